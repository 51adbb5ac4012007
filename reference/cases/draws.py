"""Inputs and options that several themes draw."""

import torch

from reference.cases.case import HARD, HARD_IMAGES, IGNORED, IMAGES, ROWS, Case


def numbers(shape, dtype):
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def with_nan(shape, dtype):
    input, target = numbers(shape, dtype)
    input.view(-1)[::3] = float("nan")
    return input, target


def logits_and_labels(shape, dtype):
    """Class indices for (C,), (N, C) or (N, C, d1, ...); every fifth is ignored, but never the first."""
    classes, where = (shape[0], ()) if len(shape) == 1 else (shape[1], (shape[0], *shape[2:]))
    labels = torch.randint(classes, where)
    labels.view(-1)[4::5] = IGNORED
    return torch.randn(shape, dtype=dtype) * 2, labels


def like_input(input):
    return torch.rand_like(input) + 0.5


def per_column(input):
    return torch.rand(input.shape[-1:], dtype=input.dtype).to(input.device) * 3 + 0.1


def rows(name, options=(), draw=logits_and_labels, **more):
    return Case(name, draw, dict(options), **{"shapes": ROWS, **more})


def hard_rows(name, draw, options=()):
    return Case(name, draw, dict(options), note=draw.__name__.replace("_", " "), shapes=HARD)


def images(name, options=(), draw=logits_and_labels, **more):
    return Case(name, draw, dict(options), **{"note": "images", "shapes": IMAGES, **more})


def hard_images(name, draw, options=()):
    return Case(name, draw, dict(options), note=f"images, {draw.__name__.replace('_', ' ')}", shapes=HARD_IMAGES)
