"""Keras' cross entropies, by its published formula, in plain PyTorch."""

import torch

from reference.losses.shared import reduced


def clipped_log(p):
    return p.clamp(1e-7, 1 - 1e-7).log()


def categorical_cross_entropy(input, target, from_logits=False, label_smoothing=0.0, reduction="mean", *, dim=None):
    dim = min(input.dim() - 1, 1) if dim is None else dim
    target = (1 - label_smoothing) * target + label_smoothing / max(input.shape[dim], 1)
    log_p = input.log_softmax(dim) if from_logits else clipped_log(input / input.sum(dim, keepdim=True))
    return reduced(-(target * log_p).sum(dim), reduction)


def sparse_categorical_cross_entropy(
    input, target, from_logits=False, ignore_index=None, reduction="mean", *, dim=None
):
    dim = min(input.dim() - 1, 1) if dim is None else dim
    kept = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    label = torch.where(kept, target, 0).long().unsqueeze(dim)
    x = input.where(kept.unsqueeze(dim), 1)  # ignored rows: 1, whatever is there
    if from_logits:
        log_p = x.log_softmax(dim).gather(dim, label)
    else:
        log_p = clipped_log(x.gather(dim, label) / x.sum(dim, keepdim=True))
    losses = torch.where(kept, -log_p.squeeze(dim), 0)
    return losses.sum() / kept.sum() if reduction == "mean" else reduced(losses, reduction)
