"""The regression losses in plain PyTorch."""

import torch
from torch.nn.functional import softplus

from reference.losses.shared import reduced


def log_cosh_loss(input, target, reduction="mean"):
    d = (input - target).abs()
    return reduced(
        d + softplus(-2 * d, threshold=50) - torch.tensor(2.0, dtype=torch.float64).log().to(d.dtype), reduction
    )


def quantile_loss(input, target, quantile=0.5, reduction="mean"):
    d = target - input
    return reduced(torch.maximum(quantile * d, (quantile - 1) * d), reduction)


def multi_quantile_loss(input, target, quantiles=(0.1, 0.5, 0.9), reduction="mean"):
    pairs = zip(input.unbind(-1), quantiles, strict=True)
    return reduced(torch.stack([quantile_loss(x, target, q, "none") for x, q in pairs], -1), reduction)
