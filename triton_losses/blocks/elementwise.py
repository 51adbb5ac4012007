"""Elementwise losses in blocks that stay in a CPU's cache."""

import torch

from triton_losses.core.formula import FORMULAS, partials_of, value_of
from triton_losses.core.op import shapes_only
from triton_losses.core.reduction import divisor_of, given, widest
from triton_losses.core.threads import elements, share


def blocks(tensors, most):
    """Slices of at most ``most`` elements of tensors of one shape; flat if every tensor is contiguous."""
    if all(t.is_contiguous() for t in tensors):
        tensors = [t.view(-1) for t in tensors]
    size, shape = tensors[0].numel(), tensors[0].shape
    if size <= most:
        yield tensors
    elif size // shape[0] > most:
        for parts in zip(*(t.unbind(0) for t in tensors)):
            yield from blocks(parts, most)
    else:
        yield from zip(*(t.split(most * shape[0] // size) for t in tensors))


def forward(tensors, problem):
    operands = given(tensors)
    x, wide = operands[0], widest(operands)
    formula, none = FORMULAS[problem.formula], problem.reduction == "none"
    if none or shapes_only():
        out = x.new_empty(x.shape if none else (), dtype=problem.dtype)
    if shapes_only():
        return [out], []
    parts = list(blocks([*operands, out] if none else operands, elements(wide)))

    def losses_of(values):
        return value_of(formula, [v.to(wide) for v in values], problem.scalars, problem.weighted)

    if none:

        def write(i):
            *values, o = parts[i]
            o.copy_(losses_of(values))

        share(write, len(parts))
        return [out], []
    sums = [None] * len(parts)

    def add(i):
        sums[i] = losses_of(parts[i]).sum()

    share(add, len(parts))
    total = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
    return [(total / x.numel() if problem.reduction == "mean" else total).to(problem.dtype)], []


def backward(tensors, saved, upstream, problem, wanted):
    operands, (dout,) = given(tensors), upstream
    wanted = tuple(wanted[: len(operands)])
    grads = [torch.empty_like(v, memory_format=torch.contiguous_format) for v, want in zip(operands, wanted) if want]
    if shapes_only():
        return grads
    wide, formula, reduced = widest(operands), FORMULAS[problem.formula], problem.reduction != "none"
    factor = dout.to(wide) / divisor_of(operands[0], problem.reduction) if reduced else None
    count = len(operands)
    parts = list(blocks([*operands, *grads, *(() if reduced else (dout,))], elements(wide)))

    def write(i):
        values = [v.to(wide) for v in parts[i][:count]]
        factor_here = factor if reduced else parts[i][-1].to(wide)
        partials = partials_of(formula, values, problem.scalars, problem.weighted, wanted)
        for partial, grad in zip(partials, parts[i][count:]):
            if grad.dtype == wide:
                torch.mul(partial, factor_here, out=grad)
            else:
                grad.copy_(partial * factor_here)

    share(write, len(parts))
    return grads
