"""The kernel that follows the sums of regions: it adds up what the runs of pixels left, and makes scores and the loss.

There are so few numbers that one program takes them all, in float64. It leaves the loss's derivatives by the sums,
which the backward has only to multiply by the upstream gradient: each sum is part of one element of the loss.
"""

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.device_math import as_scalars, exact
from triton_losses.core.formula import FORMULAS
from triton_losses.core.regions import shape_of_loss
from triton_losses.core.tuning import Tuned


@triton.jit
def sums_of(
    partial_sums,
    image,
    exists,
    splits,
    C: tl.constexpr,
    IMAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Σ pt, Σ p and Σ t of some images, (IMAGES, CLASSES) each; 0 where there is no such image or class."""
    c = tl.arange(0, CLASSES)[None, None, :]
    split = tl.arange(0, SPLITS)[None, :, None]
    at = partial_sums + image[:, None, None] * (splits * 3 * C) + c
    inside = exists[:, None, None] & (c < C)
    overlap = tl.zeros((IMAGES, SPLITS, CLASSES), partial_sums.dtype.element_ty)
    predicted = overlap
    wanted = overlap
    for first in range(0, splits, SPLITS):
        here = at + (first + split) * (3 * C)
        mask = inside & (first + split < splits)
        overlap += tl.load(here, mask=mask, other=0.0)
        predicted += tl.load(here + C, mask=mask, other=0.0)
        wanted += tl.load(here + 2 * C, mask=mask, other=0.0)
    return tl.sum(overlap.to(tl.float64), 1), tl.sum(predicted.to(tl.float64), 1), tl.sum(wanted.to(tl.float64), 1)


@triton.jit
def formula_losses_of(partial_losses, image, exists, splits, IMAGES: tl.constexpr, SPLITS: tl.constexpr):
    """Σ L of some images, (IMAGES,)."""
    split = tl.arange(0, SPLITS)[None, :]
    total = tl.zeros((IMAGES, SPLITS), partial_losses.dtype.element_ty)
    for first in range(0, splits, SPLITS):
        mask = exists[:, None] & (first + split < splits)
        total += tl.load(partial_losses + image[:, None] * splits + (first + split), mask=mask, other=0.0)
    return tl.sum(total.to(tl.float64), 1)


@triton.jit
def losses_of(
    overlap,
    predicted,
    wanted,
    weight,
    counts,
    scores,
    links,
    SCORE: tl.constexpr,
    LINK: tl.constexpr,
    AVERAGE: tl.constexpr,
    EMPTY: tl.constexpr,
    MEAN: tl.constexpr,
):
    """The score's loss of each image and class, and its slopes by overlap and predicted; sums that do not count are 0.

    Where classes are added up first, the loss is (images, 1). Where a mean excludes absent classes, it is divided
    already.
    """
    factor = tl.where(counts, 1.0, 0.0).to(tl.float64)
    if AVERAGE == "macro":
        found = SCORE(overlap, predicted, wanted, *scores)
    else:
        if AVERAGE != "micro":
            absent = wanted == 0.0
            volume = tl.where(absent, 1.0, wanted)
            factor = tl.where(absent, 0.0, 1.0 / (volume * volume if AVERAGE == "square" else volume))
            factor = tl.where(absent & counts, tl.max(factor, 1)[:, None], factor)
        overlap = tl.sum(overlap * factor, 1)[:, None]
        predicted = tl.sum(predicted * factor, 1)[:, None]
        wanted = tl.sum(wanted * factor, 1)[:, None]
        found = SCORE(overlap, predicted, wanted, *scores)
    link = LINK(found[0], *links)
    loss = link[0] * weight
    slope = link[1] * weight
    if EMPTY != "smooth":
        loss = tl.where(wanted > 0.0, loss, 0.0)
        slope = tl.where(wanted > 0.0, slope, 0.0)
    if EMPTY == "exclude" and MEAN:
        present = tl.sum(tl.where(wanted > 0.0, weight, 0.0), 1)[:, None]
        present = tl.where(present == 0.0, 1.0, present)
        loss = loss / present
        slope = slope / present
    return loss, slope * found[1] * factor, slope * found[2] * factor


@triton.jit
def store_loss(at, loss, mask):
    """By way of float32 to bfloat16, as compiled kernels do anyway: the interpreter knows no other way."""
    loss = loss.to(tl.float32) if at.dtype.element_ty == tl.bfloat16 else loss
    tl.store(at, loss.to(at.dtype.element_ty), mask=mask)


@triton.jit
def store_slopes(d_sums, d_overlap, d_predicted, image, exists, c, counts, C: tl.constexpr):
    at = d_sums + image[:, None] * (3 * C) + c
    mask = exists[:, None] & counts
    tl.store(at, d_overlap.to(d_sums.dtype.element_ty), mask=mask)
    tl.store(at + C, d_predicted.to(d_sums.dtype.element_ty), mask=mask)


@triton.jit(
    repr=lambda spec: f"region_scores_{spec.constants['SCORE'].__name__}",
    do_not_specialize=["images", "splits", "pixels"],
)
def scores_kernel(
    partial_sums,  # (images, splits, 3, C)
    partial_losses,  # (images, splits), where BESIDE
    weights,  # of the classes from SHIFT on, where WEIGHTED or CLASS_WEIGHTED
    out,  # the loss; where NONE as core/regions.py's shape_of_loss says
    d_sums,  # (images, 3, C), of which Σ pt's and Σ p's of classes that count are written
    d_losses,  # (images,), where BESIDE
    images: tl.int64,
    splits,
    pixels,
    score_scalars,
    link_scalars,
    lambdas,
    SCORE: tl.constexpr,
    LINK: tl.constexpr,
    AVERAGE: tl.constexpr,
    EMPTY: tl.constexpr,
    REDUCTION: tl.constexpr,
    # which counts
    BATCH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHIFT: tl.constexpr,
    C: tl.constexpr,
    FIRST: tl.constexpr,
    BESIDE: tl.constexpr,
    MAPS: tl.constexpr,
    CLASS_WEIGHTED: tl.constexpr,
    DIVIDED: tl.constexpr,
    EACH: tl.constexpr,
    IMAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    MEAN: tl.constexpr = REDUCTION == "mean"
    NONE: tl.constexpr = REDUCTION == "none"
    MACRO: tl.constexpr = AVERAGE == "macro"
    scores = exact(score_scalars, tl.float64)
    links = exact(link_scalars, tl.float64)
    lambdas = exact(lambdas, tl.float64)
    lanes = tl.arange(0, IMAGES)
    c = tl.arange(0, CLASSES)[None, :]
    counts = (c >= FIRST) & (c < C)
    weight = tl.where(counts, 1.0, 0.0).to(tl.float64) if MACRO else tl.full((1, 1), 1.0, tl.float64)
    if WEIGHTED:
        weight = tl.load(weights + (c - SHIFT), mask=counts, other=0.0).to(tl.float64)
    if CLASS_WEIGHTED:
        class_weight = tl.load(weights + c, mask=c < C, other=0.0).to(tl.float64)
    scale = lambdas[0]  # of the score's loss of an image and a class in the whole
    if MEAN and MACRO and EMPTY != "exclude" or NONE and BESIDE:
        scale = scale / (C - FIRST)
    if MEAN and not BATCH:
        scale = scale / images.to(tl.float64)
    cost = tl.zeros((IMAGES,), tl.float64)
    rest = tl.zeros((IMAGES,), tl.float64)
    divisor = tl.zeros((IMAGES,), tl.float64)
    all_overlap = tl.zeros((1, CLASSES), tl.float64)
    all_predicted = tl.zeros((1, CLASSES), tl.float64)
    all_wanted = tl.zeros((1, CLASSES), tl.float64)
    for start in range(0, images, IMAGES):
        image = start + lanes
        exists = image < images
        overlap, predicted, wanted = sums_of(partial_sums, image, exists, splits, C, IMAGES, SPLITS, CLASSES)
        if BESIDE:
            losses = formula_losses_of(partial_losses, image, exists, splits, IMAGES, SPLITS)
            if MAPS:
                number = tl.where(exists, tl.cast(pixels, tl.float64), 0.0)
            else:
                number = tl.sum(wanted * class_weight if CLASS_WEIGHTED else wanted, 1)
            number = number * EACH
            if MEAN:
                rest += losses
                divisor += number
            else:
                slope = tl.zeros((IMAGES,), tl.float64) + lambdas[1]
                if DIVIDED:
                    slope = slope / tl.where(number == 0.0, 1.0, number)
                tl.store(d_losses + image, slope.to(d_losses.dtype.element_ty), mask=exists)
                losses = losses * slope
                rest += losses
        overlap = tl.where(counts, overlap, 0.0)
        predicted = tl.where(counts, predicted, 0.0)
        wanted = tl.where(counts, wanted, 0.0)
        if BATCH:
            all_overlap += tl.sum(overlap, 0)[None, :]
            all_predicted += tl.sum(predicted, 0)[None, :]
            all_wanted += tl.sum(wanted, 0)[None, :]
        else:
            loss, d_overlap, d_predicted = losses_of(
                overlap, predicted, wanted, weight, counts, scores, links, SCORE, LINK, AVERAGE, EMPTY, MEAN
            )
            store_slopes(d_sums, d_overlap * scale, d_predicted * scale, image, exists, c, counts, C)
            of_image = tl.sum(loss, 1)
            if NONE and BESIDE:
                store_loss(out + image, of_image * scale + losses, exists)
            elif NONE and MACRO:
                store_loss(out + image[:, None] * (C - FIRST) + (c - FIRST), loss, exists[:, None] & counts)
            elif NONE:
                store_loss(out + image, of_image, exists)
            cost += tl.where(exists, of_image, 0.0)
    if BATCH:
        loss, d_overlap, d_predicted = losses_of(
            all_overlap, all_predicted, all_wanted, weight, counts, scores, links, SCORE, LINK, AVERAGE, EMPTY, MEAN
        )
        for start in range(0, images, IMAGES):
            image = start + lanes
            store_slopes(d_sums, d_overlap * scale, d_predicted * scale, image, image < images, c, counts, C)
        if NONE and MACRO:
            store_loss(out + (c - FIRST), loss, counts)
        cost += tl.where(lanes == 0, tl.sum(tl.sum(loss, 1), 0), 0.0)
    total = tl.sum(cost, 0) * scale
    if BESIDE and MEAN:
        number = tl.sum(divisor, 0)
        slope = lambdas[1] / tl.where(number == 0.0, 1.0, number)
        total += tl.sum(rest, 0) * slope
        for start in range(0, images, IMAGES):
            image = start + lanes
            of_each = tl.zeros((IMAGES,), tl.float64) + slope
            tl.store(d_losses + image, of_each.to(d_losses.dtype.element_ty), mask=image < images)
    elif BESIDE:
        total += tl.sum(rest, 0)
    if not NONE or BATCH and not MACRO:
        store_loss(out, total, None)


MOST = 2048  # sums of each kind that are in the registers at once


def config(args):
    classes = triton.next_power_of_2(args["C"])
    splits = min(triton.next_power_of_2(args["splits"]), max(MOST // classes // 4, 1))
    images = min(max(MOST // (classes * splits), 1), 32)
    warps = min(max(images * splits * classes // 128, 1), 16)
    return {"IMAGES": images, "SPLITS": splits, "CLASSES": classes, "num_warps": warps}


scores_launch = Tuned(
    scores_kernel,
    configs=[],
    rule=config,
    key=lambda args: (args["C"], args["splits"], args["BESIDE"], args["BATCH"]),
    programs=lambda images, fixed: 1,
    size="images",
)


def bind_scores(tensors, problem, splits):
    """The launch of problems of this kind, whose images have so many runs of pixels each."""
    logits, targets, weights = tensors
    (images, classes, pixels), wide = logits.shape, compute_dtype(logits.dtype)
    first, beside, macro = int(not problem.background), bool(problem.formula), problem.average == "macro"
    by_label, softmax = targets.dim() == 2, problem.activation == "softmax"
    summed = problem.reduction == "sum"
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
        score_scalars=as_scalars(problem.score_scalars, torch.float64),
        link_scalars=as_scalars(problem.link_scalars, torch.float64),
        lambdas=as_scalars(problem.lambdas if beside else (1.0, 0.0), torch.float64),
        SCORE=FORMULAS[problem.score].kernel,
        LINK=FORMULAS[problem.link].kernel,
        AVERAGE=problem.average,
        EMPTY=problem.empty,
        REDUCTION=problem.reduction,
        BATCH=problem.batch,
        BESIDE=beside,
        WEIGHTED=weights is not None and macro and classes - first > 1,
        CLASS_WEIGHTED=beside and weights is not None and by_label and softmax and not summed,
        MAPS=not by_label,
        DIVIDED=problem.means_of_space or not summed,
        EACH=1 if softmax or summed else classes - first * problem.means_of_space,
        C=classes,
        FIRST=first,
        SHIFT=0 if weights is None else classes - weights.shape[0],
    )
