"""The ranking and metric losses of the table."""

import math

import torch

from reference.cases.binary import numbers_and_signs
from reference.cases.case import HARD, TIMED_LESS, Case

TIMED_VECTORS = {"quick": ((4096, 1024),), "full": ((64, 10), (4096, 1024), (65536, 1024), (1 << 19, 128))}


def three_vectors(shape, dtype):
    """Of about length 1, so that a loss is of the size of the distances whose difference it is."""
    return tuple(torch.randn(shape, dtype=dtype) / shape[-1] ** 0.5 for _ in range(3))


def two_scores_and_signs(shape, dtype):
    return torch.randn(shape, dtype=dtype), *numbers_and_signs(shape, dtype)


def scores_at_the_margin(shape, dtype):
    """Differences of exactly -1, -½, 0, ½, 1, nan and infinite scores."""
    _, second, target = two_scores_and_signs(shape, dtype)
    spots = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, float("inf"), -float("inf"), float("nan")], dtype=dtype)
    second = second.round()
    return second + spots[torch.randint(len(spots), shape)], second, target


def in_rows(shape):
    """One dimension of rows at most, which is all that the cosine embedding loss takes."""
    return shape if len(shape) < 2 else (math.prod(shape[:-1]), shape[-1])


def two_vectors_and_signs(shape, dtype):
    shape = in_rows(shape)
    a, b = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    return a, b, torch.randint(2, shape[:-1]) * 2 - 1


def two_vectors_and_cosines(shape, dtype):
    return *three_vectors(shape, dtype)[:2], torch.rand(shape[:-1], dtype=dtype) * 2 - 1


def near_vectors_and_bits(shape, dtype):
    """Distances on both sides of 1."""
    a, step = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype) * torch.rand(*shape[:-1], 1, dtype=dtype)
    return a, a + step * (1.9 / shape[-1] ** 0.5), torch.randint(2, shape[:-1]).to(dtype)


def near_vectors_and_chances(shape, dtype):
    a, b, bits = near_vectors_and_bits(shape, dtype)
    return a, b, (0.1 + 0.8 * torch.rand(bits.shape, dtype=torch.float64)).to(dtype)


def hard_vectors(*vectors):
    """Zero, equal, opposite, small, huge and nan ones among others."""
    a, b = vectors[:2]
    a[0], b[1], a[2], b[2] = 0, 0, 0, 0
    b[3], b[4] = a[3], -a[4]
    for v in vectors:
        v[5] *= 1e-4
        v[6] *= 1e3 if v.dtype == torch.float16 else 1e15
    b[8, 5] = float("nan")


def hard_triplets(shape, dtype):
    """Negatives as near as the positive, too, and positives that are the anchor or the negative."""
    vectors = anchor, positive, negative = three_vectors(shape, dtype)
    hard_vectors(*vectors)
    anchor[7, 3], negative[0, 1], negative[1], negative[2] = (
        float("inf"),
        float("nan"),
        positive[1],
        2 * anchor[2] - positive[2],
    )
    return vectors


def hard_embeddings(shape, dtype):
    """Labels that mean nothing, too."""
    a, b, target = two_vectors_and_signs(shape, dtype)
    hard_vectors(a, b)
    target[0], target[8], a[7, 3] = 1, 0, float("inf")
    return a, b, target


def hard_cosines(shape, dtype):
    a, b, target = two_vectors_and_cosines(shape, dtype)
    hard_vectors(a, b)
    b[7, 3] = -float("inf")
    return a, b, target


def hard_contrasts(shape, dtype):
    a, b, target = near_vectors_and_bits(shape, dtype)
    hard_vectors(a, b)
    target[2:4] = torch.tensor([0, 1])
    return a, b, target


def triplets(options=(), draw=three_vectors, **more):
    return Case("triplet_margin_loss", draw, dict(options), **{"differentiable": 3, **more})


def cosine_distance(like):
    return lambda a, b: 1 - torch.nn.functional.cosine_similarity(a, b, -1)


CASES = [
    Case("margin_ranking_loss", two_scores_and_signs, bench=TIMED_LESS, differentiable=3),
    Case("margin_ranking_loss", two_scores_and_signs, {"margin": 0.5}, differentiable=2),
    Case(
        "margin_ranking_loss",
        scores_at_the_margin,
        {"margin": 0.5},
        "at the margin",
        differentiable=3,
        shapes=((9, 7),),
    ),
    triplets(bench=TIMED_VECTORS, headline=True),
    triplets({"swap": True, "margin": 0.3}, bench={"full": ((4096, 1024),)}),
    triplets({"p": 1.0, "eps": 0.01, "margin": 9.0}, bench={"full": ((4096, 1024),)}, shapes=((7, 130),)),
    triplets({"p": 3.0, "margin": 0.7, "swap": True}, shapes=((7, 130), (3, 3001))),
    *(
        triplets(options, hard_triplets, note="hard triplets", shapes=HARD)
        for options in ({"swap": True}, {"p": 1.0, "swap": True}, {"p": 1.5}, {"eps": 0.0})
    ),
    Case("triplet_margin_with_distance_loss", three_vectors, differentiable=3, bench={"full": ((4096, 1024),)}),
    Case(
        "triplet_margin_with_distance_loss",
        three_vectors,
        {"swap": True, "distance_function": cosine_distance},
        differentiable=3,
        shapes=((7, 130),),
    ),
    Case("cosine_embedding_loss", two_vectors_and_signs, differentiable=2, bench=TIMED_VECTORS, headline=True),
    Case("cosine_embedding_loss", two_vectors_and_signs, {"margin": 0.05}, differentiable=2, shapes=((7, 130),)),
    Case("cosine_embedding_loss", hard_embeddings, note="hard embeddings", differentiable=2, shapes=HARD),
    Case("cosine_similarity_loss", two_vectors_and_cosines, differentiable=3, bench=TIMED_VECTORS),
    Case(
        "cosine_similarity_loss",
        two_vectors_and_cosines,
        {"eps": 1.0},
        "some shorter than eps",
        differentiable=2,
        shapes=HARD,
    ),
    Case("cosine_similarity_loss", hard_cosines, note="hard cosines", differentiable=3, shapes=HARD),
    Case("contrastive_loss", near_vectors_and_bits, differentiable=2, bench=TIMED_VECTORS),
    Case("contrastive_loss", near_vectors_and_chances, {"margin": 1.5}, differentiable=3),
    Case("contrastive_loss", hard_contrasts, note="hard contrasts", differentiable=2, shapes=HARD),
]
