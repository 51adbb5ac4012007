"""Sets of labels: every reading of the margin_rows family takes them as PyTorch does, wherever they end and whatever stands twice."""

import pytest
import torch
from conftest import INTERPRET
from hypothesis import given, settings, strategies

from triton_losses import functional
from triton_losses.core.formula import FORMULAS
from triton_losses.families import margin_native, margin_rows

few = settings(max_examples=6 if INTERPRET else 40, deadline=None, derandomize=True, database=None)


@strategies.composite
def scores_and_sets(draw):
    """Whole numbers, so that many lie exactly at the margin; any labels in any order, -1 anywhere."""
    rows, columns = draw(strategies.integers(1, 3)), draw(strategies.integers(2, 7))
    of_rows = lambda low, high: strategies.lists(strategies.integers(low, high), min_size=rows * columns, max_size=rows * columns)
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
    formula, options = FORMULAS["margin_excess"], ([1.0], reduction)
    torch.testing.assert_close(of(lambda x, labels: functional.multilabel_margin_loss(x, labels, reduction=reduction)), expected)
    torch.testing.assert_close(of(lambda x, labels: margin_rows.margin_rows(formula, x, labels, None, *options)), expected)
    torch.testing.assert_close(of(lambda x, labels: margin_rows.Whole.apply(x, labels, None, formula.name, *options, x.dtype)), expected)


def test_function_transforms_of_a_set_are_those_of_its_rows():
    scores, labels = torch.randn(3, 4, 5, dtype=torch.float64), torch.randint(-1, 5, (3, 4, 5))
    loss = lambda x, labels: margin_rows.margin_rows(FORMULAS["margin_excess"], x, labels, None, [1.0])
    together = torch.func.vmap(torch.func.grad(loss))(scores, labels)
    each = [value_and_gradient(lambda x, labels=labels[i]: loss(x, labels), scores[i])[1] for i in range(3)]
    torch.testing.assert_close(together, 2 * torch.stack(each))  # whose upstream gradient is a half


def test_function_transforms_of_one_label_a_row_are_those_of_its_rows():
    scores, labels, weight = torch.randn(3, 4, 5, dtype=torch.float64), torch.randint(5, (3, 4)), torch.rand(5, dtype=torch.float64)
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
    x, weight = torch.randn(3, 9, device=device), torch.rand(9, device=device)
    labels = torch.randint(9, (3, 9 if a_set else 1), device=device)
    labels[:, 2:] = -1
    if device == "cpu" and not INTERPRET:
        forward, backward = margin_native.margin_native_forward, margin_native.margin_native_backward
        options = 2 - a_set, 0.3, reduction
    else:
        forward, backward = margin_rows.margin_rows_forward, margin_rows.margin_rows_backward
        options = "squared_margin_excess", [0.3], reduction
    torch.library.opcheck(forward.overload, (x, labels, weight, *options, torch.float32), test_utils=OP_TESTS)
    out, saved = forward(x, labels, weight, *options, torch.float32)
    torch.library.opcheck(backward.overload, (x, labels, weight, saved, torch.randn_like(out), *options), test_utils=OP_TESTS)
