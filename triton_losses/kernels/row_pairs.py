"""Reading a pair of rows together: in one read, by the rule of families/distribution_rows.py, or in two.

Both are read as rows.py reads one: in vectors of 16 bytes; the elements before the first aligned vector and after the
last one are one small tile, the *edge*. Here the edge has the shape of all other tiles, with its two ends in the first
two lanes, so that one function folds all tiles.
"""

import triton
import triton.language as tl

from triton_losses.core.device_math import exp, load_zeros
from triton_losses.kernels.rows import LOWEST, LOWEST_DOUBLE, span_of, take


@triton.jit
def edge_tile(head, vectors, cols, LANES: tl.constexpr, VEC: tl.constexpr):
    """Columns of the edge, (LANES, VEC), and which of them exist."""
    lanes = tl.arange(0, LANES)[:, None]
    i = tl.arange(0, VEC)[None, :]
    columns = tl.where(lanes == 0, i, head + vectors * VEC + i)
    return columns, ((lanes == 0) & (i < head)) | ((lanes == 1) & (columns < cols))


@triton.jit
def load_logits(pointers, mask, scale, COMPUTE: tl.constexpr, EVICT: tl.constexpr):
    """Load logits over the temperature; -inf outside the mask."""
    if mask is None:
        return tl.load(pointers, eviction_policy=EVICT).to(COMPUTE) * scale
    else:
        return tl.load(pointers, mask=mask, other=-float("inf"), eviction_policy=EVICT).to(COMPUTE) * scale


@triton.jit
def load_pair(pointers, mask, scale, KIND: tl.constexpr, EVICT: tl.constexpr):
    p, q = pointers
    a = load_zeros(p, mask).to(KIND.compute) if KIND.given else load_logits(p, mask, scale, KIND.compute, EVICT)
    return a, load_logits(q, mask, scale, KIND.compute, EVICT)


@triton.jit
def read_formula(p, q, weights, mask, scalars, FORMULA: tl.constexpr, KIND: tl.constexpr):
    """f, ∂f/∂log p (or ∂f/∂p if p is given) and ∂f/∂log q, times the weights; 0 outside the mask."""
    out = FORMULA(p, q, *scalars)
    f = out[0]
    d_p = out[1]
    d_q = out[2]
    if KIND.weighted:
        w = load_zeros(weights, mask).to(q.dtype)
        f *= w
        d_p *= w
        d_q *= w
    if mask is not None:
        f = tl.where(mask, f, 0.0)
        d_p = tl.where(mask, d_p, 0.0)
        d_q = tl.where(mask, d_q, 0.0)
    return f, d_p, d_q


# One read: f is summed with the running maxima in place of log Σ exp, and the sums are moved when a maximum rises


@triton.jit
def moved(total_f, total_d, by_p, by_q, KIND: tl.constexpr):
    """Σ f and Σ ∂f/∂log q after adding ``by_p`` to log p and ``by_q`` to log q: see the rule of one read."""
    distance = by_q if KIND.given else by_q - by_p
    # the first maximum is -3e38: the distance may be infinite while the sum is 0
    total_f += tl.where(total_d == 0.0, 0.0, distance * total_d)
    if not KIND.given:
        factor = exp(by_p)
        total_f = tl.where(factor == 0.0, 0.0, total_f * factor)
        total_d *= factor
    return total_f, total_d


@triton.jit
def fold(state, tiles, weights, mask, scalars, FORMULA: tl.constexpr, KIND: tl.constexpr):
    """Fold pairs of tiles into each lane's maxima and sums, with one rescale. weights: pointers, one for each pair."""
    top_p, top_q, total_q, total_f, total_d = state
    new_p = top_p
    new_q = top_q
    for i in tl.static_range(len(tiles) // 2):
        if not KIND.given:
            new_p = tl.maximum(new_p, tl.max(tiles[2 * i], 1))
        new_q = tl.maximum(new_q, tl.max(tiles[2 * i + 1], 1))
    total_f, total_d = moved(total_f, total_d, top_p - new_p, top_q - new_q, KIND)
    total_q *= exp(top_q - new_q)
    for i in tl.static_range(len(tiles) // 2):
        p = tiles[2 * i]
        if not KIND.given:
            p -= new_p[:, None]
        q = tiles[2 * i + 1] - new_q[:, None]
        f, _, d = read_formula(p, q, weights[i], mask, scalars, FORMULA, KIND)
        total_f += tl.sum(f, 1)
        total_d += tl.sum(d, 1)
        total_q += tl.sum(exp(q), 1)
    return new_p, new_q, total_q, total_f, total_d


@triton.jit
def in_one_read(
    pair,  # p and q
    starts,
    cols,
    weight,
    scale,
    scalars,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Max and log Σ exp(· - max) of p and of q, Σ ∂f/∂log p, Σ ∂f/∂log q and Σ f of one pair of rows."""
    p, q = pair
    start_p, start_q = starts
    head, vectors = span_of(start_q, cols, KIND.vec, KIND.edge)
    first_p = p + (start_p + head) // KIND.vec * KIND.vec  # tells the compiler that it is aligned
    first_q = q + (start_q + head) // KIND.vec * KIND.vec
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * KIND.vec + tl.arange(0, KIND.vec)[None, :]
    lowest = tl.full((LANES,), LOWEST_DOUBLE if KIND.compute == tl.float64 else LOWEST, KIND.compute)
    none = tl.zeros((LANES,), KIND.compute)
    state = (none if KIND.given else lowest, lowest, none, none, none)
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        tiles = ()
        weights = ()
        for u in tl.static_range(UNROLL):
            at = (v + u * LANES) * KIND.vec + tile
            tiles += load_pair((first_p + at, first_q + at), None, scale, KIND, "evict_first")
            weights += (weight + head + at,)
        state = fold(state, tiles, weights, None, scalars, FORMULA, KIND)
    for v in range(unmasked, vectors, LANES):
        mask = (v + lanes < vectors)[:, None]
        at = v * KIND.vec + tile
        tiles = load_pair((first_p + at, first_q + at), mask, scale, KIND, "evict_first")
        state = fold(state, tiles, (weight + head + at,), mask, scalars, FORMULA, KIND)
    if KIND.edge:
        at, mask = edge_tile(head, vectors, cols, LANES, KIND.vec)
        tiles = load_pair((p + start_p + at, q + start_q + at), mask, scale, KIND, "")
        state = fold(state, tiles, (weight + at,), mask, scalars, FORMULA, KIND)
    top_p, top_q, total_q, total_f, total_d = state
    highest_p = tl.max(top_p, 0)
    highest_q = tl.max(top_q, 0)
    total_f, total_d = moved(total_f, total_d, top_p - highest_p, top_q - highest_q, KIND)
    total_q = tl.sum(total_q * exp(top_q - highest_q), 0)
    log_total_q = tl.log(total_q)
    loss = tl.sum(total_f, 0)
    slope_q = tl.sum(total_d, 0)
    log_total_p = loss * 0.0
    if KIND.given:
        loss -= log_total_q * slope_q
        slope_p = log_total_p
    else:
        log_total_p = tl.log(-slope_q)
        loss = loss / -slope_q + tl.log(total_q / -slope_q)  # a ratio's log: a difference of logs is less exact
        slope_q = slope_q / -slope_q  # -1, or nan if the row has a nan
        slope_p = loss - slope_q
    return highest_p, log_total_p, highest_q, log_total_q, slope_p, slope_q, loss


# Two reads: first max and Σ exp of each row, then sums of f; the second read hits the L2 cache


@triton.jit
def add_tiles(
    totals,
    pointers,  # of p, q and the weights
    mask,
    scale,
    rowwise,
    scalars,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Add f and its partial derivatives at one pair of tiles to each lane's sums."""
    p, q, weights = pointers
    highest_p, log_total_p, highest_q, log_total_q = rowwise
    log_p = (load_logits(p, mask, scale, KIND.compute, EVICT) - highest_p) - log_total_p
    log_q = (load_logits(q, mask, scale, KIND.compute, EVICT) - highest_q) - log_total_q
    f, d_p, d_q = read_formula(log_p, log_q, weights, mask, scalars, FORMULA, KIND)
    return totals[0] + tl.sum(f, 1), totals[1] + tl.sum(d_p, 1), totals[2] + tl.sum(d_q, 1)


@triton.jit
def in_two_reads(
    pair,  # p and q
    starts,
    cols,
    weight,
    scale,
    scalars,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The same as ``in_one_read``, for any formula of two rows of logits."""
    p, q = pair
    start_p, start_q = starts
    head, vectors = span_of(start_q, cols, KIND.vec, KIND.edge)
    first_p = p + (start_p + head) // KIND.vec * KIND.vec
    first_q = q + (start_q + head) // KIND.vec * KIND.vec
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * KIND.vec + tl.arange(0, KIND.vec)[None, :]
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    top_p = tl.full((LANES,), LOWEST_DOUBLE if KIND.compute == tl.float64 else LOWEST, KIND.compute)
    top_q = top_p
    sum_p = tl.zeros((LANES,), KIND.compute)
    sum_q = sum_p
    for v in range(0, unmasked, LANES * UNROLL):
        tiles_p = ()
        tiles_q = ()
        for u in tl.static_range(UNROLL):
            at = (v + u * LANES) * KIND.vec + tile
            tiles_p += (load_logits(first_p + at, None, scale, KIND.compute, "evict_last"),)
            tiles_q += (load_logits(first_q + at, None, scale, KIND.compute, "evict_last"),)
        top_p, sum_p = take(tiles_p, top_p, sum_p)
        top_q, sum_q = take(tiles_q, top_q, sum_q)
    for v in range(unmasked, vectors, LANES):
        mask = (v + lanes < vectors)[:, None]
        at = v * KIND.vec + tile
        top_p, sum_p = take((load_logits(first_p + at, mask, scale, KIND.compute, "evict_last"),), top_p, sum_p)
        top_q, sum_q = take((load_logits(first_q + at, mask, scale, KIND.compute, "evict_last"),), top_q, sum_q)
    if KIND.edge:
        edge, exists = edge_tile(head, vectors, cols, LANES, KIND.vec)
        top_p, sum_p = take((load_logits(p + start_p + edge, exists, scale, KIND.compute, ""),), top_p, sum_p)
        top_q, sum_q = take((load_logits(q + start_q + edge, exists, scale, KIND.compute, ""),), top_q, sum_q)
    highest_p = tl.max(top_p, 0)
    highest_q = tl.max(top_q, 0)
    log_total_p = tl.log(tl.sum(sum_p * exp(top_p - highest_p), 0))
    log_total_q = tl.log(tl.sum(sum_q * exp(top_q - highest_q), 0))
    rowwise = highest_p, log_total_p, highest_q, log_total_q
    none = tl.zeros((LANES,), KIND.compute)
    totals = (none, none, none)
    for v in range(0, unmasked, LANES):
        at = v * KIND.vec + tile
        pointers = (first_p + at, first_q + at, weight + head + at)
        totals = add_tiles(totals, pointers, None, scale, rowwise, scalars, FORMULA, KIND, "evict_first")
    for v in range(unmasked, vectors, LANES):
        at = v * KIND.vec + tile
        mask = (v + lanes < vectors)[:, None]
        pointers = (first_p + at, first_q + at, weight + head + at)
        totals = add_tiles(totals, pointers, mask, scale, rowwise, scalars, FORMULA, KIND, "evict_first")
    if KIND.edge:
        edge, exists = edge_tile(head, vectors, cols, LANES, KIND.vec)  # recomputed: keeping it would take registers
        pointers = (p + start_p + edge, q + start_q + edge, weight + edge)
        totals = add_tiles(totals, pointers, exists, scale, rowwise, scalars, FORMULA, KIND, "")
    total_f, total_p, total_q = totals
    return highest_p, log_total_p, highest_q, log_total_q, tl.sum(total_p, 0), tl.sum(total_q, 0), tl.sum(total_f, 0)
