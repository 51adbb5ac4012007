"""Regions on whole tensors: for second derivatives, torch.func, other devices, and more classes than a kernel holds."""

import torch

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.formula import FORMULAS
from triton_losses.core.reduction import cast
from triton_losses.core.regions import activate, loss_of, share_of, takes_weight, zero_where_no_share


def sums_forward(tensors, problem):
    """Sums (images, 3, classes) and losses (images,)."""
    logits, targets, class_weights = tensors
    x = cast(logits, compute_dtype(logits.dtype))
    kept = (
        torch.ones_like(targets, dtype=torch.bool) if problem.ignore_index is None else targets != problem.ignore_index
    )
    t = torch.where(kept, targets, 0)
    if targets.dim() == 2:
        t, kept = t[:, None] == torch.arange(x.shape[1], device=x.device)[:, None], kept[:, None].expand(x.shape)
        x = torch.where(kept, x, 0)  # otherwise a nan there would make the gradient nan
    t = t.to(x.dtype) * kept
    p = torch.where(kept, activate(x, problem.activation), 0)
    overlap = torch.minimum(p, t) if problem.smaller else p * t
    sums = torch.stack(
        [overlap.sum(2), (p * p if problem.squared else p).sum(2), (t * t if problem.squared else t).sum(2)], 1
    )
    if not problem.formula:
        return sums, x[:, 0, :0].sum(1)  # zeros that autograd can follow
    formula, scalars = FORMULAS[problem.formula], problem.scalars
    weights = (x.new_ones(x.shape[1]) if class_weights is None else cast(class_weights, x.dtype))[:, None].expand(
        x.shape
    )
    if problem.activation == "softmax":
        losses = zero_where_no_share(share_of(t, problem.smoothing), formula.value(x.log_softmax(1), weights, *scalars))
    elif takes_weight(formula, scalars):
        losses = formula.value(x, t, weights, *scalars)
    else:
        losses = formula.value(x, t, *scalars) * weights
    return sums, torch.where(kept, losses, 0).sum((1, 2))


def forward(tensors, problem):
    return loss_of(*sums_forward(tensors, problem), tensors, problem)
