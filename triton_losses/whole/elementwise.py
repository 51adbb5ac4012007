"""Elementwise losses on whole tensors: for torch.compile, which can fuse them, torch.func, and other devices."""

from triton_losses.core.formula import FORMULAS, partials_of, value_of
from triton_losses.core.reduction import cast, divisor_of, given, widest


def forward(tensors, problem):
    operands = given(tensors)
    wide = widest(operands)
    loss = value_of(FORMULAS[problem.formula], [cast(v, wide) for v in operands], problem.scalars, problem.weighted)
    if problem.reduction != "none":
        loss = loss.sum() / divisor_of(operands[0], problem.reduction)
    return cast(loss, problem.dtype)


def backward(tensors, upstream, problem, wanted):
    operands = given(tensors)
    wide = widest(operands)
    factor = cast(upstream[0], wide) / divisor_of(operands[0], problem.reduction)
    values, wanted = [cast(v, wide) for v in operands], tuple(wanted[: len(operands)])
    partials = partials_of(FORMULAS[problem.formula], values, problem.scalars, problem.weighted, wanted)
    return [
        cast(partial * factor, v.dtype)
        for partial, v in zip(partials, (v for v, want in zip(operands, wanted) if want))
    ]
