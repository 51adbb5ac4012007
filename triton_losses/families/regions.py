"""Losses of the regions of an image, such as Dice, from one read of its logits.

    p          softmax, sigmoid or identity of the logits x
    t          1 for a pixel's own class and 0 for the others; or a map of the logits' shape
    sums[b]    Σ p t, Σ p, Σ t  over the pixels of image b, for each class. ``squared``: Σ p², Σ t² for Σ p, Σ t.
               ``smaller``: Σ min(p, t) for Σ p t
    losses[b]  Σ L  of a formula of the same pixels. With softmax it is a row formula of log_p and weight,
               Σ_j t_j f(log p_j, w_j), with (1 - ε) t + ε/C for t if smoothed; otherwise f(x, t) of each element

One formula computes a score from an image's sums of a class, and another one the loss from the score. These losses are
weighted and reduced, and the mean of the pixels' formula may be added.

    softmax   ∂/∂x_j = p_j (g_j - Σ_c p_c g_c - Σ_c t_c f'_c) + t_j f'_j,     g_c = d(Σpt) t_c + d(Σp)

    forward   reads the logits once; each program writes one row of sums, and the rows are added in a fixed order.
              Kernels also save the derivatives of the loss by the sums
    backward  reads the logits once and writes their gradient once

`region_sums` returns the sums, for callers that do something between sums and loss, such as an all-reduce. They compute
the rest in plain torch.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch

from triton_losses.blocks import regions as blocks
from triton_losses.core.bridge import Bridge
from triton_losses.core.compiler import runs_kernels, triton
from triton_losses.whole import regions as whole

if triton is not None:
    from triton_losses.kernels import regions as kernels
else:
    kernels = None  # type: ignore[assignment]


class SumsProblem(NamedTuple):
    activation: str  # "softmax", "sigmoid" or "none"
    ignore_index: int | None  # pixels with this label, or elements of a map with this value, do not count
    squared: bool
    smaller: bool
    formula: str  # "" for none
    scalars: tuple[float, ...]
    smoothing: float


class Problem(NamedTuple):
    activation: str  # these seven fields as above
    ignore_index: int | None
    squared: bool
    smaller: bool
    formula: str
    scalars: tuple[float, ...]
    smoothing: float
    background: bool  # whether class 0 counts in the score
    batch: bool  # one score for all images
    # "macro": one score per class; otherwise one score of the classes' sums, added up as they are ("micro") or divided
    # by Σ t ("simple") or (Σ t)² ("square")
    average: str
    score: str
    score_scalars: tuple[float, ...]
    link: str  # formula of the score's loss
    link_scalars: tuple[float, ...]
    # the loss of an absent class: "smooth": as for others; "zero": 0; "exclude": 0, and the mean does not count it
    empty: str
    lambdas: tuple[float, ...]  # factors of the score's loss and of the formula's, if there is one
    # whether the formula is only of the score's classes, and its "sum" adds the images' means over pixels
    means_of_space: bool
    reduction: str
    dtype: torch.dtype  # of the result


read = Bridge("regions", Problem, inputs=3, outputs=1, whole=whole, blocks=blocks, kernels=kernels)
read_sums = Bridge(
    "region_sums",
    SumsProblem,
    inputs=3,
    outputs=2,
    whole=SimpleNamespace(forward=whole.sums_forward),
    blocks=SimpleNamespace(forward=blocks.sums_forward, backward=blocks.sums_backward, scratch=blocks.scratch),
    kernels=kernels and SimpleNamespace(forward=kernels.sums_forward, backward=kernels.sums_backward),
)


def by_reading(bridge, problem, logits, targets, weights):
    logits, targets = logits.contiguous(), targets.contiguous()
    weights = weights if weights is None else weights.contiguous()
    targets = targets.view(torch.uint8) if targets.dtype == torch.bool else targets
    if kernels is not None and runs_kernels(logits) and logits.shape[1] > kernels.MOST_CLASSES:
        found = bridge.in_plain_torch(problem, (logits, targets, weights))
        return found[0] if bridge.outputs == 1 else found
    return bridge(problem, logits, targets, weights)


def regions(problem, logits, targets, weights=None):
    """The loss of ``logits`` (images, classes, pixels).

    targets: labels (images, pixels), integers or integral floats, or a map of the logits' shape. weights: of the
    classes that count; if there is a formula, of all classes, and they apply to both losses.
    """
    return by_reading(read, problem, logits, targets, weights)


def region_sums(problem, logits, targets, class_weights=None):
    """Sums (images, 3, classes) and the formula's losses (images,), float32, or float64 for float64 logits."""
    return by_reading(read_sums, problem, logits, targets, class_weights)
