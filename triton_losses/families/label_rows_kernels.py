"""The kernels of label_rows.py, and how they are launched. One program is one row.

A row is walked in vectors of 16 bytes. Where rows start anywhere (50257 columns), the elements before the first aligned
vector and after the last are one small masked tile, the *edge*: a mask over single elements would narrow every load.
"""

import torch
import triton
import triton.language as tl

from triton_losses.compiler import WARP, compute_dtype
from triton_losses.device_math import as_scalars, exact, exp, load_zeros
from triton_losses.tuning import Tuned

LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: -inf - -inf would be NaN; and no float32 logit lies below
LOWEST_DOUBLE = tl.constexpr(-1.7976931348623157e308)


@triton.jit
def take(tiles, top, total):
    """Fold tiles into each lane's running maximum and Σ exp(x - maximum): one rescale for all of them."""
    new_top = top
    for i in tl.static_range(len(tiles)):
        new_top = tl.maximum(new_top, tl.max(tiles[i], 1))
    total *= exp(top - new_top)
    for i in tl.static_range(len(tiles)):
        total += tl.sum(exp(tiles[i] - new_top[:, None]), 1)
    return new_top, total


@triton.jit
def weighted_sum(x, columns, mask, class_weights, pivot, WEIGHTED: tl.constexpr):
    """Σ w_j (x_j - pivot) of each lane: near the row's own values, so that a common offset costs no digits."""
    d = x - pivot
    if WEIGHTED:
        d *= load_zeros(class_weights + columns, mask).to(x.dtype)
    return d if mask is None else tl.where(mask, d, 0.0)


@triton.jit
def span_of(start, cols, VEC: tl.constexpr, EDGE: tl.constexpr):
    """Of the row at ``start``: elements before its first aligned vector, and its aligned vectors."""
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
def row_statistics(
    logits, start, cols, pivot, class_weights,
    MEAN_LOG_P: tl.constexpr, WEIGHTED: tl.constexpr, EDGE: tl.constexpr, COMPUTE: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """max x, log Σ exp(x - max) and Σ w_j (x_j - pivot) of one row, read once."""
    head, vectors = span_of(start, cols, VEC, EDGE)
    first = logits + (start + head) // VEC * VEC  # says that it is aligned
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    top = tl.full((LANES,), LOWEST_DOUBLE if COMPUTE == tl.float64 else LOWEST, COMPUTE)
    total = tl.zeros((LANES,), COMPUTE)
    spread = tl.zeros((LANES,), COMPUTE)
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):
            at = (v + u * LANES) * VEC + tile
            tiles += (tl.load(first + at, eviction_policy="evict_first").to(COMPUTE),)
            if MEAN_LOG_P:
                spread += tl.sum(weighted_sum(tiles[u], head + at, None, class_weights, pivot, WEIGHTED), 1)
        top, total = take(tiles, top, total)
    for v in range(unmasked, vectors, LANES):
        mask = (v + lanes < vectors)[:, None]
        at = v * VEC + tile
        x = tl.load(first + at, mask=mask, other=-float("inf"), eviction_policy="evict_first").to(COMPUTE)
        if MEAN_LOG_P:
            spread += tl.sum(weighted_sum(x, head + at, mask & (at >= 0), class_weights, pivot, WEIGHTED), 1)
        top, total = take((x,), top, total)
    highest = tl.max(top, 0)
    total = tl.sum(total * exp(top - highest), 0)
    spread = tl.sum(spread, 0)
    if EDGE:
        columns, mask = edge_of(head, vectors, cols, VEC)
        x = tl.load(logits + start + columns, mask=mask, other=-float("inf")).to(COMPUTE)
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * exp(highest - higher) + tl.sum(exp(x - higher), 0)
        highest = higher
        if MEAN_LOG_P:
            spread += tl.sum(weighted_sum(x, columns, mask, class_weights, pivot, WEIGHTED), 0)
    return highest, tl.log(total), spread


@triton.jit
def read_formula(FORMULA: tl.constexpr, SLOTS: tl.constexpr, picked, log_p, mean_log_p, lse, weight, scalars):
    """The loss, and its partials by picked, log_p, mean_log_p and lse: 0 by those not taken."""
    values = ()
    if SLOTS[0]:
        values += (picked,)
    if SLOTS[1]:
        values += (log_p,)
    if SLOTS[2]:
        values += (mean_log_p,)
    if SLOTS[3]:
        values += (lse,)
    if SLOTS[4]:
        values += (weight,)
    out = FORMULA(*values, *scalars)
    zero = weight * 0.0
    d_picked = out[SLOTS[0]] if SLOTS[0] else zero
    d_log_p = out[SLOTS[1]] if SLOTS[1] else zero
    d_mean_log_p = out[SLOTS[2]] if SLOTS[2] else zero
    d_lse = out[SLOTS[3]] if SLOTS[3] else zero
    return out[0], d_picked, d_log_p, d_mean_log_p, d_lse


@triton.jit
def label_of(labels, row, cols, ignore_index):
    """Whether the row's label counts, and the label's column, or one that can be read all the same."""
    label = tl.load(labels + row).to(tl.int64)
    kept = label != ignore_index
    fits = (label >= 0) & (label < cols)
    tl.device_assert(fits | (label == ignore_index), "a target is out of bounds: it is no class and not ignore_index")
    return kept, tl.where(fits, label, 0).to(tl.int32)


def name_of(kernel):
    return lambda spec: f"{kernel}_{spec.constants['FORMULA'].__name__}"


@triton.jit(repr=name_of("label_rows_forward"), debug=True, do_not_specialize=["rows", "ignore_index"])
def forward_kernel(
    logits,  # (rows, cols), row r at r * stride
    labels,  # (rows,)
    class_weights,  # (cols,) where WEIGHTED
    mean_weight,  # () where WEIGHTED
    losses,  # (2, rows): losses and weights
    saved,  # (3, rows): max, log Σ exp(x - max), mean_log_p; each written where the formula needs it
    rows, cols, stride, ignore_index, scalars,
    FORMULA: tl.constexpr, SLOTS: tl.constexpr, WEIGHTED: tl.constexpr, EDGE: tl.constexpr, COMPUTE: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kept, place = label_of(labels, row, cols, ignore_index)
    loss = tl.zeros((), COMPUTE)
    weight = tl.zeros((), COMPUTE)
    highest = tl.zeros((), COMPUTE)
    log_total = tl.zeros((), COMPUTE)
    mean_log_p = tl.zeros((), COMPUTE)
    if kept:
        start = row * stride
        picked = tl.load(logits + start + place).to(COMPUTE)
        weight += tl.load(class_weights + place).to(COMPUTE) if WEIGHTED else 1.0
        if SLOTS[1] or SLOTS[2] or SLOTS[3]:
            pivot = tl.where(tl.abs(picked) < float("inf"), picked, 0.0).to(COMPUTE)
            highest, log_total, spread = row_statistics(
                logits, start, cols, pivot, class_weights, SLOTS[2] > 0, WEIGHTED, EDGE, COMPUTE, VEC, LANES, UNROLL
            )
            if SLOTS[2]:
                rest = pivot - highest - log_total
                if WEIGHTED:
                    rest *= tl.load(mean_weight).to(COMPUTE)
                mean_log_p = spread / cols + rest
        loss = read_formula(
            FORMULA, SLOTS, picked, (picked - highest) - log_total, mean_log_p, highest + log_total, weight, exact(scalars, COMPUTE)
        )[0].to(COMPUTE)
    tl.store(losses + row, loss.to(losses.dtype.element_ty))  # every program writes every output
    tl.store(losses + rows + row, weight.to(losses.dtype.element_ty))
    if SLOTS[1] or SLOTS[2] or SLOTS[3]:
        tl.store(saved + row, highest)
        tl.store(saved + rows + row, log_total)
    if SLOTS[2]:
        tl.store(saved + 2 * rows.to(tl.int64) + row, mean_log_p)


@triton.jit
def gradient_at(
    x, columns, mask, highest, log_total, softmax_factor, label_factor, uniform_factor, label, class_weights,
    SLOTS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    g = tl.where(columns == label, label_factor, 0.0).to(x.dtype)
    if SLOTS[1] or SLOTS[2] or SLOTS[3]:
        g += exp((x - highest) - log_total) * softmax_factor
    if SLOTS[2]:
        if WEIGHTED:
            g += uniform_factor * load_zeros(class_weights + columns, mask).to(x.dtype)
        else:
            g += uniform_factor
    return g


@triton.jit(repr=name_of("label_rows_backward"), debug=True, do_not_specialize=["rows", "ignore_index", "dout_stride"])
def backward_kernel(
    logits,  # (rows, cols), row r at r * stride
    labels,  # (rows,)
    class_weights,  # (cols,) where WEIGHTED
    mean_weight,  # () where WEIGHTED
    saved,  # (3, rows)
    grad,  # (rows, cols), row r at r * stride
    dout,  # of row r at r * dout_stride
    denominator,  # () where MEAN
    rows, cols, stride, dout_stride, ignore_index, scalars,
    FORMULA: tl.constexpr, SLOTS: tl.constexpr, WEIGHTED: tl.constexpr, MEAN: tl.constexpr, EDGE: tl.constexpr,
    COMPUTE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = row * stride
    kept, place = label_of(labels, row, cols, ignore_index)
    head, vectors = span_of(start, cols, VEC, EDGE)
    first = (start + head) // VEC * VEC
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    columns, exists = edge_of(head, vectors, cols, VEC)
    if kept:
        picked = tl.load(logits + start + place).to(COMPUTE)
        highest = tl.zeros((), COMPUTE)
        weight = tl.load(class_weights + place).to(COMPUTE) if WEIGHTED else highest + 1.0
        log_total = highest
        mean_log_p = highest
        if SLOTS[1] or SLOTS[2] or SLOTS[3]:
            highest = tl.load(saved + row)
            log_total = tl.load(saved + rows + row)
        if SLOTS[2]:
            mean_log_p = tl.load(saved + 2 * rows.to(tl.int64) + row)
        _, d_picked, d_log_p, d_mean_log_p, d_lse = read_formula(
            FORMULA, SLOTS, picked, (picked - highest) - log_total, mean_log_p, highest + log_total, weight, exact(scalars, COMPUTE)
        )
        upstream = tl.load(dout + row * dout_stride).to(COMPUTE)
        if MEAN:
            upstream = upstream / tl.load(denominator)
        label_factor = (d_log_p + d_picked) * upstream
        softmax_factor = (d_lse - d_log_p) * upstream
        uniform_factor = d_mean_log_p * upstream
        if SLOTS[2]:
            softmax_factor -= uniform_factor * (tl.load(mean_weight).to(COMPUTE) if WEIGHTED else 1.0)
        uniform_factor = uniform_factor / cols
        unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
        for v in range(0, unmasked, LANES * UNROLL):
            tiles = ()
            for u in tl.static_range(UNROLL):  # all loads first, so that they travel together
                tiles += (tl.load(logits + first + (v + u * LANES) * VEC + tile, eviction_policy="evict_first").to(COMPUTE),)
            for u in tl.static_range(UNROLL):
                at = (v + u * LANES) * VEC + tile
                g = gradient_at(
                    tiles[u], at, None, highest, log_total, softmax_factor, label_factor, uniform_factor, place - head,
                    class_weights + head, SLOTS, WEIGHTED,
                )  # fmt: skip
                tl.store(grad + first + at, g.to(grad.dtype.element_ty), eviction_policy="evict_first")
        for v in range(unmasked, vectors, LANES):
            mask = (v + lanes < vectors)[:, None]
            at = v * VEC + tile
            x = tl.load(logits + first + at, mask=mask, other=0.0, eviction_policy="evict_first").to(COMPUTE)
            g = gradient_at(
                x, at, mask & (at >= 0), highest, log_total, softmax_factor, label_factor, uniform_factor, place - head,
                class_weights + head, SLOTS, WEIGHTED,
            )  # fmt: skip
            tl.store(grad + first + at, g.to(grad.dtype.element_ty), mask=mask, eviction_policy="evict_first")
        if EDGE:
            x = tl.load(logits + start + columns, mask=exists, other=0.0).to(COMPUTE)
            g = gradient_at(
                x, columns, exists, highest, log_total, softmax_factor, label_factor, uniform_factor, place, class_weights, SLOTS, WEIGHTED
            )
            tl.store(grad + start + columns, g.to(grad.dtype.element_ty), mask=exists)
    else:
        for v in range(0, vectors, LANES):
            mask = (v + lanes < vectors)[:, None]
            tl.store(grad + first + v * VEC + tile, tl.zeros((LANES, VEC), grad.dtype.element_ty), mask=mask)
        if EDGE:
            tl.store(grad + start + columns, tl.zeros((2 * VEC,), grad.dtype.element_ty), mask=exists)


def row_arguments(logits, labels, class_weights, formula, scalars, ignore_index, slots_of):
    """What both kernels take."""
    rows, cols = logits.shape
    stride = logits.stride(0) if rows > 1 else cols
    wide = compute_dtype(logits.dtype)
    vec = 16 // logits.element_size()
    weighted = class_weights is not None
    return dict(
        logits=logits, labels=labels.contiguous(), class_weights=class_weights.contiguous() if weighted else logits,
        mean_weight=class_weights.to(wide).mean() if weighted else logits, rows=rows, cols=cols, stride=stride,
        ignore_index=ignore_index, scalars=as_scalars(scalars, wide), FORMULA=formula.kernel, SLOTS=slots_of(formula), WEIGHTED=weighted,
        EDGE=cols % vec != 0 or stride % vec != 0, COMPUTE=tl.float64 if wide == torch.float64 else tl.float32, VEC=vec,
    )  # fmt: skip


SAMPLE_BYTES = 256 << 20  # a launch is measured on at most this much


def key(args):
    x = args["logits"]
    return args["FORMULA"].__name__, args["cols"], str(x.dtype), args["WEIGHTED"], args["EDGE"], x.data_ptr() % 16 == 0, "grad" in args


def sample(args):
    most = max(SAMPLE_BYTES // max(args["stride"] * args["logits"].element_size(), 1), 1)
    return {**args, "rows": min(args["rows"], most)}


def config(warps, unroll):
    return {"LANES": warps * WARP, "UNROLL": unroll, "num_warps": warps}


def configs(args):
    vectors = args["cols"] // args["VEC"]
    widths = [w for w in (1, 2, 4, 8, 16) if w == 1 or w * WARP <= 2 * vectors]
    return [config(w, u) for w in widths[-4:] for u in (1, 2, 4) if u == 1 or w * WARP * u <= vectors]


def rule(args):
    vectors = max(args["cols"] // args["VEC"], 1)
    warps = max(1, min(8, triton.next_power_of_2(vectors // (2 * WARP))))
    return config(warps, 2 if vectors >= 2 * warps * WARP else 1)


def programs(args, config):
    return args["rows"]


forward_launch = Tuned(forward_kernel, configs=configs, rule=rule, key=key, programs=programs, sample=sample)
backward_launch = Tuned(backward_kernel, configs=configs, rule=rule, key=key, programs=programs, sample=sample)
