"""Error of a loss's value and gradient against the reference in float64."""

import torch

from bench.passes import Call
from bench.providers import eager

ELEMENTS = 1 << 25  # the float64 reference of more takes too long and too much memory


def exact(case, tensors, options):
    """Value and gradient, in float64, of the same (already rounded) inputs; None where they are too large."""
    if tensors[0].numel() > ELEMENTS:
        return None
    tensors = tuple(in_float64(tensor) for tensor in tensors)
    return Call(eager(case), tensors, {name: in_float64(value) for name, value in options.items()}).value_and_gradient()


def in_float64(value):
    return value.detach().double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def error(found, truth):
    """The larger of two: the value's and the gradient's largest deviation, each relative to the largest exact component.

    Component by component it would judge the least of a gradient's components, where rounding leaves no loss a digit."""
    return max(deviation(*pair) for pair in zip(found, truth, strict=True))


def deviation(found, truth):
    scale = truth.abs().max().item()
    return (found.double() - truth).abs().max().item() / (scale or 1.0)
