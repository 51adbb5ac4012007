"""The multi-class margin losses of the table. They take rows, or one, and no more dimensions: larger shapes are drawn
as rows.
"""

import math

import torch

from reference.cases.case import HARD, Case
from reference.cases.classification import per_class


def rows_of(shape):
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else shape


def scores_and_labels(shape, dtype):
    shape = rows_of(shape)
    return torch.randn(shape, dtype=dtype) * 2, torch.randint(shape[-1], shape[:-1])


def scores_and_sets(shape, dtype):
    """Up to two labels, at times the same one twice, then a -1, then labels that do not count."""
    shape = rows_of(shape)
    columns, ends = torch.arange(shape[-1]), torch.randint(3, (*shape[:-1], 1))
    labels = torch.where(columns == ends, -1, torch.randint(shape[-1], shape))
    return torch.randn(shape, dtype=dtype) * 2, labels


def scores_and_full_sets(shape, dtype):
    """No -1: a label stands in every place."""
    shape = rows_of(shape)
    return torch.randn(shape, dtype=dtype) * 2, torch.randint(shape[-1], shape)


SPOTS = (-2.0, -1.0, 0.0, 1.0, 2.0)


def at_the_margin(shape, dtype):
    return torch.tensor(SPOTS, dtype=dtype)[torch.randint(len(SPOTS), shape)], torch.randint(shape[-1], shape[:-1])


def infinite_scores(shape, dtype):
    """And nan, which costs nothing: torch looks for what exceeds the margin."""
    spots = torch.tensor([*SPOTS, float("inf"), -float("inf"), float("nan")], dtype=dtype)
    return spots[torch.randint(len(spots), shape)], torch.randint(shape[-1], shape[:-1])


def sets_at_the_margin(shape, dtype):
    return at_the_margin(shape, dtype)[0], scores_and_sets(shape, dtype)[1]


def infinite_scores_and_sets(shape, dtype):
    return infinite_scores(shape, dtype)[0], scores_and_sets(shape, dtype)[1]


# not much wider first: PyTorch sums one after another, even in float64
SHAPES = ((7, 39), (5, 1), (1, 33), (6,), (3, 2071))


def margin(name, options=(), draw=scores_and_labels, **more):
    return Case(name, draw, dict(options), **{"shapes": SHAPES, **more})


def hard(name, draw, options=()):
    return Case(name, draw, dict(options), note=draw.__name__.replace("_", " "), shapes=HARD)


CASES = [
    margin(
        "multi_margin_loss", bench={"quick": ((64, 10), (1024, 8000)), "full": ((64, 10), (8192, 1000), (1024, 32000))}
    ),
    margin("multi_margin_loss", {"p": 2, "margin": 0.3}, bench={"full": ((1024, 32000),)}),
    margin("multi_margin_loss", {"p": 2, "weight": per_class}, shapes=SHAPES[::3]),
    margin("multi_margin_loss", {"margin": -0.5, "weight": per_class}, shapes=SHAPES[::3]),
    *(hard("multi_margin_loss", draw, {"p": p}) for draw in (at_the_margin, infinite_scores) for p in (1, 2)),
    margin(
        "multilabel_margin_loss",
        (),
        scores_and_sets,
        bench={"quick": ((64, 10), (1024, 1000)), "full": ((64, 10), (8192, 1000))},
    ),
    margin("multilabel_margin_loss", (), scores_and_full_sets, shapes=((3, 9), (2, 1))),
    *(hard("multilabel_margin_loss", draw) for draw in (sets_at_the_margin, infinite_scores_and_sets)),
]
