"""Kernels of images and their labels: each program reads a block of one image's pixels, with all their classes.

A thread has 16 bytes of neighbouring pixels of each class. If its registers can hold all classes at once, each class is
a separate tile, because one tile with a dimension of classes would be padded to a power of two. More classes are read
in a loop, with a running maximum and Σ exp(x - maximum) for each pixel. For few classes (at most FEW) the backward
reads them twice, and the second read hits the cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import INTERPRET, WARP, compute_dtype
from triton_losses.core.device_math import as_scalars, exact
from triton_losses.core.formula import FORMULAS
from triton_losses.core.launch import Launch
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import planned
from triton_losses.core.rows import counted, slots_of
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import name_of, triton_type
from triton_losses.kernels.finish import finish
from triton_losses.kernels.label_tiles import (
    Kind,
    block_of,
    formula_of,
    labels_of,
    load_tiles,
    picked_of,
    statistics_of,
    write_tiles,
)
from triton_losses.kernels.rows import factors_of

SPAN = 2048  # bytes of a class's pixels that one program sums: fixed, so that tuning never changes the partial sums
FEW = 32  # most classes whose logits, 16 bytes of each per thread, are still cached when they are read again
HELD = {2: 12, 4: 32, 8: 24}  # most classes that a thread holds without spilling registers, by the bytes of a logit


def few(logits):
    """Whether the backward recomputes the pixels' statistics, so that the forward saves none."""
    return 0 < logits.shape[1] <= FEW


def held(logits):
    """The number of classes if a thread can hold 16 bytes of pixels of each, otherwise 0."""
    classes = logits.shape[1]
    return classes if classes <= HELD[logits.element_size()] else 0


@triton.jit(repr=name_of("label_planes_forward"), debug=True, do_not_specialize=["ignore_index", "images"])
def forward_kernel(
    logits,  # (images, classes, pixels); the stride of pixels is 1
    labels,  # (images, pixels)
    weights,  # class weights, (classes,), if weighted; their mean, (), if the formula takes mean_log_p too
    saved,  # (2 or 3, images, pixels): max, log Σ exp(x - max), mean_log_p if the formula takes it; written if saved
    out,  # (images, pixels) losses; if reduced (2, images, spans): sums of losses and of weights
    images: tl.int64,
    classes,
    pixels,
    image_stride,
    class_stride,
    ignore_index,
    scalars,
    scaling,  # softcap, scale
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    SOFTMAX: tl.constexpr = KIND.slots[1] or KIND.slots[2] or KIND.slots[3]
    COUNT: tl.constexpr = KIND.held
    image, first, lanes, mask, places = block_of(pixels, BLOCK, KIND)
    stride = tl.cast(class_stride, tl.int64) // KIND.vec * KIND.vec  # tells the compiler that planes are aligned
    planes = (logits + (image * (image_stride // KIND.vec * KIND.vec) + first) + lanes, stride, mask)
    scaling = exact(scaling, KIND.compute)
    kept, label = labels_of(labels + places, mask, classes, ignore_index)
    picked = picked_of(planes, label, classes, scaling, KIND)
    zeros = tl.zeros((BLOCK,), KIND.compute)
    statistics = (zeros, zeros, zeros)
    if SOFTMAX:
        tiles = load_tiles(planes, 0, scaling, COUNT, "evict_first", KIND)
        statistics = statistics_of(planes, tiles, picked, classes, weights, scaling, UNROLL, "evict_first", KIND)
        if KIND.saved:
            count = images * (pixels // KIND.vec * KIND.vec)
            tl.store(saved + places, statistics[0], mask=mask)
            tl.store(saved + count + places, statistics[1], mask=mask)
            if KIND.slots[2]:
                tl.store(saved + 2 * count + places, statistics[2], mask=mask)
    loss, _, weight = formula_of(picked, statistics, label, kept, weights[0], scalars, FORMULA, KIND)
    loss = tl.where(kept, loss, 0.0).to(KIND.compute)
    if KIND.reduced:
        program = tl.program_id(0).to(tl.int64)
        tl.store(out + program, tl.sum(loss, 0))
        tl.store(out + images * tl.cdiv(pixels, BLOCK) + program, tl.sum(weight, 0))
    else:
        tl.store(out + places, loss.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    repr=name_of("label_planes_backward"), debug=True, do_not_specialize=["ignore_index", "images", "at_denominator"]
)
def backward_kernel(
    logits,  # (images, classes, pixels); the stride of pixels is 1
    labels,  # (images, pixels)
    weights,  # as in the forward
    saved,  # as in the forward; read if saved
    grad,  # (images, classes, pixels), contiguous
    upstream,  # () if same, otherwise (images, pixels)
    denominator,  # if mean (at_denominator + 1,): its last element is read
    at_denominator: tl.int64,
    images: tl.int64,
    classes,
    pixels,
    image_stride,
    class_stride,
    ignore_index,
    scalars,
    scaling,  # softcap, scale
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    SOFTMAX: tl.constexpr = KIND.slots[1] or KIND.slots[2] or KIND.slots[3]
    COUNT: tl.constexpr = KIND.held
    image, first, lanes, mask, places = block_of(pixels, BLOCK, KIND)
    stride = tl.cast(class_stride, tl.int64) // KIND.vec * KIND.vec  # tells the compiler that planes are aligned
    plane = tl.cast(pixels, tl.int64) // KIND.vec * KIND.vec
    planes = (logits + (image * (image_stride // KIND.vec * KIND.vec) + first) + lanes, stride, mask)
    out = (grad + (image * classes * plane + first) + lanes, plane, mask)
    scaling = exact(scaling, KIND.compute)
    kept, label = labels_of(labels + places, mask, classes, ignore_index)
    picked = picked_of(planes, label, classes, scaling, KIND)
    zeros = tl.zeros((BLOCK,), KIND.compute)
    statistics = (zeros, zeros, zeros)
    tiles = load_tiles(planes, 0, scaling, COUNT, "evict_first", KIND)
    if SOFTMAX and not KIND.saved:
        statistics = statistics_of(planes, tiles, picked, classes, weights, scaling, UNROLL, "evict_last", KIND)
    elif SOFTMAX:
        count = images * plane
        highest = tl.load(saved + places, mask=mask, other=0.0)
        log_total = tl.load(saved + count + places, mask=mask, other=0.0)
        mean_log_p = tl.load(saved + 2 * count + places, mask=mask, other=0.0) if KIND.slots[2] else zeros
        statistics = (highest, log_total, mean_log_p)
    _, partials, _ = formula_of(picked, statistics, label, kept, weights[0], scalars, FORMULA, KIND)
    factor = tl.load(upstream) if KIND.same else tl.load(upstream + places, mask=mask, other=0.0)
    factor = factor.to(KIND.compute)
    if KIND.mean:
        factor = factor / tl.load(denominator + at_denominator)
    if KIND.scaled:
        factor *= scaling[1]
    of_pixels = (statistics, factors_of(partials, factor, weights[1], classes, KIND), label, kept)
    if KIND.held:
        write_tiles(out, tiles, 0, of_pixels, weights[0], scaling, KIND)
    else:
        together = classes // UNROLL * UNROLL
        for c in range(0, together, UNROLL):
            loaded = load_tiles(planes, c, scaling, UNROLL, "evict_first", KIND)
            write_tiles(out, loaded, c, of_pixels, weights[0], scaling, KIND)
        for c in range(together, classes):
            loaded = load_tiles(planes, c, scaling, 1, "evict_first", KIND)
            write_tiles(out, loaded, c, of_pixels, weights[0], scaling, KIND)


def key(args):
    x, kind = args["logits"], args["KIND"]
    flags = kind.weighted, kind.capped, kind.scaled, kind.vec, kind.reduced, kind.same
    return args["FORMULA"].__name__, args["classes"], str(x.dtype), *flags, x.data_ptr() % 16 == 0


def bytes_of_image(args):
    return args["classes"] * args["pixels"] * args["logits"].element_size()


def config(args, threads, unroll):  # a thread has 16 bytes of pixels
    return {"BLOCK": threads * 16 // args["logits"].element_size(), "UNROLL": unroll, "num_warps": threads // WARP}


def rule(args):
    return config(args, 128, 1 if args["KIND"].held else 4)


def backward_rule(args):
    """A gradient's factors of 8 pixels take many registers, so few programs fit: each asks for 6 classes at once."""
    return config(args, 128, 6) if not args["KIND"].held and args["logits"].element_size() == 2 else rule(args)


def configs(args, most=8):
    if args["KIND"].held:
        return [config(args, threads, 1) for threads in (64, 128, 256)]
    return [config(args, threads, unroll) for threads, unroll in ((128, 4), (128, most), (64, 4), (256, 4))]


def backward_configs(args):
    return configs(args, most=6)  # with 8, AMD's compiler spills registers


def in_spans(choice, args):
    """The forward's block is one SPAN: only the number of threads and of classes loaded together can be tuned."""
    return {**choice, "BLOCK": SPAN // args["logits"].element_size()}


def programs(images, fixed):
    return images * -(-fixed["pixels"] // fixed["BLOCK"])


forward_launch = Tuned(
    forward_kernel,
    configs=lambda args: [in_spans(choice, args) for choice in configs(args)],
    rule=lambda args: in_spans(rule(args), args),
    key=key,
    programs=programs,
    size="images",
    bytes_each=bytes_of_image,
)
backward_launch = Tuned(
    backward_kernel,
    configs=backward_configs,
    rule=backward_rule,
    key=key,
    programs=programs,
    size="images",
    bytes_each=bytes_of_image,
)


def shared_arguments(inputs, problem, saved, **directions):
    """The arguments that both kernels take."""
    (logits, labels, class_weights), formula = inputs, FORMULAS[problem.formula]
    images, classes, pixels = logits.shape
    wide, weighted = compute_dtype(logits.dtype), class_weights is not None
    image_stride, class_stride, _ = logits.stride()
    vec = 16 // logits.element_size()
    while any(s % vec for s in (pixels, image_stride, class_stride)):
        vec //= 2
    softcap, scale = problem.softcap, problem.scale
    given = {"weighted": weighted, "capped": softcap > 0, "scaled": scale != 1}
    kind = {"held": held(logits), "saved": not few(logits), **given, **directions}
    return {
        "logits": logits,
        "labels": labels,
        "weights": (class_weights if weighted else logits, saved if weighted and slots_of(formula)[2] else logits),
        "saved": saved,
        "images": images,
        "classes": classes,
        "pixels": pixels,
        "image_stride": image_stride,
        "class_stride": class_stride,
        "ignore_index": problem.ignore_index,
        "scalars": as_scalars(problem.scalars, wide),
        "scaling": as_scalars((softcap, scale), wide),
        "FORMULA": formula.kernel,
        "KIND": Kind(triton_type(wide), vec, slots_of(formula), **kind),
    }


class PlanesPlan(NamedTuple):
    readable: bool  # the stride of pixels is 1; labels and class weights are contiguous
    wide: torch.dtype
    spans: int  # partial sums per image
    mean_weight: bool
    same: bool = False  # one upstream gradient for all pixels
    launch: Launch | None = None


def unreadable(logits, labels, class_weights):
    return (logits.stride(2) != 1 and logits.shape[2] != 1) or not all(
        t is None or t.is_contiguous() for t in (labels, class_weights)
    )


def saved_of(logits, formula):
    """Memory for each pixel's max x, log Σ exp(x - max) and, if taken, mean_log_p; empty if there are few classes."""
    images, _, pixels = logits.shape
    taken = slots_of(formula)
    count = 0 if few(logits) or not any(taken[1:4]) else 3 if taken[2] else 2
    return logits.new_empty((count, images, pixels) if count else (0,), dtype=compute_dtype(logits.dtype))


def spans_of(logits):
    return -(-logits.shape[2] * logits.element_size() // SPAN)


def sums_of(logits, spans):
    """Memory for partial sums of losses and of weights, and for the sum of the weights."""
    return logits.new_empty(2 * logits.shape[0] * spans + 1, dtype=compute_dtype(logits.dtype))


@planned
def plan(tensors, problem):
    """The backward's plan if there is an upstream gradient, otherwise the forward's."""
    *inputs, upstream, saved = tensors
    logits, labels, class_weights = inputs
    wide, formula, none = compute_dtype(logits.dtype), FORMULAS[problem.formula], problem.reduction == "none"
    spans, mean_weight = spans_of(logits), class_weights is not None and slots_of(formula)[2] > 0
    # one value, perhaps expanded: loss.sum().backward() passes such a gradient
    same = upstream is not None and not any(upstream.stride())
    if unreadable(*inputs) or not (upstream is None or same or upstream.is_contiguous()):
        return PlanesPlan(False, wide, spans, mean_weight, same)
    if upstream is None:
        out = logits.new_empty(labels.shape, dtype=problem.dtype) if none else sums_of(logits, spans)
        arguments = shared_arguments(
            inputs, problem, saved_of(logits, formula), reduced=not none, same=False, mean=False
        )
        return PlanesPlan(True, wide, spans, mean_weight, same, forward_launch.bind(out=out, **arguments))
    launch = backward_launch.bind(
        grad=logits.new_empty(logits.shape),
        upstream=upstream,
        denominator=sums_of(logits, spans),
        at_denominator=0,
        **shared_arguments(inputs, problem, saved, reduced=False, same=same, mean=problem.reduction == "mean"),
    )
    return PlanesPlan(True, wide, spans, mean_weight, same, launch)


def prepared(tensors, problem, upstream=None, saved=None):
    """The plan, and the tensors and the upstream gradient in the layout that the kernels read."""
    found = plan((*tensors, upstream, saved), problem)
    if not found.readable:
        logits, *others = tensors
        if logits.stride(2) != 1 and logits.shape[2] != 1:
            logits = logits.contiguous()
        tensors = (logits, *(t if t is None else t.contiguous() for t in others))
        upstream = upstream if upstream is None or found.same else upstream.contiguous()
        found = plan((*tensors, upstream, saved), problem)
    logits, labels, class_weights = tensors
    if INTERPRET:
        # raises for a label that is no class; on a GPU the kernel asserts
        counted(labels, None, logits.shape[1], problem.ignore_index, torch.float32)
    mean_weight = class_weights.to(found.wide).mean() if found.mean_weight else logits
    weights = logits if class_weights is None else class_weights, mean_weight
    return found, (logits, labels, weights), upstream


def forward(tensors, problem):
    logits, labels, _ = tensors
    none, saved = problem.reduction == "none", saved_of(logits, FORMULAS[problem.formula])
    out = logits.new_empty(labels.shape if none else (), dtype=problem.dtype)
    sums = saved.new_empty(0) if none else sums_of(logits, spans_of(logits))
    if not shapes_only():
        found, inputs, _ = prepared(tensors, problem)
        found.launch(*inputs, saved, out if none else sums, logits.shape[0])
        if not none:
            finish(sums, out, logits.shape[0] * found.spans, weights_at=2, mean=problem.reduction == "mean")
    return [out], [saved, sums]


def backward(tensors, saved, upstream, problem):
    logits, (statistics, sums) = tensors[0], saved
    grad = logits.new_empty(logits.shape)
    if not shapes_only():
        found, inputs, dout = prepared(tensors, problem, upstream[0], statistics)
        images = logits.shape[0]
        found.launch(*inputs, statistics, grad, dout, sums, 2 * images * found.spans, images)
    return [grad]
