"""Regression losses: how far is a number from the number it should be?"""

import warnings

import torch

from triton_losses.compiler import compute_dtype, tl
from triton_losses.device_math import clamp, log_cosh, sign, tanh
from triton_losses.families.elementwise import elementwise
from triton_losses.families.reduction import reduction_of, result_dtype
from triton_losses.formula import formula


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


def in_one_shape(input, target, weight=None):
    """input and target broadcast, with torch's warning, before their dtypes meet: a scalar's counts like any other's."""
    if weight is not None and weight.size() != input.size():
        raise ValueError(f"weight and input must have the same size, got {tuple(weight.size())} and {tuple(input.size())}")
    if input.is_complex() or target.is_complex():
        raise NotImplementedError(f"a loss takes real tensors, got {input.dtype} and {target.dtype}")
    if target.size() == input.size():
        return input, target
    warnings.warn(
        f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). This will likely lead to "
        "incorrect results due to broadcasting. Please ensure they have the same size.",
        stacklevel=3,
    )
    return torch.broadcast_tensors(input, target)


def mean_by_weight(formula, input, target, reduction, weight):
    """Losses whose weighted mean divides by the sum of the weights."""
    if weight is None:
        return elementwise(formula, (input, target), (), reduction)
    dtype = result_dtype(input, torch.promote_types(torch.promote_types(input.dtype, target.dtype), weight.dtype))
    if reduction != "mean":
        return elementwise(formula, (input, target), (), reduction, weight, dtype)
    total = elementwise(formula, (input, target), (), "sum", weight, compute_dtype(dtype))
    return (total / weight.sum(dtype=total.dtype)).to(dtype)  # rounded once


def mse_loss(input, target, size_average=None, reduce=None, reduction="mean", weight=None):
    """``(x - y)²``: mean squared error.

    input, target: floating, any shapes that broadcast (sizes that differ draw torch's warning). weight: the input's size; the
    mean then divides by its sum. reduction: "mean", "sum" or "none"; size_average and reduce are torch's older spelling of it.
    As ``torch.nn.functional.mse_loss``.

    >>> mse_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    tensor(2.)
    """
    input, target = in_one_shape(input, target, weight)
    return mean_by_weight(squared_error, input, target, reduction_of(reduction, size_average, reduce), weight)


def l1_loss(input, target, size_average=None, reduce=None, reduction="mean", weight=None):
    """``|x - y|``: mean absolute error; its gradient at 0 is 0.

    input, target: floating, any shapes that broadcast (sizes that differ draw torch's warning). weight: the input's size; the
    mean then divides by its sum. reduction: "mean", "sum" or "none"; size_average and reduce are torch's older spelling of it.
    As ``torch.nn.functional.l1_loss``.

    >>> l1_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), reduction="sum")
    tensor(2.)
    """
    input, target = in_one_shape(input, target, weight)
    return mean_by_weight(absolute_error, input, target, reduction_of(reduction, size_average, reduce), weight)


def smooth_l1_loss(input, target, size_average=None, reduce=None, reduction="mean", beta=1.0):
    """``d²/(2β)`` where ``|d| < β``, else ``|d| - β/2``, with ``d = x - y``: smooth L1.

    input, target: floating, any shapes that broadcast (sizes that differ draw torch's warning). beta: in units of ``input``;
    0 is the L1 loss, negative raises RuntimeError. reduction, size_average, reduce: as in ``mse_loss``.
    As ``torch.nn.functional.smooth_l1_loss``. Girshick 2015, arXiv:1504.08083.

    >>> smooth_l1_loss(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.0]), reduction="none")
    tensor([0.1250, 2.5000])
    """
    input, target = in_one_shape(input, target)
    if not beta >= 0:
        raise RuntimeError(f"smooth_l1_loss does not support negative values for beta: beta must be >= 0, got {beta}")
    reduction = reduction_of(reduction, size_average, reduce)
    if beta < 1e-37:  # 1 / beta would overflow in float32
        return elementwise(absolute_error, (input, target), (), reduction)
    beta = min(beta, 1e37)  # infinity · 0 would be NaN
    return elementwise(smooth_absolute_error, (input, target), (beta, 1 / beta), reduction)


def huber_loss(input, target, reduction="mean", delta=1.0, weight=None):
    """``d²/2`` where ``|d| <= δ``, else ``δ(|d| - δ/2)``, with ``d = x - y``: the Huber loss.

    input, target: floating, any shapes that broadcast (sizes that differ draw torch's warning). delta: in units of ``input``;
    delta <= 0 raises RuntimeError. weight: the input's size; the mean divides by the number of elements all the same.
    reduction: "mean", "sum" or "none". As ``torch.nn.functional.huber_loss``. Huber 1964, doi:10.1214/aoms/1177703732.

    >>> huber_loss(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.0]), reduction="none")
    tensor([0.1250, 2.5000])
    """
    input, target = in_one_shape(input, target, weight)
    if not delta > 0:
        raise RuntimeError(f"huber_loss does not support non-positive values for delta: delta must be > 0, got {delta}")
    dtype = input.dtype if weight is None else torch.promote_types(input.dtype, weight.dtype)  # torch asks nothing of the target
    return elementwise(huber, (input, target), (delta,), reduction_of(reduction), weight, dtype)


def log_cosh_loss(input, target, reduction="mean"):
    """``log cosh(x - y)``: about ``d²/2`` near 0 and ``|d| - log 2`` far from it, smooth everywhere.

    input, target: floating, any shapes that broadcast (sizes that differ draw torch's warning). reduction: "mean", "sum" or
    "none". The loss Keras calls LogCosh.

    >>> log_cosh_loss(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0]), reduction="none")
    tensor([0.0000, 0.4338])
    """
    input, target = in_one_shape(input, target)
    return elementwise(log_cosh_error, (input, target), (), reduction_of(reduction))
