"""Targets with several labels per sample: padded (samples, width), or concatenated (labels of all samples)."""

import torch


def labels_of(targets, target_lengths, most):
    """Labels (samples, most), of targets with at most ``most`` labels; entries after a target's end are arbitrary."""
    if targets.dim() > 1:
        return targets[:, :most].long().contiguous()
    if not targets.numel():
        return targets.new_zeros(target_lengths.shape[0], most, dtype=torch.int64)
    starts = target_lengths.cumsum(0) - target_lengths
    places = starts[:, None] + torch.arange(most, device=targets.device)
    return targets[places.clamp(0, targets.shape[0] - 1)].long()
