"""The multi-class margin losses: PyTorch's own where they will do.

They take no 16-bit numbers, make garbage of no rows, and sum one after another, which for multi_margin_loss costs float64 digits."""

import torch

from reference.losses.shared import reduced


def excess(x, label, others, margin):
    """By how much each of the others comes too near the label's score."""
    z = margin - x.gather(1, label) + x
    return torch.where(others & (z > 0), z, 0)


def multi_margin_loss(input, target, p=1, margin=1.0, weight=None, size_average=None, reduce=None, reduction="mean"):
    if input.dtype == torch.float32 and input.numel():  # PyTorch makes garbage of no rows
        return torch.nn.functional.multi_margin_loss(input, target, p, margin, weight, reduction=reduction)
    x, labels = torch.atleast_2d(input), target.reshape(-1, 1)
    losses = (excess(x, labels, torch.arange(x.shape[1], device=x.device) != labels, margin) ** p).sum(1) / x.shape[1]
    return reduced((losses if weight is None else losses * weight[labels[:, 0]]).view(target.shape), reduction)


def multilabel_margin_loss(input, target, size_average=None, reduce=None, reduction="mean"):
    if input.element_size() >= 4 and input.numel():
        return torch.nn.functional.multilabel_margin_loss(input, target, reduction=reduction)
    x, labels = torch.atleast_2d(input), torch.atleast_2d(target)
    counts = (labels < 0).cumsum(1) == 0
    labels = torch.where(counts, labels, x.shape[1])  # a column beside the others, which is then left out
    others = torch.ones(x.shape[0], x.shape[1] + 1, dtype=torch.bool, device=x.device).scatter(1, labels, False)[:, :-1]
    losses = torch.zeros_like(x[:, 0]) + 0 * x[:, :0].sum()  # of no rows too, a part of the graph
    for k in counts.any(0).nonzero()[:, 0].tolist():
        label = labels[:, k : k + 1]
        losses = losses + excess(x, label.clamp(max=x.shape[1] - 1), others & counts[:, k : k + 1], 1.0).sum(1)
    return reduced((losses / x.shape[1]).view(input.shape[:-1]), reduction)
