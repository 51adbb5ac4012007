"""Targets of several labels a sample, padded (samples, room) or concatenated (labels of all samples)."""

import torch


def labels_of(targets, target_lengths, most):
    """(samples, most) labels, of targets that have no more than that; anything after a target's end."""
    if targets.dim() > 1:
        return targets[:, :most].long().contiguous()
    if not targets.numel():
        return targets.new_zeros(target_lengths.shape[0], most, dtype=torch.int64)
    starts = target_lengths.cumsum(0) - target_lengths
    places = starts[:, None] + torch.arange(most, device=targets.device)
    return targets[places.clamp(0, targets.shape[0] - 1)].long()
