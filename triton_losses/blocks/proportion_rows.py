"""Losses of rows of proportions in blocks of rows that stay in a CPU's cache."""

import itertools

import torch

from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import shapes_only
from triton_losses.core.reduction import cast, given, widest
from triton_losses.core.rows import counted
from triton_losses.core.threads import elements, share


def forward(tensors, problem):
    """saved: Σ x of each row; with labels also p of its label, 1 where ignored."""
    x, y = tensors
    rows, wide, labelled = x.shape[0], widest(tensors), not y.is_floating_point()
    if shapes_only():
        saved = [x.new_empty(rows, 1, dtype=wide) for _ in range(1 + labelled)]
        return [x.new_empty(rows if problem.reduction == "none" else (), dtype=problem.dtype)], saved
    kept, formula = None, FORMULAS[problem.formula]
    if labelled:
        kept, label, _ = counted(y, None, x.shape[1], problem.ignore_index, wide)
        total = in_blocks(lambda x: cast(x, wide).sum(1, keepdim=True), (x,), x.shape[1], wide)
        total = total[0] if len(total) == 1 else torch.cat(total)
        p = cast(x.gather(1, label), wide) / total
        losses, saved = formula.value(1.0, p, *problem.scalars)[:, 0], [total, p]
        if kept is not None:
            losses.masked_fill_(~kept, 0)
            p.masked_fill_(~kept[:, None], 1)
    else:

        def work(x, y):
            x = cast(x, wide)
            total = x.sum(1, keepdim=True)
            return total, formula.value(cast(y, wide), x / total, *problem.scalars).sum(1)

        found = in_blocks(work, tensors, x.shape[1], wide)
        total, losses = found[0] if len(found) == 1 else map(torch.cat, zip(*found))
        saved = [total]
    return [reduced(losses, kept, problem)], saved


def reduced(losses, kept, problem):
    if problem.reduction == "sum":
        losses = losses.sum()
    elif problem.reduction == "mean":
        losses = losses.mean() if kept is None else losses.sum() / kept.sum()
    return cast(losses, problem.dtype)


def small(tensors, problem):
    """(loss,) of a few rows, in operations that autograd follows."""
    x, y = tensors
    wide, formula, kept = widest(tensors), FORMULAS[problem.formula], None
    x = cast(x, wide)
    if y.is_floating_point():
        losses = formula.value(cast(y, wide), x / x.sum(1, keepdim=True), *problem.scalars).sum(1)
        return (reduced(losses, kept, problem),)
    label = y = y[:, None]
    kept = y != problem.ignore_index
    if kept.all():
        kept = None
    else:  # replaces everything in the other rows, also nan
        label, x = torch.where(kept, y, 0), torch.where(kept, x, 1)
    try:
        p = x.gather(1, label) / x.sum(1, keepdim=True)
    except RuntimeError:
        counted(tensors[1], None, x.shape[1], problem.ignore_index, wide)  # its error names the invalid label
        raise
    losses = formula.value(1.0, p, *problem.scalars)
    losses = losses if kept is None else torch.where(kept, losses, 0)
    return (reduced(losses if problem.reduction != "none" else losses[:, 0], kept, problem),)


def backward(tensors, saved, upstream, problem, wanted):
    x, y = tensors
    grads = [t.new_empty(t.shape) if want else None for t, want in zip(tensors, wanted)]
    if shapes_only():
        return given(grads)
    total, wide, factor = saved[0], saved[0].dtype, cast(upstream[0], saved[0].dtype)
    if problem.reduction == "none":
        factor = factor[:, None]
    if y.is_floating_point():
        if problem.reduction == "mean":
            factor = factor / x.shape[0]
        partials_of = FORMULAS[problem.formula].partials((grads[1] is not None, grads[0] is not None))

        def work(x, y, total, factor, grad_x, grad_y):
            p = cast(x, wide) / total
            partials = partials_of(cast(y, wide), p, *problem.scalars)
            if grad_x is not None:
                d = partials[-1]
                write(grad_x, d - (p * d).sum(1, keepdim=True), factor / total)
            if grad_y is not None:
                write(grad_y, partials[0], factor)

        in_blocks(work, (x, y, total, factor, *grads), x.shape[1], wide)
        return given(grads)
    kept, label, _ = counted(y, None, x.shape[1], problem.ignore_index, wide)
    if problem.reduction == "mean":
        factor = factor / (x.shape[0] if kept is None else kept.sum())
    write_gradient_of_labels(grads[0], saved, label, kept, factor, problem)
    return grads[:1]


def write_gradient_of_labels(grad, saved, label, kept, factor, problem):
    total, p = saved
    (d,) = FORMULAS[problem.formula].partials((False, True))(1.0, p, *problem.scalars)
    at_label = d * (factor / total)
    elsewhere = (p * at_label).neg_()
    at_label += elsewhere
    if kept is not None:  # overwrites everything in those rows, also nan
        at_label, elsewhere = (torch.where(kept[:, None], g, 0) for g in (at_label, elsewhere))
    grad.copy_(elsewhere).scatter_(1, label, cast(at_label, grad.dtype))


def in_blocks(work, tensors, cols, wide):
    """What ``work`` returns for each block of rows; None and 0-dim tensors go to every block as they are."""
    step = elements(wide) // max(cols, 1) or 1
    if tensors[0].shape[0] <= step:
        return [work(*tensors)]
    blocks = list(zip(*(itertools.repeat(t) if t is None or not t.dim() else t.split(step) for t in tensors)))
    found = [None] * len(blocks)

    def work_at(i):
        found[i] = work(*blocks[i])

    share(work_at, len(blocks))
    return found


def write(grad, value, factor):
    if grad.dtype == value.dtype:
        torch.mul(value, factor, out=grad)
    else:
        grad.copy_(value * factor)
