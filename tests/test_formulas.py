"""A formula's written partials are its derivative, and each of its readings is the same function."""

import math

import pytest
import torch

import triton_losses  # noqa: F401  files the formulas
from triton_losses import functional
from triton_losses.core import device_math
from triton_losses.core.formula import FORMULAS, Formula, formula
from triton_losses.core.rows import slots_of

ELEMENTWISE = {  # operands, scalars: one draw for each formula that is not of rows
    "squared_error": (2, ()),
    "absolute_error": (2, ()),
    "smooth_absolute_error": (2, (0.5, 2.0)),
    "huber": (2, (0.7,)),
    "log_cosh_error": (2, ()),
    "logistic": (2, ()),
    "weighted_logistic": (3, ()),
    "sigmoid_focal": (2, (0.75, -0.5, 1.7)),
    "sigmoid_focal_squared": (2, (0.75, -0.5)),
    "gaussian": (3, (0.0, 0.9)),
    "poisson": (2, ()),
    "poisson_of_rate": (2, (9.0,)),
    "poisson_full": (2, (0.9,)),
    "poisson_of_rate_full": (2, (9.0, 0.9)),
    "pinball": (2, (0.15, 0.35)),
    "pinball_of_each": (3, ()),
    "cross_entropy_of_chances": (2, ()),
    "hinge": (2, (0.7,)),
    "squared_hinge": (2, (0.7,)),
    "exponential": (2, ()),
    "soft_margin": (2, ()),
    "hinge_embedding": (2, (0.7,)),
    "margin_excess": (1, (0.7,)),
    "squared_margin_excess": (1, (0.7,)),
    "pointwise_divergence": (2, ()),
    "pointwise_divergence_of_logs": (2, ()),
    "margin_ranking": (3, (0.7,)),
    "product": (2, ()),
    "squared_difference": (2, (0.1,)),
    "absolute_difference": (2, (0.1,)),
    "power_of_difference": (2, (0.1, 2.7)),
    "triplet": (2, (0.7, 2.5)),
    "triplet_swapped": (3, (0.7, 2.0)),
    "contrastive": (2, (1.9,)),
    "cosine_embedding": (4, (0.1,)),
    "squared_cosine_error": (4, (1e-8,)),
    "dice_score": (3, (0.1, 0.2)),
    "tversky_score": (3, (0.3, 0.6, 0.1, 0.2)),
    "one_less_score": (1, ()),
    "power_of_one_less_score": (1, (1.7,)),
    "minus_log_score": (1, ()),
    "power_of_minus_log_score": (1, (1.7,)),
}
ROWS = {
    "chosen_log_p": (),
    "log_p_beside_entropy": (),
    "row_entropy": (),
    "along": (0.7, -0.4),
    "log_p_beside_mean": (),
    "along_part": (0.7, -0.4),
    "along_part_with_mean": (0.7, -0.4, 0.3),
    "along_part_with_entropy": (0.7, -0.4, 0.3),
    "log_total": (),
    "negative_log_likelihood": (),
    "cross_entropy_plain": (),
    "cross_entropy_with_z_loss": (0.1,),
    "cross_entropy_smoothed": (0.1, 0.2),
    "softmax_focal": (1.7, 0.3),
    "softmax_focal_squared": (0.3,),
}
PAIRS = {  # of a pair of rows
    "cross_entropy_of_probabilities": (),
    "cross_entropy_of_smoothed_probabilities": (0.1, 0.02),
    "clipped_cross_entropy": (1e-7, 1 - 1e-7),
    "clipped_cross_entropy_smoothed": (1e-7, 1 - 1e-7, 0.1, 0.02),
    "relative_entropy": (),
    "jensen_shannon": (0.3, 0.7),
    "total_variation": (),
}


def operands_of(name):
    """Chances where a formula takes them, log-probabilities below 0; values away from kinks with probability one."""
    f = FORMULAS[name]
    if name in ELEMENTWISE:
        count, scalars = ELEMENTWISE[name]
        operands = [
            torch.rand(50, dtype=torch.float64) if i else torch.randn(50, dtype=torch.float64) * 2 for i in range(count)
        ]
        if name.endswith("_of_chances"):
            operands[0] = operands[0].sigmoid()
        elif name.endswith("_full"):  # counts on both sides of 1, where Stirling's term begins
            operands[1] = operands[1] * 3
        elif name in ("triplet", "triplet_swapped", "contrastive"):  # sums of squares
            operands[0] = operands[0].abs()
        elif name == "cosine_embedding":
            operands[3] = operands[3].round() * 2 - 1
        return operands, scalars
    if name.startswith("clipped_cross_entropy"):
        return [torch.rand(50, dtype=torch.float64) * 0.99 + 0.005 for _ in range(2)], PAIRS[name]
    count = 2 if name in PAIRS else sum(slot > 0 for slot in slots_of(f))
    return [-torch.rand(50, dtype=torch.float64) * 3 - 0.01 for _ in range(count)], {**ROWS, **PAIRS}[name]


def every_partial(f):
    return f.partials(max(f.cuts))  # the cut in which all are wanted


def test_every_formula_is_drawn_here():
    assert set(FORMULAS) == {*ELEMENTWISE, *ROWS, *PAIRS}


@pytest.mark.parametrize("name", [*ELEMENTWISE, *ROWS, *PAIRS])
def test_partials_are_the_derivative_of_the_value(name):
    operands, scalars = operands_of(name)
    operands = [v.requires_grad_() for v in operands]
    f = FORMULAS[name]
    loss, partials = f.value(*operands, *scalars), every_partial(f)(*operands, *scalars)
    for operand, partial, parameter in zip(operands, partials, f.parameters):  # a row formula has none by its weight
        (derivative,) = torch.autograd.grad(loss.sum(), operand, retain_graph=True, allow_unused=True)
        derivative = torch.zeros_like(operand) if derivative is None else derivative
        partial = torch.as_tensor(partial, dtype=torch.float64).expand_as(operand)
        torch.testing.assert_close(partial, derivative, rtol=1e-10, atol=1e-12, msg=f"∂{name}/∂{parameter}")


@pytest.mark.parametrize("name", [*ELEMENTWISE, *ROWS, *PAIRS])
def test_a_reading_cut_to_some_outputs_gives_those_outputs(name):
    operands, scalars = operands_of(name)
    f = FORMULAS[name]
    loss, *partials = f.reading(tuple(range(1 + len(next(iter(f.cuts))))))(*operands, *scalars)
    assert torch.equal(f.value(*operands, *scalars), loss)
    for i, partial in enumerate(partials):
        wanted = tuple(k == i for k in range(len(partials)))
        assert torch.equal(*(torch.as_tensor(v) for v in (f.partials(wanted)(*operands, *scalars)[0], partial)))


# the last has no such line
@pytest.mark.parametrize("name", ["logistic", "weighted_logistic", "sigmoid_focal", "squared_error"])
def test_a_slope_takes_what_is_already_known(name):
    operands, scalars = operands_of(name)
    f = FORMULAS[name]
    (expected,) = f.partials((True, *[False] * (len(max(f.cuts)) - 1)))(*operands, *scalars)
    assert torch.equal(f.slope_given("sigmoid(x)")(operands[0].sigmoid(), *operands, *scalars), expected)
    if name == "logistic":
        assert torch.equal(f.slope_given("sigmoid(x)")(torch.ones(50), *operands, *scalars), 1 - operands[1])


# torch looks for what exceeds
@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if "margin_excess" not in name])
def test_nan_stays_nan(name):
    (input, *rest), scalars = operands_of(name)
    assert FORMULAS[name].value(input * math.nan, *rest, *scalars).isnan().all()


def test_a_reading_leaves_out_what_it_does_not_need():
    assert "tanh" in FORMULAS["log_cosh_error"].partials((True, False)).__code__.co_names
    assert "log_cosh" not in FORMULAS["log_cosh_error"].partials((True, False)).__code__.co_names


def test_two_formulas_cannot_share_a_name():
    def huber(x, y, delta):
        return x, x, y

    with pytest.raises(ValueError, match="two formulas are named 'huber'"):
        formula(huber)
    assert isinstance(FORMULAS["huber"], Formula)


SPOTS = torch.tensor(
    [0.0, 1e-30, 1e-7, 1e-4, 0.01, 0.2, 0.3499, 0.3501, 0.5, 1.0, 3.0, 9.0, 17.0, 40.0, 87.0], dtype=torch.float64
)
SPOTS = torch.cat([-SPOTS.flip(0), SPOTS])
EXACT = {
    "exp": torch.exp,
    "exact_exp": torch.exp,
    "log1p_exp_minus_abs": lambda x: torch.exp(-x.abs()).log1p(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "log_cosh": lambda x: torch.where(
        x.abs() < 1,
        torch.log1p(2 * torch.sinh(x / 2) ** 2),
        x.abs() + torch.log1p(torch.exp(-2 * x.abs())) - math.log(2),
    ),
    "expm1": torch.expm1,
    "sign": torch.sign,
    "relu": torch.relu,
    "negative_part": lambda x: torch.relu(-x),
    "step": lambda x: (x >= 0).to(x.dtype),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_function_of_device_math_and_its_twin_are_exact(name, dtype, device):
    """Against float64: relative errors of a few roundings, at tiny, middling and large arguments alike."""
    from device_functions import evaluate

    function = getattr(device_math, name)
    x = SPOTS.to(device, dtype)
    exact = EXACT[name](x.double())
    smallest = 1e-15 if dtype == torch.float64 else 1e-37  # float64 kernels promise absolute 1e-16 of tiny arguments
    for values in (function.eager(x), evaluate(function, x)):
        relative = (values.double() - exact).abs() / exact.abs().clamp(min=smallest)
        close = relative < (2e-6 if dtype == torch.float32 else 1e-12) * (1 + x.abs() / 20)  # exp's argument is rounded
        assert (close | ((values.double() - exact).abs() < (1e-37 if dtype == torch.float32 else 1e-15))).all(), (
            x[~close],
            values[~close],
            exact[~close],
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_logarithm_near_1_is_exact_to_its_last_digits(dtype, device):
    from device_functions import evaluate

    x = -torch.cat([torch.tensor([0.0, 1e-30, 1e-7, 1e-4]), torch.linspace(0.001, 0.999, 999)]).to(device, dtype)
    for values in (device_math.log1p_negative.eager(x), evaluate(device_math.log1p_negative, x)):
        torch.testing.assert_close(
            values.double(), x.double().log1p(), rtol=5e-7 if dtype == torch.float32 else 1e-14, atol=0
        )


NEAR_0 = torch.cat([torch.logspace(-30, -1, 60), torch.linspace(0.1, 0.9, 333)]).double()
NEAR_0 = torch.cat([-NEAR_0, torch.zeros(1).double(), NEAR_0])
FAR = torch.logspace(-44, 38, 333).double()
CLOSE_TO_A_ZERO = {
    "log": torch.cat([1 + NEAR_0, FAR]),
    "log1p": torch.cat([NEAR_0, FAR[FAR > 1e-30]]),  # torch's own flushes smaller ones to 0
    "expm1": torch.cat([NEAR_0, -FAR, FAR.clamp(max=80)]),
}


@pytest.mark.parametrize("name", CLOSE_TO_A_ZERO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_function_is_exact_near_its_zero_and_far_from_it(name, dtype, device):
    """A GPU's own float32 logarithm errs by at most 2⁻²² log 2: 6e-7 of log 1.3, the least that is left to it."""
    from device_functions import evaluate

    x = CLOSE_TO_A_ZERO[name].to(device, dtype)
    x = x[x != 0] if name == "log" else x
    exact = getattr(torch, name)(x.double())
    for values in (getattr(device_math, name).eager(x), evaluate(getattr(device_math, name), x)):
        bound = 1e-6 + x.abs() * 2.0**-23 if name == "expm1" else 1e-6  # expm1's argument is rounded once more
        error = (values.double() - exact).abs() / exact.abs().clamp(min=1e-44)
        assert (error <= (bound if dtype == torch.float32 else 1e-12 * (1 + x.abs()))).all(), x[error.argmax()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_logarithm_has_its_limits(dtype, device):
    from device_functions import evaluate

    x = torch.tensor([0.0, -1.0, math.inf, -math.inf, math.nan], dtype=dtype, device=device)
    for values in (device_math.log.eager(x), evaluate(device_math.log, x)):
        torch.testing.assert_close(values, x.log(), equal_nan=True)


HALF, SIGNS = torch.tensor([[0.0, 1.0, 0.3, 0.8]]).double(), torch.tensor([[-1.0, 1.0, 1.0, -1.0]]).double()
SMOOTH = {  # at an input of 0: the target, whether the loss is smooth in that too, and options
    "binary_cross_entropy_with_logits": (HALF, True, {"pos_weight": torch.tensor(2.0).double()}),
    "cross_entropy": (torch.tensor([1]), False, {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}),
    "distillation_loss": (torch.zeros(1, 4).double(), False, {"direction": "jsd", "beta": 0.3}),
    "focal_loss": (torch.tensor([1]), False, {}),
    "log_cosh_loss": (torch.zeros(1, 4).double(), True, {}),
    "multilabel_soft_margin_loss": (HALF, False, {}),
    "poisson_nll_loss": (HALF, True, {}),
    "sigmoid_focal_loss": (HALF, True, {"gamma": 1.5}),
    "soft_margin_loss": (SIGNS, True, {}),
}


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", SMOOTH)
def test_kinks_that_cancel_in_the_derivative_cancel_in_the_second(name):
    """|x| and max(x, 0) each have one at 0, the loss that is written with them has none."""
    target, smooth, options = SMOOTH[name]
    leaves = [torch.zeros(1, 4).double().requires_grad_(), *([target.clone().requires_grad_()] if smooth else [])]
    assert torch.autograd.gradgradcheck(lambda x, y=target: getattr(functional, name)(x, y, **options), leaves)
