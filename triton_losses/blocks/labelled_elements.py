"""Labelled elements in blocks of rows that stay in a CPU's cache: each block creates its own one-hot tensor."""

import torch

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import shapes_only
from triton_losses.core.reduction import divisor_of
from triton_losses.core.rows import counted
from triton_losses.core.threads import row_blocks, share


def blocks_of(x, labels, background):
    """The blocks' rows, and a function that returns the logits and bits of one block in the compute type."""
    wide, parts = compute_dtype(x.dtype), row_blocks(*x.shape, x.dtype)
    kept, at, _ = counted(labels, None, x.shape[1], background, torch.float32)  # refuses a label that is no class
    if kept is not None:
        at = torch.where(kept[:, None], at, -1)
    columns = torch.arange(x.shape[1], device=x.device)
    return parts, lambda part: (x[part].to(wide), (at[part] == columns).to(wide))


def forward(tensors, problem):
    x, labels = tensors
    none = problem.reduction == "none"
    out = x.new_empty(x.shape if none else (), dtype=problem.dtype)
    if shapes_only():
        return [out], []
    parts, operands = blocks_of(x, labels, problem.background)
    formula, sums = FORMULAS[problem.formula], x.new_zeros(max(len(parts), 1), dtype=compute_dtype(x.dtype))

    def work(i):
        losses = formula.value(*operands(parts[i]), *problem.scalars)
        if none:
            out[parts[i]] = losses
        else:
            sums[i] = losses.sum()

    share(work, len(parts))
    return [out if none else out.copy_(sums.sum() / divisor_of(x, problem.reduction))], []


def backward(tensors, saved, upstream, problem, wanted):
    (x, labels), (dout,) = tensors, upstream
    grad = x.new_empty(x.shape)
    if shapes_only():
        return [grad]
    parts, operands = blocks_of(x, labels, problem.background)
    wide, divisor = compute_dtype(x.dtype), max(divisor_of(x, problem.reduction), 1)
    partial = FORMULAS[problem.formula].partials((True, False))

    def work(i):
        (d,) = partial(*operands(parts[i]), *problem.scalars)
        factor = (dout[parts[i]] if dout.dim() else dout).to(wide) / divisor
        torch.mul(d, factor, out=grad[parts[i]] if grad.dtype == wide else d)
        if grad.dtype != wide:
            grad[parts[i]] = d

    share(work, len(parts))
    return [grad]
