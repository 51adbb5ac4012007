"""The binary losses of the table."""

import torch

from reference.cases.case import TIMED, TIMED_LESS, Case
from reference.cases.draws import like_input, per_column, with_nan


def chances_and_chances(shape, dtype):
    return torch.rand(shape, dtype=torch.float64).clamp(0.01, 0.99).to(dtype), torch.rand(shape, dtype=dtype)


def certain_chances(shape, dtype):
    """Chances of exactly 0 and 1 and of almost, for bits."""
    return torch.tensor([0.0, 1.0, 1e-7, 0.999, 0.5], dtype=dtype)[torch.randint(5, shape)], torch.randint(2, shape).to(
        dtype
    )


def numbers_and_signs(shape, dtype):
    return torch.randn(shape, dtype=dtype) * 2, torch.randint(2, shape).to(dtype) * 2 - 1


def margins(shape, dtype):
    """Exactly at the margin, at 0, nan and infinite."""
    spots = torch.tensor(
        [-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 9.0, float("inf"), -float("inf"), float("nan")], dtype=dtype
    )
    return spots[torch.randint(len(spots), shape)], numbers_and_signs(shape, dtype)[1]


def logits_and_chances(shape, dtype):
    return torch.randn(shape, dtype=dtype) * 3, torch.rand(shape, dtype=dtype)


def logits_and_bits(shape, dtype):
    return torch.randn(shape, dtype=dtype) * 3, torch.randint(2, shape).to(dtype)


def logits_and_classes(shape, dtype):
    """An index of a class for each row, every third of them background."""
    classes = torch.randint(shape[-1], shape[:-1])
    classes.view(-1)[1::3] = -1
    return torch.randn(shape, dtype=dtype) * 3, classes


def huge_logits_and_few_classes(shape, dtype):
    return torch.randn(shape, dtype=dtype) * 1e4, torch.randint(min(2, shape[-1]), shape[:-1]).to(torch.uint8)


def huge_logits_and_bits(shape, dtype):
    return torch.randn(shape, dtype=dtype) * 1e4, torch.randint(2, shape).to(dtype)


# ragged, one class, one row, whole vectors, more than a block
CLASSES = ((7, 130), (5, 1), (4,), (2, 3, 16), (3, 3001))
TIMED_CLASSES = {"quick": ((1 << 17, 80),), "full": ((1 << 20, 80), (1 << 20, 91))}
SCORES = (
    "hinge_loss",
    "squared_hinge_loss",
    "perceptron_loss",
    "exponential_loss",
    "soft_margin_loss",
    "hinge_embedding_loss",
)


def scores(name, options=(), draw=numbers_and_signs, **more):
    return Case(name, draw, dict(options), **more)


def binary(name, options=(), draw=logits_and_chances, **more):
    return Case(name, draw, dict(options), differentiable=2, **more)


CASES = [
    binary("binary_cross_entropy", (), chances_and_chances, bench=TIMED_LESS),
    binary("binary_cross_entropy", {"weight": like_input}, chances_and_chances),
    binary("binary_cross_entropy", {"weight": per_column}, chances_and_chances),
    binary("binary_cross_entropy", (), certain_chances, note="certain chances", shapes=((9, 7),)),
    *(
        scores(name, bench=TIMED_LESS)
        for name in ("hinge_loss", "squared_hinge_loss", "perceptron_loss", "exponential_loss")
    ),
    scores("hinge_loss", {"margin": 0.3}),
    scores("squared_hinge_loss", {"margin": 2.0}),
    scores("soft_margin_loss", differentiable=2, bench=TIMED_LESS),
    scores("soft_margin_loss", (), huge_logits_and_bits, note="huge logits", differentiable=2),
    scores("hinge_embedding_loss", bench=TIMED_LESS),
    scores("hinge_embedding_loss", {"margin": 0.3}, logits_and_bits),
    *(scores(name, (), margins, note="margins", shapes=((9, 7),)) for name in SCORES),
    binary(
        "multilabel_soft_margin_loss", bench={"quick": ((64, 10), (1 << 16, 64)), "full": ((64, 10), (1 << 20, 64))}
    ),
    scores("multilabel_soft_margin_loss", {"weight": per_column}, logits_and_bits),
    scores("multilabel_soft_margin_loss", {"weight": like_input}, huge_logits_and_bits, note="huge logits"),
    binary("multilabel_soft_margin_loss", (), with_nan, note="with nan"),
    binary("binary_cross_entropy_with_logits", bench=TIMED, headline=True),
    binary("binary_cross_entropy_with_logits", {"weight": like_input}),
    binary(
        "binary_cross_entropy_with_logits",
        {"weight": per_column, "pos_weight": per_column},
        bench={"full": ((1 << 18, 64),)},
    ),
    binary("binary_cross_entropy_with_logits", {"pos_weight": per_column}, huge_logits_and_bits, note="huge logits"),
    binary("binary_cross_entropy_with_logits", (), with_nan, note="with nan"),
    binary("sigmoid_focal_loss", {"reduction": "mean"}, logits_and_bits, bench=TIMED, headline=True),
    binary("sigmoid_focal_loss", {"alpha": 0.6, "gamma": 1.5}),
    binary("sigmoid_focal_loss", {"alpha": -1.0, "gamma": 0.0}, logits_and_bits),
    binary(
        "sigmoid_focal_loss", {"alpha": None, "gamma": 1.0}, logits_and_bits
    ),  # at 2 plain float64 itself is off by more than the budget
    binary("sigmoid_focal_loss", {"gamma": 0.5}, huge_logits_and_bits, note="huge logits"),
    Case("sigmoid_focal_loss", logits_and_classes, {"alpha": 0.75}, shapes=CLASSES, bench=TIMED_CLASSES),
    Case(
        "sigmoid_focal_loss",
        huge_logits_and_few_classes,
        {"alpha": -1.0, "background": 0},
        note="huge logits",
        shapes=CLASSES,
    ),
]
