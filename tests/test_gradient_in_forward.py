"""cross_entropy and focal_loss with gradient_in_forward and overwrite: the same numbers from one pass over the rows."""

import pytest
import torch
from conftest import INTERPRET
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_losses import functional
from triton_losses.core.compiler import runs_kernels
from triton_losses.families import label_rows

ROWS = 5
OPTIONS = {
    "cross_entropy": (
        {},
        {"label_smoothing": 0.1, "weight": True},
        {"z_loss": 0.1, "temperature": 2.0},
        {"softcap": 3.0},
    ),
    "focal_loss": ({}, {"gamma": 1.5, "weight": True}),
}
CALLS = [pytest.param(name, options, id=f"{name} {options}") for name, calls in OPTIONS.items() for options in calls]
ONE_PASS = [{"gradient_in_forward": True}, {"overwrite": True}]


def example(device, options, columns=7, dtype=torch.float32, ignored=True):
    logits = torch.randn(ROWS, columns, dtype=torch.float64).to(dtype)
    labels = torch.arange(ROWS) % columns
    if ignored:
        labels[1] = -100
    options = dict(options)
    if options.get("weight"):
        options["weight"] = torch.linspace(0.5, 2.0, columns).to(device)
    return logits.to(device).requires_grad_(), labels.to(device), options


def result(name, leaf, labels, options, upstream=None):
    """The loss, and the gradient of a leaf whose double, which can be overwritten, is the loss's input."""
    logits = leaf * 2
    loss = getattr(functional, name)(logits, labels, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    return loss, gradient


@pytest.mark.parametrize("one_pass", ONE_PASS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("name", "options"), CALLS)
def test_the_numbers_are_those_of_two_passes(name, options, reduction, one_pass, device):
    """To the bit where rows are short. Programs that take long rows in turn add them up in another order.

    Then p may differ by the rounding of log p: 17 · 2⁻⁵³ of it. Terms of at most 1e-2 are subtracted from it.
    """
    for columns, dtype in ((1, torch.float32), (7, torch.float32), (5000, torch.float64)):
        leaf, labels, options_here = example(device, {**options, "reduction": reduction}, columns, dtype)
        upstream = torch.ones(ROWS if reduction == "none" else (), device=device)
        wanted = result(name, leaf, labels, options_here, upstream)
        found = result(name, leaf, labels, {**options_here, **one_pass}, upstream)
        rounding = {"rtol": 0, "atol": 0} if columns < 5000 else {"rtol": 1e-14, "atol": 1e-17}
        torch.testing.assert_close(found, wanted, **rounding)


@pytest.mark.parametrize("one_pass", ONE_PASS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@settings(deadline=None, max_examples=5 if INTERPRET else 25)
@given(factors=st.lists(st.sampled_from([1.0, 0.0, -2.0, 0.3, 65536.0]), min_size=ROWS, max_size=ROWS), data=st.data())
def test_any_upstream_gradient_is_right(one_pass, reduction, factors, data):
    device = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
    columns = data.draw(st.sampled_from([1, 3, 64, 4100]))
    leaf, labels, options = example(device, {"reduction": reduction}, columns, torch.float64)
    upstream = torch.tensor(factors, device=device, dtype=torch.float64)
    upstream = upstream if reduction == "none" else upstream[0]
    _, wanted = result("cross_entropy", leaf, labels, options, upstream)
    _, found = result("cross_entropy", leaf, labels, {**options, **one_pass}, upstream)
    # 2 (p - 1) u: where p is close to 1, the difference keeps the rounding of p, some units of 2⁻⁵³
    bound = 1e-14 * wanted.abs() + 2**-49 * (upstream[:, None] if upstream.dim() else upstream).abs()
    assert ((found - wanted).abs() <= bound).all(), (found, wanted)


def test_a_second_backward_and_second_derivatives_are_right(device):
    leaf, labels, _ = example(device, {}, dtype=torch.float64)
    loss = functional.cross_entropy(leaf, labels, gradient_in_forward=True)
    gradients = [torch.autograd.grad(loss * factor, leaf, retain_graph=True)[0] / factor for factor in (3.0, 1.0, 0.5)]
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[2], gradients[1])
    assert torch.autograd.gradgradcheck(lambda x: functional.cross_entropy(x, labels, gradient_in_forward=True), leaf)


def test_the_gradient_replaces_the_logits_only_if_that_is_asked(device):
    leaf, labels, _ = example(device, {})
    for overwrite in (False, True):
        logits = leaf * 2
        before = logits.detach().clone()
        loss = functional.cross_entropy(logits, labels, gradient_in_forward=True, overwrite=overwrite)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.equal(logits, gradient if overwrite else before)
        assert (gradient.data_ptr() == logits.data_ptr()) == overwrite


def test_the_same_logits_without_gradient_are_never_overwritten(device):
    leaf, labels, _ = example(device, {})
    before = leaf.detach().clone()
    functional.cross_entropy(leaf.detach(), labels, overwrite=True)
    with torch.no_grad():
        functional.cross_entropy(leaf, labels, overwrite=True)
    assert torch.equal(leaf, before)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:, :5], lambda x: x.view(-1, x.shape[-1])], ids=range(3))
@pytest.mark.parametrize("name", OPTIONS)
def test_a_leaf_is_not_overwritten(name, view, device):
    leaf, labels, _ = example(device, {})
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="overwrite=True.*leaf"):
        getattr(functional, name)(view(leaf), labels, overwrite=True)
    assert torch.equal(leaf, before)


def overwritten(device):
    leaf, labels, _ = example(device, {})
    logits = leaf * 2
    return logits, functional.cross_entropy(logits, labels, overwrite=True)


def test_an_overwritten_input_refuses_a_second_backward(device):
    logits, loss = overwritten(device)
    torch.autograd.grad(loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="overwrite=True"):
        torch.autograd.grad(loss, logits)


def test_an_overwritten_input_refuses_second_derivatives_and_batched_gradients(device):
    logits, loss = overwritten(device)
    with pytest.raises(RuntimeError, match="overwrite=True"):
        torch.autograd.grad(loss, logits, create_graph=True)
    logits, loss = overwritten(device)
    with pytest.raises(RuntimeError, match="overwrite=True"):
        torch.autograd.grad(loss, logits, torch.ones(2, device=device), is_grads_batched=True)


def test_autograd_refuses_an_operation_that_needs_the_overwritten_values(device):
    leaf, labels, _ = example(device, {})
    logits = leaf.tanh()  # its backward reads its result
    loss = functional.cross_entropy(logits, labels, overwrite=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_padding_beside_overwritten_rows_stays(device):
    leaf = torch.randn(ROWS, 9, device=device, requires_grad=True)
    wide = leaf * 2
    labels = torch.arange(ROWS, device=device)
    before = wide[:, 7:].detach().clone()
    loss = functional.cross_entropy(wide[:, :7], labels, overwrite=True)
    (loss * 3).backward()
    assert torch.equal(wide[:, 7:], before)
    wanted = torch.autograd.functional.jacobian(lambda x: 3 * functional.cross_entropy(x[:, :7] * 2, labels), leaf)
    torch.testing.assert_close(leaf.grad, wanted)


def test_float16_makes_its_gradient_in_the_backward(device):
    """A gradient of 1e-9 is 0 in float16, but a GradScaler's factor makes it a number."""
    x = torch.zeros(2, 2000, device=device, dtype=torch.float16)
    x[:, 0] = 18.0
    labels = torch.zeros(2, device=device, dtype=torch.int64)
    for one_pass in ONE_PASS:
        leaf = x.clone().requires_grad_()
        loss = functional.cross_entropy(leaf * 1, labels, **one_pass)
        (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 65504.0))
        assert gradient[0, 1] != 0


@pytest.mark.parametrize("shape", [(7,), (2, 7, 3), (2, 7, 2, 2)], ids=str)
def test_other_shapes_take_the_options_too(shape, device):
    leaf = torch.randn(shape, device=device, requires_grad=True)
    labels = torch.zeros(() if len(shape) == 1 else (shape[0], *shape[2:]), dtype=torch.int64, device=device)
    for memory_format in (torch.preserve_format, torch.channels_last)[: 1 + (len(shape) == 4)]:
        found = []
        for one_pass in ({}, *ONE_PASS):
            logits = (leaf * 2).clone(memory_format=memory_format)
            found.append(torch.autograd.grad(functional.cross_entropy(logits, labels, **one_pass), leaf)[0])
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_kernels_read_the_logits_once(device, monkeypatch):
    if not runs_kernels(torch.empty(0, device=device)):
        pytest.skip("a CPU has no kernels")
    passes = []
    prepared = label_rows.kernels.prepared
    monkeypatch.setattr(
        label_rows.kernels, "prepared", lambda *args, **kwargs: (passes.append(args[2]), prepared(*args, **kwargs))[1]
    )
    for one_pass, count in (({}, 2), *((options, 1) for options in ONE_PASS)):
        passes.clear()
        leaf, labels, _ = example(device, {})
        result("cross_entropy", leaf, labels, one_pass)
        assert len(passes) == count


@pytest.mark.not_interpreted
@pytest.mark.parametrize("one_pass", ONE_PASS, ids=str)
def test_a_compiled_call_takes_the_options(one_pass, device):
    leaf, labels, _ = example(device, {}, columns=50)

    def loss_of(leaf, labels, **options):
        return functional.cross_entropy(leaf * 2, labels, **options)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    wanted, found = loss_of(leaf, labels), compiled(leaf, labels, **one_pass)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaf)[0] for loss in (found, wanted)))
