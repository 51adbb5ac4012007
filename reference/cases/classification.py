"""The classification losses of the table."""

import torch

from reference.cases.case import IGNORED, TIMED_IMAGES, TIMED_ROWS
from reference.cases.draws import hard_images, hard_rows, images, logits_and_labels, rows


def logits_and_all_labels(shape, dtype):
    """Class indices none of which lies outside the classes, for an ignore_index among them."""
    input, labels = logits_and_labels(shape, dtype)
    return input, labels.clamp(min=0)


def log_probabilities_and_all_labels(shape, dtype):
    input, labels = log_probabilities_and_labels(shape, dtype)
    return input, labels.clamp(min=0)


def log_probabilities_and_labels(shape, dtype):
    input, labels = logits_and_labels(shape, dtype)
    return input.log_softmax(min(len(shape) - 1, 1)), labels


def logits_and_probabilities(shape, dtype):
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype).softmax(min(len(shape) - 1, 1))


def logits_and_soft_labels(shape, dtype):
    """Probabilities that need not sum to 1, some of them 0."""
    return torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype) * (torch.rand(shape) > 0.2)


def masked_vocabulary(shape, dtype):
    """-inf logits, a whole leading block among them; labels are never masked."""
    input, labels = logits_and_labels(shape, dtype)
    input[:, : shape[1] // 2] = -float("inf")
    input[1:, -2] = -float("inf")
    return input, torch.where(labels == IGNORED, labels, shape[1] - 1)


def masked_label(shape, dtype):
    input, labels = logits_and_labels(shape, dtype)
    labels[0], input[0, 1] = 1, -float("inf")
    return input, labels


def lowest_logits(shape, dtype):
    """finfo.min, as attention-style masks use it: a whole row of it, and most of another."""
    input, labels = logits_and_labels(shape, dtype)
    input[0], input[1, 1:] = torch.finfo(dtype).min, torch.finfo(dtype).min
    return input, labels


def offset_logits(shape, dtype):
    """A common offset of 1e5 must cost no digits beyond those it costs the logits themselves."""
    input, labels = logits_and_labels(shape, dtype)
    return input + (1e5 if dtype != torch.float16 else 1e3), labels


def huge_logits(shape, dtype):
    input, labels = logits_and_labels(shape, dtype)
    return input * 5e3, labels


def a_nan_logit(shape, dtype):
    input, labels = logits_and_labels(shape, dtype)
    input[0, 1], input[2], input[3, 0] = float("nan"), -float("inf"), float("inf")
    return input, labels


def all_ignored(shape, dtype):
    input, labels = logits_and_labels(shape, dtype)
    return input, torch.full_like(labels, IGNORED)


def certain(shape, dtype):
    """The label's probability is 1, or almost: what focal modulators divide by."""
    input, labels = logits_and_labels(shape, dtype)
    rows = torch.arange(shape[0])
    input[rows, labels.clamp(min=0)] += torch.tensor([200.0, 17.0, 8.0])[rows % 3].to(dtype)
    return input, labels


def hard_pixels(shape, dtype):
    """nan, infinite and finfo.min, beside ordinary ones."""
    input, labels = logits_and_labels(shape, dtype)
    pixels = input.flatten(2)
    pixels[0, 1, 0], pixels[0, :, 1], pixels[0, 0, 2] = float("nan"), -float("inf"), float("inf")
    pixels[1, :, 0], pixels[1, 1:, 1], pixels[2, 1:, 0] = torch.finfo(dtype).min, torch.finfo(dtype).min, -float("inf")
    labels[2] = 0
    return input, labels


def per_class(input):
    return torch.rand(input.shape[min(input.dim() - 1, 1)], dtype=input.dtype).to(input.device) + 0.5


SHAPED = {
    "softcap": 2.0,
    "temperature": 1.5,
    "z_loss": 1e-2,
    "label_smoothing": 0.2,
    "weight": per_class,
    "ignore_index": 0,
}

CASES = [
    rows("nll_loss", (), log_probabilities_and_labels, bench=TIMED_ROWS),
    rows("nll_loss", {"weight": per_class, "ignore_index": 0}, log_probabilities_and_all_labels),
    hard_rows("nll_loss", all_ignored),
    rows("cross_entropy", bench=TIMED_ROWS, headline=True),
    rows("cross_entropy", {"weight": per_class, "ignore_index": 0}, logits_and_all_labels),
    rows("cross_entropy", {"label_smoothing": 0.1}, bench=TIMED_ROWS),
    rows("cross_entropy", {"label_smoothing": 0.1, "weight": per_class}),
    rows("cross_entropy", {"z_loss": 1e-2}),
    rows("cross_entropy", {"gradient_in_forward": True}, bench={"full": ((8192, 50257), (8192, 128256))}),
    rows("cross_entropy", {"gradient_in_forward": True, "label_smoothing": 0.1, "weight": per_class}),
    rows(
        "cross_entropy",
        {"z_loss": 1e-2, "label_smoothing": 0.2, "weight": per_class, "ignore_index": 0},
        logits_and_all_labels,
    ),
    rows("cross_entropy", {"softcap": 3.0, "temperature": 0.7}),
    rows("cross_entropy", SHAPED, logits_and_all_labels),
    rows("cross_entropy", {"label_smoothing": 0.2, "weight": per_class}, logits_and_probabilities),
    rows(
        "cross_entropy",
        {"softcap": 3.0, "temperature": 0.5, "z_loss": 1e-2},
        logits_and_probabilities,
        differentiable=2,
    ),
    rows("cross_entropy", {"z_loss": 1e-2}, logits_and_probabilities, bench={"full": ((1024, 32000),)}),
    rows("cross_entropy", {"label_smoothing": 0.1, "weight": per_class}, logits_and_soft_labels, differentiable=2),
    rows("cross_entropy", {"z_loss": 1e-2}, logits_and_soft_labels, differentiable=2),
    *(
        hard_rows("cross_entropy", draw)
        for draw in (
            masked_vocabulary,
            masked_label,
            lowest_logits,
            offset_logits,
            huge_logits,
            a_nan_logit,
            all_ignored,
        )
    ),
    hard_rows("cross_entropy", offset_logits, {"label_smoothing": 0.1, "weight": per_class}),
    hard_rows("cross_entropy", all_ignored, {"label_smoothing": 0.1}),
    hard_rows("cross_entropy", masked_vocabulary, {"z_loss": 1e-2}),
    hard_rows("cross_entropy", masked_vocabulary, {"softcap": 3.0, "temperature": 0.7}),
    rows("focal_loss", bench=TIMED_ROWS),
    rows("focal_loss", {"gamma": 0.0, "weight": per_class, "ignore_index": 0}, logits_and_all_labels),
    rows("focal_loss", {"gamma": 0.5, "alpha": 0.25, "weight": per_class}),
    rows("focal_loss", {"alpha": None}),
    rows("focal_loss", {"gradient_in_forward": True, "weight": per_class}),
    *(
        hard_rows("focal_loss", draw, {"gamma": 0.5})
        for draw in (certain, masked_vocabulary, masked_label, huge_logits, all_ignored)
    ),
    images("nll_loss", {"weight": per_class}, log_probabilities_and_labels),
    images("cross_entropy", bench=TIMED_IMAGES),
    images("cross_entropy", {"weight": per_class, "ignore_index": 0}, logits_and_all_labels),
    images("cross_entropy", {"z_loss": 1e-2, "label_smoothing": 0.2, "weight": per_class}),
    images("focal_loss", bench=TIMED_IMAGES),
    images("focal_loss", {"gamma": 0.5, "alpha": 0.25, "weight": per_class}),
    *(
        hard_images("cross_entropy", draw)
        for draw in (hard_pixels, masked_vocabulary, lowest_logits, offset_logits, huge_logits, all_ignored)
    ),
    hard_images("cross_entropy", offset_logits, {"label_smoothing": 0.1, "weight": per_class}),
    hard_images("cross_entropy", hard_pixels, {"z_loss": 1e-2}),
    *(hard_images("focal_loss", draw, {"gamma": 0.5}) for draw in (hard_pixels, masked_vocabulary, huge_logits)),
]
