"""Keras' cross entropies in the table."""

import torch

from reference.cases.case import IGNORED, ROWS
from reference.cases.classification import logits_and_all_labels, logits_and_probabilities, logits_and_soft_labels
from reference.cases.draws import hard_rows, logits_and_labels, rows


def chances_and_probabilities(shape, dtype):
    return torch.rand(shape, dtype=dtype) + 0.01, logits_and_probabilities(shape, dtype)[1]


def chances_and_soft_labels(shape, dtype):
    return torch.rand(shape, dtype=dtype) + 0.01, logits_and_soft_labels(shape, dtype)[1]


def chances_and_labels(shape, dtype):
    return torch.rand(shape, dtype=dtype) + 0.01, logits_and_labels(shape, dtype)[1]


def chances_and_all_labels(shape, dtype):
    return torch.rand(shape, dtype=dtype) + 0.01, logits_and_all_labels(shape, dtype)[1]


def certain_and_impossible(shape, dtype):
    """Chances of 1, of 0, and of less than is told from 0; for one-hot targets."""
    input, labels = chances_and_all_labels(shape, dtype)
    input[::3] = 0
    input[::3, 1], input[1::3, 2], input[2, 3] = 1, 0, 1e-9
    labels[0], labels[1], labels[2], labels[3] = 1, 2, 3, 4
    return input, torch.nn.functional.one_hot(labels, shape[1]).to(dtype)


def certain_and_impossible_labels(shape, dtype):
    input, target = certain_and_impossible(shape, dtype)
    labels = target.argmax(1)
    labels[4] = IGNORED
    return input, labels


def no_chances(shape, dtype):
    """A row of zeros, a nan, an infinity."""
    input, target = chances_and_probabilities(shape, dtype)
    input[0], input[1, 3], input[2, 4] = 0, float("nan"), float("inf")
    return input, target


def no_chances_and_labels(shape, dtype):
    input, labels = no_chances(shape, dtype)[0], logits_and_labels(shape, dtype)[1]
    input[4] = float("nan")
    return input, labels


FEW = ROWS[::3]
IGNORING = {"ignore_index": IGNORED}
TIMED = {"quick": ((64, 10), (1024, 10000)), "full": ((64, 10), (8192, 1000), (1024, 32000))}

CASES = [
    rows("categorical_cross_entropy", (), chances_and_probabilities, bench=TIMED),
    rows("categorical_cross_entropy", {"label_smoothing": 0.1}, chances_and_soft_labels, differentiable=2, shapes=FEW),
    rows("categorical_cross_entropy", {"dim": -1, "label_smoothing": 0.3}, chances_and_soft_labels, shapes=FEW),
    rows(
        "categorical_cross_entropy", {"from_logits": True, "label_smoothing": 0.1}, logits_and_probabilities, shapes=FEW
    ),
    hard_rows("categorical_cross_entropy", certain_and_impossible),
    hard_rows("categorical_cross_entropy", certain_and_impossible, {"label_smoothing": 0.1}),
    hard_rows("categorical_cross_entropy", no_chances),
    rows("sparse_categorical_cross_entropy", (), chances_and_all_labels, bench=TIMED),
    rows("sparse_categorical_cross_entropy", IGNORING, chances_and_labels),
    rows("sparse_categorical_cross_entropy", {"from_logits": True, **IGNORING}, logits_and_labels, shapes=FEW),
    hard_rows("sparse_categorical_cross_entropy", certain_and_impossible_labels, IGNORING),
    hard_rows("sparse_categorical_cross_entropy", no_chances_and_labels, IGNORING),
]
