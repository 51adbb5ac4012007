"""Regression losses: how far is a number from the number it should be?"""

import warnings

from triton_losses.families.elementwise import elementwise
from triton_losses.families.reduction import reduction_of
from triton_losses.formula import formula
from triton_losses.device_math import clamp, log_cosh, sign, tanh
from triton_losses.compiler import tl


@formula
def squared_error(x, y):
    d = x - y
    return d * d, 2.0 * d, -2.0 * d


@formula
def absolute_error(x, y):
    d = x - y
    return tl.abs(d), sign(d), -sign(d)


@formula
def smooth_absolute_error(x, y, beta, inverse_beta):
    d = x - y
    slope = clamp(d * inverse_beta, -1.0, 1.0)
    return slope * (d - (0.5 * beta) * slope), slope, -slope


@formula
def huber(x, y, delta):
    d = x - y
    slope = clamp(d, -delta, delta)
    return slope * (d - 0.5 * slope), slope, -slope


@formula
def log_cosh_error(x, y):
    d = x - y
    return log_cosh(d), tanh(d), -tanh(d)


def warn_of_broadcast(input, target):
    if target.size() != input.size():
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). This will likely lead to "
            "incorrect results due to broadcasting. Please ensure they have the same size.",
            stacklevel=3,
        )


def check_weight(input, weight):
    if weight is not None and weight.size() != input.size():
        raise ValueError(f"weight and input must have the same size, got {tuple(weight.size())} and {tuple(input.size())}")


def mean_by_weight(formula, input, target, reduction, weight):
    """Losses whose weighted mean divides by the sum of the weights."""
    check_weight(input, weight)
    if weight is None or reduction != "mean":
        return elementwise(formula, (input, target), (), reduction, weight)
    total = elementwise(formula, (input, target), (), "sum", weight)
    return (total / weight.sum()).to(total.dtype)


def mse_loss(input, target, size_average=None, reduce=None, reduction="mean", weight=None):
    """``(x - y)²``: mean squared error.

    input, target: floating, any shapes that broadcast (sizes that differ draw torch's warning). weight: the input's size; the
    mean then divides by its sum. reduction: "mean", "sum" or "none"; size_average and reduce are torch's older spelling of it.
    As ``torch.nn.functional.mse_loss``.

    >>> mse_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    tensor(2.)
    """
    warn_of_broadcast(input, target)
    return mean_by_weight(squared_error, input, target, reduction_of(reduction, size_average, reduce), weight)


def l1_loss(input, target, size_average=None, reduce=None, reduction="mean", weight=None):
    """``|x - y|``: mean absolute error; its gradient at 0 is 0.

    input, target: floating, any shapes that broadcast (sizes that differ draw torch's warning). weight: the input's size; the
    mean then divides by its sum. reduction: "mean", "sum" or "none"; size_average and reduce are torch's older spelling of it.
    As ``torch.nn.functional.l1_loss``.

    >>> l1_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), reduction="sum")
    tensor(2.)
    """
    warn_of_broadcast(input, target)
    return mean_by_weight(absolute_error, input, target, reduction_of(reduction, size_average, reduce), weight)


def smooth_l1_loss(input, target, size_average=None, reduce=None, reduction="mean", beta=1.0):
    """``d²/(2β)`` where ``|d| < β``, else ``|d| - β/2``, with ``d = x - y``: smooth L1.

    input, target: floating, any shapes that broadcast (sizes that differ draw torch's warning). beta: in units of ``input``;
    0 is the L1 loss, negative raises RuntimeError. reduction, size_average, reduce: as in ``mse_loss``.
    As ``torch.nn.functional.smooth_l1_loss``. Girshick 2015, arXiv:1504.08083.

    >>> smooth_l1_loss(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.0]), reduction="none")
    tensor([0.1250, 2.5000])
    """
    warn_of_broadcast(input, target)
    if beta < 0:
        raise RuntimeError(f"smooth_l1_loss does not support negative values for beta: beta must be >= 0, got {beta}")
    reduction = reduction_of(reduction, size_average, reduce)
    if beta == 0:
        return elementwise(absolute_error, (input, target), (), reduction)
    return elementwise(smooth_absolute_error, (input, target), (beta, 1 / beta), reduction, dtype=like_input(input))


def huber_loss(input, target, reduction="mean", delta=1.0, weight=None):
    """``d²/2`` where ``|d| <= δ``, else ``δ(|d| - δ/2)``, with ``d = x - y``: the Huber loss.

    input, target: floating, any shapes that broadcast (sizes that differ draw torch's warning). delta: in units of ``input``;
    delta <= 0 raises RuntimeError. weight: the input's size; the mean divides by the number of elements all the same.
    reduction: "mean", "sum" or "none". As ``torch.nn.functional.huber_loss``. Huber 1964, doi:10.1214/aoms/1177703732.

    >>> huber_loss(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.0]), reduction="none")
    tensor([0.1250, 2.5000])
    """
    warn_of_broadcast(input, target)
    check_weight(input, weight)
    if delta <= 0:
        raise RuntimeError(f"huber_loss does not support non-positive values for delta: delta must be > 0, got {delta}")
    return elementwise(huber, (input, target), (delta,), reduction, weight, dtype=like_input(input) if weight is None else None)


def log_cosh_loss(input, target, reduction="mean"):
    """``log cosh(x - y)``: about ``d²/2`` near 0 and ``|d| - log 2`` far from it, smooth everywhere.

    input, target: floating, any shapes that broadcast (sizes that differ draw torch's warning). reduction: "mean", "sum" or
    "none". The loss Keras calls LogCosh.

    >>> log_cosh_loss(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0]), reduction="none")
    tensor([0.0000, 0.4338])
    """
    warn_of_broadcast(input, target)
    return elementwise(log_cosh_error, (input, target), (), reduction)


def like_input(input):
    """torch gives these two losses the input's dtype, whatever the target's."""
    return input.dtype if input.is_floating_point() else None
