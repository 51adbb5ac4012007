"""The binary losses in plain PyTorch."""

import torch
from torch.nn.functional import softplus

from reference.losses.shared import power, reduced


def hinge_loss(input, target, margin=1.0, reduction="mean"):
    return reduced((margin - target * input).clamp(min=0), reduction)


def squared_hinge_loss(input, target, margin=1.0, reduction="mean"):
    slack = margin - target * input
    return reduced(slack.masked_fill(slack < 0, 0) ** 2, reduction)  # whose gradient keeps nan


def perceptron_loss(input, target, reduction="mean"):
    return reduced((-target * input).clamp(min=0), reduction)


def exponential_loss(input, target, reduction="mean"):
    return reduced(torch.exp(-target * input), reduction)


def soft_margin_loss(input, target, size_average=None, reduce=None, reduction="mean"):
    return reduced(softplus(-target * input, threshold=50), reduction)  # torch's own overflows


def sigmoid_focal_loss(inputs, targets, alpha=0.25, gamma=2, reduction="none", *, background=-1):
    if targets.dim() < inputs.dim():
        found = torch.where(targets == background, inputs.shape[-1], targets.long())
        targets = torch.nn.functional.one_hot(found, inputs.shape[-1] + 1)[..., :-1].to(inputs.dtype)
    p, q = inputs.sigmoid(), (-inputs).sigmoid()
    entropy = (1 - targets) * softplus(inputs, threshold=50) + targets * softplus(-inputs, threshold=50)
    losses = entropy * power(p * (1 - targets) + q * targets, gamma)
    if alpha is not None and alpha >= 0:
        losses = (alpha * targets + (1 - alpha) * (1 - targets)) * losses
    return reduced(losses, reduction)
