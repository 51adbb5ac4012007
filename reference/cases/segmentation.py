"""The segmentation losses of the table. Tensors are (images, classes, pixels ...)."""

import torch

from reference.cases.case import IGNORED, Case

# ragged, one pixel, 2-D, 3-D, more classes
IMAGES = ((2, 5, 70), (1, 2, 1), (3, 4, 6, 5), (2, 3, 2, 3, 4), (2, 19, 3, 8), (1, 40, 8))
IMAGE = IMAGES[:1]
MAPS, VOLUMES_AND_STREETS = ((16, 1, 512, 512),), ((2, 4, 96, 96, 96), (8, 19, 256, 512))
TIMED_MAPS = {"quick": ((4, 1, 256, 256),), "peers": MAPS, "full": MAPS}
TIMED_IMAGES = {
    "quick": ((1, 4, 48, 48, 48), (2, 19, 128, 256)),
    "peers": VOLUMES_AND_STREETS,
    "full": VOLUMES_AND_STREETS,
}


def chances_and_bits(shape, dtype):
    return torch.rand(shape, dtype=torch.float64).clamp(0.01, 0.99).to(dtype), torch.randint(2, shape).to(dtype)


def logits_and_bits(shape, dtype):
    return torch.randn(shape, dtype=dtype) * 2, torch.randint(2, shape).to(dtype)


def logits_and_soft_maps(shape, dtype):
    return torch.randn(shape, dtype=dtype) * 2, torch.rand(shape, dtype=dtype)


def labels_of(shape):
    """Class indices (B, *), or (B, 1, *) of one class; class 1 is rare."""
    where = (shape[0], *shape[2:])
    labels = torch.randint(shape[1], where)
    return torch.where((labels == 1) & (torch.rand(where) < 0.7), 0, labels)


def logits_and_image(shape, dtype):
    return torch.randn(shape, dtype=dtype) * 2, labels_of(shape)


def logits_and_image_with_void(shape, dtype):
    input, labels = logits_and_image(shape, dtype)
    labels.view(-1)[4::5] = IGNORED
    return input, labels


def logits_and_bits_with_void(shape, dtype):
    input, bits = logits_and_bits(shape, dtype)
    bits.view(-1)[4::5] = IGNORED
    return input, bits


def of_foreground(input):
    return torch.rand(max(input.shape[1] - 1, 1), dtype=input.dtype).to(input.device) + 0.5


def of_classes(input):
    return torch.rand(input.shape[1], dtype=input.dtype).to(input.device) + 0.5


def huge_logits_in_an_image(shape, dtype):
    input, labels = logits_and_image(shape, dtype)
    return input * 3e3, labels


def nan_where_ignored(shape, dtype):
    input, labels = logits_and_image_with_void(shape, dtype)
    return input.masked_fill((labels == IGNORED)[:, None], float("nan")), labels


def masked_classes(shape, dtype):
    input, labels = logits_and_image(shape, dtype)
    input[:, -1] = -float("inf")
    return input, labels.clamp(max=shape[1] - 2)


def all_void(shape, dtype):
    input, labels = logits_and_image(shape, dtype)
    return input, torch.full_like(labels, IGNORED)


def regions(name, options, draw=logits_and_image, **more):
    return Case(name, draw, dict(options), **{"shapes": IMAGE, "classes": 5, **more})


def more(name, options, draw=logits_and_image, **rest):
    """Tested for its values; whether it compiles, and the like, a simpler case says."""
    return regions(name, options, draw, note="more options", **rest)


def hard(name, options, draw):
    return regions(name, options, draw, note=draw.__name__.replace("_", " "))


SOFTMAX, SIGMOID, VOID = {"softmax": True}, {"sigmoid": True}, {"ignore_index": IGNORED}
CASES = [
    regions("dice_loss", {}, chances_and_bits),
    regions("dice_loss", SOFTMAX, shapes=IMAGES, bench=TIMED_IMAGES),
    regions("dice_loss", SIGMOID, logits_and_bits, bench=TIMED_MAPS),
    more(
        "dice_loss",
        {**SOFTMAX, **VOID, "include_background": False, "weight": of_foreground},
        logits_and_image_with_void,
    ),
    more("dice_loss", {**SIGMOID, "batch": True, "squared_pred": True, "jaccard": True}, logits_and_bits),
    more("dice_loss", {**SIGMOID, "soft_label": True, "log_loss": True}, logits_and_soft_maps),
    more("dice_loss", {**SOFTMAX, "average": "micro", "squared_pred": True}, logits_and_soft_maps),
    more("dice_loss", {**SOFTMAX, "empty": "exclude", "smooth_nr": 0, "smooth_dr": 0, "classes": (0, 1)}),
    more("dice_loss", {**SIGMOID, "empty": "zero", "smooth_nr": 0}, logits_and_bits),
    *(
        hard("dice_loss", {**SOFTMAX, **VOID}, draw)
        for draw in (huge_logits_in_an_image, nan_where_ignored, masked_classes, all_void)
    ),
    regions("jaccard_loss", SIGMOID, logits_and_bits),
    more("jaccard_loss", {**SOFTMAX, "weight": of_classes, "batch": True}),
    regions("tversky_loss", SIGMOID, logits_and_bits),
    more("tversky_loss", {**SOFTMAX, "alpha": 0.3, "beta": 0.6, "log_loss": True}),
    regions("focal_tversky_loss", SOFTMAX),
    regions("generalized_dice_loss", SOFTMAX),
    more("generalized_dice_loss", {**SIGMOID, "w_type": "simple", "batch": True}, logits_and_bits),
    regions("dice_ce_loss", SOFTMAX, shapes=IMAGES, bench=TIMED_IMAGES, headline=True),
    regions(
        "dice_ce_loss",
        {**SOFTMAX, **VOID, "weight": of_classes, "label_smoothing": 0.1},
        logits_and_image_with_void,
        shapes=IMAGES,
    ),
    more(
        "dice_ce_loss",
        {**SOFTMAX, **VOID, "include_background": False, "weight": of_classes},
        logits_and_image_with_void,
    ),
    more("dice_ce_loss", {**SOFTMAX, "weight": of_classes, "squared_pred": True}, logits_and_soft_maps),
    more("dice_ce_loss", {**SIGMOID, **VOID, "weight": of_classes, "lambda_ce": 0.3}, logits_and_image_with_void),
    regions("dice_ce_loss", SIGMOID, logits_and_bits, bench=TIMED_MAPS),
    *(
        hard("dice_ce_loss", {**SOFTMAX, **VOID}, draw)
        for draw in (huge_logits_in_an_image, nan_where_ignored, masked_classes, all_void)
    ),
    regions("dice_focal_loss", {**SIGMOID, "alpha": 0.25}, logits_and_bits),
    regions(
        "dice_focal_loss",
        {**SOFTMAX, **VOID, "use_softmax": True, "gamma": 1.5, "weight": of_classes},
        logits_and_image_with_void,
    ),
    more("dice_focal_loss", {**SIGMOID, **VOID, "include_background": False}, logits_and_image_with_void),
    regions("lovasz_loss", {}, shapes=IMAGES),
    more("lovasz_loss", {**VOID, "per_image": True, "classes": "all"}, logits_and_image_with_void),
    regions("lovasz_loss", {"mode": "hinge", "per_image": True}, logits_and_bits),
    more("lovasz_loss", {"mode": "hinge", **VOID}, logits_and_bits_with_void),
    hard("lovasz_loss", VOID, all_void),
    regions("combo_loss", {}, logits_and_bits, shapes=IMAGES),
]
