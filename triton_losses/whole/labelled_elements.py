"""Labelled elements on whole tensors: an elementwise loss of the logits and the map of bits, made after all."""

import torch

from triton_losses.whole import elementwise


def with_bits(tensors, background):
    """The logits, and a 1 where a column is its row's label."""
    x, labels = tensors
    labels = labels.long()  # a byte would be compared with -1 as with 255
    labels = torch.where(labels == background, -1, labels)[:, None]
    return x, (labels == torch.arange(x.shape[1], device=x.device)).to(x.dtype)


def forward(tensors, problem):
    return elementwise.forward(with_bits(tensors, problem.background), problem)


def backward(tensors, upstream, problem, wanted):
    return elementwise.backward(with_bits(tensors, problem.background), upstream, problem, wanted)
