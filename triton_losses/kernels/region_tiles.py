"""Functions of the kernels of regions for a tile of pixels: logits, targets, softmax, and the pixels' formula.

A tile is (LANES · GROUP, vec). One load is vec neighbouring pixels of one class. GROUP classes are in neighbouring
threads, so that a sum over classes takes a few shuffles and no barrier. A tuple of such tiles holds all classes of a
pixel in registers.

    pixels   of a tile: each row's class within the tile, the number of elements of a plane, the offsets of the tile's
             first classes, and which rows lie inside the plane
    of_row   each pixel's maximum and log Σ exp(x - maximum) over the classes
"""

from typing import NamedTuple

import triton
import triton.language as tl

from triton_losses.core.compiler import INTERPRET, WARP
from triton_losses.core.device_math import exp, sigmoid

MOST_BYTES = 96  # most bytes of exponentials that a thread holds
SPAN = 8192  # about how many logits a program reads: fixed, so that tuning never changes the partial sums


class Kind(NamedTuple):
    """Compile-time parameters of the kernels of regions."""

    compute: tl.dtype  # the type of the sums
    classes: int
    vec: int  # neighbouring pixels per thread
    activation: str  # "softmax", "sigmoid" or "none"
    maps: bool  # the targets are maps of the logits' shape; otherwise labels
    ignore: bool  # there is an ignore_index
    squared: bool  # the sums are Σ p² and Σ t²
    smaller: bool  # the overlap is Σ min(p, t); otherwise Σ p t
    weighted: bool  # the formula has class weights
    operand: bool  # the formula takes them as an operand; otherwise they multiply it
    smoothed: bool  # label smoothing: each class has a share of ε / classes in a pixel's row loss
    finished: bool  # in the backward: the slopes must be multiplied by the upstream gradient
    first: int  # the first class of the upstream gradient


@triton.jit
def tile_at(base, g: tl.constexpr, pixels, KIND: tl.constexpr, GROUP: tl.constexpr):
    """Addresses and mask of tile g: of class g, or of the GROUP classes from g · GROUP on."""
    sub, plane, offset, inside = pixels
    mask = inside & (g * GROUP + sub < KIND.classes) if GROUP > 1 else inside
    return base + g * GROUP * plane + offset, mask


@triton.jit
def load_tile(base, g: tl.constexpr, pixels, other, KIND: tl.constexpr, GROUP: tl.constexpr):
    at, mask = tile_at(base, g, pixels, KIND, GROUP)
    return tl.load(at, mask=mask, other=other, eviction_policy="evict_first")


@triton.jit
def store_tile(base, g: tl.constexpr, pixels, x, KIND: tl.constexpr, GROUP: tl.constexpr):
    at, mask = tile_at(base, g, pixels, KIND, GROUP)
    tl.store(at, x.to(base.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def weight_of(class_weights, g: tl.constexpr, sub, KIND: tl.constexpr, GROUP: tl.constexpr):
    """The weights of tile g's classes; 1 if there are no weights."""
    if not KIND.weighted:
        return 1.0
    elif GROUP == 1:
        return tl.load(class_weights + g).to(KIND.compute)
    else:
        c = g * GROUP + sub
        return tl.load(class_weights + c, mask=c < KIND.classes, other=0.0).to(KIND.compute)


@triton.jit
def weight_of_label(class_weights, label, KIND: tl.constexpr):
    """The weight of each pixel's class, or of an arbitrary class if it has none; 1 if there are no weights."""
    if not KIND.weighted:
        return 1.0
    else:
        c = tl.minimum(tl.maximum(label, 0), KIND.classes - 1)
        return tl.load(class_weights + c).to(KIND.compute)


@triton.jit
def slopes_of(d_sums, dout, g: tl.constexpr, sub, dout_class, KIND: tl.constexpr, GROUP: tl.constexpr):
    """The loss's derivatives by the overlap and by Σ p of tile g's classes; 0 for a class that does not count.

    If squared, the second is doubled, because the derivative of p² is 2 p. If finished, dout multiplies both.
    """
    c = g if GROUP == 1 else g * GROUP + sub
    counts = (c >= KIND.first) & (c < KIND.classes)
    of_overlap = tl.load(d_sums + c, mask=counts, other=0.0).to(KIND.compute)
    of_p = tl.load(d_sums + KIND.classes + c, mask=counts, other=0.0).to(KIND.compute)
    if KIND.finished:
        upstream = tl.load(dout + (c - KIND.first) * dout_class, mask=counts, other=0.0).to(KIND.compute)
        of_overlap *= upstream
        of_p *= upstream
    return of_overlap, of_p * 2.0 if KIND.squared else of_p


@triton.jit
def slope_by_p(p, t, slopes, KIND: tl.constexpr):
    """The derivative by p of the loss that is computed from the sums."""
    of_overlap, of_p = slopes
    step = tl.where(p < t, 1.0, tl.where(p > t, 0.0, 0.5)).to(p.dtype) if KIND.smaller else t
    return of_overlap * step + (of_p * p if KIND.squared else of_p)


@triton.jit
def over_classes(x, HIGHEST: tl.constexpr, GROUP: tl.constexpr):
    """The maximum or the sum over the threads that share a pixel, returned to each of them."""
    if GROUP == 1:
        return x
    else:
        LANES: tl.constexpr = x.shape[0] // GROUP
        VEC: tl.constexpr = x.shape[1]
        x = tl.reshape(x, (LANES, GROUP, VEC))
        x = tl.max(x, 1) if HIGHEST else tl.sum(x, 1)
        return tl.reshape(tl.broadcast_to(x[:, None, :], (LANES, GROUP, VEC)), (LANES * GROUP, VEC))


@triton.jit
def load_labels(targets, at, inside, ignore_index, KIND: tl.constexpr):
    """Labels; -1 for a pixel that does not count, and the number of classes for a label that is no class."""
    raw = tl.load(targets + at, mask=inside, other=0)
    counts = inside & (raw != ignore_index) if KIND.ignore else inside
    label = tl.where((raw >= 0) & (raw < KIND.classes), raw.to(tl.int32), KIND.classes)
    return tl.where(counts, label, -1)


@triton.jit
def targets_of(targets, label, g: tl.constexpr, pixels, ignore_index, KIND: tl.constexpr, GROUP: tl.constexpr):
    """t of tile g, 0 where it does not count, and the mask of where it counts."""
    sub, plane, offset, inside = pixels
    if KIND.maps:
        raw = load_tile(targets, g, pixels, 0, KIND, GROUP)
        counts = inside & (raw != ignore_index) if KIND.ignore else inside
        t = raw.to(KIND.compute)
        t = tl.where(counts, t, 0.0) if KIND.ignore else t
    else:
        t, counts = tl.where(label == g * GROUP + sub, 1.0, 0.0).to(KIND.compute), label >= 0
    return t, counts


@triton.jit
def softmax_of(base, pixels, KIND: tl.constexpr, GROUP: tl.constexpr):
    """Tuples of x as stored and of exp(x - max), then 1 / Σ exp(x - max) and of_row; nan outside the plane."""
    xs, es = (), ()
    for g in tl.static_range((KIND.classes + GROUP - 1) // GROUP):
        x = load_tile(base, g, pixels, -float("inf"), KIND, GROUP)
        xs += (x,)
        top = x.to(KIND.compute) if g == 0 else tl.maximum(top, x.to(KIND.compute))
    top = over_classes(top, True, GROUP)
    for g in tl.static_range((KIND.classes + GROUP - 1) // GROUP):
        e = exp(xs[g].to(KIND.compute) - top)
        es += (e,)
        total = e if g == 0 else total + e
    total = over_classes(total, False, GROUP)
    return xs, es, 1.0 / total, (top, tl.log(total))


@triton.jit
def element_of(base, g: tl.constexpr, pixels, KIND: tl.constexpr, GROUP: tl.constexpr):
    """x and p of tile g, for an activation other than softmax."""
    x = load_tile(base, g, pixels, 0.0, KIND, GROUP).to(KIND.compute)
    return x, sigmoid(x) if KIND.activation == "sigmoid" else x


@triton.jit
def log_p_of(x, of_row, KIND: tl.constexpr):
    top, log_total = of_row
    return (x.to(KIND.compute) - top) - log_total


@triton.jit
def log_p_of_label(xs, of_row, label, sub, KIND: tl.constexpr, GROUP: tl.constexpr):
    """log p of each pixel's own class."""
    for g in tl.static_range((KIND.classes + GROUP - 1) // GROUP):
        x = tl.where(label == g * GROUP + sub, xs[g].to(KIND.compute), 0.0)
        picked = x if g == 0 else picked + x
    return log_p_of(over_classes(picked, False, GROUP), of_row, KIND)


@triton.jit
def row_formula(log_p, w, values, which: tl.constexpr, FORMULA: tl.constexpr):
    """L (which = 0) or ∂L/∂log_p (1) of a pixel if this were its class; the last of the values is ε, the smoothing."""
    return FORMULA(log_p, w + tl.zeros_like(log_p), *values[:-1])[which]


@triton.jit
def share_formula(x, of_row, t, w, values, which: tl.constexpr, FORMULA: tl.constexpr, KIND: tl.constexpr):
    """The share of this class in a pixel's row loss, (1 - ε) t + ε / classes, and the result of row_formula."""
    share = t + values[-1] * (1.0 / KIND.classes - t) if KIND.smoothed else t
    return share, row_formula(log_p_of(x, of_row, KIND), w, values, which, FORMULA)


@triton.jit
def element_formula(x, t, w, values, which: tl.constexpr, FORMULA: tl.constexpr, KIND: tl.constexpr):
    """L (which = 0) or ∂L/∂x (1) of an element; its class weight is an operand of the formula or a factor."""
    if KIND.operand:
        return FORMULA(x, t, w + tl.zeros_like(x), *values[:-1])[which]
    elif KIND.weighted:
        return FORMULA(x, t, *values[:-1])[which] * w
    else:
        return FORMULA(x, t, *values[:-1])[which]


@triton.jit
def tiles_of(vectors, splits, LANES: tl.constexpr, STEPS: tl.constexpr):
    """A program's image, its first tile of pixels, and the end of its tiles."""
    program = tl.program_id(0)
    first = (program % splits) * STEPS
    return (program // splits).to(tl.int64), first, tl.minimum(first + STEPS, tl.cdiv(vectors, LANES))


@triton.jit
def rows_of(vectors, KIND: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr):
    """Each tile row's lane and class within the tile; pixels per plane; offsets of the pixels and of the logits."""
    row = tl.arange(0, LANES * GROUP)
    lane, sub, plane = row // GROUP, (row % GROUP)[:, None], tl.cast(vectors, tl.int64) * KIND.vec
    at = (lane * KIND.vec)[:, None] + tl.arange(0, KIND.vec)[None, :]
    return lane, sub, plane, at, at + sub * plane if GROUP > 1 else at


def span_of(classes):
    """Pixels per program: a power of two, so that every configuration's tiles divide it."""
    return max(triton.next_power_of_2(SPAN // classes), 1024)


def config(args, threads=128, most=MOST_BYTES):
    kind, group = args["KIND"], 1
    each = kind.vec * (8 if kind.compute == tl.float64 else 4)
    if INTERPRET:  # the interpreter takes as long for a small tile as for a large one
        each, most = 1, 2
    while -(-kind.classes // group) * each > most and group < 32:
        group *= 2
    lanes = threads // group
    steps = span_of(kind.classes) // (lanes * kind.vec)
    return {"LANES": lanes, "GROUP": group, "STEPS": steps, "num_warps": threads // WARP}


def configs(args):
    return [*(config(args, threads) for threads in (64, 128, 256)), config(args, most=MOST_BYTES * 5 // 3)]
