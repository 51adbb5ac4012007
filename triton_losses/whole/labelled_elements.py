"""Labelled elements on whole tensors: an elementwise loss of the logits and the one-hot tensor of the bits."""

import torch

from triton_losses.whole import elementwise


def with_bits(tensors, background):
    """The logits, and a tensor of bits: 1 where the column is the label of the row."""
    x, labels = tensors
    labels = labels.long()  # a comparison of uint8 labels would take -1 for 255
    labels = torch.where(labels == background, -1, labels)[:, None]
    return x, (labels == torch.arange(x.shape[1], device=x.device)).to(x.dtype)


def forward(tensors, problem):
    return elementwise.forward(with_bits(tensors, problem.background), problem)


def backward(tensors, upstream, problem, wanted):
    return elementwise.backward(with_bits(tensors, problem.background), upstream, problem, wanted)
