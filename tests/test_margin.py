"""Sets of labels: every reading of the margin_rows family takes them as PyTorch does, wherever they end and whatever
stands twice.
"""

import pytest
import torch
from conftest import INTERPRET
from hypothesis import given, settings, strategies

from triton_losses import functional
from triton_losses.core import dispatch
from triton_losses.core.formula import FORMULAS
from triton_losses.families.margin_rows import Problem, margin_rows, read

few = settings(max_examples=6 if INTERPRET else 40, deadline=None, derandomize=True, database=None)


@strategies.composite
def scores_and_sets(draw):
    """Whole numbers, so that many lie exactly at the margin; any labels in any order, -1 anywhere."""
    rows, columns = draw(strategies.integers(1, 3)), draw(strategies.integers(2, 7))
    of_rows = lambda low, high: strategies.lists(
        strategies.integers(low, high), min_size=rows * columns, max_size=rows * columns
    )
    scores, labels = draw(of_rows(-2, 2)), draw(of_rows(-1, columns - 1))
    return torch.tensor(scores, dtype=torch.float64).view(rows, columns), torch.tensor(labels).view(rows, columns)


def value_and_gradient(loss, scores):
    scores = scores.clone().requires_grad_()
    value = loss(scores)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    return value.detach(), torch.autograd.grad(value, scores, upstream)[0]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@few
@given(scores_and_sets())
def test_every_reading_of_a_set_is_pytorchs(reduction, drawn):
    scores, labels = drawn
    of = lambda serve: value_and_gradient(lambda x: serve(x, labels), scores)
    expected = of(lambda x, labels: torch.nn.functional.multilabel_margin_loss(x, labels, reduction=reduction))
    problem = Problem("margin_excess", 1.0, reduction, scores.dtype)
    torch.testing.assert_close(
        of(lambda x, labels: functional.multilabel_margin_loss(x, labels, reduction=reduction)), expected
    )
    torch.testing.assert_close(of(lambda x, labels: read.in_plain_torch(problem, (x, labels))[0]), expected)


def test_function_transforms_of_a_set_are_those_of_its_rows():
    scores, labels = torch.randn(3, 4, 5, dtype=torch.float64), torch.randint(-1, 5, (3, 4, 5))
    loss = lambda x, labels: margin_rows(FORMULAS["margin_excess"], x, labels)
    together = torch.func.vmap(torch.func.grad(loss))(scores, labels)
    each = [value_and_gradient(lambda x, labels=labels[i]: loss(x, labels), scores[i])[1] for i in range(3)]
    torch.testing.assert_close(together, 2 * torch.stack(each))  # whose upstream gradient is a half


def test_function_transforms_of_one_label_a_row_are_those_of_its_rows():
    scores, labels, weight = (
        torch.randn(3, 4, 5, dtype=torch.float64),
        torch.randint(5, (3, 4)),
        torch.rand(5, dtype=torch.float64),
    )
    loss = lambda x, labels: functional.multi_margin_loss(x, labels, p=2, weight=weight)
    together = torch.func.vmap(torch.func.grad(loss))(scores, labels)
    each = [value_and_gradient(lambda x, labels=labels[i]: loss(x, labels), scores[i])[1] for i in range(3)]
    torch.testing.assert_close(together, 2 * torch.stack(each))
    hessian = torch.func.jacrev(torch.func.jacrev(loss))(scores[0], labels[0])
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(lambda x: loss(x, labels[0]), scores[0]))
    assert hessian.any()


OP_TESTS = ("test_schema", "test_faketensor")  # autograd is the Functions', not the ops'


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("a_set", [False, True])
def test_the_ops_are_well_behaved(a_set, reduction, device):
    x, weight = torch.randn(3, 9, device=device), None if a_set else torch.rand(9, device=device)
    labels = torch.randint(9, (3, 9) if a_set else (3,), device=device)
    if a_set:
        labels[:, 2:] = -1
    tensors = [x, labels] if a_set else [x, labels, weight]
    problem = Problem(
        "margin_excess" if a_set else "squared_margin_excess", 1.0 if a_set else 0.3, reduction, torch.float32
    )
    torch.library.opcheck(read.forward_op, (tensors, *problem), test_utils=OP_TESTS)
    out, *saved = read.forward_op(tensors, *problem)
    upstream, wanted = [torch.randn_like(out)], [True, *[False] * (len(tensors) - 1)]
    torch.library.opcheck(read.backward_op, (tensors, saved, upstream, wanted, *problem), test_utils=OP_TESTS)


@pytest.fixture
def aten(calls_are_ours, monkeypatch):
    """Calls with few numbers on a CPU go to ATen, as they do outside of tests."""
    monkeypatch.setattr(dispatch, "ATEN", True)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("p", [1, 2, "a set"])
def test_calls_that_go_to_aten_have_second_derivatives(p, reduction, aten):
    x, weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.rand(5, dtype=torch.float64)
    if p == "a set":
        labels = torch.tensor([[1, 3, -1, 0, 0], [2, 2, -1, 0, 0], [-1, 0, 0, 0, 0]])
        loss = lambda x: functional.multilabel_margin_loss(x, labels, reduction=reduction)
    else:
        loss = lambda x: functional.multi_margin_loss(x, torch.tensor([1, 4, 0]), p, 0.3, weight, reduction=reduction)
    assert "Margin" in loss(x).grad_fn.name()  # ATen's
    assert torch.autograd.gradcheck(loss, x) and torch.autograd.gradgradcheck(lambda x: loss(x).square(), x)
    upstreams = torch.randn(2, *loss(x).shape, dtype=torch.float64)
    (together,) = torch.autograd.grad(loss(x), x, upstreams, is_grads_batched=True)
    torch.testing.assert_close(
        together, torch.stack([torch.autograd.grad(loss(x), x, upstream)[0] for upstream in upstreams])
    )
    hessian = torch.func.jacrev(torch.func.jacrev(lambda x: loss(x).sum()))(x.detach())
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(lambda x: loss(x).sum(), x))


@pytest.mark.not_interpreted
@pytest.mark.parametrize(
    "error, named, name, target",
    [
        (RuntimeError, "7", "multi_margin_loss", torch.tensor([0, 7, 1])),
        (TypeError, "None", "multi_margin_loss", None),
        (RuntimeError, "-3", "multilabel_margin_loss", torch.full((3, 5), -3)),
        (RuntimeError, "int32", "multi_margin_loss", torch.zeros(3).int()),
    ],
)
def test_calls_that_go_to_aten_say_what_they_refuse(error, named, name, target, aten):
    with pytest.raises(error, match=named):
        getattr(functional, name)(torch.randn(3, 5), target)
