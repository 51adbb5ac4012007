"""Losses of two rows by kernels: one program is one pair of rows.

Both rows are walked together, as label_rows.py walks one: in vectors of 16 bytes, the elements before the first
aligned vector and after the last as one narrow tile, the *edge*. Here the edge has the shape of all other tiles, its two ends
in the first two lanes, so that one function folds them all.

Both kernels are built without fused multiply-adds. The compiler fuses what it likes, and so may round Σ exp of p and of q
differently: identical rows would not give exactly 0, neither as a loss nor as a gradient.

What a forward leaves for its backward is one tensor, ``state``: runs of one number a row each. First, where the loss is reduced,
the losses, and, where there are labels, 1 for each row that counts; then max p, log Σ exp(p - max p), the same of q,
Σ ∂f/∂log p and Σ ∂f/∂log q; at last, where the mean is over the rows that count, how many those are.
"""

import torch
import triton
import triton.language as tl

from triton_losses.core.device_math import as_scalars, exact, exp, load_zeros
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import planned
from triton_losses.core.reduction import given, widest
from triton_losses.core.rows import readable
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import name_of, triton_type
from triton_losses.kernels.finish import finish
from triton_losses.kernels.rows import LOWEST, LOWEST_DOUBLE, configs, rule, span_of, take, write_zeros

VECTOR = 16  # bytes; both rows of a pair must start at the same place within one
SAVED = 6  # numbers a row that the backward reads


@triton.jit
def edge_tile(head, vectors, cols, LANES: tl.constexpr, VEC: tl.constexpr):
    """Columns of the edge, (LANES, VEC), and which of them exist."""
    lanes = tl.arange(0, LANES)[:, None]
    i = tl.arange(0, VEC)[None, :]
    columns = tl.where(lanes == 0, i, head + vectors * VEC + i)
    return columns, ((lanes == 0) & (i < head)) | ((lanes == 1) & (columns < cols))


@triton.jit
def load_logits(pointers, mask, scale, COMPUTE: tl.constexpr, EVICT: tl.constexpr):
    """Logits over the temperature; -inf where the mask forbids."""
    if mask is None:
        return tl.load(pointers, eviction_policy=EVICT).to(COMPUTE) * scale
    else:
        return tl.load(pointers, mask=mask, other=-float("inf"), eviction_policy=EVICT).to(COMPUTE) * scale


@triton.jit
def load_pair(p, q, mask, scale, GIVEN: tl.constexpr, COMPUTE: tl.constexpr, EVICT: tl.constexpr):
    a = load_zeros(p, mask).to(COMPUTE) if GIVEN else load_logits(p, mask, scale, COMPUTE, EVICT)
    return a, load_logits(q, mask, scale, COMPUTE, EVICT)


@triton.jit
def read_formula(p, q, weights, mask, scalars, FORMULA: tl.constexpr, WEIGHTED: tl.constexpr):
    """f, ∂f/∂log p (or ∂f/∂p, where p is given) and ∂f/∂log q, times the weights; 0 where the mask forbids."""
    out = FORMULA(p, q, *scalars)
    f = out[0]
    d_p = out[1]
    d_q = out[2]
    if WEIGHTED:
        w = load_zeros(weights, mask).to(q.dtype)
        f *= w
        d_p *= w
        d_q *= w
    if mask is not None:
        f = tl.where(mask, f, 0.0)
        d_p = tl.where(mask, d_p, 0.0)
        d_q = tl.where(mask, d_q, 0.0)
    return f, d_p, d_q


# One read: sums of f as if the maxima so far were log Σ exp, moved whenever a maximum rises


@triton.jit
def moved(total_f, total_d, by_p, by_q, GIVEN: tl.constexpr):
    """Σ f and Σ ∂f/∂log q once log p has moved by ``by_p`` and log q by ``by_q``: see the rule of one read."""
    distance = by_q if GIVEN else by_q - by_p
    total_f += tl.where(total_d == 0.0, 0.0, distance * total_d)  # the first maximum is -3e38: nothing, infinitely far away
    if not GIVEN:
        factor = exp(by_p)
        total_f = tl.where(factor == 0.0, 0.0, total_f * factor)
        total_d *= factor
    return total_f, total_d


@triton.jit
def fold(state, tiles, weights, mask, scalars, FORMULA: tl.constexpr, GIVEN: tl.constexpr, WEIGHTED: tl.constexpr):
    """Fold pairs of tiles into each lane's maxima and sums; one rescale for all of them. weights: where each pair's lie."""
    top_p, top_q, total_q, total_f, total_d = state
    new_p = top_p
    new_q = top_q
    for i in tl.static_range(len(tiles) // 2):
        if not GIVEN:
            new_p = tl.maximum(new_p, tl.max(tiles[2 * i], 1))
        new_q = tl.maximum(new_q, tl.max(tiles[2 * i + 1], 1))
    total_f, total_d = moved(total_f, total_d, top_p - new_p, top_q - new_q, GIVEN)
    total_q *= exp(top_q - new_q)
    for i in tl.static_range(len(tiles) // 2):
        p = tiles[2 * i]
        if not GIVEN:
            p -= new_p[:, None]
        q = tiles[2 * i + 1] - new_q[:, None]
        f, _, d = read_formula(p, q, weights[i], mask, scalars, FORMULA, WEIGHTED)
        total_f += tl.sum(f, 1)
        total_d += tl.sum(d, 1)
        total_q += tl.sum(exp(q), 1)
    return new_p, new_q, total_q, total_f, total_d


@triton.jit
def in_one_read(
    p, q, start_p, start_q, weight, cols, scale, scalars,
    FORMULA: tl.constexpr, GIVEN: tl.constexpr, WEIGHTED: tl.constexpr, EDGE: tl.constexpr, COMPUTE: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Of one pair of rows: max and log Σ exp(· - max) of p and of q, Σ ∂f/∂log p, Σ ∂f/∂log q and Σ f."""
    head, vectors = span_of(start_q, cols, VEC, EDGE)
    first_p = p + (start_p + head) // VEC * VEC  # says that it is aligned
    first_q = q + (start_q + head) // VEC * VEC
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    lowest = tl.full((LANES,), LOWEST_DOUBLE if COMPUTE == tl.float64 else LOWEST, COMPUTE)
    none = tl.zeros((LANES,), COMPUTE)
    state = (none if GIVEN else lowest, lowest, none, none, none)
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        tiles = ()
        weights = ()
        for u in tl.static_range(UNROLL):
            at = (v + u * LANES) * VEC + tile
            tiles += load_pair(first_p + at, first_q + at, None, scale, GIVEN, COMPUTE, "evict_first")
            weights += (weight + head + at,)
        state = fold(state, tiles, weights, None, scalars, FORMULA, GIVEN, WEIGHTED)
    for v in range(unmasked, vectors, LANES):
        mask = (v + lanes < vectors)[:, None]
        at = v * VEC + tile
        tiles = load_pair(first_p + at, first_q + at, mask, scale, GIVEN, COMPUTE, "evict_first")
        state = fold(state, tiles, (weight + head + at,), mask, scalars, FORMULA, GIVEN, WEIGHTED)
    if EDGE:
        at, mask = edge_tile(head, vectors, cols, LANES, VEC)
        tiles = load_pair(p + start_p + at, q + start_q + at, mask, scale, GIVEN, COMPUTE, "")
        state = fold(state, tiles, (weight + at,), mask, scalars, FORMULA, GIVEN, WEIGHTED)
    top_p, top_q, total_q, total_f, total_d = state
    highest_p = tl.max(top_p, 0)
    highest_q = tl.max(top_q, 0)
    total_f, total_d = moved(total_f, total_d, top_p - highest_p, top_q - highest_q, GIVEN)
    total_q = tl.sum(total_q * exp(top_q - highest_q), 0)
    log_total_q = tl.log(total_q)
    loss = tl.sum(total_f, 0)
    slope_q = tl.sum(total_d, 0)
    log_total_p = loss * 0.0
    if GIVEN:
        loss -= log_total_q * slope_q
        slope_p = log_total_p
    else:
        log_total_p = tl.log(-slope_q)
        loss = loss / -slope_q + tl.log(total_q / -slope_q)  # not a difference of logarithms: those are rounded
        slope_q = slope_q / -slope_q  # -1, or the NaN of a row that has one
        slope_p = loss - slope_q
    return highest_p, log_total_p, highest_q, log_total_q, slope_p, slope_q, loss


# Two reads: first max and Σ exp of each row, then sums of f; the second read comes out of L2


@triton.jit
def add_tiles(
    totals, p, q, weights, mask, scale, rowwise, scalars,
    FORMULA: tl.constexpr, WEIGHTED: tl.constexpr, COMPUTE: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Add f and its partials at one pair of tiles to each lane's sums."""
    highest_p, log_total_p, highest_q, log_total_q = rowwise
    log_p = (load_logits(p, mask, scale, COMPUTE, EVICT) - highest_p) - log_total_p
    log_q = (load_logits(q, mask, scale, COMPUTE, EVICT) - highest_q) - log_total_q
    f, d_p, d_q = read_formula(log_p, log_q, weights, mask, scalars, FORMULA, WEIGHTED)
    return totals[0] + tl.sum(f, 1), totals[1] + tl.sum(d_p, 1), totals[2] + tl.sum(d_q, 1)


@triton.jit
def in_two_reads(
    p, q, start_p, start_q, weight, cols, scale, scalars,
    FORMULA: tl.constexpr, WEIGHTED: tl.constexpr, EDGE: tl.constexpr, COMPUTE: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """As ``in_one_read``, of any formula of two rows of logits."""
    head, vectors = span_of(start_q, cols, VEC, EDGE)
    first_p = p + (start_p + head) // VEC * VEC
    first_q = q + (start_q + head) // VEC * VEC
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    top_p = tl.full((LANES,), LOWEST_DOUBLE if COMPUTE == tl.float64 else LOWEST, COMPUTE)
    top_q = top_p
    sum_p = tl.zeros((LANES,), COMPUTE)
    sum_q = sum_p
    for v in range(0, unmasked, LANES * UNROLL):
        tiles_p = ()
        tiles_q = ()
        for u in tl.static_range(UNROLL):
            at = (v + u * LANES) * VEC + tile
            tiles_p += (load_logits(first_p + at, None, scale, COMPUTE, "evict_last"),)
            tiles_q += (load_logits(first_q + at, None, scale, COMPUTE, "evict_last"),)
        top_p, sum_p = take(tiles_p, top_p, sum_p)
        top_q, sum_q = take(tiles_q, top_q, sum_q)
    for v in range(unmasked, vectors, LANES):
        mask = (v + lanes < vectors)[:, None]
        at = v * VEC + tile
        top_p, sum_p = take((load_logits(first_p + at, mask, scale, COMPUTE, "evict_last"),), top_p, sum_p)
        top_q, sum_q = take((load_logits(first_q + at, mask, scale, COMPUTE, "evict_last"),), top_q, sum_q)
    if EDGE:
        edge, exists = edge_tile(head, vectors, cols, LANES, VEC)
        top_p, sum_p = take((load_logits(p + start_p + edge, exists, scale, COMPUTE, ""),), top_p, sum_p)
        top_q, sum_q = take((load_logits(q + start_q + edge, exists, scale, COMPUTE, ""),), top_q, sum_q)
    highest_p = tl.max(top_p, 0)
    highest_q = tl.max(top_q, 0)
    log_total_p = tl.log(tl.sum(sum_p * exp(top_p - highest_p), 0))
    log_total_q = tl.log(tl.sum(sum_q * exp(top_q - highest_q), 0))
    rowwise = highest_p, log_total_p, highest_q, log_total_q
    none = tl.zeros((LANES,), COMPUTE)
    totals = (none, none, none)
    for v in range(0, unmasked, LANES):
        at = v * VEC + tile
        totals = add_tiles(
            totals, first_p + at, first_q + at, weight + head + at, None, scale, rowwise, scalars, FORMULA, WEIGHTED, COMPUTE, "evict_first"
        )
    for v in range(unmasked, vectors, LANES):
        at = v * VEC + tile
        mask = (v + lanes < vectors)[:, None]
        totals = add_tiles(
            totals, first_p + at, first_q + at, weight + head + at, mask, scale, rowwise, scalars, FORMULA, WEIGHTED, COMPUTE, "evict_first"
        )
    if EDGE:
        edge, exists = edge_tile(head, vectors, cols, LANES, VEC)  # made anew, for the loops would have to hold it
        totals = add_tiles(
            totals, p + start_p + edge, q + start_q + edge, weight + edge, exists, scale, rowwise, scalars, FORMULA, WEIGHTED, COMPUTE, ""
        )
    total_f, total_p, total_q = totals
    return highest_p, log_total_p, highest_q, log_total_q, tl.sum(total_p, 0), tl.sum(total_q, 0), tl.sum(total_f, 0)


@triton.jit(
    repr=name_of("distribution_rows_forward"), do_not_specialize=["rows", "ignore_index"],
    do_not_specialize_on_alignment=["labels", "losses", "state"],
)
def forward_kernel(
    p, q,  # (rows, cols), row r at r * stride_p, r * stride_q
    weight,  # (cols,) where WEIGHTED
    labels,  # (rows,) where LABELLED
    losses,  # (rows,); where COUNTED (2, rows): losses, and 1 for each row that counts
    state,  # (AHEAD, rows) of other things, then (6, rows) for the backward
    rows: tl.int64,
    cols, stride_p, stride_q, ignore_index, factors, scalars,
    FORMULA: tl.constexpr, GIVEN: tl.constexpr, ONE_READ: tl.constexpr, WEIGHTED: tl.constexpr, LABELLED: tl.constexpr,
    COUNTED: tl.constexpr, AHEAD: tl.constexpr, EDGE: tl.constexpr, COMPUTE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale, z_loss, factor = exact(factors, COMPUTE)
    values = exact(scalars, COMPUTE)
    zero = tl.zeros((), COMPUTE)
    found = (zero, zero, zero, zero, zero, zero, zero)
    counts = zero
    kept = True
    if LABELLED:
        kept = tl.load(labels + row).to(tl.int64) != ignore_index
    if kept:
        counts += 1.0
        at_p = row * stride_p
        at_q = row * stride_q
        if ONE_READ:
            found = in_one_read(p, q, at_p, at_q, weight, cols, scale, values, FORMULA, GIVEN, WEIGHTED, EDGE, COMPUTE, VEC, LANES, UNROLL)
        else:
            found = in_two_reads(p, q, at_p, at_q, weight, cols, scale, values, FORMULA, WEIGHTED, EDGE, COMPUTE, VEC, LANES, UNROLL)
    highest_p, log_total_p, highest_q, log_total_q, slope_p, slope_q, loss = found
    if z_loss != 0.0:
        lse = highest_q + log_total_q
        loss += z_loss * lse * lse
        slope_q -= 2.0 * z_loss * lse
    row_saved = (highest_p, log_total_p, highest_q, log_total_q, slope_p, slope_q)
    tl.store(losses + row, (loss * factor).to(losses.dtype.element_ty))  # every program writes every output
    if COUNTED:
        tl.store(losses + rows + row, counts.to(losses.dtype.element_ty))
    for i in tl.static_range(6):
        tl.store(state + (AHEAD + i) * rows + row, row_saved[i])


@triton.jit
def store_gradients(
    pair, grad_p, grad_q, weights, mask, scale, rowwise, upstream, scalars, FORMULA: tl.constexpr, GIVEN: tl.constexpr,
    WEIGHTED: tl.constexpr, WANT_P: tl.constexpr, WANT_Q: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one pair of tiles."""
    highest_p, log_total_p, highest_q, log_total_q, slope_p, slope_q = rowwise
    a, b = pair
    if not GIVEN:
        a = (a - highest_p) - log_total_p
    b = (b - highest_q) - log_total_q
    _, d_p, d_q = read_formula(a, b, weights, mask, scalars, FORMULA, WEIGHTED)
    if WANT_P:
        g = d_p * upstream if GIVEN else (d_p - exp(a) * slope_p) * (upstream * scale)
        tl.store(grad_p, g.to(grad_p.dtype.element_ty), mask=mask, eviction_policy=EVICT)
    if WANT_Q:
        g = (d_q - exp(b) * slope_q) * (upstream * scale)
        tl.store(grad_q, g.to(grad_q.dtype.element_ty), mask=mask, eviction_policy=EVICT)


@triton.jit(
    repr=name_of("distribution_rows_backward"), do_not_specialize=["rows", "ignore_index", "dout_stride"],
    do_not_specialize_on_alignment=["labels", "state", "dout"],
)
def backward_kernel(
    p, q,  # (rows, cols), row r at r * stride_p, r * stride_q
    weight,  # (cols,) where WEIGHTED
    labels,  # (rows,) where LABELLED
    state,  # (AHEAD, rows) of other things, then (6, rows); where COUNTED then how many rows count
    grad_p, grad_q,  # as p and q, which they may be, where WANT_P and WANT_Q
    dout,  # of row r at r * dout_stride
    rows: tl.int64,
    cols, stride_p, stride_q, dout_stride, ignore_index, factors, scalars,
    FORMULA: tl.constexpr, GIVEN: tl.constexpr, WEIGHTED: tl.constexpr, LABELLED: tl.constexpr, COUNTED: tl.constexpr,
    AHEAD: tl.constexpr, MEAN: tl.constexpr, WANT_P: tl.constexpr, WANT_Q: tl.constexpr, EDGE: tl.constexpr,
    COMPUTE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start_p = row * stride_p
    start_q = row * stride_q
    head, vectors = span_of(start_q, cols, VEC, EDGE)
    first_p = (start_p + head) // VEC * VEC
    first_q = (start_q + head) // VEC * VEC
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    kept = True
    if LABELLED:
        kept = tl.load(labels + row).to(tl.int64) != ignore_index
    if kept:
        scale, _, factor = exact(factors, COMPUTE)
        values = exact(scalars, COMPUTE)
        rowwise = ()
        for i in tl.static_range(6):
            rowwise += (tl.load(state + (AHEAD + i) * rows + row),)
        upstream = tl.load(dout + row * dout_stride).to(COMPUTE) * factor
        if MEAN:
            upstream = upstream / (tl.load(state + (AHEAD + 6) * rows) if COUNTED else tl.cast(rows, COMPUTE))
        unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
        for v in range(0, unmasked, LANES * UNROLL):
            pairs = ()
            for u in tl.static_range(UNROLL):  # all loads first, so that they travel together
                at = (v + u * LANES) * VEC + tile
                pairs += (load_pair(p + first_p + at, q + first_q + at, None, scale, GIVEN, COMPUTE, "evict_first"),)
            for u in tl.static_range(UNROLL):
                at = (v + u * LANES) * VEC + tile
                store_gradients(
                    pairs[u], grad_p + first_p + at, grad_q + first_q + at, weight + head + at, None, scale, rowwise, upstream, values,
                    FORMULA, GIVEN, WEIGHTED, WANT_P, WANT_Q, "evict_first",
                )  # fmt: skip
        for v in range(unmasked, vectors, LANES):
            at = v * VEC + tile
            mask = (v + lanes < vectors)[:, None]
            pair = load_pair(p + first_p + at, q + first_q + at, mask, scale, GIVEN, COMPUTE, "evict_first")
            store_gradients(
                pair, grad_p + first_p + at, grad_q + first_q + at, weight + head + at, mask, scale, rowwise, upstream, values,
                FORMULA, GIVEN, WEIGHTED, WANT_P, WANT_Q, "evict_first",
            )  # fmt: skip
        if EDGE:
            edge, exists = edge_tile(head, vectors, cols, LANES, VEC)
            pair = load_pair(p + start_p + edge, q + start_q + edge, exists, scale, GIVEN, COMPUTE, "")
            store_gradients(
                pair, grad_p + start_p + edge, grad_q + start_q + edge, weight + edge, exists, scale, rowwise, upstream, values,
                FORMULA, GIVEN, WEIGHTED, WANT_P, WANT_Q, "",
            )  # fmt: skip
    else:
        if WANT_P:
            write_zeros(grad_p, start_p, cols, EDGE, VEC, LANES)
        if WANT_Q:
            write_zeros(grad_q, start_q, cols, EDGE, VEC, LANES)


def key(args):
    rows = args["p"], args["q"]
    aligned = all(x.data_ptr() % 16 == 0 for x in rows)
    same = tuple(args[name] for name in ("cols", "GIVEN", "WEIGHTED", "LABELLED", "EDGE"))
    return (args["FORMULA"].__name__, *(str(x.dtype) for x in rows), *same, aligned, args.get("WANT_P"), args.get("WANT_Q"))


SAMPLE_BYTES = 256 << 20  # a launch is measured on at most this much


def sample(args):
    most = SAMPLE_BYTES // sum(max(args[f"stride_{name}"] * args[name].element_size(), 1) for name in ("p", "q"))
    rows = min(args["rows"], max(most, 1))
    return {**args, "rows": rows} | {name: args[name][:rows] for name in ("grad_p", "grad_q") if name in args}


def pair_configs(args):
    return [config for config in configs(args) if config["num_warps"] * config["UNROLL"] < 64]  # beyond, registers spill


tuning = {"configs": pair_configs, "rule": rule, "key": key, "size": "rows", "sample": sample, "fuse": False}
tuning["programs"] = lambda rows, fixed: rows
forward_launch = Tuned(forward_kernel, **tuning)
backward_launch = Tuned(backward_kernel, written=("grad_p", "grad_q"), **tuning)  # where they are p and q


def readable_pair(p, q):
    """Both with rows one after another, and starting at the same place within a vector."""
    p, q = readable(p), readable(q)
    if q.shape[0] > 1 and (p.stride(0) - q.stride(0)) % VECTOR:
        p, q = p.contiguous(), q.contiguous()
    return p, q


def ahead_of(problem, labels):
    """How many runs of ``state`` come before what the backward reads."""
    return 0 if problem.reduction == "none" else 1 if labels is None else 2


def state_of(q, problem, labels, wide):
    ahead = ahead_of(problem, labels)
    return q.new_empty((ahead + SAVED) * q.shape[0] + ahead // 2, dtype=wide)


@planned
def plan(tensors, problem, wanted):
    """Of the forward where nothing is wanted, else of the backward: the launch, or False where the tensors have to be arranged."""
    p, q, weight, labels, dout = tensors
    first, second = readable_pair(p, q)
    if first is not p or second is not q or not all(t.is_contiguous() for t in given((weight, labels))):
        return False
    rows, cols = q.shape
    wide, vec = widest((p, q)), VECTOR // min(p.element_size(), q.element_size())
    strides = [x.stride(0) if rows > 1 else cols for x in (p, q)]
    none, state = problem.reduction == "none", state_of(q, problem, labels, wide)
    arguments = {
        "p": p,
        "q": q,
        "weight": q if weight is None else weight,
        "labels": q if labels is None else labels,
        "state": state,
        "rows": rows,
        "cols": cols,
        "stride_p": strides[0],
        "stride_q": strides[1],
        "ignore_index": problem.ignore_index,
        "factors": as_scalars((problem.scale, problem.z_loss, problem.factor), wide),
        "scalars": as_scalars(problem.scalars, wide),
        "FORMULA": FORMULAS[problem.formula].kernel,
        "GIVEN": problem.given,
        "WEIGHTED": weight is not None,
        "LABELLED": labels is not None,
        "COUNTED": labels is not None and not none,
        "AHEAD": ahead_of(problem, labels),
        "EDGE": any(size % vec for size in (cols, *strides)),
        "COMPUTE": triton_type(wide),
        "VEC": vec,
    }
    if not wanted:
        losses = q.new_empty(rows, dtype=problem.dtype) if none else state
        return forward_launch.bind(losses=losses, ONE_READ=problem.one_read, **arguments)
    grads = [room_for_gradient(x) if want else x for x, want in zip((p, q), wanted)]
    return backward_launch.bind(
        grad_p=grads[0],
        grad_q=grads[1],
        dout=dout,
        dout_stride=dout.stride(0) if none and rows > 1 else 0,
        MEAN=problem.reduction == "mean",
        WANT_P=wanted[0],
        WANT_Q=wanted[1],
        **arguments,
    )


def prepared(tensors, problem, wanted=(), dout=None):
    """The launch, and p, q, weight and labels as its kernel wants them."""
    p, q, weight, labels = tensors
    launch = plan((*tensors, dout), problem, wanted)
    if not launch:
        p, q = readable_pair(p, q)
        weight, labels = (t if t is None else t.contiguous() for t in (weight, labels))
        launch = plan((p, q, weight, labels, dout), problem, wanted)
    return launch, p, q, q if weight is None else weight, q if labels is None else labels


def room_for_gradient(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def forward(tensors, problem):
    p, q, _, labels = tensors
    rows, none, wide = q.shape[0], problem.reduction == "none", widest((p, q))
    out, state = q.new_empty(rows if none else (), dtype=problem.dtype), state_of(q, problem, labels, wide)
    if shapes_only():
        return [out], [state]
    launch, p, q, weight, marks = prepared(tensors, problem)
    launch(p, q, weight, marks, out if none else state, state, rows)
    if not none:
        mean, weights_at = problem.reduction == "mean", 0 if labels is None else 2 + SAVED
        finish(state, out, rows, weights_at, mean, rows)
    return [out], [state]


def backward(tensors, saved, upstream, problem, wanted):
    (state,), (dout,), wanted = saved, upstream, tuple(wanted[:2])
    if shapes_only():
        return [x.new_empty(x.shape) for x, want in zip(tensors, wanted) if want]
    launch, p, q, weight, marks = prepared(tensors, problem, wanted, dout)
    grad_p, grad_q = (room_for_gradient(x) if want else x for x, want in zip((p, q), wanted))
    launch(p, q, weight, marks, state, grad_p, grad_q, dout, q.shape[0])
    return [grad for grad, want in zip((grad_p, grad_q), wanted) if want]


def walk(tensors, problem, task):
    """The losses of the rows; fills the gradients that the task asks for. Of a pair that can be read as it lies."""
    (losses,), (state,) = forward(tensors, problem)
    wanted = tuple(grad is not None for grad in task.grads)
    if any(wanted):
        launch, p, q, weight, marks = prepared(tensors, problem, wanted, task.upstream)
        grad_p, grad_q = (x if grad is None else grad for x, grad in zip((p, q), task.grads))
        launch(p, q, weight, marks, state, grad_p, grad_q, task.upstream, q.shape[0])
    return losses
