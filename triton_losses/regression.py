"""Regression losses: how far is a number from the number it should be?"""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from triton_losses.core.compiler import compute_dtype, tl
from triton_losses.core.device_math import at_least, clamp, division, exp, log, log_cosh, sign, tanh
from triton_losses.core.formula import formula
from triton_losses.core.op import readable
from triton_losses.core.reduction import promoted, reduction_of, result_dtype
from triton_losses.families.elementwise import elementwise


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
    slope = tanh(d)
    return log_cosh(d), slope, -slope


@formula
def gaussian(x, y, variance, least, constant):
    v = at_least(variance, least)  # the derivative ignores this bound, as in torch
    d = x - y
    slope = division(d, v)
    return 0.5 * (log(v) + d * slope) + constant, slope, -slope, division(0.5 - 0.5 * d * slope, v)


@formula
def poisson(x, y):
    rate = exp(x)
    return rate - y * x, rate - y, -x


@formula
def poisson_of_rate(x, y, eps):
    log_rate = tl.log(x + eps)
    return x - y * log_rate, 1.0 - y / (x + eps), -log_rate


@formula
def poisson_full(x, y, half_log_tau):
    rate = exp(x)
    log_count = tl.log(at_least(y, 1.0))
    stirling = tl.where(y <= 1.0, 0.0, (y + 0.5) * log_count - y + half_log_tau)  # Stirling's approximation of log y!
    return rate - y * x + stirling, rate - y, tl.where(y <= 1.0, 0.0, log_count + 0.5 / at_least(y, 1.0)) - x


@formula
def poisson_of_rate_full(x, y, eps, half_log_tau):
    log_rate = tl.log(x + eps)
    log_count = tl.log(at_least(y, 1.0))
    stirling = tl.where(y <= 1.0, 0.0, (y + 0.5) * log_count - y + half_log_tau)  # Stirling's approximation of log y!
    dy = tl.where(y <= 1.0, 0.0, log_count + 0.5 / at_least(y, 1.0)) - log_rate
    return x - y * log_rate + stirling, 1.0 - y / (x + eps), dy


@formula
def pinball(x, y, half_above, half_below):
    d = y - x
    slope = half_above * (1.0 + sign(d)) - half_below * (1.0 - sign(d))  # q if d > 0, q - 1 if d < 0, their mean if 0
    return d * slope, -slope, slope


@formula
def pinball_of_each(x, y, q):
    d = y - x
    slope = 0.5 * (q * (1.0 + sign(d)) - (1.0 - q) * (1.0 - sign(d)))
    return d * slope, -slope, slope, d


HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


def in_one_shape(input, target, weight=None):
    """Broadcast input and target, with torch's warning, before dtypes are promoted: a scalar's dtype counts too."""
    if weight is not None and weight.size() != input.size():
        raise ValueError(
            f"weight and input must have the same size, got {tuple(weight.size())} and {tuple(input.size())}"
        )
    if input.is_complex() or target.is_complex():
        raise NotImplementedError(f"a loss takes real tensors, got {input.dtype} and {target.dtype}")
    if target.size() == input.size():
        return input, target
    warnings.warn(
        f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
        "This will likely lead to incorrect results due to broadcasting. Please ensure they have the same size.",
        stacklevel=3,
    )
    return torch.broadcast_tensors(input, target)


def mean_by_weight(formula, input, target, reduction, weight, aten):
    """An elementwise loss; its weighted mean divides by the sum of the weights."""
    if weight is None:
        return elementwise(formula, (input, target), (), reduction, aten=aten)
    dtype = result_dtype(input, torch.promote_types(torch.promote_types(input.dtype, target.dtype), weight.dtype))
    if reduction != "mean":
        return elementwise(formula, (input, target), (), reduction, weight, dtype)
    total = elementwise(formula, (input, target), (), "sum", weight, compute_dtype(dtype))
    return (total / weight.sum(dtype=total.dtype)).to(dtype)  # only this rounds to the dtype


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """``(x - y)²``: mean squared error.

    input, target: floating, any shapes that broadcast (sizes that differ draw torch's warning). weight: the input's
    size; the mean then divides by its sum. reduction: "mean", "sum" or "none"; size_average and reduce are torch's
    older spelling of it. As ``torch.nn.functional.mse_loss``.

    >>> mse_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    tensor(2.)
    """
    input, target = in_one_shape(input, target, weight)
    reduction = reduction_of(reduction, size_average, reduce)
    return mean_by_weight(squared_error, input, target, reduction, weight, torch.nn.functional.mse_loss)


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """``|x - y|``: mean absolute error; its gradient at 0 is 0.

    input, target: floating, any shapes that broadcast (sizes that differ draw torch's warning). weight: the input's
    size; the mean then divides by its sum. reduction: "mean", "sum" or "none"; size_average and reduce are torch's
    older spelling of it. As ``torch.nn.functional.l1_loss``.

    >>> l1_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), reduction="sum")
    tensor(2.)
    """
    input, target = in_one_shape(input, target, weight)
    reduction = reduction_of(reduction, size_average, reduce)
    return mean_by_weight(absolute_error, input, target, reduction, weight, torch.nn.functional.l1_loss)


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    """``d²/(2β)`` where ``|d| < β``, else ``|d| - β/2``, with ``d = x - y``: smooth L1.

    input, target: floating, any shapes that broadcast (sizes that differ draw torch's warning). beta: in units of
    ``input``; 0 is the L1 loss, negative raises RuntimeError. reduction, size_average, reduce: as in ``mse_loss``.
    As ``torch.nn.functional.smooth_l1_loss``. Girshick 2015, arXiv:1504.08083.

    >>> smooth_l1_loss(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.0]), reduction="none")
    tensor([0.1250, 2.5000])
    """
    input, target = in_one_shape(input, target)
    if not beta >= 0:
        raise RuntimeError(f"smooth_l1_loss does not support negative values for beta: beta must be >= 0, got {beta}")
    reduction = reduction_of(reduction, size_average, reduce)

    def aten(x, y, reduction, beta=beta):  # the beta given, which ours bounds below
        return torch.nn.functional.smooth_l1_loss(x, y, reduction=reduction, beta=beta)

    if beta < 1e-37:  # 1 / beta would overflow in float32
        return elementwise(absolute_error, (input, target), (), reduction, aten=aten)
    beta = min(beta, 1e37)  # infinity · 0 would be NaN
    return elementwise(smooth_absolute_error, (input, target), (beta, 1 / beta), reduction, aten=aten)


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """``d²/2`` where ``|d| <= δ``, else ``δ(|d| - δ/2)``, with ``d = x - y``: the Huber loss.

    input, target: floating, any shapes that broadcast (sizes that differ draw torch's warning). delta: in units of
    ``input``; delta <= 0 raises RuntimeError. weight: the input's size; the mean divides by the number of elements all
    the same. reduction: "mean", "sum" or "none". As ``torch.nn.functional.huber_loss``. Huber 1964,
    doi:10.1214/aoms/1177703732.

    >>> huber_loss(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.0]), reduction="none")
    tensor([0.1250, 2.5000])
    """
    input, target = in_one_shape(input, target, weight)
    if not delta > 0:
        raise RuntimeError(f"huber_loss does not support non-positive values for delta: delta must be > 0, got {delta}")
    reduction = reduction_of(reduction)
    # the result does not depend on the target's dtype, as in torch
    dtype = input.dtype if weight is None else torch.promote_types(input.dtype, weight.dtype)

    def aten(x, y, reduction):
        return torch.nn.functional.huber_loss(x, y, reduction=reduction, delta=delta)

    # ATen's loss is no slower than blocks at any size, and needs no scratch memory
    return elementwise(huber, (input, target), (delta,), reduction, weight, dtype, aten=aten, aten_up_to=math.inf)


def log_cosh_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """``log cosh(x - y)``: about ``d²/2`` near 0 and ``|d| - log 2`` far from it, smooth everywhere.

    input, target: floating, any shapes that broadcast (sizes that differ draw torch's warning). reduction: "mean",
    "sum" or "none". The loss Keras calls LogCosh.

    >>> log_cosh_loss(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0]), reduction="none")
    tensor([0.0000, 0.4338])
    """
    input, target = in_one_shape(input, target)
    return elementwise(log_cosh_error, (input, target), (), reduction_of(reduction))


def variance_of(input, var):
    """var as a tensor that broadcasts to the input, by torch's rules."""
    if not isinstance(var, torch.Tensor):
        if var < 0:
            raise ValueError(f"var must be >= 0, got {var}")
        return input.new_full([1] * input.dim(), var, dtype=compute_dtype(input.dtype))
    if readable(var) and (var < 0).any():
        raise ValueError(f"var must be >= 0, got {var.min()}")
    if var.size() == input.size():
        return var
    if var.size() == input.size()[:-1]:
        return var.unsqueeze(-1)
    if var.dim() == input.dim() and sum(v for v, i in zip(var.size(), input.size()) if v != i) == 1:
        return var
    raise ValueError(
        f"var must be of size {tuple(input.size())}, 1 in one dimension or without the last, got {tuple(var.size())}"
    )


def gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Tensor | float, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """``(log v + (x - y)²/v)/2``: negative log likelihood of a normal distribution with mean x and variance v.

    input, target: floating, shapes that broadcast. var: >= 0 (else ValueError; looked at for CPU tensors only), a
    number or a tensor of the input's size, or 1 in one dimension, or without the last one. eps: v is at least this; its
    gradient passes through that bound unchanged, as in torch. full: add ``log(2π)/2``. reduction: "mean", "sum" or
    "none". As ``torch.nn.functional.gaussian_nll_loss``.

    >>> mean, target, variance = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0])
    >>> gaussian_nll_loss(mean, target, variance, reduction="none")
    tensor([0.0000, 1.3466])
    """
    variance, dtype = variance_of(input, var), promoted(input, target)
    if isinstance(var, torch.Tensor):
        dtype = torch.promote_types(dtype, var.dtype)
    wide, shape = compute_dtype(dtype), torch.broadcast_shapes(input.shape, target.shape, variance.shape)
    # operands that broadcast are widened, so that their summed gradients are rounded once
    operands = [v if v.shape == shape else v.to(wide) for v in (input, target, variance)]
    return elementwise(gaussian, operands, (eps, HALF_LOG_TAU if full else 0.0), reduction_of(reduction), None, dtype)


def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``exp(x) - y x``: negative log likelihood of a count y that is Poisson distributed with the rate exp(x).

    input: floating: the logarithm of the rate, or with log_input=False the rate itself, then ``x - y log(x + eps)``.
    target: counts, floating or integers; broadcasts with input. full: add Stirling's ``log y!`` = ``y log y - y +
    log(2πy)/2``, where y > 1. reduction, size_average, reduce: as in ``mse_loss``. As
    ``torch.nn.functional.poisson_nll_loss``.

    >>> poisson_nll_loss(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0]), reduction="none")
    tensor([1.0000, 0.7183])
    """
    reduction = reduction_of(reduction, size_average, reduce)
    formula = (poisson_full if full else poisson) if log_input else (poisson_of_rate_full if full else poisson_of_rate)
    scalars = (*(() if log_input else (eps,)), *((HALF_LOG_TAU,) if full else ()))
    return elementwise(formula, (input, target), scalars, reduction)


def check_quantile(quantile):
    if not 0 <= quantile <= 1:
        raise ValueError(f"a quantile must be in [0, 1], got {quantile}")


def quantile_loss(
    input: Tensor, target: Tensor, quantile: float | Sequence[float] = 0.5, reduction: str = "mean"
) -> Tensor:
    """``max(q d, (q - 1) d)`` with ``d = y - x``: the pinball loss, least where x is the q-quantile of y.

    input, target: floating, any shapes that broadcast (sizes that differ draw torch's warning). quantile: in [0, 1]
    (else ValueError), or a sequence of them, as in ``multi_quantile_loss``. By x the gradient at d = 0 is ``½ - q``,
    midway between those on either side. reduction: "mean", "sum" or "none". Koenker and Bassett 1978,
    doi:10.2307/1913643.

    >>> quantile_loss(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]), quantile=0.9, reduction="none")
    tensor([0.9000, 0.1000])
    """
    if isinstance(quantile, Sequence):
        return multi_quantile_loss(input, target, quantile, reduction)
    check_quantile(quantile)
    quantile = float(quantile)
    input, target = in_one_shape(input, target)
    return elementwise(pinball, (input, target), (0.5 * quantile, 0.5 * (1 - quantile)), reduction_of(reduction))


def multi_quantile_loss(
    input: Tensor, target: Tensor, quantiles: Sequence[float] = (0.1, 0.5, 0.9), reduction: str = "mean"
) -> Tensor:
    """``max(q_k d_k, (q_k - 1) d_k)`` with ``d_k = y - x_k``: the pinball loss of several quantiles at once.

    input: (..., K), floating, its last dimension the K quantiles in their order; target: (...) (else ValueError).
    quantiles: each in [0, 1] (else ValueError). reduction: "mean" (over all K as well), "sum" or "none", which keeps K.
    Gradient and source as in ``quantile_loss``.

    >>> multi_quantile_loss(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([3.0]), reduction="none")
    tensor([[0.2000, 0.5000, 0.1000]])
    """
    for quantile in quantiles:
        check_quantile(quantile)
    if input.shape != (*target.shape, len(quantiles)):
        shapes = f"{tuple(input.shape)} and {tuple(target.shape)}"
        raise ValueError(
            f"input must be of the target's shape and {len(quantiles)} quantiles in a last dimension, got {shapes}"
        )
    # new_full fills each on the device: no copy from the host
    q = torch.cat([input.new_full((1,), q, dtype=compute_dtype(input.dtype)) for q in quantiles])
    return elementwise(
        pinball_of_each, (input, target.unsqueeze(-1), q), (), reduction_of(reduction), None, promoted(input, target)
    )
