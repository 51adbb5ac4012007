"""Each loss in the plainest PyTorch that is right in any dtype: the definition of correct, and the bench's baseline.

PyTorch's own function where it has one. Signatures are those of triton_losses.functional.
"""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import huber_loss as huber_loss
from torch.nn.functional import l1_loss as l1_loss
from torch.nn.functional import mse_loss as mse_loss
from torch.nn.functional import nll_loss as nll_loss
from torch.nn.functional import smooth_l1_loss as smooth_l1_loss
from torch.nn.functional import softplus


def reduced(losses, reduction):
    return losses if reduction == "none" else getattr(losses, reduction)()


def power(miss, gamma):
    """(1 - p)^γ, whose derivative at 1 - p = 0 autograd would make inf · 0 of."""
    return miss.clamp(min=1e-37) ** gamma


def log_cosh_loss(input, target, reduction="mean"):
    d = (input - target).abs()
    return reduced(d + softplus(-2 * d, threshold=50) - torch.tensor(2.0, dtype=torch.float64).log().to(d.dtype), reduction)


def sigmoid_focal_loss(inputs, targets, alpha=0.25, gamma=2, reduction="none"):
    p, q = inputs.sigmoid(), (-inputs).sigmoid()
    entropy = (1 - targets) * softplus(inputs, threshold=50) + targets * softplus(-inputs, threshold=50)
    losses = entropy * power(p * (1 - targets) + q * targets, gamma)
    if alpha >= 0:
        losses = (alpha * targets + (1 - alpha) * (1 - targets)) * losses
    return reduced(losses, reduction)


def cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0,
    *, z_loss=0.0, out_dtype=None,
):  # fmt: skip
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
    return losses.sum() / weights.sum()


def focal_loss(input, target, weight=None, gamma=2.0, alpha=1.0, ignore_index=-100, reduction="mean"):
    nll = torch_cross_entropy(input, target, None, None, ignore_index, None, "none")
    kept = target != ignore_index
    weights = torch.where(kept, 1 if weight is None else weight[torch.where(kept, target, 0)], 0).to(input.dtype)
    losses = alpha * weights * power(-torch.expm1(-nll), gamma) * nll
    return losses.sum() / weights.sum() if reduction == "mean" else reduced(losses, reduction)
