"""Error of a loss's value and gradient against the reference in float64."""

import torch

import reference.losses
from bench.memory import logits_of
from bench.passes import Call, learned_by

ELEMENTS = 1 << 25  # with more, the float64 reference takes too long and too much memory


def exact(case, shape, tensors, options):
    """Value and gradients, in float64, of the same (already rounded) inputs; None where they are too large."""
    if max(tensors[0].numel(), logits_of(case, shape)) > ELEMENTS:
        return None
    tensors = tuple(in_float64(tensor) for tensor in tensors)
    options = {name: in_float64(value) for name, value in options.items()}
    return Call(getattr(reference.losses, case.name), tensors, options, learned_by(case)).value_and_gradients()


def in_float64(value):
    return value.detach().double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def error(found, truth):
    """The larger of the value's and the gradient's largest deviation, each relative to the largest exact component.

    A comparison component by component would judge by a gradient's smallest components, in which rounding leaves no
    correct digit, whatever the loss.
    """
    return max(deviation(*pair) for pair in zip(found, truth, strict=True))


def deviation(found, truth):
    scale = truth.abs().max().item()
    return (found.double() - truth).abs().max().item() / (scale or 1.0)
