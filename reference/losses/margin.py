"""The multi-class margin losses: PyTorch's own, which take no 16-bit numbers and make garbage of no rows."""

import torch

from reference.losses.shared import reduced, wider


def multi_margin_loss(input, target, p=1, margin=1.0, weight=None, size_average=None, reduce=None, reduction="mean"):
    if not input.numel():
        return reduced(input.sum(-1), reduction)
    weight = weight if weight is None else weight.to(wider(input))
    return torch.nn.functional.multi_margin_loss(
        input.to(wider(input)), target, p, margin, weight, reduction=reduction
    ).to(input.dtype)


def multilabel_margin_loss(input, target, size_average=None, reduce=None, reduction="mean"):
    if not input.numel():
        return reduced(input.sum(-1), reduction)
    # on the CPU: torch's CUDA backward scales a row's gradient in all threads while one of them still adds the labels'
    # part to it
    loss = torch.nn.functional.multilabel_margin_loss(input.to("cpu", wider(input)), target.cpu(), reduction=reduction)
    return loss.to(input.device, input.dtype)
