"""Every case of the table against its float64 reference: values and gradients, for a random upstream gradient."""

import inspect

import pytest
import torch
from conftest import INTERPRET
from table import FIRST, SOME

import reference.losses
from reference.cases import CASES
from triton_losses import functional
from triton_losses.core import dispatch

# the interpreter truncates to bfloat16
ROUNDING = {
    torch.float64: 2**-50,
    torch.float32: 2**-22,
    torch.bfloat16: 2**-7 if INTERPRET else 2**-8,
    torch.float16: 2**-10,
}


# the losses of probabilities alone, which a softmax may make
OF_REGIONS_ALONE = ("dice_loss", "jaccard_loss", "tversky_loss", "focal_tversky_loss", "generalized_dice_loss")


def value_and_gradients(loss, case, tensors, options):
    """The loss and a gradient of each differentiable tensor, for one upstream gradient, the same in every dtype."""
    tensors = [t.clone().requires_grad_(i < case.differentiable) for i, t in enumerate(tensors)]
    value = loss(*tensors, **options)
    upstream = torch.randn(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    value.backward(upstream.to(value.device, torch.float32).to(value.dtype))
    return [value.detach(), *(t.grad for t in tensors[: case.differentiable])]


def in_float64(thing):
    return thing.double() if isinstance(thing, torch.Tensor) and thing.is_floating_point() else thing


def assert_within_budget(ours, torchs, exact, dtype, times=2, size=0.0):
    """Off by at most twice what plain torch is off by in that dtype, or twice one rounding; inf and nan in the same
    places.

    size: of the terms that the value is the difference of, where those are larger.
    """
    limit = torch.finfo(dtype).max
    exact = torch.where(exact.abs() > limit, exact.sign() * float("inf"), exact)
    ours, torchs = ours.double(), torchs.double()
    assert torch.equal(ours.isnan(), exact.isnan())
    infinite = exact.isinf() | torchs.isinf()
    assert torch.equal(torch.where(infinite & ours.isinf(), 0, ours).isinf(), torch.zeros_like(infinite))
    finite = exact.isfinite() & torchs.isfinite() & ours.isfinite()
    if finite.any():
        # terms of about that size may cancel to 0
        scale = exact[finite].abs().max().clamp(min=max(size, 1 / exact.numel()))
        budget = times * torch.maximum((torchs - exact)[finite].abs().max(), ROUNDING[dtype] * scale)
        error = (ours - exact)[finite].abs().max()
        assert error <= budget, f"error {error:.3g} exceeds {budget:.3g}, values up to {scale:.3g}"


def terms_of_reverse_gradient(student, temperature, reduction):
    """q_j (log q_j - log p_j - KL) / T: a difference of rounded logarithms, so its terms are as large as q_j |log q_j|
    / T.
    """
    log_q = (student.double() / temperature).log_softmax(-1)
    rows = log_q[..., 0].numel() if reduction == "mean" else 1
    terms = (log_q.exp() * log_q.abs()).nan_to_num(0.0)  # 0 · inf where a class is masked
    return float(terms.max() / (temperature * rows))


def terms_of_softmax_gradient(plain, case, tensors, options):
    """p_i g_i: a gradient by logits is p_i (g_i - Σ_j p_j g_j), where g is the gradient by their softmax p."""
    p = tensors[0].softmax(1)
    _, g = value_and_gradients(plain, case, [p, *tensors[1:]], {**options, "softmax": False})
    return float((p * g).abs().nan_to_num(0.0).max())


def terms_of_similarities(case, tensors, options, reduction):
    """Of a loss of all pairs and of each gradient: shares p of similarities S, whose roundings make p off by |S|."""
    x, *others = (t.double() for t in tensors[: case.differentiable])
    numbers, others = [t for t in others if not t.dim()], [t for t in others if t.dim()]
    defaults = inspect.signature(getattr(functional, case.name)).parameters
    options = {name: p.default for name, p in defaults.items()} | options
    normalize, temperature = options["normalize"], options.get("temperature")
    lengths = [t.norm(dim=-1).max() for t in (x, *(others or [x]))]
    scale = float(numbers[0]) if numbers else 1 / temperature
    product = 1.0 if normalize else float(lengths[0] * max(lengths[1:]))
    largest = scale * product + abs(float(numbers[1]) if len(numbers) > 1 else 0.0)
    rows = x[..., 0].numel() * (2 if case.name == "nt_xent_loss" else 1)
    each = (1 / rows if reduction == "mean" else 1.0) * max(1.0, largest)
    if len(others) == 0 or case.name == "nt_xent_loss":  # each pair comes twice
        each *= 2 * temperature / options.get("base_temperature", temperature)
    slopes = []
    for t in (x, *others):
        size = 1 / float(t.norm(dim=-1).clamp(min=1e-3).min()) if normalize else float(max(lengths))
        slopes.append(each * scale * size)
    return [largest * (rows if reduction == "sum" else 1), *slopes, each * rows * product, each * rows]


def check(case, shape, dtype, reduction, device):
    tensors, options = case.arguments(shape, dtype, device, reduction=reduction)
    ours = value_and_gradients(getattr(functional, case.name), case, tensors, options)
    plain = getattr(reference.losses, case.name)
    torchs = value_and_gradients(plain, case, tensors, options)
    wide = [in_float64(t) for t in tensors], {k: in_float64(v) for k, v in options.items()}
    exact = value_and_gradients(plain, case, *wide)
    for i, (o, t, e) in enumerate(zip(ours, torchs, exact, strict=True)):
        assert o.dtype == t.dtype and o.shape == t.shape
        # these gradients are differences of sums: how far roundings add up there is for each order of summing its own
        # luck
        times = 8 if case.name == "linear_distillation_loss" and i else 2
        # T² (log p - log q) is a difference of logarithms that are about 5 here, and rounded
        size = case.options["temperature"] ** 2 if case.options.get("temperature_squared") and not i else 0.0
        if case.name == "distillation_loss" and case.options.get("direction") == "reverse" and i:
            size = terms_of_reverse_gradient(tensors[0], case.options.get("temperature", 1.0), reduction)
        if case.options.get("softmax") and case.name in OF_REGIONS_ALONE and i and dtype.itemsize >= 4:
            size = terms_of_softmax_gradient(plain, case, *wide)
        if case.pairwise and dtype.itemsize >= 4:
            size = terms_of_similarities(case, tensors, options, reduction)[i]
        assert_within_budget(o, t, e, dtype, times, size)


def crossed(values, some=()):
    """Every case with every value; interpreted, which takes seconds, with ``some`` alone, but for each loss's first."""
    return [
        pytest.param(case, v, id=f"{case}-{v}")
        for case in CASES
        for v in values
        if not INTERPRET or v in some or case in FIRST.values()
    ]


@pytest.mark.parametrize("case, reduction", crossed(("sum", "none", "mean"), some=("mean",)))
def test_equals_the_reference_in_every_shape(case, reduction, device):
    few = reduction == "sum" or INTERPRET and reduction == "none"  # a sum is a mean with another divisor
    for shape in case.shapes[:1] if few else case.shapes:
        check(case, shape, torch.float32, reduction, device)


@pytest.mark.parametrize("case, dtype", crossed((torch.float16, torch.bfloat16, torch.float64), some=(torch.bfloat16,)))
def test_equals_the_reference_in_every_dtype(case, dtype, device):
    for reduction in ("mean",) if INTERPRET else ("none", "mean"):
        check(case, case.shapes[0], dtype, reduction, device)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_takes_no_rows_and_gives_what_torch_gives(case, device):
    for reduction in ("none", "sum", "mean"):
        tensors, options = case.arguments(case.shape(0, 7), torch.float32, device, reduction=reduction)
        ours = value_and_gradients(getattr(functional, case.name), case, tensors, options)
        torchs = value_and_gradients(getattr(reference.losses, case.name), case, tensors, options)
        for o, t in zip(ours, torchs, strict=True):
            torch.testing.assert_close(o, t, equal_nan=True)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_strides_do_not_matter(case, device):
    """Transposed, sliced and expanded tensors, and an upstream gradient that is none of contiguous."""
    shape = case.shapes[0]
    tensors, options = case.arguments(shape, torch.float32, device, reduction="none")
    straight = value_and_gradients(getattr(functional, case.name), case, tensors, options)

    def with_odd_strides(t):
        if t.dim() < 2:
            return torch.stack([t, t], -1)[..., 0]
        return torch.stack([t.transpose(0, 1).contiguous()] * 2)[1].transpose(0, 1)

    odd = [with_odd_strides(t).detach().requires_grad_(i < case.differentiable) for i, t in enumerate(tensors)]
    value = getattr(functional, case.name)(*odd, **options)
    upstream = (
        torch.randn(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).float().to(device)
    )
    value.backward(with_odd_strides(upstream))
    for o, s in zip([value, *(t.grad for t in odd[: case.differentiable])], straight, strict=True):
        torch.testing.assert_close(o, s, rtol=1e-5, atol=1e-6)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_calls_that_go_to_aten_give_the_same(case, device, monkeypatch):
    """Small ones on a CPU, where ATen has the loss."""
    tensors, options = case.arguments(case.shapes[0], torch.float32, device)
    ours = value_and_gradients(getattr(functional, case.name), case, tensors, options)
    monkeypatch.setattr(dispatch, "ATEN", True)
    for small, large in zip(
        value_and_gradients(getattr(functional, case.name), case, tensors, options), ours, strict=True
    ):
        torch.testing.assert_close(small, large, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_what_stands_in_an_ignored_row_or_at_an_unused_weight_does_not_show_in_a_small_call(reduction, monkeypatch):
    """Of a few rows on a CPU, by ATen's log_softmax."""
    logits = torch.randn(5, 3, dtype=torch.float64)
    logits[1], labels = float("nan"), torch.tensor([1, -100, 2, -100, 1])
    weight = torch.tensor([float("inf"), 0.5, 2.0], dtype=torch.float64)  # no label is 0
    results = []
    for aten in (False, True):
        monkeypatch.setattr(dispatch, "ATEN", aten)
        leaf = logits.clone().requires_grad_()
        loss = functional.focal_loss(leaf, labels, weight, reduction=reduction)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    assert all(value.isfinite().all() for value in results[1])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


OTHER_PROCESSES = ("process_group", "group", "vocab_start")  # the reference is one process


@pytest.mark.parametrize("name", sorted({case.name for case in CASES}))
def test_the_reference_has_the_same_signature(name):
    ours, plain = (
        inspect.signature(getattr(module, name)).parameters.values() for module in (functional, reference.losses)
    )
    ours, plain = ([(p.name, p.default, p.kind) for p in own if p.name not in OTHER_PROCESSES] for own in (ours, plain))
    assert ours == plain


def test_every_public_loss_stands_in_the_table():
    public = {name for name, value in vars(functional).items() if inspect.isfunction(value)}
    assert public == {case.name for case in CASES}
