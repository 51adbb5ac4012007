"""Regions by kernels: one program is a run of pixels of one image, all their classes.

Its tiles: region_tiles.py. What becomes of the sums: region_scores.py.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import INTERPRET, WARP, compute_dtype
from triton_losses.core.device_math import as_scalars, exact, sigmoid
from triton_losses.core.formula import FORMULAS
from triton_losses.core.launch import Launch
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import planned
from triton_losses.core.regions import shape_of_loss, takes_weight
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import triton_type
from triton_losses.kernels.finish import ALONE
from triton_losses.kernels.region_scores import bind_scores
from triton_losses.kernels.region_tiles import (
    element_formula,
    load_labels,
    of_class,
    over_classes,
    picked_of,
    place_of,
    row_formula,
    share_of,
    slope_of,
    softmax_of,
    step_of,
    targets_of,
    tile_of,
)


def name_of_pass(which):
    return lambda spec: f"regions_{which}_{getattr(spec.constants['FORMULA'], '__name__', 'sums')}"


@triton.jit(repr=name_of_pass("forward"), debug=True, do_not_specialize=["images", "ignore_index", "splits"])
def forward_kernel(
    logits,  # (images, C, vectors · VEC)
    targets,  # (images, vectors · VEC) labels; where MAPS as logits
    class_weights,  # (C,) where WEIGHTED
    partial_sums,  # (images, splits, 3, C)
    partial_losses,  # (images, splits), written where there is a FORMULA
    images: tl.int64,
    vectors,
    splits,
    ignore_index,
    scalars,
    FORMULA: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MAPS: tl.constexpr,
    IGNORE: tl.constexpr,
    SQUARED: tl.constexpr,
    SMALLER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    OPERAND: tl.constexpr,
    SMOOTHED: tl.constexpr,
    COMPUTE: tl.constexpr,
    C: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    VEC: tl.constexpr,
    STEPS: tl.constexpr,
):
    SOFTMAX: tl.constexpr = ACTIVATION == "softmax"
    EVERY_CLASS: tl.constexpr = MAPS or SMOOTHED  # has a share in a pixel's row loss
    image, first, end, lane, sub = place_of(vectors, splits, LANES, GROUP, STEPS)
    plane = tl.cast(vectors, tl.int64) * VEC
    values = exact(scalars, COMPUTE)
    nothing = tl.zeros((LANES * GROUP,), COMPUTE)
    overlap, predicted, wanted, losses = (), (), (), nothing
    # label: the assertion, whose printing takes registers, stays out of the loop
    highest = tl.full((LANES * GROUP,), -1, tl.int32)
    for g in tl.static_range((C + GROUP - 1) // GROUP):
        overlap += (nothing,)
        predicted += (nothing,)
        wanted += (nothing,)
    at = (lane * VEC)[:, None] + tl.arange(0, VEC)[None, :]
    offset = at + sub * plane if GROUP > 1 else at
    for tile in range(first, end):
        start = tl.cast(tile, tl.int64) * (LANES * VEC)
        inside = (start + lane * VEC < plane)[:, None]
        base = logits + image * C * plane + start
        wants = targets + image * (C if MAPS else 1) * plane + start
        label = sub if MAPS else load_labels(wants, at, inside, ignore_index, C, IGNORE)
        if not MAPS:
            highest = tl.maximum(highest, tl.max(label, 1))
        if SOFTMAX:
            xs, es, top, total = softmax_of(base, sub, plane, offset, inside, C, LANES, GROUP, VEC, COMPUTE)
            inverse, log_total = 1.0 / total, tl.log(total)
        new_overlap, new_predicted, new_wanted = (), (), ()
        for g in tl.static_range((C + GROUP - 1) // GROUP):
            t, counts = targets_of(
                wants, label, g, sub, plane, offset, inside, ignore_index, MAPS, IGNORE, C, GROUP, COMPUTE
            )
            counts = counts & (g * GROUP + sub < C) if GROUP > 1 else counts
            if SOFTMAX:
                p = es[g] * inverse
            else:
                x = tile_of(base, g, sub, plane, offset, inside, 0.0, C, GROUP).to(COMPUTE)
                p = sigmoid(x) if ACTIVATION == "sigmoid" else x
            p = tl.where(counts, p, 0.0)
            new_overlap += (overlap[g] + tl.sum(tl.minimum(p, t) if SMALLER else p * t, 1),)
            new_predicted += (predicted[g] + tl.sum(p * p if SQUARED else p, 1),)
            new_wanted += (wanted[g] + tl.sum(t * t if SQUARED and MAPS else t, 1),)
            if FORMULA is not None:
                w = of_class(class_weights, g, sub, C, GROUP, COMPUTE) if WEIGHTED else 1.0
                if not SOFTMAX:
                    loss = element_formula(x, t, w, values, 0, FORMULA, WEIGHTED, OPERAND)
                    losses += tl.sum(tl.where(counts, loss, 0.0), 1)
                elif EVERY_CLASS:
                    share = share_of(t, values, SMOOTHED, C)
                    loss = share * row_formula((xs[g].to(COMPUTE) - top) - log_total, w, values, 0, FORMULA)
                    losses += tl.sum(tl.where(counts & (share != 0.0), loss, 0.0), 1)
        overlap, predicted, wanted = new_overlap, new_predicted, new_wanted
        if FORMULA is not None and SOFTMAX and not EVERY_CLASS:
            log_p = (picked_of(xs, label, sub, C, LANES, GROUP, VEC, COMPUTE) - top) - log_total
            w = tl.load(class_weights + tl.minimum(tl.maximum(label, 0), C - 1)).to(COMPUTE) if WEIGHTED else 1.0
            loss = row_formula(log_p, w, values, 0, FORMULA)
            # one of a pixel's threads speaks for it
            losses += tl.sum(tl.where((label >= 0) & (sub == 0), loss, 0.0), 1)
    program = tl.program_id(0).to(tl.int64)
    out = partial_sums + program * (3 * C)
    for g in tl.static_range((C + GROUP - 1) // GROUP):
        sums = (overlap[g], predicted[g], wanted[g])
        for i in tl.static_range(3):
            if GROUP == 1:
                tl.store(out + i * C + g, tl.sum(sums[i], 0))
            else:
                classes = g * GROUP + tl.arange(0, GROUP)
                tl.store(out + i * C + classes, tl.sum(tl.reshape(sums[i], (LANES, GROUP)), 0), mask=classes < C)
    if FORMULA is not None:
        tl.store(partial_losses + program, tl.sum(losses, 0))
    if not MAPS:
        tl.device_assert(highest < C, "a target is out of bounds: it is no class and not ignore_index")


@triton.jit(
    repr=name_of_pass("backward"),
    do_not_specialize=["images", "ignore_index", "splits", "dout_image", "dout_class"],
    do_not_specialize_on_alignment=["d_sums", "d_losses", "dout"],
)
def backward_kernel(
    logits,
    targets,
    class_weights,  # as in the forward
    d_sums,  # (images, 3, C)
    d_losses,  # (images,), read where there is a FORMULA
    dout,  # where FINISHED the loss's gradient: of image b and class c at b * dout_image + (c - FIRST) * dout_class
    grad,  # as logits
    images: tl.int64,
    vectors,
    splits,
    ignore_index,
    dout_image,
    dout_class,
    scalars,
    FINISHED: tl.constexpr,
    FIRST: tl.constexpr,
    FORMULA: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MAPS: tl.constexpr,
    IGNORE: tl.constexpr,
    SQUARED: tl.constexpr,
    SMALLER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    OPERAND: tl.constexpr,
    SMOOTHED: tl.constexpr,
    COMPUTE: tl.constexpr,
    C: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    VEC: tl.constexpr,
    STEPS: tl.constexpr,
):
    SOFTMAX: tl.constexpr = ACTIVATION == "softmax"
    EVERY_CLASS: tl.constexpr = MAPS or SMOOTHED
    image, first, end, lane, sub = place_of(vectors, splits, LANES, GROUP, STEPS)
    plane = tl.cast(vectors, tl.int64) * VEC
    values = exact(scalars, COMPUTE)
    d_overlap, d_predicted = (), ()
    of_image = d_sums + image * (3 * C)
    of_loss = dout + image * dout_image
    for g in tl.static_range((C + GROUP - 1) // GROUP):
        d_overlap += (slope_of(of_image, of_loss, g, sub, dout_class, FINISHED, FIRST, C, GROUP, COMPUTE),)
        of_p = slope_of(of_image + C, of_loss, g, sub, dout_class, FINISHED, FIRST, C, GROUP, COMPUTE)
        d_predicted += (of_p * 2.0 if SQUARED else of_p,)
    if FORMULA is not None:
        upstream = tl.load(d_losses + image).to(COMPUTE)
        if FINISHED:
            upstream *= tl.load(of_loss).to(COMPUTE)
    at = (lane * VEC)[:, None] + tl.arange(0, VEC)[None, :]
    offset = at + sub * plane if GROUP > 1 else at
    for tile in range(first, end):
        start = tl.cast(tile, tl.int64) * (LANES * VEC)
        inside = (start + lane * VEC < plane)[:, None]
        base = logits + image * C * plane + start
        out = grad + image * C * plane + start
        wants = targets + image * (C if MAPS else 1) * plane + start
        label = sub if MAPS else load_labels(wants, at, inside, ignore_index, C, IGNORE)
        if SOFTMAX:
            xs, es, top, total = softmax_of(base, sub, plane, offset, inside, C, LANES, GROUP, VEC, COMPUTE)
            inverse, log_total = 1.0 / total, tl.log(total)
            dot = tl.zeros_like(total)  # Σ p g, and Σ share · ∂L/∂log_p
            for g in tl.static_range((C + GROUP - 1) // GROUP):
                t, counts = targets_of(
                    wants, label, g, sub, plane, offset, inside, ignore_index, MAPS, IGNORE, C, GROUP, COMPUTE
                )
                p = es[g] * inverse
                dot += p * (d_overlap[g] * step_of(p, t, SMALLER) + (d_predicted[g] * p if SQUARED else d_predicted[g]))
                if FORMULA is not None and EVERY_CLASS:
                    w = of_class(class_weights, g, sub, C, GROUP, COMPUTE) if WEIGHTED else 1.0
                    share = share_of(t, values, SMOOTHED, C)
                    slope = share * upstream * row_formula((xs[g].to(COMPUTE) - top) - log_total, w, values, 1, FORMULA)
                    dot += tl.where((g * GROUP + sub < C) & (share != 0.0), slope, 0.0)
            dot = over_classes(dot, False, LANES, GROUP, VEC)
            if FORMULA is not None and not EVERY_CLASS:
                log_p = (picked_of(xs, label, sub, C, LANES, GROUP, VEC, COMPUTE) - top) - log_total
                w = tl.load(class_weights + tl.minimum(tl.maximum(label, 0), C - 1)).to(COMPUTE) if WEIGHTED else 1.0
                own = row_formula(log_p, w, values, 1, FORMULA) * upstream
                dot += own
        for g in tl.static_range((C + GROUP - 1) // GROUP):
            t, counts = targets_of(
                wants, label, g, sub, plane, offset, inside, ignore_index, MAPS, IGNORE, C, GROUP, COMPUTE
            )
            if SOFTMAX:
                p = es[g] * inverse
            else:
                x = tile_of(base, g, sub, plane, offset, inside, 0.0, C, GROUP).to(COMPUTE)
                p = sigmoid(x) if ACTIVATION == "sigmoid" else x
            dx = d_overlap[g] * step_of(p, t, SMALLER) + (d_predicted[g] * p if SQUARED else d_predicted[g])
            if SOFTMAX:
                dx = p * (dx - dot)
            elif ACTIVATION == "sigmoid":
                dx *= p * (1.0 - p)
            if FORMULA is not None:
                w = of_class(class_weights, g, sub, C, GROUP, COMPUTE) if WEIGHTED else 1.0
                if not SOFTMAX:
                    dx += element_formula(x, t, w, values, 1, FORMULA, WEIGHTED, OPERAND) * upstream
                elif EVERY_CLASS:
                    share = share_of(t, values, SMOOTHED, C)
                    slope = share * upstream * row_formula((xs[g].to(COMPUTE) - top) - log_total, w, values, 1, FORMULA)
                    dx += tl.where(share != 0.0, slope, 0.0)
                else:
                    dx += tl.where(label == g * GROUP + sub, own, 0.0)
            if IGNORE:
                dx = tl.where(counts, dx, 0.0)
            if GROUP == 1:
                tl.store(
                    out + g * plane + offset, dx.to(grad.dtype.element_ty), mask=inside, eviction_policy="evict_first"
                )
            else:
                mask = inside & (g * GROUP + sub < C)
                tl.store(
                    out + g * GROUP * plane + offset,
                    dx.to(grad.dtype.element_ty),
                    mask=mask,
                    eviction_policy="evict_first",
                )


MOST_CLASSES = 320  # ten tiles of 32 classes: beyond, a pixel's classes do not fit the registers
MOST_BYTES = 96  # of the exponentials that a thread holds
SPAN = 8192  # logits of a program, about: fixed, so that tuning never moves the partial sums
SAMPLE_BYTES = 256 << 20  # a launch is measured on at most this much


def span_of(classes):
    """Pixels of a program: a power of two, which every configuration's tiles divide."""
    return max(triton.next_power_of_2(SPAN // classes), 1024)


def config(args, threads=128, most=MOST_BYTES):
    group, each = 1, args["VEC"] * (8 if args["COMPUTE"] == tl.float64 else 4)
    if INTERPRET:  # which takes as long for a small tile as for a large one
        each, most = 1, 2
    while -(-args["C"] // group) * each > most and group < 32:
        group *= 2
    lanes = threads // group
    return {
        "LANES": lanes,
        "GROUP": group,
        "STEPS": span_of(args["C"]) // (lanes * args["VEC"]),
        "num_warps": threads // WARP,
    }


def configs(args):
    return [*(config(args, threads) for threads in (64, 128, 256)), config(args, most=MOST_BYTES * 5 // 3)]


def key(args):
    flags = tuple(
        args[name]
        for name in ("ACTIVATION", "MAPS", "IGNORE", "SQUARED", "SMALLER", "WEIGHTED", "SMOOTHED", "C", "VEC")
    )
    x, targets, read = args["logits"], args["targets"], args["FORMULA"]
    return getattr(read, "__name__", "sums"), str(x.dtype), str(targets.dtype), *flags, x.data_ptr() % 16 == 0


def sample(args):
    image = args["C"] * args["vectors"] * args["VEC"] * args["logits"].element_size()
    return {**args, "images": min(args["images"], max(SAMPLE_BYTES // max(image, 1), 1))}


def programs(images, fixed):
    return images * fixed["splits"]


options = {"configs": configs, "rule": config, "key": key, "programs": programs, "size": "images", "sample": sample}
forward_launch = Tuned(forward_kernel, **options)
backward_launch = Tuned(backward_kernel, **options)


class SumsPlan(NamedTuple):
    launch: Launch
    splits: int  # runs of pixels of an image
    scores: Launch | None = None
    scores_of_sums: Launch | None = None  # the same, of images whose splits are added up already


def shared_arguments(logits, targets, class_weights, problem):
    """What both kernels take."""
    images, classes, pixels = logits.shape
    formula, wide = FORMULAS.get(problem.formula), compute_dtype(logits.dtype)
    vec = math.gcd(pixels, 16 // logits.element_size())  # planes of no multiple of 16 bytes start anywhere
    return {
        "logits": logits,
        "targets": targets,
        "class_weights": given(class_weights, logits, problem),
        "images": images,
        "vectors": pixels // vec,
        "splits": max(-(-pixels // span_of(classes)), 1),
        "ignore_index": 0 if problem.ignore_index is None else problem.ignore_index,
        "scalars": as_scalars((*problem.scalars, problem.smoothing), wide),
        "FORMULA": formula.kernel if formula else None,
        "ACTIVATION": problem.activation,
        "MAPS": targets.dim() == 3,
        "IGNORE": problem.ignore_index is not None,
        "SQUARED": problem.squared,
        "SMALLER": problem.smaller,
        "WEIGHTED": formula is not None and class_weights is not None,
        "OPERAND": formula is not None and problem.activation != "softmax" and takes_weight(formula, problem.scalars),
        "SMOOTHED": problem.smoothing > 0,
        "COMPUTE": triton_type(wide),
        "C": classes,
        "VEC": vec,
    }


def given(class_weights, logits, problem):
    """The formula's class weights, or what stands in their place."""
    return class_weights if problem.formula and class_weights is not None else logits


def partials_of(logits, splits, formula):
    """Room for the sums of each run of pixels, and for the formula's losses: the same where there are none."""
    images, classes, _ = logits.shape
    wide = compute_dtype(logits.dtype)
    sums = logits.new_empty((images, splits, 3, classes), dtype=wide)
    return sums, logits.new_empty((images, splits), dtype=wide) if formula else sums


@planned
def sums_plan(tensors, problem):
    arguments = shared_arguments(*tensors, problem)
    sums, losses = partials_of(tensors[0], arguments["splits"], problem.formula)
    return SumsPlan(forward_launch.bind(partial_sums=sums, partial_losses=losses, **arguments), arguments["splits"])


@planned
def loss_plan(tensors, problem):
    found = sums_plan(tensors, problem)
    scores = (bind_scores(tensors, problem, splits) for splits in (found.splits, 1))
    return SumsPlan(found.launch, found.splits, *scores)


@planned
def backward_plan(tensors, problem, finished):
    logits, targets, class_weights, d_sums, d_losses, dout = tensors
    strides = (0, 0)
    if finished and dout.dim():
        of_classes = dout.stride(-1) if dout.dim() == 2 or problem.batch else 0
        strides = (0 if problem.batch else dout.stride(0), of_classes if problem.average == "macro" else 0)
    return backward_launch.bind(
        d_sums=d_sums,
        d_losses=d_losses,
        dout=dout,
        grad=torch.empty_like(logits),
        dout_image=strides[0],
        dout_class=strides[1],
        FINISHED=finished,
        FIRST=int(finished and not problem.background),
        **shared_arguments(logits, targets, class_weights, problem),
    )


def check_labels(targets, ignore_index, classes):
    """In the interpreter, where labels lie in a CPU's memory; a GPU asserts."""
    if targets.dim() == 2:
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= classes))]
        if wrong.numel():
            rule = f"it must be in [0, {classes})" + (
                "" if ignore_index is None else f", or ignore_index, {ignore_index}"
            )
            raise IndexError(f"Target {wrong.flatten()[0].item()} is out of bounds: {rule}")


def launched(find, tensors, problem):
    """The plan, and what each run of pixels summed."""
    logits, targets, class_weights = tensors
    if INTERPRET:
        check_labels(targets, problem.ignore_index, logits.shape[1])
    found = find(tensors, problem)
    sums, losses = partials_of(logits, found.splits, problem.formula)
    found.launch(logits, targets, given(class_weights, logits, problem), sums, losses, logits.shape[0])
    return found, sums, losses


def forward(tensors, problem):
    """saved: the loss's derivatives by the sums, and by the formula's losses where there are any."""
    logits, _, weights = tensors
    images, classes, _ = logits.shape
    wide = compute_dtype(logits.dtype)
    out = logits.new_empty(shape_of_loss(problem, images, classes), dtype=problem.dtype)
    saved = [logits.new_empty((images, 3, classes), dtype=wide)]
    if problem.formula:
        saved.append(logits.new_empty(images, dtype=wide))
    if shapes_only():
        return [out], saved
    found, sums, losses = launched(loss_plan, tensors, problem)
    scores = found.scores
    if sums.numel() > ALONE:
        sums, losses, scores = sums.sum(1), losses.sum(1) if problem.formula else sums, found.scores_of_sums
    scores(sums, losses, logits if weights is None else weights, out, saved[0], saved[-1], images)
    return [out], saved


def backward(tensors, saved, upstream, problem, wanted):
    logits, targets, class_weights = tensors
    grad = torch.empty_like(logits)
    if not shapes_only():
        launch = backward_plan((*tensors, saved[0], saved[-1], upstream[0]), problem, True)
        used = given(class_weights, logits, problem)
        launch(logits, targets, used, saved[0], saved[-1], upstream[0], grad, logits.shape[0])
    return [grad]


def sums_forward(tensors, problem):
    logits = tensors[0]
    images, classes, _ = logits.shape
    if shapes_only():
        sums = logits.new_empty((images, 3, classes), dtype=compute_dtype(logits.dtype))
        return [sums, sums.new_empty(images)], []
    _, sums, losses = launched(sums_plan, tensors, problem)
    return [sums.sum(1), losses.sum(1) if problem.formula else sums.new_zeros(images)], []


def sums_backward(tensors, saved, upstream, problem, wanted):
    logits, targets, class_weights = tensors
    grad = torch.empty_like(logits)
    if not shapes_only():
        d_sums, d_losses = (d.contiguous() for d in upstream)
        launch = backward_plan((*tensors, d_sums, d_losses, None), problem, False)
        launch(logits, targets, given(class_weights, logits, problem), d_sums, d_losses, d_sums, grad, logits.shape[0])
    return [grad]
