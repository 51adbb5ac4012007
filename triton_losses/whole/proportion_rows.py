"""Losses of rows of proportions on whole tensors: for second derivatives, torch.func, and other devices."""

import torch

from triton_losses.core.formula import FORMULAS
from triton_losses.core.reduction import cast, widest


def chances(tensors, problem):
    """For each row y, p and Σ x; and which rows count (None: all). With labels, only y_t and p_t: (rows, 1)."""
    x, y = tensors
    wide = widest(tensors)
    x = cast(x, wide)
    total = x.sum(1, keepdim=True)
    if y.is_floating_point():
        return cast(y, wide), x / total, total, None
    kept = y != problem.ignore_index
    p = x.gather(1, torch.where(kept, y, 0).long()[:, None]) / total
    return torch.ones_like(p), p, total, kept


def forward(tensors, problem):
    target, p, _, kept = chances(tensors, problem)
    losses = FORMULAS[problem.formula].value(target, p, *problem.scalars).sum(1)
    if kept is not None:
        losses = torch.where(kept, losses, 0)
    if problem.reduction != "none":
        losses = losses.sum()
    if problem.reduction == "mean":
        losses = losses / (p.shape[0] if kept is None else kept.sum())
    return cast(losses, problem.dtype)


def backward(tensors, upstream, problem, wanted):
    x, y = tensors
    target, p, total, kept = chances(tensors, problem)
    factor = cast(upstream[0], p.dtype)
    if problem.reduction == "mean":
        factor = factor / (x.shape[0] if kept is None else kept.sum())
    factor = factor.expand(x.shape[0])
    factor = (factor if kept is None else torch.where(kept, factor, 0))[:, None]
    d_y, d_p = FORMULAS[problem.formula].partials((True, True))(target, p, *problem.scalars)
    shift = -(p * d_p).sum(1, keepdim=True)
    if kept is None:
        grad = (d_p + shift) * (factor / total)
    else:
        label = torch.where(kept, y, 0).long()[:, None]
        factor = factor / torch.where(kept[:, None], total, 1)  # 0 · nan would be nan
        d_p, shift = (torch.where(kept[:, None], d, 0) for d in (d_p, shift))
        grad = (shift * factor).expand_as(x).scatter_add(1, label, d_p * factor)
    return [*([cast(grad, x.dtype)] if wanted[0] else []), *([cast(d_y * factor, y.dtype)] if wanted[1] else [])]
