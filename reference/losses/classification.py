"""The classification losses in plain PyTorch."""

import torch
from torch.nn.functional import cross_entropy as torch_cross_entropy

from reference.losses.shared import power, reduced, shaped


def cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
    *,
    z_loss=0.0,
    softcap=0.0,
    temperature=1.0,
    out_dtype=None,
    gradient_in_forward=False,  # this and overwrite change no number
    overwrite=False,
    num_items=None,
):
    input = shaped(input, softcap, temperature)
    losses = torch_cross_entropy(input, target, weight, None, ignore_index, None, "none", label_smoothing)
    dim = min(input.dim() - 1, 1)
    kept = target != ignore_index if not target.is_floating_point() else torch.ones_like(losses, dtype=torch.bool)
    if z_loss:
        losses = losses + z_loss * torch.where(kept, input.logsumexp(dim) ** 2, 0)
    if reduction != "mean":
        return reduced(losses, reduction)
    weights = kept.to(input.dtype)
    if weight is not None and not target.is_floating_point():
        weights = torch.where(kept, weight[torch.where(kept, target, 0)], 0)
    return losses.sum() / (weights.sum() if num_items is None else num_items)


def focal_loss(
    input,
    target,
    weight=None,
    gamma=2.0,
    alpha=1.0,
    ignore_index=-100,
    reduction="mean",
    *,
    gradient_in_forward=False,
    overwrite=False,
    num_items=None,
):
    nll = torch_cross_entropy(input, target, None, None, ignore_index, None, "none")
    kept = target != ignore_index
    weights = torch.where(kept, 1 if weight is None else weight[torch.where(kept, target, 0)], 0).to(input.dtype)
    losses = (1 if alpha is None else alpha) * weights * power(-torch.expm1(-nll), gamma) * nll
    if reduction != "mean":
        return reduced(losses, reduction)
    return losses.sum() / (weights.sum() if num_items is None else num_items)
