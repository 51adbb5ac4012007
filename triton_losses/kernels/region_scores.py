"""The kernel that runs after the sums of regions: it adds up the partial sums and computes the scores and the loss.

There are so few numbers that one program handles them all, in float64. It also writes the loss's derivatives by the
sums. The backward only multiplies them by the upstream gradient, because each sum affects one element of the loss.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.device_math import as_scalars, exact
from triton_losses.core.formula import FORMULAS
from triton_losses.core.regions import shape_of_loss
from triton_losses.core.tuning import Tuned


class Kind(NamedTuple):
    """Compile-time parameters of the kernel; families/regions.py's Problem describes the first four."""

    average: str
    empty: str
    reduction: str
    batch: bool
    classes: int
    first: int  # the first class that counts in the score
    maps: bool  # the targets are maps of the logits' shape; otherwise labels
    weighted: bool  # the classes' scores are weighted
    shift: int  # the first class in the tensor of weights
    beside: bool  # a formula's losses of the pixels are added to the score's loss
    counted: bool  # in their mean, a pixel counts with its label's weight
    divided: bool  # they are divided by the number of those that count
    each: int  # the number of them per pixel


@triton.jit
def sums_of(partial_sums, image, exists, splits, KIND: tl.constexpr, SPLITS: tl.constexpr, CLASSES: tl.constexpr):
    """Σ p t, Σ p and Σ t of some images, (images, CLASSES) each; 0 for images and classes that do not exist."""
    c = tl.arange(0, CLASSES)[None, None, :]
    split = tl.arange(0, SPLITS)[None, :, None]
    at = partial_sums + image[:, None, None] * (splits * 3 * KIND.classes) + c
    inside = exists[:, None, None] & (c < KIND.classes)
    overlap = tl.zeros((image.shape[0], SPLITS, CLASSES), partial_sums.dtype.element_ty)
    predicted = overlap
    wanted = overlap
    for first in range(0, splits, SPLITS):
        here = at + (first + split) * (3 * KIND.classes)
        mask = inside & (first + split < splits)
        overlap += tl.load(here, mask=mask, other=0.0)
        predicted += tl.load(here + KIND.classes, mask=mask, other=0.0)
        wanted += tl.load(here + 2 * KIND.classes, mask=mask, other=0.0)
    return tl.sum(overlap.to(tl.float64), 1), tl.sum(predicted.to(tl.float64), 1), tl.sum(wanted.to(tl.float64), 1)


@triton.jit
def formula_losses_of(partial_losses, image, exists, splits, SPLITS: tl.constexpr):
    """Σ L of each of some images, (images,)."""
    split = tl.arange(0, SPLITS)[None, :]
    total = tl.zeros((image.shape[0], SPLITS), partial_losses.dtype.element_ty)
    for first in range(0, splits, SPLITS):
        mask = exists[:, None] & (first + split < splits)
        total += tl.load(partial_losses + image[:, None] * splits + (first + split), mask=mask, other=0.0)
    return tl.sum(total.to(tl.float64), 1)


@triton.jit
def losses_of(sums, weight, counts, scalars, SCORE: tl.constexpr, LINK: tl.constexpr, KIND: tl.constexpr):
    """The score's loss of each image and class, and its slopes by overlap and predicted; sums that do not count are 0.

    If the classes are added up first (not "macro"), the loss is (images, 1). If a mean excludes absent classes, the
    loss is already divided by the weight of the classes that are present.
    """
    overlap, predicted, wanted = sums
    factor = tl.where(counts, 1.0, 0.0).to(tl.float64)
    if KIND.average != "macro":
        if KIND.average != "micro":
            absent = wanted == 0.0
            volume = tl.where(absent, 1.0, wanted)
            factor = tl.where(absent, 0.0, 1.0 / (volume * volume if KIND.average == "square" else volume))
            factor = tl.where(absent & counts, tl.max(factor, 1)[:, None], factor)
        overlap = tl.sum(overlap * factor, 1)[:, None]
        predicted = tl.sum(predicted * factor, 1)[:, None]
        wanted = tl.sum(wanted * factor, 1)[:, None]
    score, by_overlap, by_predicted, _ = SCORE(overlap, predicted, wanted, *scalars[0])
    loss, slope = LINK(score, *scalars[1])
    loss *= weight
    slope *= weight
    if KIND.empty != "smooth":
        loss = tl.where(wanted > 0.0, loss, 0.0)
        slope = tl.where(wanted > 0.0, slope, 0.0)
    if KIND.empty == "exclude" and KIND.reduction == "mean":
        present = tl.sum(tl.where(wanted > 0.0, weight, 0.0), 1)[:, None]
        present = tl.where(present == 0.0, 1.0, present)
        loss = loss / present
        slope = slope / present
    return loss, (slope * by_overlap * factor, slope * by_predicted * factor)


@triton.jit
def store(at, x, mask):
    """Store x, converted to bfloat16 by way of float32, as compiled kernels do; the interpreter needs that."""
    x = x.to(tl.float32) if at.dtype.element_ty == tl.bfloat16 else x
    tl.store(at, x.to(at.dtype.element_ty), mask=mask)


@triton.jit
def store_slopes(d_sums, slopes, scale, image, c, mask, KIND: tl.constexpr):
    at = d_sums + image[:, None] * (3 * KIND.classes) + c
    store(at, slopes[0] * scale, mask)
    store(at + KIND.classes, slopes[1] * scale, mask)


@triton.jit(
    repr=lambda spec: f"region_scores_{spec.constants['SCORE'].__name__}",
    do_not_specialize=["images", "splits", "pixels"],
)
def scores_kernel(
    partial_sums,  # (images, splits, 3, classes)
    partial_losses,  # (images, splits), if beside
    weights,  # weights of the classes from shift on, if weighted or counted
    out,  # the loss, of the shape that core/regions.py's shape_of_loss gives
    d_sums,  # (images, 3, classes); written for Σ p t and Σ p of the classes that count
    d_losses,  # (images,), if beside
    images: tl.int64,
    splits,
    pixels,
    scalars,  # those of the score and of the link
    lambdas,
    SCORE: tl.constexpr,
    LINK: tl.constexpr,
    KIND: tl.constexpr,
    IMAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    MEAN: tl.constexpr = KIND.reduction == "mean"
    NONE: tl.constexpr = KIND.reduction == "none"
    MACRO: tl.constexpr = KIND.average == "macro"
    scalars = (exact(scalars[0], tl.float64), exact(scalars[1], tl.float64))
    lambdas = exact(lambdas, tl.float64)
    lanes = tl.arange(0, IMAGES)
    c = tl.arange(0, CLASSES)[None, :]
    counts = (c >= KIND.first) & (c < KIND.classes)
    weight = tl.where(counts, 1.0, 0.0).to(tl.float64) if MACRO else tl.full((1, 1), 1.0, tl.float64)
    if KIND.weighted:
        weight = tl.load(weights + (c - KIND.shift), mask=counts, other=0.0).to(tl.float64)
    if KIND.counted:
        class_weight = tl.load(weights + c, mask=c < KIND.classes, other=0.0).to(tl.float64)
    scale = lambdas[0]  # the factor of the score's loss of one image and class in the total
    if MEAN and MACRO and KIND.empty != "exclude" or NONE and KIND.beside:
        scale = scale / (KIND.classes - KIND.first)
    if MEAN and not KIND.batch:
        scale = scale / images.to(tl.float64)
    cost = tl.zeros((IMAGES,), tl.float64)
    rest = cost
    divisor = cost
    nothing = tl.zeros((1, CLASSES), tl.float64)
    of_batch = (nothing, nothing, nothing)
    for start in range(0, images, IMAGES):
        image = start + lanes
        exists = image < images
        overlap, predicted, wanted = sums_of(partial_sums, image, exists, splits, KIND, SPLITS, CLASSES)
        if KIND.beside:
            losses = formula_losses_of(partial_losses, image, exists, splits, SPLITS)
            if KIND.maps:
                number = tl.where(exists, tl.cast(pixels, tl.float64), 0.0)
            else:
                number = tl.sum(wanted * class_weight if KIND.counted else wanted, 1)
            number = number * KIND.each
            if MEAN:
                divisor += number
            else:
                slope = tl.zeros((IMAGES,), tl.float64) + lambdas[1]
                if KIND.divided:
                    slope = slope / tl.where(number == 0.0, 1.0, number)
                store(d_losses + image, slope, exists)
                losses = losses * slope
            rest += losses
        overlap = tl.where(counts, overlap, 0.0)
        predicted = tl.where(counts, predicted, 0.0)
        wanted = tl.where(counts, wanted, 0.0)
        if KIND.batch:
            of_batch = (
                of_batch[0] + tl.sum(overlap, 0)[None, :],
                of_batch[1] + tl.sum(predicted, 0)[None, :],
                of_batch[2] + tl.sum(wanted, 0)[None, :],
            )
        else:
            loss, slopes = losses_of((overlap, predicted, wanted), weight, counts, scalars, SCORE, LINK, KIND)
            store_slopes(d_sums, slopes, scale, image, c, exists[:, None] & counts, KIND)
            of_image = tl.sum(loss, 1)
            if NONE and KIND.beside:
                store(out + image, of_image * scale + losses, exists)
            elif NONE and MACRO:
                at = out + image[:, None] * (KIND.classes - KIND.first) + (c - KIND.first)
                store(at, loss, exists[:, None] & counts)
            elif NONE:
                store(out + image, of_image, exists)
            cost += tl.where(exists, of_image, 0.0)
    if KIND.batch:
        loss, slopes = losses_of(of_batch, weight, counts, scalars, SCORE, LINK, KIND)
        for start in range(0, images, IMAGES):
            image = start + lanes
            store_slopes(d_sums, slopes, scale, image, c, (image < images)[:, None] & counts, KIND)
        if NONE and MACRO:
            store(out + (c - KIND.first), loss, counts)
        cost += tl.where(lanes == 0, tl.sum(tl.sum(loss, 1), 0), 0.0)
    total = tl.sum(cost, 0) * scale
    if KIND.beside and MEAN:
        number = tl.sum(divisor, 0)
        slope = lambdas[1] / tl.where(number == 0.0, 1.0, number)
        total += tl.sum(rest, 0) * slope
        for start in range(0, images, IMAGES):
            image = start + lanes
            store(d_losses + image, tl.zeros((IMAGES,), tl.float64) + slope, image < images)
    elif KIND.beside:
        total += tl.sum(rest, 0)
    if not NONE or KIND.batch and not MACRO:
        store(out, total, None)


MOST = 2048  # most sums of each kind that are in registers at once


def config(args):
    classes = triton.next_power_of_2(args["KIND"].classes)
    splits = min(triton.next_power_of_2(args["splits"]), max(MOST // classes // 4, 1))
    images = min(max(MOST // (classes * splits), 1), 32)
    warps = min(max(images * splits * classes // 128, 1), 16)
    return {"IMAGES": images, "SPLITS": splits, "CLASSES": classes, "num_warps": warps}


scores_launch = Tuned(
    scores_kernel,
    configs=[],
    rule=config,
    key=lambda args: tuple(config(args).values()),
    programs=lambda images, fixed: 1,
    size="images",
)


def bind_scores(tensors, problem, splits):
    """The launch for this problem and this number of partial sums per image."""
    logits, targets, weights = tensors
    (images, classes, pixels), wide = logits.shape, compute_dtype(logits.dtype)
    first, beside = int(not problem.background), bool(problem.formula)
    by_label, softmax = targets.dim() == 2, problem.activation == "softmax"
    summed = problem.reduction == "sum"
    kind = Kind(
        average=problem.average,
        empty=problem.empty,
        reduction=problem.reduction,
        batch=problem.batch,
        classes=classes,
        first=first,
        maps=not by_label,
        weighted=weights is not None and problem.average == "macro" and classes - first > 1,
        shift=0 if weights is None else classes - weights.shape[0],
        beside=beside,
        counted=beside and weights is not None and by_label and softmax and not summed,
        divided=problem.means_of_space or not summed,
        each=1 if softmax or summed else classes - first * problem.means_of_space,
    )
    sums = logits.new_empty((images, splits, 3, classes), dtype=wide)
    return scores_launch.bind(
        partial_sums=sums,
        partial_losses=logits.new_empty((images, splits), dtype=wide) if beside else sums,
        weights=logits if weights is None else weights,
        out=logits.new_empty(shape_of_loss(problem, images, classes), dtype=problem.dtype),
        d_sums=logits.new_empty((images, 3, classes), dtype=wide),
        d_losses=logits.new_empty(images, dtype=wide) if beside else sums,
        images=images,
        splits=splits,
        pixels=pixels,
        scalars=tuple(as_scalars(values, torch.float64) for values in (problem.score_scalars, problem.link_scalars)),
        lambdas=as_scalars(problem.lambdas if beside else (1.0, 0.0), torch.float64),
        SCORE=FORMULAS[problem.score].kernel,
        LINK=FORMULAS[problem.link].kernel,
        KIND=kind,
    )
