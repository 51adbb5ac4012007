"""Keras' cross entropies: its own published numbers, and the laws of chances that are given up to a factor."""

import pytest
import torch
from conftest import INTERPRET
from hypothesis import given, settings, strategies
from test_bad_input import CHANCES, ELSEWHERE, INTEGERS, LABELS, LABELS_ELSEWHERE, NAN, NUMBERS, labelled, of

from triton_losses import functional

few = settings(max_examples=4 if INTERPRET else 30, deadline=None, derandomize=True, database=None)


def test_the_examples_of_keras_documentation_hold(device):
    """keras.losses.CategoricalCrossentropy and SparseCategoricalCrossentropy: [0.0513, 2.303], 1.177 on average."""
    chances, labels = (
        torch.tensor([[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]], device=device),
        torch.tensor([1, 2], device=device),
    )
    one_hot, each = (
        torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], device=device),
        torch.tensor([0.0513, 2.303], device=device),
    )
    for loss, target in (
        (functional.categorical_cross_entropy, one_hot),
        (functional.sparse_categorical_cross_entropy, labels),
    ):
        torch.testing.assert_close(loss(chances, target, reduction="none"), each, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(loss(chances, target), torch.tensor(1.177, device=device), rtol=1e-3, atol=1e-3)


sizes = strategies.integers(1, 6)


@few
@given(rows=sizes, columns=sizes, seed=strategies.integers(0, 2**31), factor=strategies.floats(1e-3, 1e3))
def test_a_label_is_a_one_hot_row_and_a_common_factor_changes_nothing(rows, columns, seed, factor):
    torch.manual_seed(seed)
    chances, labels = torch.rand(rows, columns, dtype=torch.float64), torch.randint(columns, (rows,))
    one_hot = torch.nn.functional.one_hot(labels, columns)
    expected = None
    for scale in (1.0, factor):
        x = (scale * chances).requires_grad_()
        for loss in (
            functional.sparse_categorical_cross_entropy(x, labels),
            functional.categorical_cross_entropy(x, one_hot),
        ):
            found = loss, scale * torch.autograd.grad(loss, x)[0]
            expected = expected or found
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32], ids=str)
def test_labels_may_be_any_integers(dtype, device):
    chances, labels = CHANCES.to(device), LABELS.to(device)
    for more in ({}, {"from_logits": True}, {"ignore_index": 2}):
        wide = functional.sparse_categorical_cross_entropy(chances, labels, **more)
        assert torch.equal(functional.sparse_categorical_cross_entropy(chances, labels.to(dtype), **more), wide)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_classes_lie_where_dim_says(dim, device):
    x, labels, y = (
        torch.rand(3, 3, 3, device=device),
        torch.randint(3, (3, 3), device=device),
        torch.rand(3, 3, 3, device=device),
    )
    last, sparse = functional.categorical_cross_entropy, functional.sparse_categorical_cross_entropy
    for more in ({}, {"from_logits": True}):
        moved = last(x.movedim(dim, -1), y.movedim(dim, -1), dim=-1, reduction="none", **more)
        torch.testing.assert_close(last(x, y, dim=dim, reduction="none", **more), moved)
        moved = sparse(x.movedim(dim, -1), labels, dim=-1, reduction="none", **more)
        torch.testing.assert_close(sparse(x, labels, dim=dim, reduction="none", **more), moved)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_function_transforms_and_second_derivatives(reduction):
    x, y = torch.rand(3, 4, dtype=torch.float64) + 0.1, torch.rand(3, 4, dtype=torch.float64)
    labels = torch.tensor([0, -100, 3])
    losses = [
        lambda x: functional.categorical_cross_entropy(x, y, label_smoothing=0.1, reduction=reduction),
        lambda x: functional.sparse_categorical_cross_entropy(x, labels, ignore_index=-100, reduction=reduction),
    ]
    for loss in losses:
        assert torch.autograd.gradcheck(loss, x.requires_grad_()) and torch.autograd.gradgradcheck(loss, x)
        plain = torch.autograd.functional.jacobian(loss, x.detach())
        torch.testing.assert_close(torch.func.jacrev(loss)(x.detach()), plain)
        many = torch.stack([x.detach(), 2 * x.detach()])
        torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(loss))(many)[0], plain)


REFUSALS = [
    (ValueError, "(5,)", of("categorical_cross_entropy", CHANCES, CHANCES[0])),
    (ValueError, "1.5", of("categorical_cross_entropy", CHANCES, CHANCES, label_smoothing=1.5)),
    (ValueError, "nan", of("categorical_cross_entropy", CHANCES, CHANCES, label_smoothing=NAN)),
    (ValueError, "average", of("categorical_cross_entropy", CHANCES, CHANCES, reduction="average")),
    (IndexError, "2", of("categorical_cross_entropy", CHANCES, CHANCES, dim=2)),
    (IndexError, "()", of("categorical_cross_entropy", CHANCES[0, 0], CHANCES[0, 0])),
    (NotImplementedError, "int64", of("categorical_cross_entropy", INTEGERS, CHANCES)),
    (RuntimeError, "meta", of("categorical_cross_entropy", CHANCES, ELSEWHERE)),
    (TypeError, "[1.0]", of("categorical_cross_entropy", CHANCES, [1.0])),
    (ValueError, "(3,)", of("sparse_categorical_cross_entropy", CHANCES, LABELS[:3])),
    (ValueError, "(4, 1)", of("sparse_categorical_cross_entropy", CHANCES, LABELS[:, None])),
    (ValueError, "(4,)", of("sparse_categorical_cross_entropy", CHANCES, LABELS, dim=0)),
    (RuntimeError, "float32", of("sparse_categorical_cross_entropy", CHANCES, LABELS.float())),
    (RuntimeError, "bool", of("sparse_categorical_cross_entropy", CHANCES, LABELS > 1)),
    (IndexError, "5", of("sparse_categorical_cross_entropy", CHANCES, labelled(0, 5, 2, 1))),
    (IndexError, "-100", of("sparse_categorical_cross_entropy", CHANCES, labelled(0, -100, 2, 1))),
    (IndexError, "7", of("sparse_categorical_cross_entropy", NUMBERS, labelled(0, 7, 2, 1), from_logits=True)),
    (TypeError, "1.5", of("sparse_categorical_cross_entropy", CHANCES, LABELS, ignore_index=1.5)),
    (RuntimeError, "meta", of("sparse_categorical_cross_entropy", CHANCES, LABELS_ELSEWHERE)),
]


@pytest.mark.parametrize("kind, named, call", REFUSALS, ids=[f"{kind.__name__} {named}" for kind, named, _ in REFUSALS])
def test_refuses_what_breaks_its_rules(kind, named, call):
    with pytest.raises(kind) as caught:
        call(functional)
    assert named in str(caught.value)
