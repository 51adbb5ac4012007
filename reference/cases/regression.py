"""The regression losses of the table."""

import torch

from reference.cases.case import TIMED, TIMED_LESS, Case
from reference.cases.draws import like_input, numbers, with_nan


def kinks(shape, dtype):
    """Residuals of exactly -2, -1, -½, 0, ½, 1, 2: where these losses bend."""
    target = torch.randint(-3, 4, shape).to(dtype)
    return target + torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0], dtype=dtype)[torch.randint(7, shape)], target


def infinite(shape, dtype):
    input, target = numbers(shape, dtype)
    input.view(-1)[::3], input.view(-1)[1::3] = float("inf"), -float("inf")
    return input, target


def numbers_and_variances(shape, dtype):
    return *numbers(shape, dtype), torch.rand(shape, dtype=dtype) * 2 + 0.1


def small_variances(shape, dtype):
    """Some of 0, some below any eps, some numbers nan and infinite."""
    input, target, var = numbers_and_variances(shape, dtype)
    var.view(-1)[::3], var.view(-1)[1::4], input.view(-1)[5::7], input.view(-1)[6::11] = (
        0,
        1e-7,
        float("nan"),
        float("inf"),
    )
    return input, target, var


def rates_and_counts(shape, dtype):
    return torch.rand(shape, dtype=dtype) * 2 + 0.1, torch.randint(6, shape).to(dtype)


def rates_of_none(shape, dtype):
    """Rates of 0, infinity and nan among others, and counts of 0."""
    input, target = rates_and_counts(shape, dtype)
    input.view(-1)[::5], input.view(-1)[1::5], input.view(-1)[2::5] = 0, float("inf"), float("nan")
    return input, target


def numbers_of_three_and_numbers(shape, dtype):
    """An input for three quantiles of each target."""
    return torch.randn(*shape, 3, dtype=dtype), torch.randn(shape, dtype=dtype)


def three_kinks(shape, dtype):
    input, target = kinks((*shape, 3), dtype)
    input[0, 0, 0], input[0, 1, 1] = -float("inf"), float("inf")
    return input, target[..., 0]


def per_row(input):
    return torch.rand(input.shape[:-1], dtype=input.dtype).to(input.device) + 0.5


def regression(name, options=(), **more):
    return Case(name, numbers, dict(options), differentiable=2, **more)


CASES = [
    regression("mse_loss", bench=TIMED, headline=True),
    regression("mse_loss", {"weight": like_input}),
    regression("l1_loss", bench=TIMED),
    regression("l1_loss", {"weight": like_input}),
    regression("smooth_l1_loss", bench=TIMED),
    regression("smooth_l1_loss", {"beta": 0.3}),
    regression("smooth_l1_loss", {"beta": 0.0}),
    regression("huber_loss", bench=TIMED, headline=True),
    regression("huber_loss", {"delta": 0.3}),
    regression("huber_loss", {"weight": like_input, "delta": 2.0}),
    regression("log_cosh_loss", bench=TIMED),
    *(
        Case(name, draw, note=draw.__name__.replace("_", " "), differentiable=2, shapes=((9, 7),))
        for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "log_cosh_loss")
        for draw in (kinks, with_nan, infinite)
    ),
    Case("gaussian_nll_loss", numbers_and_variances, differentiable=3, bench=TIMED_LESS),
    Case("gaussian_nll_loss", numbers_and_variances, {"full": True, "eps": 0.05}, differentiable=3),
    Case("gaussian_nll_loss", numbers, {"var": 0.7}, differentiable=2),
    Case("gaussian_nll_loss", numbers, {"var": per_row}, differentiable=2),
    Case(
        "gaussian_nll_loss",
        small_variances,
        {"eps": 2**-10},
        note="small variances",
        differentiable=3,
        shapes=((9, 7),),
    ),
    regression("poisson_nll_loss", bench=TIMED_LESS),
    Case("poisson_nll_loss", rates_and_counts, {"full": True}),
    Case("poisson_nll_loss", rates_and_counts, {"log_input": False}, differentiable=2),
    Case("poisson_nll_loss", rates_and_counts, {"log_input": False, "full": True, "eps": 0.1}),
    Case("poisson_nll_loss", rates_of_none, {"log_input": False}, note="rates of none", shapes=((9, 7),)),
    Case("poisson_nll_loss", with_nan, {"full": True}, note="with nan", shapes=((9, 7),)),
    regression("quantile_loss", {"quantile": 0.9}, bench=TIMED_LESS),
    regression("quantile_loss"),
    *(
        Case("quantile_loss", draw, {"quantile": 0.3}, draw.__name__, differentiable=2, shapes=((9, 7),))
        for draw in (kinks, infinite)
    ),
    Case("multi_quantile_loss", numbers_of_three_and_numbers, differentiable=2, bench=TIMED_LESS),
    Case("multi_quantile_loss", numbers_of_three_and_numbers, {"quantiles": (0.0, 0.25, 1.0)}, differentiable=2),
    Case("multi_quantile_loss", three_kinks, note="three kinks", differentiable=2, shapes=((9, 7),)),
]
