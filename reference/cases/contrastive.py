"""The contrastive losses of the table: each row of features meets every other."""

import torch

from reference.cases.case import IGNORED, Case

PAIRS = ((7, 130), (1, 1), (70, 20), (140, 9))
TIMED_PAIRS = {"quick": ((2048, 256),), "peers": ((8192, 512),), "full": ((64, 64), (8192, 512), (32768, 512))}
TIMED_LESS = {name: TIMED_PAIRS[name] for name in ("peers", "full")}
TIMED_FULLY = {"full": ((8192, 512),)}


def two_sets(shape, dtype):
    """Of about length 1, and the number that similarities are multiplied by."""
    x, y = (torch.randn(shape, dtype=dtype) / shape[1] ** 0.5 for _ in range(2))
    return x, y, torch.tensor(9.0, dtype=dtype)


def two_sets_and_a_bias(shape, dtype):
    return *two_sets(shape, dtype), torch.tensor(-3.0, dtype=dtype)


def two_views(shape, dtype):
    first = torch.randn(shape, dtype=dtype)
    return first, first + torch.randn(shape, dtype=dtype)


def three_views(shape, dtype):
    return (torch.randn(shape[0], 3, shape[1], dtype=dtype) + torch.randn(shape[0], 1, shape[1], dtype=dtype),)


def features_and_labels(shape, dtype):
    """Of a few labels; every fifth is ignored, and the last is alone."""
    labels = torch.randint(max(shape[0] // 3, 1), shape[:1])
    labels[4::5] = IGNORED
    labels[-1:] = 1000
    return torch.randn(shape, dtype=dtype), labels


def queries_keys_and_negatives(shape, dtype):
    return *two_views(shape, dtype), torch.randn(2 * shape[0] + 3, shape[1], dtype=dtype)


def queries_keys_and_their_negatives(shape, dtype):
    return *two_views(shape, dtype), torch.randn(shape[0], 5, shape[1], dtype=dtype)


def queries_and_more_keys(shape, dtype):
    return torch.randn(shape, dtype=dtype), torch.randn(shape[0] + 3, shape[1], dtype=dtype)


def huge_similarities(shape, dtype):
    """Up to 1e4 apart, with a common offset, so that all but one share of each row are 0; and a vector of zeros."""
    x, y, _ = two_sets(shape, dtype)
    x[1], y[2] = 0, 0
    return x, y, torch.tensor(3000.0, dtype=dtype), torch.tensor(1000.0, dtype=dtype)


def vanishing_losses(shape, dtype):
    """Each pair by far the most similar of its row and column: losses of 1e-5 and less are differences of 30 and 30."""
    x = torch.linalg.qr(torch.randn(max(shape), max(shape), dtype=torch.float64))[0][: shape[0], : shape[1]].to(dtype)
    return x, x.clone(), torch.tensor(15.0, dtype=dtype)


def some_ids(input):
    """Of a few kinds; every fifth is ignored."""
    ids = torch.arange(input.shape[0]) % max(input.shape[0] // 2, 1)
    ids[4::5] = IGNORED
    return ids.to(input.device)


def more_ids(input):
    ids = torch.arange(input.shape[0] + 3) % max(input.shape[0] // 3, 1)
    ids[3::4] = IGNORED
    return ids.to(input.device)


def pairwise(name, draw, options=(), differentiable=2, **more):
    made = {"shapes": PAIRS, "pairwise": True, "differentiable": differentiable}
    return Case(name, draw, dict(options), **{**made, **more})


MANY_POSITIVES = {"query_ids": some_ids, "positive_ids": more_ids}
SOME = PAIRS[:1] + PAIRS[2:3]
CASES = [
    pairwise("clip_loss", two_sets, differentiable=3, bench=TIMED_PAIRS),
    pairwise("clip_loss", two_sets_and_a_bias, {"normalize": True, "label_smoothing": 0.1}, 4),
    pairwise("clip_loss", two_sets, {"ids": some_ids, "normalize": True}, 3),
    pairwise("clip_loss", huge_similarities, {}, 4, note="huge similarities", shapes=((9, 70),)),
    pairwise("siglip_loss", two_sets_and_a_bias, differentiable=4, bench=TIMED_PAIRS),
    pairwise("siglip_loss", two_sets_and_a_bias, {"ids": some_ids, "normalize": True}, 4),
    pairwise("siglip_loss", huge_similarities, {}, 4, note="huge similarities", shapes=((9, 70),)),
    pairwise("nt_xent_loss", two_views, bench=TIMED_LESS),
    pairwise("nt_xent_loss", two_views, {"temperature": 20.0, "normalize": False}),
    pairwise("supervised_contrastive_loss", features_and_labels, {"temperature": 0.3}, 1, bench=TIMED_FULLY),
    pairwise("supervised_contrastive_loss", features_and_labels, {"skip_alone": True, "temperature": 0.5}, 1),
    pairwise("supervised_contrastive_loss", three_views, {"temperature": 0.3}, 1),
    pairwise("info_nce_loss", two_views, {"temperature": 0.2}, bench=TIMED_LESS),
    pairwise("info_nce_loss", two_views, {"temperature": 0.5, "hardness": 0.5, "debias": 0.1}, shapes=SOME),
    pairwise("info_nce_loss", queries_keys_and_negatives, {"temperature": 0.2}, 3, bench=TIMED_FULLY),
    pairwise("info_nce_loss", queries_keys_and_negatives, {"temperature": 0.5, "hardness": 1.0}, 3),
    pairwise("info_nce_loss", queries_keys_and_their_negatives, {"temperature": 0.5, "negative_mode": "paired"}, 3),
    pairwise("info_nce_loss", queries_and_more_keys, {"temperature": 0.2, **MANY_POSITIVES}, shapes=SOME),
    pairwise(
        "info_nce_loss",
        queries_and_more_keys,
        {"temperature": 0.2, "multi_positive": "sum", **MANY_POSITIVES},
        shapes=SOME,
    ),
]
