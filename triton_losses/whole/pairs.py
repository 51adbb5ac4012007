"""Losses of pairs of vectors on whole tensors: for second derivatives, torch.func, and other devices."""

import torch

from triton_losses.core.formula import FORMULAS, terms_of
from triton_losses.core.reduction import cast, divisor_of, given, reduced, widest


def values_of(tensors, problem):
    """Vectors and target in the compute type, and the sums."""
    *vectors, target = tensors
    vectors = given(vectors)
    wide = widest(given(tensors))
    values, pairs = [cast(v, wide) for v in vectors], problem.pairs
    coordinate = FORMULAS[problem.coordinate].value
    sums = [
        coordinate(values[i], values[j], *problem.coordinate_scalars).sum(1) for i, j in zip(pairs[::2], pairs[1::2])
    ]
    return values, sums, [] if target is None else [cast(target, wide)]


def forward(tensors, problem):
    _, sums, target = values_of(tensors, problem)
    return reduced(FORMULAS[problem.formula].value(*sums, *target, *problem.scalars), problem.reduction, problem.dtype)


def backward(tensors, upstream, problem, wanted):
    values, sums, target = values_of(tensors, problem)
    operands = (*sums, *target)
    factor = cast(upstream[0], sums[0].dtype) / divisor_of(sums[0], problem.reduction)
    slopes = FORMULAS[problem.formula].partials((True,) * len(operands))(*operands, *problem.scalars)
    slopes = [(slope * factor).expand(sums[0].shape) for slope in slopes]
    grads = [torch.zeros_like(v) if want else None for v, want in zip(values, wanted)]
    for i, k, partial in terms_of(problem, wanted, values):
        grads[i] = grads[i] + partial * slopes[k][:, None]
    if len(wanted) == 4 and wanted[3]:
        grads.append(slopes[-1])
    dtypes = [t.dtype for t, want in zip(tensors, wanted) if want]
    return [cast(grad, dtype) for grad, dtype in zip((g for g in grads if g is not None), dtypes)]
