"""Reading a row of logits once: its statistics, its gradient, and the configurations of a program that reads it.

A row is read in vectors of 16 bytes. If rows may start within a vector (50257 columns), the elements before the first
aligned vector and after the last one are one small masked tile, the *edge*, because a mask over single elements would
narrow every load.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from triton_losses.core.compiler import WARP
from triton_losses.core.device_math import exp, load_zeros, tanh
from triton_losses.kernels.elementwise import name_of

LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, because -inf - -inf is nan; no finite float32 logit is lower
LOWEST_DOUBLE = tl.constexpr(-1.7976931348623157e308)


class Kind(NamedTuple):
    """Compile-time parameters of a kernel of rows and labels, besides its formula."""

    compute: tl.dtype
    vec: int  # numbers in 16 bytes
    edge: bool  # rows may start or end within a vector
    slots: tuple = (0,) * 6  # the statistics that the formula takes: see core/rows.slots_of
    weighted: bool = False  # there are class weights
    capped: bool = False  # there is a softcap
    scaled: bool = False  # there is a scale other than 1
    forward: bool = False
    backward: bool = False
    reduced: bool = True  # the rows' weights are written too, not only their losses
    mean: bool = False  # the upstream gradient is divided by the sum of the weights
    entropy: bool = False  # each row's entropy is computed
    likeliest: bool = False  # each row's likeliest column is written
    ahead: int = 0  # numbers per row before the saved ones
    in_turn: bool = False  # a program takes one row after another: see long_rows.py


def name_of_pass(rows):
    def name(spec):
        kind = spec.constants["KIND"]
        return name_of(
            f"{rows}_{'both' if kind.forward and kind.backward else 'forward' if kind.forward else 'backward'}"
        )(spec)

    return name


@triton.jit
def take(tiles, top, total):
    """Fold tiles into each lane's running maximum and Σ exp(x - maximum), with one rescale for all of them."""
    new_top = top
    for i in tl.static_range(len(tiles)):
        new_top = tl.maximum(new_top, tl.max(tiles[i], 1))
    total *= exp(top - new_top)
    for i in tl.static_range(len(tiles)):
        total += tl.sum(exp(tiles[i] - new_top[:, None]), 1)
    return new_top, total


@triton.jit
def take_moment(tiles, top, total, moment):
    """The same for Σ exp(x - maximum) (x - maximum); call it before `take`, because it needs the previous maximum."""
    new_top = top
    for i in tl.static_range(len(tiles)):
        new_top = tl.maximum(new_top, tl.max(tiles[i], 1))
    moment = exp(top - new_top) * (moment + tl.where(total > 0, (top - new_top) * total, 0.0))
    for i in tl.static_range(len(tiles)):
        d = tl.maximum(tiles[i] - new_top[:, None], LOWEST)  # finite, because 0 · -inf is nan
        moment += tl.sum(exp(d) * d, 1)
    return moment


@triton.jit
def take_place(tiles, v, top, place, LANES: tl.constexpr):
    """The vector of each lane's running maximum; call it before `take`, because it needs the previous maximum."""
    for i in tl.static_range(len(tiles)):
        highest = tl.max(tiles[i], 1)
        place = tl.where(highest > top, v + i * LANES, place)
        top = tl.maximum(top, highest)
    return place


@triton.jit
def first_of_highest(x, columns, mask):
    """The highest value, and the first column that has it."""
    x = tl.where(mask, x, -float("inf"))
    highest = tl.max(tl.ravel(x), 0)
    return highest, tl.min(tl.ravel(tl.where(mask & (x == highest), columns, 2147483647)), 0)


@triton.jit
def weighted_sum(x, columns, mask, class_weights, pivot, KIND: tl.constexpr):
    """w_j (x_j - pivot); a pivot near the row's values keeps a common offset from costing digits in the sum."""
    d = x - pivot
    if KIND.weighted:
        d *= load_zeros(class_weights + columns, mask).to(x.dtype)
    return d if mask is None else tl.where(mask, d, 0.0)


@triton.jit
def span_of(start, cols, VEC: tl.constexpr, EDGE: tl.constexpr):
    """How many elements the row at ``start`` has before its first aligned vector, and how many aligned vectors."""
    head = 0
    if EDGE:
        head = tl.minimum((VEC - start % VEC) % VEC, cols).to(tl.int32)
    return head, (cols - head) // VEC


@triton.jit
def edge_of(head, vectors, cols, VEC: tl.constexpr):
    """Columns of the edge, and which of them exist."""
    i = tl.arange(0, 2 * VEC)
    columns = tl.where(i < VEC, i, head + vectors * VEC + i - VEC)
    return columns, (columns < cols) & ((i >= VEC) | (i < head))


@triton.jit
def transform(x, scaling, KIND: tl.constexpr):
    """scale · softcap · tanh(x / softcap), for scaling = (softcap, scale)."""
    if KIND.capped:
        x = scaling[0] * tanh(x / scaling[0])
    if KIND.scaled:
        x = x * scaling[1]
    return x


@triton.jit
def row_statistics(
    logits,
    row,  # (the row's offset, the number of columns)
    pivot,
    class_weights,
    scaling,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Read row x once: max x, log Σ exp(x - max), Σ w_j (x_j - pivot), the softmax's entropy, the likeliest column."""
    EVICT: tl.constexpr = "evict_last" if KIND.backward else "evict_first"
    start, cols = row
    head, vectors = span_of(start, cols, KIND.vec, KIND.edge)
    first = logits + (start + head) // KIND.vec * KIND.vec  # tells the compiler that it is aligned
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * KIND.vec + tl.arange(0, KIND.vec)[None, :]
    top = tl.full((LANES,), LOWEST_DOUBLE if KIND.compute == tl.float64 else LOWEST, KIND.compute)
    total = tl.zeros((LANES,), KIND.compute)
    spread = tl.zeros((LANES,), KIND.compute)
    moment = tl.zeros((LANES,), KIND.compute)
    place = tl.zeros((LANES,), tl.int32)
    likeliest = tl.zeros((), tl.int32)
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):
            at = (v + u * LANES) * KIND.vec + tile
            tiles += (transform(tl.load(first + at, eviction_policy=EVICT).to(KIND.compute), scaling, KIND),)
            if KIND.slots[2]:
                spread += tl.sum(weighted_sum(tiles[u], head + at, None, class_weights, pivot, KIND), 1)
        if KIND.entropy:
            moment = take_moment(tiles, top, total, moment)
        if KIND.likeliest:
            place = take_place(tiles, v, top, place, LANES)
        top, total = take(tiles, top, total)
    for v in range(unmasked, vectors, LANES):
        mask = (v + lanes < vectors)[:, None]
        at = v * KIND.vec + tile
        x = tl.load(first + at, mask=mask, other=-float("inf"), eviction_policy=EVICT).to(KIND.compute)
        x = transform(x, scaling, KIND)
        if KIND.capped:
            x = tl.where(mask, x, -float("inf"))
        if KIND.slots[2]:
            spread += tl.sum(weighted_sum(x, head + at, mask & (at >= 0), class_weights, pivot, KIND), 1)
        if KIND.entropy:
            moment = take_moment((x,), top, total, moment)
        if KIND.likeliest:
            place = take_place((x,), v, top, place, LANES)
        top, total = take((x,), top, total)
    highest = tl.max(top, 0)
    shrink = exp(top - highest)
    if KIND.entropy:
        moment = tl.sum(shrink * (moment + tl.where(total > 0, (top - highest) * total, 0.0)), 0)
    total = tl.sum(total * shrink, 0)
    spread = tl.sum(spread, 0)
    if KIND.likeliest:  # load each lane's best vector again to find the column within it
        mask = (place + lanes < vectors)[:, None]
        at = (place + lanes)[:, None] * KIND.vec + tl.arange(0, KIND.vec)[None, :]
        x = transform(tl.load(first + at, mask=mask, other=0.0).to(KIND.compute), scaling, KIND)
        highest_here, likeliest = first_of_highest(x, head + at, mask & (at >= 0))
    if KIND.edge:
        columns, mask = edge_of(head, vectors, cols, KIND.vec)
        x = transform(tl.load(logits + start + columns, mask=mask, other=0.0).to(KIND.compute), scaling, KIND)
        x = tl.where(mask, x, -float("inf"))
        higher = tl.maximum(highest, tl.max(x, 0))
        if KIND.likeliest:
            highest_there, there = first_of_highest(x, columns, mask)
            nearest = tl.where(highest_there == highest_here, tl.minimum(likeliest, there), likeliest)
            likeliest = tl.where(highest_there > highest_here, there, nearest)
        if KIND.slots[2]:
            spread += tl.sum(weighted_sum(x, columns, mask, class_weights, pivot, KIND), 0)
        if KIND.entropy:
            d = tl.maximum(x - higher, LOWEST)
            moment = exp(highest - higher) * (moment + tl.where(total > 0, (highest - higher) * total, 0.0))
            moment += tl.sum(exp(d) * d, 0)
        total = total * exp(highest - higher) + tl.sum(exp(x - higher), 0)
        highest = higher
    log_total = tl.log(total)
    entropy = log_total
    if KIND.entropy:
        entropy = log_total - moment / total
    return highest, log_total, spread, entropy, tl.minimum(likeliest, cols - 1)


@triton.jit
def write_zeros(grad, start, cols, EDGE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr):
    head, vectors = span_of(start, cols, VEC, EDGE)
    first = (start + head) // VEC * VEC
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    for v in range(0, vectors, LANES):
        tl.store(
            grad + first + v * VEC + tile,
            tl.zeros((LANES, VEC), grad.dtype.element_ty),
            mask=(v + lanes < vectors)[:, None],
        )
    if EDGE:
        columns, exists = edge_of(head, vectors, cols, VEC)
        tl.store(grad + start + columns, tl.zeros((2 * VEC,), grad.dtype.element_ty), mask=exists)


@triton.jit
def read_formula(FORMULA: tl.constexpr, statistics, weight, operands, scalars, KIND: tl.constexpr):
    """The loss, and its partial derivative by each statistic: 0 for those that the formula does not take."""
    values = ()
    for i in tl.static_range(len(statistics)):
        if KIND.slots[i]:
            values += (statistics[i],)
    if KIND.slots[len(statistics)]:
        values += (weight,)
    out = FORMULA(*values, *operands, *scalars)
    partials = ()
    for i in tl.static_range(len(statistics)):
        if KIND.slots[i]:
            partials += (out[KIND.slots[i]],)
        else:
            partials += (weight * 0.0,)
    return out[0], partials


@triton.jit
def factors_of(partials, upstream, mean_weight, cols, KIND: tl.constexpr):
    """The factors of a row's gradient: of the softmax, at the label, in every column, and of the entropy's term."""
    d_picked, d_log_p, d_mean_log_p, d_lse, d_entropy = partials
    softmax_factor = d_lse - d_log_p
    if KIND.slots[2]:
        softmax_factor -= d_mean_log_p * (tl.load(mean_weight).to(upstream.dtype) if KIND.weighted else 1.0)
    return (
        softmax_factor * upstream,
        (d_log_p + d_picked) * upstream,
        d_mean_log_p * upstream / cols,
        d_entropy * upstream,
    )


@triton.jit
def gradient_at(x, columns, mask, label, of_row, class_weights, scaling, KIND: tl.constexpr):
    """∂L/∂x of a row's columns. of_row: max x, log Σ exp(x - max), the entropy, and `factors_of` the row."""
    highest, log_total, entropy, factors = of_row
    softmax_factor, label_factor, uniform_factor, entropy_factor = factors
    x = transform(x, scaling, KIND)
    g = tl.where(columns == label, label_factor, 0.0).to(x.dtype)
    if KIND.slots[4]:
        log_p = (x - highest) - log_total
        g += exp(log_p) * (softmax_factor - entropy_factor * (tl.maximum(log_p, LOWEST) + entropy))
    elif KIND.slots[1] or KIND.slots[2] or KIND.slots[3]:
        g += exp((x - highest) - log_total) * softmax_factor
    if KIND.slots[2]:
        if KIND.weighted:
            g += uniform_factor * load_zeros(class_weights + columns, mask).to(x.dtype)
        else:
            g += uniform_factor
    if KIND.capped:
        slope = x / (scaling[0] * scaling[1])  # tanh(logit / softcap)
        g *= 1.0 - slope * slope
    return g


def config(warps, unroll):
    return {"LANES": warps * WARP, "UNROLL": unroll, "num_warps": warps}


def rule(args):
    """Fastest or nearly so on an H200: more threads for very long rows, one vector at a time if a thread holds more."""
    kind = args["KIND"]
    vec, edge, slots, backward = kind.vec, kind.edge, getattr(kind, "slots", ()), getattr(kind, "backward", False)
    vectors = max(args["cols"] // vec, 1)
    warps = max(1, min(16 if vectors >= 1 << 15 else 8, triton.next_power_of_2(vectors // (2 * WARP))))
    holds_more = len(slots) > 2 and slots[2] > 0  # the mean of log p
    if backward and edge and vectors >= 1 << 12:
        return config(16, 1)
    return config(warps, 2 if vectors >= 2 * warps * WARP and not holds_more else 1)


def configs(args):
    """The rule's configuration, half and twice as many threads, and the other number of vectors at a time."""
    best, vectors = rule(args), max(args["cols"] // args["KIND"].vec, 1)
    warps, unroll = best["num_warps"], best["UNROLL"]
    near = [(warps, unroll), (warps * 2, unroll), (warps // 2, unroll), (warps, 3 - unroll)]
    return [config(w, u) for w, u in near if 1 <= w <= 16 and (w == 1 or w * WARP * u <= 2 * vectors)]


def key(args):
    x, kind = args["logits"], args["KIND"]
    directions = kind.entropy, kind.likeliest, kind.forward, kind.backward
    edge = args["cols"] * x.element_size() % 16 != 0
    width = triton.next_power_of_2(args["cols"])
    given = *directions, kind.weighted, kind.capped, kind.scaled
    return args["FORMULA"].__name__, width, edge, str(x.dtype), *given, x.data_ptr() % 16 == 0


def bytes_of_row(args):
    return args["stride"] * args["logits"].element_size()
