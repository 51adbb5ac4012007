"""Losses of two rows on whole tensors: for second derivatives, torch.func, and other devices."""

import torch

from triton_losses.core.formula import FORMULAS
from triton_losses.core.reduction import cast, widest


def log_rows(tensors, problem):
    """log p, or p itself if it is given; log q; and log Σ exp of q's logits, if there is a z-loss."""
    p, q, *_ = tensors
    wide = widest((p, q))
    p, q = cast(p, wide), cast(q, wide) * problem.scale
    lse = q.logsumexp(1) if problem.z_loss else None
    return p if problem.given else (p * problem.scale).log_softmax(1), q.log_softmax(1), lse


def forward(tensors, problem):
    _, q, weight, labels = tensors
    a, b, lse = log_rows(tensors, problem)
    f = FORMULAS[problem.formula].value(a, b, *problem.scalars)
    losses = (f if weight is None else f * cast(weight, f.dtype)).sum(1)
    if problem.z_loss:
        losses = losses + problem.z_loss * lse**2
    rows = q.shape[0]
    if labels is not None:
        kept = labels != problem.ignore_index
        losses, rows = torch.where(kept, losses, 0), kept.sum()
    if problem.reduction != "none":
        losses = losses.sum()
    if problem.reduction == "mean":
        losses = losses / rows
    return cast(losses if problem.factor == 1 else losses * problem.factor, problem.dtype)


def backward(tensors, upstream, problem, wanted):
    p, q, weight, labels = tensors
    a, b, lse = log_rows(tensors, problem)
    factor, rows = cast(upstream[0], b.dtype) * problem.factor, q.shape[0]
    if labels is not None:
        kept = labels != problem.ignore_index
        factor, rows = torch.where(kept, factor, 0), kept.sum()
    if problem.reduction == "mean":
        factor = factor / rows
    factor = factor.expand(q.shape[0])[:, None]
    d_p, d_q = FORMULAS[problem.formula].partials((True, True))(a, b, *problem.scalars)
    if weight is not None:
        d_p, d_q = (d * cast(weight, d.dtype) for d in (d_p, d_q))
    slope = d_q.sum(1, keepdim=True)
    if problem.z_loss:
        slope = slope - 2 * problem.z_loss * lse[:, None]
    grad_p = d_p if problem.given else (d_p - a.exp() * d_p.sum(1, keepdim=True)) * problem.scale
    grads = grad_p * factor, (d_q - b.exp() * slope) * (factor * problem.scale)
    if labels is not None:  # 0 · inf would be nan
        grads = [torch.where(kept[:, None], g, 0) for g in grads]
    return [cast(g, x.dtype) for g, x, want in zip(grads, (p, q), wanted) if want]
