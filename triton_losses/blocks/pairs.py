"""Losses of pairs of vectors in blocks of rows that stay in a CPU's cache."""

import torch

from triton_losses.core.formula import FORMULAS, terms_of
from triton_losses.core.op import shapes_only
from triton_losses.core.reduction import divisor_of, given, reduced, widest
from triton_losses.core.threads import row_blocks, share


def forward(tensors, problem):
    *vectors, target = tensors
    vectors, wide, (rows, cols) = given(vectors), widest(given(tensors)), tensors[0].shape
    places = list(zip(problem.pairs[::2], problem.pairs[1::2]))
    sums = vectors[0].new_zeros(len(places), rows, dtype=wide)
    if shapes_only():
        return [sums.new_empty(rows if problem.reduction == "none" else (), dtype=problem.dtype)], [sums]
    parts, coordinate = row_blocks(rows, cols, wide), FORMULAS[problem.coordinate].value

    def work(n):
        values = [v[parts[n]].to(wide) for v in vectors]
        for total, (i, j) in zip(sums, places):
            torch.sum(coordinate(values[i], values[j], *problem.coordinate_scalars), 1, out=total[parts[n]])

    share(work, len(parts))
    losses = FORMULAS[problem.formula].value(*sums, *([] if target is None else [target.to(wide)]), *problem.scalars)
    return [reduced(losses, problem.reduction, problem.dtype)], [sums]


def backward(tensors, saved, upstream, problem, wanted):
    *vectors, target = tensors
    vectors, (sums,) = given(vectors), saved
    grads = [torch.empty(v.shape, dtype=v.dtype, device=v.device) if want else None for v, want in zip(vectors, wanted)]
    want_target = len(wanted) == 4 and wanted[3]
    if shapes_only():
        return [*given(grads), *([torch.empty_like(target)] if want_target else [])]
    wide, parts = sums.dtype, row_blocks(*vectors[0].shape, sums.dtype)
    factor = upstream[0].to(wide) / divisor_of(sums[0], problem.reduction)
    operands = (*sums, *([] if target is None else [target.to(wide)]))
    slopes = FORMULAS[problem.formula].partials((True,) * len(operands))(*operands, *problem.scalars)
    slopes = [(slope * factor).expand(sums[0].shape) for slope in slopes]

    def work(n):
        values = [v[parts[n]].to(wide) for v in vectors]
        factors = [slope[parts[n], None] for slope in slopes]
        totals = [None if g is None or g.dtype != wide else g[parts[n]] for g in grads]
        begun = [False] * len(vectors)
        for i, k, partial in terms_of(problem, wanted, values):
            if begun[i]:
                totals[i].addcmul_(partial, factors[k])
            else:
                totals[i] = torch.mul(partial, factors[k], out=totals[i])
            begun[i] = True
        for grad, total in zip(grads, totals):
            if grad is not None and grad.dtype != wide:
                grad[parts[n]] = total

    share(work, len(parts))
    return [*given(grads), *([slopes[-1].to(target.dtype)] if want_target else [])]
