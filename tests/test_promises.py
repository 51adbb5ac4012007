"""What torch promises of any function holds for ours: for all strides and numbers, in every kind of gradient."""

import functools

import pytest
import torch
from conftest import INTERPRET
from hypothesis import given, settings, strategies
from table import (
    FIRST,
    FUNCTIONS,
    HEADS,
    MARGINS,
    PLAIN,
    REGIONS,
    SEQUENCES,
    SOME,
    WITH_LABELS,
    class_weights,
    draw,
    prepared,
)

import reference.losses
from triton_losses import functional

LAYOUTS = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda t: torch.stack([torch.zeros_like(t), t], -1)[..., 1],
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_strides_and_blocks_do_not_matter(case, layout, device, monkeypatch):
    """Of inputs and of the upstream gradient; there are more numbers than one block of the CPU path takes."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # what the size of a block hangs on
    shape = (2, 3, 4, 5) if INTERPRET else (3, 5, 90, 70)
    shape = shape[:3] if case.steps else shape[2:] if case.pairwise else shape
    (tensors, options), results = case.arguments(shape, torch.float32, device, reduction="none"), []
    for module, arrange in ((functional, lambda t: t), (reference.losses, torch.Tensor.contiguous)):
        arranged = [arrange(layout(t)).detach().requires_grad_(i < case.differentiable) for i, t in enumerate(tensors)]
        value = getattr(module, case.name)(*arranged, **options)
        upstream = layout(torch.randn(value.shape, generator=torch.Generator().manual_seed(2)).to(device))
        results.append([value, *torch.autograd.grad(value, arranged[: case.differentiable], arrange(upstream))])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5 if case.pairwise else 2e-6)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_nothing_is_mutated_and_every_run_is_the_same(case, device):
    """Bit for bit: a second run, a second backward through the same graph, and every tensor that went in."""
    tensors, options = case.arguments(case.shape(6, 5), torch.float32, device, reduction="none")
    inputs, loss_of = [t.requires_grad_() for t in tensors[: case.differentiable]], getattr(functional, case.name)
    runs, upstream = [], torch.randn(loss_of(*tensors, **options).shape, device=device)
    passed = [t for t in (*tensors, *options.values(), upstream) if isinstance(t, torch.Tensor)]
    before = [(t._version, t.detach().clone()) for t in passed]
    for _ in range(2):
        loss = loss_of(*tensors, **options)
        runs += [[loss, *torch.autograd.grad(loss, inputs, upstream, retain_graph=True)] for _ in range(2)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    assert all(
        t._version == version and torch.equal(t, values) for t, (version, values) in zip(passed, before, strict=True)
    )


@pytest.mark.parametrize(
    "case",
    [case for case in PLAIN if (case in SOME and case.name != "ctc_loss") or "exact_gradient" in case.options],
    ids=str,
)
def test_gradients_are_those_of_the_value_and_the_same_where_they_can_be_differentiated(case, device):
    loss, inputs = prepared(case, device, shape=(3, 4), dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
    plain, differentiable = (
        torch.autograd.grad(loss(*inputs).sum(), inputs, create_graph=create) for create in (False, True)
    )
    torch.testing.assert_close(differentiable, plain)


TWICE = [
    ("mse_loss", {}),
    ("huber_loss", {"delta": 0.7}),
    ("log_cosh_loss", {}),
    ("sigmoid_focal_loss", {"gamma": 1.5}),
    ("binary_cross_entropy_with_logits", {"pos_weight": class_weights().double()}),
    ("cross_entropy", {"label_smoothing": 0.1, "z_loss": 0.01, "weight": class_weights().double()}),
    ("multi_margin_loss", {"p": 2, "weight": class_weights().double()}),
    ("multilabel_soft_margin_loss", {}),
    ("focal_loss", {"gamma": 0.5}),
    ("focal_loss", {"gamma": 0.0}),
    ("focal_loss", {"weight": class_weights().double()}),
]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name, options", TWICE, ids=lambda thing: thing if isinstance(thing, str) else "-".join(thing))
def test_second_derivatives_are_those_of_the_gradient(name, options, reduction, device):
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    loss, inputs = prepared(FIRST[name], device, shape=(3, 5), dtype=torch.float64, reduction=reduction, **options)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


def test_pos_weight_gets_its_gradient(device):
    input, target = draw("binary_cross_entropy_with_logits", device, dtype=torch.float64)
    weight = class_weights().double().to(device).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: functional.binary_cross_entropy_with_logits(input, target, pos_weight=w), [weight]
    )


@pytest.mark.not_interpreted
@pytest.mark.parametrize(
    "name", ["huber_loss", "binary_cross_entropy_with_logits", "nll_loss", "cross_entropy", "focal_loss"]
)
def test_function_transforms_give_what_they_give_of_plain_torch(name, device):
    ours, inputs = prepared(FIRST[name], device, dtype=torch.float64)
    plain, _ = prepared(FIRST[name], device, reference.losses, dtype=torch.float64)
    inputs = [t.detach() for t in inputs]
    many = [torch.stack([t, 0.5 * t, 1 - t]) for t in inputs]
    for transform in (torch.func.grad, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        torch.testing.assert_close(transform(ours)(*inputs), transform(plain)(*inputs))
    for transform in (lambda f: f, torch.func.grad):
        torch.testing.assert_close(torch.func.vmap(transform(ours))(*many), torch.func.vmap(transform(plain))(*many))


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_inference_needs_no_graph(case, device):
    loss, inputs = prepared(case, device)
    recorded = loss(*inputs)
    with torch.no_grad():
        assert torch.equal(loss(*inputs), recorded) and not loss(*inputs).requires_grad
    with torch.inference_mode():
        assert torch.equal(loss(*inputs), recorded) and loss(*(t.clone() for t in inputs)).is_inference()


few = settings(max_examples=3 if INTERPRET else 30, deadline=None, derandomize=True, database=None)
sizes = strategies.integers(1, 6)


def law(**more):
    """Holds for tensors of any shape and numbers."""
    return lambda test: few(given(rows=sizes, columns=sizes, seed=strategies.integers(0, 2**31), **more)(test))


LAWFUL = {name: loss for name, loss in FUNCTIONS.items() if name not in (*SEQUENCES, *REGIONS)}


@law()
def test_the_mean_is_the_sum_over_the_number(rows, columns, seed):
    for name, loss in LAWFUL.items():
        *inputs, target = draw(name, "cpu", (rows, columns), torch.float64, seed)
        labels = name in WITH_LABELS and name not in MARGINS
        number = (
            (target != -100).sum()
            if labels and not target.is_floating_point()
            else loss(*inputs, target, reduction="none").numel()
        )
        torch.testing.assert_close(
            loss(*inputs, target, reduction="mean"), loss(*inputs, target, reduction="sum") / number
        )


OF_ROWS_ALONE = {n: loss for n, loss in LAWFUL.items() if n not in HEADS and not FIRST[n].pairwise}


@law(more_rows=sizes)
def test_the_loss_of_two_batches_is_the_sum_of_their_losses(rows, more_rows, columns, seed):
    for name, loss in OF_ROWS_ALONE.items():
        batches = [draw(name, "cpu", (n, columns), torch.float64, seed + n) for n in (rows, more_rows)]
        together = loss(*(torch.cat(pair) for pair in zip(*batches)), reduction="sum")
        torch.testing.assert_close(together, sum(loss(*batch, reduction="sum") for batch in batches))


SOFTMAX = [
    functional.cross_entropy,
    functional.focal_loss,
    functools.partial(functional.cross_entropy, label_smoothing=0.3),
]


@law(offset=strategies.floats(-1e4, 1e4))
def test_an_offset_common_to_a_rows_logits_changes_nothing(rows, columns, seed, offset):
    input, target = draw("cross_entropy", "cpu", (rows, columns), torch.float64, seed)
    offsets = offset * torch.rand(rows, 1, dtype=torch.float64)
    for loss in SOFTMAX:
        torch.testing.assert_close(loss(input + offsets, target), loss(input, target), rtol=1e-9, atol=1e-9)


@law()
def test_focal_loss_that_does_not_focus_is_cross_entropy(rows, columns, seed):
    input, target = draw("cross_entropy", "cpu", (rows, columns), torch.float64, seed)
    ours, torchs = (
        functional.focal_loss(input.requires_grad_(), target, gamma=0),
        torch.nn.functional.cross_entropy(input, target),
    )
    torch.testing.assert_close(ours, torchs)
    torch.testing.assert_close(torch.autograd.grad(ours, input), torch.autograd.grad(torchs, input))


@law()
def test_classes_may_come_in_any_order_and_labels_in_a_byte(rows, columns, seed):
    input, target = draw("cross_entropy", "cpu", (rows, columns), torch.float64, seed)
    target, order = target.clamp(min=0), torch.randperm(columns)
    for loss in SOFTMAX:
        (gradient,) = torch.autograd.grad(loss(input.requires_grad_(), target), input)
        permuted = input.detach()[:, order].requires_grad_()
        (of_permuted,) = torch.autograd.grad(loss(permuted, order.argsort()[target].to(torch.uint8)), permuted)
        torch.testing.assert_close(of_permuted, gradient[:, order])
