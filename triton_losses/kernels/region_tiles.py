"""What the kernels of regions read of a tile of pixels: logits, targets, softmax, and the formula beside the sums.

A tile is (LANES · GROUP, VEC): VEC neighbouring pixels of one class in one load, and GROUP classes in neighbouring
threads, so that a sum over classes is a few shuffles and no barrier. A tuple of such tiles holds all classes of a pixel
in registers.
"""

import triton
import triton.language as tl

from triton_losses.core.device_math import exp


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
def slope_of(
    d_sums,
    dout,
    g: tl.constexpr,
    sub,
    dout_class,
    FINISHED: tl.constexpr,
    FIRST: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The derivative by a sum of tile g's classes, 0 for a class that does not count; times dout where FINISHED."""
    c = g if GROUP == 1 else g * GROUP + sub
    counts = (c >= FIRST) & (c < C)
    slope = tl.load(d_sums + c, mask=counts, other=0.0).to(COMPUTE)
    if FINISHED:
        slope *= tl.load(dout + (c - FIRST) * dout_class, mask=counts, other=0.0).to(COMPUTE)
    return slope


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
    targets,
    label,
    g: tl.constexpr,
    sub,
    plane,
    offset,
    inside,
    ignore_index,
    MAPS: tl.constexpr,
    IGNORE: tl.constexpr,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
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
    base,
    sub,
    plane,
    offset,
    inside,
    C: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
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
def picked_of(
    xs, label, sub, C: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, VEC: tl.constexpr, COMPUTE: tl.constexpr
):
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
def element_formula(
    x, t, w, values, which: tl.constexpr, FORMULA: tl.constexpr, WEIGHTED: tl.constexpr, OPERAND: tl.constexpr
):
    """L (0) or ∂L/∂x (1) of an element; the class weight is an operand of the formula, or multiplies it."""
    if OPERAND:
        return FORMULA(x, t, w + tl.zeros_like(x), *values[:-1])[which]
    elif WEIGHTED:
        return FORMULA(x, t, *values[:-1])[which] * w
    else:
        return FORMULA(x, t, *values[:-1])[which]


@triton.jit
def place_of(vectors, splits, LANES: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr):
    """Image, first tile of pixels, end of the tiles; and of a row of a tile the lane and the class within the tile."""
    program = tl.program_id(0)
    first = (program % splits) * STEPS
    tiles = tl.cdiv(vectors, LANES)
    row = tl.arange(0, LANES * GROUP)
    return (
        (program // splits).to(tl.int64),
        first,
        tl.minimum(first + STEPS, tiles),
        row // GROUP,
        (row % GROUP)[:, None],
    )
