"""The kernels of families/regions.py, and how they are launched. One program is a run of pixels of one image, all their classes.

A tile is (LANES · GROUP, VEC): VEC neighbouring pixels of one class in one load, and GROUP classes in neighbouring threads, so
that a sum over classes is a few shuffles and no barrier. A tuple of such tiles holds all classes of a pixel in registers.
"""

import math

import triton
import triton.language as tl

from triton_losses.core.compiler import INTERPRET, WARP, compute_dtype
from triton_losses.core.device_math import as_scalars, exact, exp, sigmoid
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import triton_type


@triton.jit
def tile_of(base, g: tl.constexpr, sub, plane, offset, inside, other, C: tl.constexpr, GROUP: tl.constexpr):
    """Tile g: class g where a tile holds one class, else the GROUP classes from g · GROUP on."""
    if GROUP == 1:
        return tl.load(base + g * plane + offset, mask=inside, other=other, eviction_policy="evict_first")
    else:
        mask = inside & (g * GROUP + sub < C)
        return tl.load(base + g * GROUP * plane + offset, mask=mask, other=other, eviction_policy="evict_first")


@triton.jit
def of_class(table, g: tl.constexpr, sub, C: tl.constexpr, GROUP: tl.constexpr, COMPUTE: tl.constexpr):
    """A number for each class of tile g, out of a small table."""
    if GROUP == 1:
        return tl.load(table + g).to(COMPUTE)
    else:
        return tl.load(table + g * GROUP + sub, mask=g * GROUP + sub < C, other=0.0).to(COMPUTE)


@triton.jit
def over_classes(x, HIGHEST: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, VEC: tl.constexpr):
    """Maximum or sum over the threads that share a pixel, given to each of them."""
    if GROUP == 1:
        return x
    else:
        x = tl.reshape(x, (LANES, GROUP, VEC))
        x = tl.max(x, 1) if HIGHEST else tl.sum(x, 1)
        return tl.reshape(tl.broadcast_to(x[:, None, :], (LANES, GROUP, VEC)), (LANES * GROUP, VEC))


@triton.jit
def load_labels(targets, at, inside, ignore_index, C: tl.constexpr, IGNORE: tl.constexpr):
    """Labels, -1 where they do not count and C where they are none."""
    raw = tl.load(targets + at, mask=inside, other=0)
    counts = inside & (raw != ignore_index) if IGNORE else inside
    label = tl.where((raw >= 0) & (raw < C), raw.to(tl.int32), C)
    return tl.where(counts, label, -1)


@triton.jit
def targets_of(
    targets, label, g: tl.constexpr, sub, plane, offset, inside, ignore_index,
    MAPS: tl.constexpr, IGNORE: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """t of tile g, 0 where it does not count, and where it does."""
    if MAPS:
        raw = tile_of(targets, g, sub, plane, offset, inside, 0, C, GROUP)
        counts = inside & (raw != ignore_index) if IGNORE else inside
        t = raw.to(COMPUTE)
        t = tl.where(counts, t, 0.0) if IGNORE else t
    else:
        t, counts = tl.where(label == g * GROUP + sub, 1.0, 0.0).to(COMPUTE), label >= 0
    return t, counts


@triton.jit
def step_of(p, t, SMALLER: tl.constexpr):
    """∂ overlap / ∂p: of p · t, or of min(p, t)."""
    if SMALLER:
        return tl.where(p < t, 1.0, tl.where(p > t, 0.0, 0.5)).to(p.dtype)
    else:
        return t


@triton.jit
def softmax_of(
    base, sub, plane, offset, inside, C: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, VEC: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """Tuples of x as stored and of exp(x - max), then max and Σ exp(x - max) over the classes; nan outside."""
    xs, es = (), ()
    for g in tl.static_range((C + GROUP - 1) // GROUP):
        x = tile_of(base, g, sub, plane, offset, inside, -float("inf"), C, GROUP)
        xs += (x,)
        top = x.to(COMPUTE) if g == 0 else tl.maximum(top, x.to(COMPUTE))
    top = over_classes(top, True, LANES, GROUP, VEC)
    for g in tl.static_range((C + GROUP - 1) // GROUP):
        e = exp(xs[g].to(COMPUTE) - top)
        es += (e,)
        total = e if g == 0 else total + e
    return xs, es, top, over_classes(total, False, LANES, GROUP, VEC)


@triton.jit
def picked_of(xs, label, sub, C: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, VEC: tl.constexpr, COMPUTE: tl.constexpr):
    """The logit of each pixel's own class."""
    for g in tl.static_range((C + GROUP - 1) // GROUP):
        x = tl.where(label == g * GROUP + sub, xs[g].to(COMPUTE), 0.0)
        picked = x if g == 0 else picked + x
    return over_classes(picked, False, LANES, GROUP, VEC)


@triton.jit
def row_formula(log_p, w, values, which: tl.constexpr, FORMULA: tl.constexpr):
    """L (0) or ∂L/∂log_p (1) of a pixel, if this were its class; the last of the values is the smoothing."""
    return FORMULA(log_p, w + tl.zeros_like(log_p), *values[:-1])[which]


@triton.jit
def share_of(t, values, SMOOTHED: tl.constexpr, C: tl.constexpr):
    """(1 - ε) t + ε / C: how much of a pixel's row loss is this class's."""
    if SMOOTHED:
        return t + values[-1] * (1.0 / C - t)
    else:
        return t


@triton.jit
def element_formula(x, t, w, values, which: tl.constexpr, FORMULA: tl.constexpr, WEIGHTED: tl.constexpr, OPERAND: tl.constexpr):
    """L (0) or ∂L/∂x (1) of an element; the class weight is an operand of the formula, or multiplies it."""
    if OPERAND:
        return FORMULA(x, t, w + tl.zeros_like(x), *values[:-1])[which]
    elif WEIGHTED:
        return FORMULA(x, t, *values[:-1])[which] * w
    else:
        return FORMULA(x, t, *values[:-1])[which]


def name_of_pass(which):
    return lambda spec: f"regions_{which}_{getattr(spec.constants['FORMULA'], '__name__', 'sums')}"


@triton.jit
def place_of(vectors, splits, LANES: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr):
    """Image, first tile of pixels, end of the tiles; and for each row of a tile its lane and its class within the tile."""
    program = tl.program_id(0)
    first = (program % splits) * STEPS
    tiles = tl.cdiv(vectors, LANES)
    row = tl.arange(0, LANES * GROUP)
    return (program // splits).to(tl.int64), first, tl.minimum(first + STEPS, tiles), row // GROUP, (row % GROUP)[:, None]


@triton.jit(repr=name_of_pass("forward"), debug=True, do_not_specialize=["ignore_index", "splits"])
def forward_kernel(
    logits,  # (images, C, vectors · VEC)
    targets,  # (images, vectors · VEC) labels; where MAPS as logits
    class_weights,  # (C,) where WEIGHTED
    partial_sums,  # (images, splits, 3, C)
    partial_losses,  # (images, splits), written where there is a FORMULA
    vectors, splits, ignore_index, scalars,
    FORMULA: tl.constexpr, ACTIVATION: tl.constexpr, MAPS: tl.constexpr, IGNORE: tl.constexpr, SQUARED: tl.constexpr,
    SMALLER: tl.constexpr, WEIGHTED: tl.constexpr, OPERAND: tl.constexpr, SMOOTHED: tl.constexpr, COMPUTE: tl.constexpr,
    C: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, VEC: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    SOFTMAX: tl.constexpr = ACTIVATION == "softmax"
    EVERY_CLASS: tl.constexpr = MAPS or SMOOTHED  # has a share in a pixel's row loss
    image, first, end, lane, sub = place_of(vectors, splits, LANES, GROUP, STEPS)
    plane = tl.cast(vectors, tl.int64) * VEC
    values = exact(scalars, COMPUTE)
    nothing = tl.zeros((LANES * GROUP,), COMPUTE)
    overlap, predicted, wanted, losses = (), (), (), nothing
    highest = tl.full((LANES * GROUP,), -1, tl.int32)  # label: the assertion, whose printing takes registers, stays out of the loop
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
            t, counts = targets_of(wants, label, g, sub, plane, offset, inside, ignore_index, MAPS, IGNORE, C, GROUP, COMPUTE)
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
            losses += tl.sum(tl.where((label >= 0) & (sub == 0), loss, 0.0), 1)  # one of a pixel's threads speaks for it
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


@triton.jit(repr=name_of_pass("backward"), do_not_specialize=["ignore_index", "splits"])
def backward_kernel(
    logits, targets, class_weights,  # as in the forward
    d_sums,  # (images, 3, C)
    d_losses,  # (images,), read where there is a FORMULA
    grad,  # as logits
    vectors, splits, ignore_index, scalars,
    FORMULA: tl.constexpr, ACTIVATION: tl.constexpr, MAPS: tl.constexpr, IGNORE: tl.constexpr, SQUARED: tl.constexpr,
    SMALLER: tl.constexpr, WEIGHTED: tl.constexpr, OPERAND: tl.constexpr, SMOOTHED: tl.constexpr, COMPUTE: tl.constexpr,
    C: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, VEC: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    SOFTMAX: tl.constexpr = ACTIVATION == "softmax"
    EVERY_CLASS: tl.constexpr = MAPS or SMOOTHED
    image, first, end, lane, sub = place_of(vectors, splits, LANES, GROUP, STEPS)
    plane = tl.cast(vectors, tl.int64) * VEC
    values = exact(scalars, COMPUTE)
    d_overlap, d_predicted = (), ()
    for g in tl.static_range((C + GROUP - 1) // GROUP):
        d_overlap += (of_class(d_sums + image * (3 * C), g, sub, C, GROUP, COMPUTE),)
        d_predicted += (of_class(d_sums + image * (3 * C) + C, g, sub, C, GROUP, COMPUTE) * (2.0 if SQUARED else 1.0),)
    if FORMULA is not None:
        upstream = tl.load(d_losses + image).to(COMPUTE)
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
                t, counts = targets_of(wants, label, g, sub, plane, offset, inside, ignore_index, MAPS, IGNORE, C, GROUP, COMPUTE)
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
            t, counts = targets_of(wants, label, g, sub, plane, offset, inside, ignore_index, MAPS, IGNORE, C, GROUP, COMPUTE)
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
                tl.store(out + g * plane + offset, dx.to(grad.dtype.element_ty), mask=inside, eviction_policy="evict_first")
            else:
                mask = inside & (g * GROUP + sub < C)
                tl.store(out + g * GROUP * plane + offset, dx.to(grad.dtype.element_ty), mask=mask, eviction_policy="evict_first")


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
    return {"LANES": lanes, "GROUP": group, "STEPS": span_of(args["C"]) // (lanes * args["VEC"]), "num_warps": threads // WARP}


def configs(args):
    return [*(config(args, threads) for threads in (64, 128, 256)), config(args, most=MOST_BYTES * 5 // 3)]


def key(args):
    flags = tuple(args[name] for name in ("ACTIVATION", "MAPS", "IGNORE", "SQUARED", "SMALLER", "WEIGHTED", "SMOOTHED", "C", "VEC"))
    x, targets, read = args["logits"], args["targets"], args["FORMULA"]
    return getattr(read, "__name__", "sums"), str(x.dtype), str(targets.dtype), *flags, x.data_ptr() % 16 == 0


def sample(args):
    images = max(SAMPLE_BYTES // max(args["logits"][:1].nbytes, 1), 1)
    return {**args, "logits": args["logits"][:images]}


def programs(args, config):
    return args["logits"].shape[0] * args["splits"]


options = {"configs": configs, "rule": config, "key": key, "programs": programs, "sample": sample}
forward_launch = Tuned(forward_kernel, **options)
backward_launch = Tuned(backward_kernel, **options)


def arguments(logits, targets, class_weights, activation, ignore_index, squared, smaller, formula, scalars, smoothing, operand):
    """What both kernels are given. operand: the class weight is one of the formula's, not a factor."""
    images, classes, pixels = logits.shape
    wide = compute_dtype(logits.dtype)
    vec = math.gcd(pixels, 16 // logits.element_size())  # planes start anywhere where their size is no multiple of 16 bytes
    return dict(
        logits=logits, targets=targets, class_weights=logits if class_weights is None else class_weights, vectors=pixels // vec,
        splits=max(-(-pixels // span_of(classes)), 1), ignore_index=0 if ignore_index is None else ignore_index,
        scalars=as_scalars((*scalars, smoothing), wide), FORMULA=formula.kernel if formula else None, ACTIVATION=activation,
        MAPS=targets.dim() == 3, IGNORE=ignore_index is not None, SQUARED=squared, SMALLER=smaller,
        WEIGHTED=class_weights is not None, OPERAND=operand, SMOOTHED=smoothing > 0, COMPUTE=triton_type(wide), C=classes, VEC=vec,
    )  # fmt: skip
