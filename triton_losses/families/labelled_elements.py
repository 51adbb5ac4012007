"""Losses of the form L_ij = f(x_ij, [j = t_i]): an elementwise formula of a logit and a bit, where a row's label says which bit is 1.

    forward   reads logits and labels once; writes L, or one partial sum per SPAN elements
    backward  reads both again; writes ∂L/∂x · upstream

The map of bits, one-hot, would be as large as the logits: it is never made. A row whose label is `background` has no 1.
"""

import torch

from triton_losses.core.compiler import compute_dtype, runs_kernels, triton
from triton_losses.core.device_math import as_scalars
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import differentiated_again, is_plain, op, read_whole, shapes_only
from triton_losses.core.reduction import result_dtype
from triton_losses.core.threads import share
from triton_losses.families.elementwise import elementwise, whole_gradients
from triton_losses.families.label_rows_blocks import counted, row_blocks

if triton is not None:
    from triton_losses.kernels.elementwise import SPAN, triton_type
    from triton_losses.kernels.labelled_elements import backward_launch, forward_launch


def positions(labels, classes, background):
    """Labels (rows, 1), -1 where background; refused where they are no class. Both of a CPU's tensors alone."""
    kept, at, _ = counted(labels, None, classes, background, torch.float32)
    return at if kept is None else torch.where(kept[:, None], at, -1)


def bits(at, classes, dtype):
    return (at == torch.arange(classes, device=at.device)).to(dtype)


def forward_blocks(x, labels, formula, scalars, background, out):
    """Losses into ``out``, or, where that is None, a sum for each block."""
    wide, parts = compute_dtype(x.dtype), row_blocks(*x.shape, x.dtype)
    at, sums = positions(labels, x.shape[1], background), x.new_zeros(max(len(parts), 1), dtype=wide)

    def part(i):
        losses = formula.value(x[parts[i]].to(wide), bits(at[parts[i]], x.shape[1], wide), *scalars)
        if out is None:
            sums[i] = losses.sum()
        else:
            out[parts[i]] = losses

    share(part, len(parts))
    return sums


def backward_blocks(x, labels, dout, formula, scalars, background, divisor, grad):
    wide, parts = compute_dtype(x.dtype), row_blocks(*x.shape, x.dtype)
    at, partial = positions(labels, x.shape[1], background), formula.partials((True, False))

    def part(i):
        block = parts[i]
        (d,) = partial(x[block].to(wide), bits(at[block], x.shape[1], wide), *scalars)
        torch.mul(d, (dout[block] if dout.dim() else dout).to(wide) / divisor, out=grad[block] if grad.dtype == wide else d)
        if grad.dtype != wide:
            grad[block] = d

    share(part, len(parts))


def kernel_arguments(x, labels, formula, scalars, background):
    if x.device.type == "cpu":
        positions(labels, x.shape[1], background)  # refuses a label that is no class; a GPU asserts
    wide = compute_dtype(x.dtype)
    return {
        "x": x.contiguous(), "labels": labels.contiguous(), "n": x.numel(), "background": background,
        "scalars": as_scalars(scalars, wide), "FORMULA": formula.kernel, "CLASSES": x.shape[1], "COMPUTE": triton_type(wide),
        "VEC": 16 // x.element_size(),
    }  # fmt: skip


@op
def labelled_elements_forward(
    x: torch.Tensor, labels: torch.Tensor, formula: str, scalars: list[float], background: int, reduction: str, dtype: torch.dtype
) -> torch.Tensor:
    whole = reduction == "none"
    out = x.new_empty(x.shape if whole else (), dtype=dtype)
    if shapes_only():
        return out
    options = FORMULAS[formula], scalars, background
    divisor = x.numel() if reduction == "mean" else 1
    if not runs_kernels(x):
        sums = forward_blocks(x, labels, *options, out if whole else None)
    else:
        sums = None if whole else x.new_zeros(max(-(-x.numel() // SPAN), 1), dtype=compute_dtype(x.dtype))
        forward_launch(**kernel_arguments(x, labels, *options), out=out if whole else sums, REDUCE=not whole)
    if whole:
        return out
    return (sums.sum() / divisor if divisor else sums.sum() * float("nan")).to(dtype)  # torch's mean of nothing


@op
def labelled_elements_backward(
    x: torch.Tensor, labels: torch.Tensor, dout: torch.Tensor, formula: str, scalars: list[float], background: int, reduction: str
) -> torch.Tensor:
    grad = x.new_empty(x.shape)
    if shapes_only():
        return grad
    options = FORMULAS[formula], scalars, background
    divisor = max(x.numel(), 1) if reduction == "mean" else 1
    if not runs_kernels(x):
        backward_blocks(x, labels, dout, *options, divisor, grad)
        return grad
    same = not any(dout.stride())  # one value, or one value expanded: what loss.sum().backward() sends
    upstream = dout if same else dout.contiguous()
    backward_launch(**kernel_arguments(x, labels, *options), grad=grad, upstream=upstream, divisor=divisor, SAME=same)
    return grad


def as_map(labels, classes, background, dtype):
    """The map of bits after all, for plain torch."""
    return bits(torch.where(labels == background, -1, labels)[..., None], classes, dtype)


class LabelledElements(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, labels, formula, scalars, background, reduction, dtype):
        ctx.options = formula, scalars, background, reduction
        ctx.save_for_backward(x, labels)
        return labelled_elements_forward(x, labels, *ctx.options, dtype)

    @staticmethod
    def backward(ctx, dout):
        x, labels = ctx.saved_tensors
        formula, scalars, background, reduction = ctx.options
        again = differentiated_again()
        if again or read_whole(dout):
            operands = x, as_map(labels, x.shape[1], background, x.dtype)
            grad, _ = whole_gradients(operands, (True, False), dout, formula, scalars, False, reduction)
        else:
            grad = labelled_elements_backward(x, labels, dout, *ctx.options)
        return grad, *[None] * 6


def labelled_elements(formula, x, labels, scalars=(), background=-1, reduction="mean"):
    """Reduce ``formula(x, bit, *scalars)``; x (..., classes), labels (...): class indices or ``background``. The mean is over elements."""
    if is_plain(x):
        return elementwise(formula, (x, as_map(labels, x.shape[-1], background, x.dtype)), scalars, reduction)
    options = formula.name, [float(s) for s in scalars], background, reduction, result_dtype(x)
    loss = LabelledElements.apply(x.reshape(-1, x.shape[-1]), labels.reshape(-1), *options)
    return loss.view(x.shape) if reduction == "none" else loss
