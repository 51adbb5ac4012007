"""Images and their labels by kernels: one program is a run of one image's pixels, and all their classes.

A thread has 16 bytes of neighbouring pixels of each class. Where its registers hold all classes at once, each class is
a tile of its own: one tile with a dimension of classes would be padded to a power of two. More classes are walked in a
loop, with a running maximum and Σ exp(x - maximum) for each pixel; the backward of few walks them twice, the second
time out of the cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import INTERPRET, WARP, compute_dtype
from triton_losses.core.device_math import as_scalars, exact, exp
from triton_losses.core.formula import FORMULAS
from triton_losses.core.launch import Launch
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import planned
from triton_losses.core.rows import counted, slots_of
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import name_of, triton_type
from triton_losses.kernels.finish import finish
from triton_losses.kernels.rows import LOWEST, LOWEST_DOUBLE, factors_of, read_formula, transform

# bytes of a class's pixels whose losses one program sums: fixed, so that tuning never moves the partial sums
SPAN = 2048
FEW = 32  # classes whose logits a program still finds in the cache when it reads them again: 16 bytes of each a thread
HELD = {2: 12, 4: 32, 8: 24}  # classes that a thread holds without spilling, by the bytes of a logit


def few(logits):
    """Whether the backward computes a pixel's statistics anew, so that the forward saves none."""
    return 0 < logits.shape[1] <= FEW


def held(logits):
    """The number of classes where a thread can hold all those of its 16 bytes of pixels, else 0."""
    classes = logits.shape[1]
    return classes if classes <= HELD[logits.element_size()] else 0


@triton.jit
def load_tiles(
    at,
    class_stride,
    mask,
    shape,
    COUNT: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    EVICT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """COUNT classes of a block of pixels: all loads first, so that they travel together."""
    tiles = ()
    for i in tl.static_range(COUNT):
        x = tl.load(at + i * class_stride, mask=mask, other=0.0, eviction_policy=EVICT).to(COMPUTE)
        tiles += (transform(x, shape, CAPPED, SCALED),)
    return tiles


@triton.jit
def take_classes(
    tiles, c, highest, total, spread, pivot, class_weights, MEAN_LOG_P: tl.constexpr, WEIGHTED: tl.constexpr
):
    """Fold classes from c on into the pixels' running maximum, Σ exp(x - maximum) and Σ w_j (x_j - pivot)."""
    higher = highest
    for i in tl.static_range(len(tiles)):
        higher = tl.maximum(higher, tiles[i])
    total *= exp(highest - higher)
    for i in tl.static_range(len(tiles)):
        total += exp(tiles[i] - higher)
        if MEAN_LOG_P:
            d = tiles[i] - pivot
            spread += d * tl.load(class_weights + c + i).to(d.dtype) if WEIGHTED else d
    return higher, total, spread


@triton.jit
def where(program, blocks, pixels, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """A program's block of pixels: the image, the lanes, which of them exist, and their places in (images, pixels)."""
    image = program // blocks
    first = (program - image * blocks) * BLOCK
    lanes = tl.arange(0, BLOCK)
    mask = lanes < tl.minimum(pixels - first, BLOCK).to(tl.int32) // VEC * VEC
    return image, lanes, mask, (image * (pixels // VEC * VEC) + first) + lanes


@triton.jit
def labels_of(at, mask, classes, ignore_index):
    """Whether each pixel's label counts, and the label's class, or one that can be read all the same."""
    label = tl.load(at, mask=mask, other=0).to(tl.int64)
    kept = mask & (label != ignore_index)
    fits = (label >= 0) & (label < classes)
    tl.device_assert(fits | ~kept, "a target is out of bounds: it is no class and not ignore_index")
    return kept, tl.where(fits, label, 0).to(tl.int32)


@triton.jit
def statistics_of(
    at,
    tiles,
    classes,
    class_stride,
    mask,
    pivot,
    class_weights,
    mean_weight,
    shape,
    MEAN_LOG_P: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    HELD: tl.constexpr,
    UNROLL: tl.constexpr,
    EVICT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Of each pixel: max x, log Σ exp(x - max), mean_log_p; from the tiles where they are HELD, else from one read."""
    highest = tl.full(pivot.shape, LOWEST_DOUBLE if COMPUTE == tl.float64 else LOWEST, COMPUTE)
    total = tl.zeros(pivot.shape, COMPUTE)
    spread = tl.zeros(pivot.shape, COMPUTE)
    if HELD:
        highest, total, spread = take_classes(
            tiles, 0, highest, total, spread, pivot, class_weights, MEAN_LOG_P, WEIGHTED
        )
    else:
        together = classes // UNROLL * UNROLL
        for c in range(0, together, UNROLL):
            loaded = load_tiles(
                at + c * class_stride, class_stride, mask, shape, UNROLL, CAPPED, SCALED, EVICT, COMPUTE
            )
            highest, total, spread = take_classes(
                loaded, c, highest, total, spread, pivot, class_weights, MEAN_LOG_P, WEIGHTED
            )
        for c in range(together, classes):
            loaded = load_tiles(at + c * class_stride, class_stride, mask, shape, 1, CAPPED, SCALED, EVICT, COMPUTE)
            highest, total, spread = take_classes(
                loaded, c, highest, total, spread, pivot, class_weights, MEAN_LOG_P, WEIGHTED
            )
    log_total = tl.log(total)
    if MEAN_LOG_P:
        rest = pivot - highest - log_total
        if WEIGHTED:
            rest *= tl.load(mean_weight).to(COMPUTE)
        spread = spread / classes + rest
    return highest, log_total, spread


@triton.jit
def formula_of(
    picked,
    highest,
    log_total,
    mean_log_p,
    place,
    kept,
    class_weights,
    scalars,
    FORMULA: tl.constexpr,
    SLOTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Each pixel's loss, its partials, and the weight of its class."""
    weight = tl.where(kept, 1.0, 0.0).to(COMPUTE)
    if WEIGHTED:
        weight = tl.load(class_weights + place, mask=kept, other=0.0).to(COMPUTE)
    # no formula here takes the entropy
    statistics = (picked, (picked - highest) - log_total, mean_log_p, highest + log_total, highest)
    loss, partials = read_formula(FORMULA, SLOTS, statistics, weight, (), exact(scalars, COMPUTE))
    return loss, partials, weight


def direction(which):
    return name_of(f"label_planes_{which}")


@triton.jit(repr=direction("forward"), debug=True, do_not_specialize=["ignore_index", "images"])
def forward_kernel(
    logits,  # (images, classes, pixels); a pixel's neighbours lie beside it
    labels,  # (images, pixels)
    class_weights,  # (classes,) where WEIGHTED
    mean_weight,  # () where WEIGHTED
    # (2 or 3, images, pixels): max, log Σ exp(x - max), mean_log_p where the formula takes it; written where SAVED
    saved,
    out,  # (images, pixels) losses; where REDUCE (2, images, spans): sums of losses and of weights
    images: tl.int64,
    classes,
    pixels,
    image_stride,
    class_stride,
    ignore_index,
    scalars,
    shape,
    FORMULA: tl.constexpr,
    SLOTS: tl.constexpr,
    REDUCE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    HELD: tl.constexpr,
    SAVED: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    SOFTMAX: tl.constexpr = SLOTS[1] or SLOTS[2] or SLOTS[3]
    program = tl.program_id(0).to(tl.int64)
    spans = tl.cdiv(pixels, BLOCK)
    image, lanes, mask, places = where(program, spans, pixels, VEC, BLOCK)
    stride = tl.cast(class_stride, tl.int64) // VEC * VEC  # says that planes are aligned
    at = logits + (image * (image_stride // VEC * VEC) + (program - image * spans) * BLOCK) + lanes
    shape = exact(shape, COMPUTE)
    kept, place = labels_of(labels + places, mask, classes, ignore_index)
    picked = tl.load(at + place.to(tl.int64) * stride, mask=mask & (place < classes), other=0.0).to(COMPUTE)
    picked = transform(picked, shape, CAPPED, SCALED)
    highest = tl.zeros((BLOCK,), COMPUTE)
    log_total = highest
    mean_log_p = highest
    if SOFTMAX:
        tiles = load_tiles(at, stride, mask, shape, HELD, CAPPED, SCALED, "evict_first", COMPUTE)
        pivot = tl.where(tl.abs(picked) < float("inf"), picked, 0.0).to(COMPUTE)
        highest, log_total, mean_log_p = statistics_of(
            at,
            tiles,
            classes,
            stride,
            mask,
            pivot,
            class_weights,
            mean_weight,
            shape,
            SLOTS[2] > 0,
            WEIGHTED,
            CAPPED,
            SCALED,
            HELD,
            UNROLL,
            "evict_first",
            COMPUTE,
        )
        if SAVED:
            count = images * (pixels // VEC * VEC)
            tl.store(saved + places, highest, mask=mask)
            tl.store(saved + count + places, log_total, mask=mask)
            if SLOTS[2]:
                tl.store(saved + 2 * count + places, mean_log_p, mask=mask)
    loss, _, weight = formula_of(
        picked, highest, log_total, mean_log_p, place, kept, class_weights, scalars, FORMULA, SLOTS, WEIGHTED, COMPUTE
    )
    loss = tl.where(kept, loss, 0.0).to(COMPUTE)
    if REDUCE:
        tl.store(out + program, tl.sum(loss, 0))
        tl.store(out + images * spans + program, tl.sum(weight, 0))
    else:
        tl.store(out + places, loss.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gradient_of(x, c, pixels, class_weights, shape, SLOTS: tl.constexpr, WEIGHTED: tl.constexpr, CAPPED: tl.constexpr):
    """∂L/∂x of class c; x is transformed already."""
    highest, log_total, factors, place, kept = pixels
    softmax_factor, label_factor, uniform_factor, _ = factors
    g = tl.where(place == c, label_factor, 0.0).to(highest.dtype)
    if SLOTS[1] or SLOTS[2] or SLOTS[3]:
        g += exp((x - highest) - log_total) * softmax_factor
    if SLOTS[2]:
        g += uniform_factor * tl.load(class_weights + c).to(g.dtype) if WEIGHTED else uniform_factor
    if CAPPED:
        slope = x / (shape[0] * shape[1])  # tanh(logit / softcap)
        g *= 1.0 - slope * slope
    return tl.where(kept, g, 0.0)  # whatever stood there, nan too


@triton.jit
def write_tiles(
    at,
    class_stride,
    tiles,
    c,
    mask,
    pixels,
    class_weights,
    shape,
    SLOTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    for i in tl.static_range(len(tiles)):
        g = gradient_of(tiles[i], c + i, pixels, class_weights, shape, SLOTS, WEIGHTED, CAPPED)
        tl.store(at + i * class_stride, g.to(at.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit(repr=direction("backward"), debug=True, do_not_specialize=["ignore_index", "images", "at_denominator"])
def backward_kernel(
    logits,  # (images, classes, pixels); a pixel's neighbours lie beside it
    labels,  # (images, pixels)
    class_weights,  # (classes,) where WEIGHTED
    mean_weight,  # () where WEIGHTED
    saved,  # (2 or 3, images, pixels): max, log Σ exp(x - max), mean_log_p where the formula takes it; read where SAVED
    grad,  # (images, classes, pixels), contiguous
    upstream,  # () where SAME, else (images, pixels)
    denominator,  # where MEAN (at + 1,), of which the last is read
    at_denominator: tl.int64,
    images: tl.int64,
    classes,
    pixels,
    image_stride,
    class_stride,
    ignore_index,
    scalars,
    shape,
    FORMULA: tl.constexpr,
    SLOTS: tl.constexpr,
    SAME: tl.constexpr,
    MEAN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    HELD: tl.constexpr,
    SAVED: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    SOFTMAX: tl.constexpr = SLOTS[1] or SLOTS[2] or SLOTS[3]
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(pixels, BLOCK)
    image, lanes, mask, places = where(program, blocks, pixels, VEC, BLOCK)
    first = (program - image * blocks) * BLOCK
    stride = tl.cast(class_stride, tl.int64) // VEC * VEC  # says that planes are aligned
    plane = tl.cast(pixels, tl.int64) // VEC * VEC
    at = logits + (image * (image_stride // VEC * VEC) + first) + lanes
    out = grad + (image * classes * plane + first) + lanes
    shape = exact(shape, COMPUTE)
    kept, place = labels_of(labels + places, mask, classes, ignore_index)
    picked = tl.load(at + place.to(tl.int64) * stride, mask=mask & (place < classes), other=0.0).to(COMPUTE)
    picked = transform(picked, shape, CAPPED, SCALED)
    highest = tl.zeros((BLOCK,), COMPUTE)
    log_total = highest
    mean_log_p = highest
    tiles = load_tiles(at, stride, mask, shape, HELD, CAPPED, SCALED, "evict_first", COMPUTE)
    if SOFTMAX and not SAVED:
        pivot = tl.where(tl.abs(picked) < float("inf"), picked, 0.0).to(COMPUTE)
        highest, log_total, mean_log_p = statistics_of(
            at,
            tiles,
            classes,
            stride,
            mask,
            pivot,
            class_weights,
            mean_weight,
            shape,
            SLOTS[2] > 0,
            WEIGHTED,
            CAPPED,
            SCALED,
            HELD,
            UNROLL,
            "evict_last",
            COMPUTE,
        )
    elif SOFTMAX:
        count = images * plane
        highest = tl.load(saved + places, mask=mask, other=0.0)
        log_total = tl.load(saved + count + places, mask=mask, other=0.0)
        if SLOTS[2]:
            mean_log_p = tl.load(saved + 2 * count + places, mask=mask, other=0.0)
    _, partials, _ = formula_of(
        picked, highest, log_total, mean_log_p, place, kept, class_weights, scalars, FORMULA, SLOTS, WEIGHTED, COMPUTE
    )
    factor = tl.load(upstream).to(COMPUTE) if SAME else tl.load(upstream + places, mask=mask, other=0.0).to(COMPUTE)
    if MEAN:
        factor = factor / tl.load(denominator + at_denominator)
    if SCALED:
        factor *= shape[1]
    factors = factors_of(partials, factor, mean_weight, classes, SLOTS, WEIGHTED)
    of_pixels = (highest, log_total, factors, place, kept)
    if HELD:
        write_tiles(out, plane, tiles, 0, mask, of_pixels, class_weights, shape, SLOTS, WEIGHTED, CAPPED)
    else:
        together = classes // UNROLL * UNROLL
        for c in range(0, together, UNROLL):
            loaded = load_tiles(at + c * stride, stride, mask, shape, UNROLL, CAPPED, SCALED, "evict_first", COMPUTE)
            write_tiles(
                out + c * plane, plane, loaded, c, mask, of_pixels, class_weights, shape, SLOTS, WEIGHTED, CAPPED
            )
        for c in range(together, classes):
            loaded = load_tiles(at + c * stride, stride, mask, shape, 1, CAPPED, SCALED, "evict_first", COMPUTE)
            write_tiles(
                out + c * plane, plane, loaded, c, mask, of_pixels, class_weights, shape, SLOTS, WEIGHTED, CAPPED
            )


SAMPLE_BYTES = 256 << 20  # a launch is measured on at most this much


def key(args):
    x = args["logits"]
    flags = tuple(args[name] for name in ("WEIGHTED", "CAPPED", "SCALED", "VEC"))
    return (
        args["FORMULA"].__name__,
        args["classes"],
        str(x.dtype),
        *flags,
        args.get("REDUCE", args.get("SAME")),
        x.data_ptr() % 16 == 0,
    )


def sample(args):
    most = SAMPLE_BYTES // max(args["classes"] * args["pixels"] * args["logits"].element_size(), 1)
    return {**args, "images": min(args["images"], max(most, 1))}


def config(args, threads, unroll):  # a thread has 16 bytes of pixels
    return {"BLOCK": threads * 16 // args["logits"].element_size(), "UNROLL": unroll, "num_warps": threads // WARP}


def rule(args):
    return config(args, 128, 1 if args["HELD"] else 4)


def configs(args):
    if args["HELD"]:
        return [config(args, threads, 1) for threads in (64, 128, 256)]
    return [config(args, threads, unroll) for threads, unroll in ((128, 4), (128, 8), (64, 4), (256, 4))]


def in_spans(choice, args):
    """The forward's blocks are SPANs: what may vary is how many threads share one, and how many classes travel
    together.
    """
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
    sample=sample,
)
backward_launch = Tuned(
    backward_kernel, configs=configs, rule=rule, key=key, programs=programs, size="images", sample=sample
)


def shared_arguments(logits, labels, class_weights, problem, saved):
    """What both kernels take."""
    formula, (images, classes, pixels) = FORMULAS[problem.formula], logits.shape
    wide, weighted = compute_dtype(logits.dtype), class_weights is not None
    strides = logits.stride()[:2]
    vec = 16 // logits.element_size()
    while any(s % vec for s in (pixels, *strides)):
        vec //= 2
    softcap, scale = problem.softcap, problem.scale
    return {
        "logits": logits,
        "labels": labels,
        "class_weights": class_weights if weighted else logits,
        "mean_weight": class_weights if weighted and slots_of(formula)[2] else logits,
        "saved": saved,
        "images": images,
        "classes": classes,
        "pixels": pixels,
        "image_stride": strides[0],
        "class_stride": strides[1],
        "ignore_index": problem.ignore_index,
        "scalars": as_scalars(problem.scalars, wide),
        "shape": as_scalars((softcap, scale), wide),
        "FORMULA": formula.kernel,
        "SLOTS": slots_of(formula),
        "WEIGHTED": weighted,
        "CAPPED": softcap > 0,
        "SCALED": scale != 1,
        "HELD": held(logits),
        "SAVED": not few(logits),
        "COMPUTE": triton_type(wide),
        "VEC": vec,
    }


class PlanesPlan(NamedTuple):
    readable: bool  # pixels side by side, labels and class weights without gaps
    wide: torch.dtype
    spans: int  # sums of an image
    mean_weight: bool
    same: bool = False  # one upstream gradient for all pixels
    launch: Launch | None = None


def unreadable(logits, labels, class_weights):
    return (logits.stride(2) != 1 and logits.shape[2] != 1) or not all(
        t is None or t.is_contiguous() for t in (labels, class_weights)
    )


def saved_of(logits, formula):
    """Room for each pixel's max x, log Σ exp(x - max) and, where the formula takes it, mean_log_p: of many classes
    alone.
    """
    images, _, pixels = logits.shape
    taken = slots_of(formula)
    count = 0 if few(logits) or not any(taken[1:4]) else 3 if taken[2] else 2
    return logits.new_empty((count, images, pixels) if count else (0,), dtype=compute_dtype(logits.dtype))


def spans_of(logits):
    return -(-logits.shape[2] * logits.element_size() // SPAN)


def sums_of(logits, spans):
    """Room for sums of losses and of weights, and for the sum of those."""
    return logits.new_empty(2 * logits.shape[0] * spans + 1, dtype=compute_dtype(logits.dtype))


@planned
def plan(tensors, problem):
    """Of the backward where there is an upstream gradient, else of the forward."""
    *inputs, upstream, saved = tensors
    logits, labels, class_weights = inputs
    wide, formula, none = compute_dtype(logits.dtype), FORMULAS[problem.formula], problem.reduction == "none"
    spans, mean_weight = spans_of(logits), class_weights is not None and slots_of(formula)[2] > 0
    # one upstream gradient, or one expanded: what loss.sum().backward() sends
    same = upstream is not None and not any(upstream.stride())
    if unreadable(*inputs) or not (upstream is None or same or upstream.is_contiguous()):
        return PlanesPlan(False, wide, spans, mean_weight, same)
    if upstream is None:
        out = logits.new_empty(labels.shape, dtype=problem.dtype) if none else sums_of(logits, spans)
        arguments = shared_arguments(*inputs, problem, saved_of(logits, formula))
        return PlanesPlan(
            True, wide, spans, mean_weight, same, forward_launch.bind(out=out, REDUCE=not none, **arguments)
        )
    launch = backward_launch.bind(
        grad=logits.new_empty(logits.shape),
        upstream=upstream,
        denominator=sums_of(logits, spans),
        at_denominator=0,
        SAME=same,
        MEAN=problem.reduction == "mean",
        **shared_arguments(*inputs, problem, saved),
    )
    return PlanesPlan(True, wide, spans, mean_weight, same, launch)


def prepared(tensors, problem, upstream=None, saved=None):
    """The plan, what both kernels read as they want it, and the upstream gradient likewise."""
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
        # refuses a label that is no class; a GPU asserts
        counted(labels, None, logits.shape[1], problem.ignore_index, torch.float32)
    mean_weight = class_weights.to(found.wide).mean() if found.mean_weight else logits
    return found, (logits, labels, logits if class_weights is None else class_weights, mean_weight), upstream


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
