"""The kernel of families/label_rows.py, and how it is launched. One program is one row.

A row is walked in vectors of 16 bytes. Where rows start anywhere (50257 columns), the elements before the first aligned
vector and after the last are one small masked tile, the *edge*: a mask over single elements would narrow every load.
"""

import triton
import triton.language as tl

from triton_losses.compiler import WARP, compute_dtype
from triton_losses.device_math import as_scalars, exact, exp, load_zeros, tanh
from triton_losses.kernels.elementwise import name_of, triton_type
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
def take_moment(tiles, top, total, moment):
    """The same for Σ exp(x - maximum) (x - maximum); before `take`, whose new maximum it uses."""
    new_top = top
    for i in tl.static_range(len(tiles)):
        new_top = tl.maximum(new_top, tl.max(tiles[i], 1))
    moment = exp(top - new_top) * (moment + tl.where(total > 0, (top - new_top) * total, 0.0))
    for i in tl.static_range(len(tiles)):
        d = tl.maximum(tiles[i] - new_top[:, None], LOWEST)  # finite, for 0 · -inf is nan
        moment += tl.sum(exp(d) * d, 1)
    return moment


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
def transform(x, shape, CAPPED: tl.constexpr, SCALED: tl.constexpr):
    """scale · softcap · tanh(x / softcap)"""
    if CAPPED:
        x = shape[0] * tanh(x / shape[0])
    if SCALED:
        x = x * shape[1]
    return x


@triton.jit
def row_statistics(
    logits, start, cols, pivot, class_weights, shape,
    MEAN_LOG_P: tl.constexpr, ENTROPY: tl.constexpr, WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr, EVICT: tl.constexpr, EDGE: tl.constexpr,
    COMPUTE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Of one row x, read once: max x, log Σ exp(x - max), Σ w_j (x_j - pivot), and the entropy of softmax(x)."""
    head, vectors = span_of(start, cols, VEC, EDGE)
    first = logits + (start + head) // VEC * VEC  # says that it is aligned
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    top = tl.full((LANES,), LOWEST_DOUBLE if COMPUTE == tl.float64 else LOWEST, COMPUTE)
    total = tl.zeros((LANES,), COMPUTE)
    spread = tl.zeros((LANES,), COMPUTE)
    moment = tl.zeros((LANES,), COMPUTE)
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):
            at = (v + u * LANES) * VEC + tile
            tiles += (transform(tl.load(first + at, eviction_policy=EVICT).to(COMPUTE), shape, CAPPED, SCALED),)
            if MEAN_LOG_P:
                spread += tl.sum(weighted_sum(tiles[u], head + at, None, class_weights, pivot, WEIGHTED), 1)
        if ENTROPY:
            moment = take_moment(tiles, top, total, moment)
        top, total = take(tiles, top, total)
    for v in range(unmasked, vectors, LANES):
        mask = (v + lanes < vectors)[:, None]
        at = v * VEC + tile
        x = tl.load(first + at, mask=mask, other=-float("inf"), eviction_policy=EVICT).to(COMPUTE)
        x = transform(x, shape, CAPPED, SCALED)
        if CAPPED:
            x = tl.where(mask, x, -float("inf"))
        if MEAN_LOG_P:
            spread += tl.sum(weighted_sum(x, head + at, mask & (at >= 0), class_weights, pivot, WEIGHTED), 1)
        if ENTROPY:
            moment = take_moment((x,), top, total, moment)
        top, total = take((x,), top, total)
    highest = tl.max(top, 0)
    shrink = exp(top - highest)
    if ENTROPY:
        moment = tl.sum(shrink * (moment + tl.where(total > 0, (top - highest) * total, 0.0)), 0)
    total = tl.sum(total * shrink, 0)
    spread = tl.sum(spread, 0)
    if EDGE:
        columns, mask = edge_of(head, vectors, cols, VEC)
        x = transform(tl.load(logits + start + columns, mask=mask, other=0.0).to(COMPUTE), shape, CAPPED, SCALED)
        x = tl.where(mask, x, -float("inf"))
        higher = tl.maximum(highest, tl.max(x, 0))
        if MEAN_LOG_P:
            spread += tl.sum(weighted_sum(x, columns, mask, class_weights, pivot, WEIGHTED), 0)
        if ENTROPY:
            d = tl.maximum(x - higher, LOWEST)
            moment = exp(highest - higher) * (moment + tl.where(total > 0, (highest - higher) * total, 0.0)) + tl.sum(exp(d) * d, 0)
        total = total * exp(highest - higher) + tl.sum(exp(x - higher), 0)
        highest = higher
    log_total = tl.log(total)
    entropy = log_total
    if ENTROPY:
        entropy = log_total - moment / total
    return highest, log_total, spread, entropy


@triton.jit
def read_formula(FORMULA: tl.constexpr, SLOTS: tl.constexpr, statistics, weight, operands, scalars):
    """The loss, and its partial by each of the statistics: 0 by those not taken."""
    values = ()
    for i in tl.static_range(len(statistics)):
        if SLOTS[i]:
            values += (statistics[i],)
    if SLOTS[len(statistics)]:
        values += (weight,)
    out = FORMULA(*values, *operands, *scalars)
    partials = ()
    for i in tl.static_range(len(statistics)):
        if SLOTS[i]:
            partials += (out[SLOTS[i]],)
        else:
            partials += (weight * 0.0,)
    return out[0], partials


@triton.jit
def label_of(labels, row, cols, ignore_index):
    """Whether the row's label counts, and the label's column, or one that can be read all the same."""
    label = tl.load(labels + row).to(tl.int64)
    kept = label != ignore_index
    fits = (label >= 0) & (label < cols)
    tl.device_assert(fits | (label == ignore_index), "a target is out of bounds: it is no class and not ignore_index")
    return kept, tl.where(fits, label, 0).to(tl.int32)


@triton.jit
def gradient_at(
    x, columns, mask, highest, log_total, entropy, factors, label, class_weights, shape,
    SLOTS: tl.constexpr, WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    softmax_factor, label_factor, uniform_factor, entropy_factor = factors
    x = transform(x, shape, CAPPED, SCALED)
    g = tl.where(columns == label, label_factor, 0.0).to(x.dtype)
    if SLOTS[4]:
        log_p = (x - highest) - log_total
        g += exp(log_p) * (softmax_factor - entropy_factor * (tl.maximum(log_p, LOWEST) + entropy))
    elif SLOTS[1] or SLOTS[2] or SLOTS[3]:
        g += exp((x - highest) - log_total) * softmax_factor
    if SLOTS[2]:
        if WEIGHTED:
            g += uniform_factor * load_zeros(class_weights + columns, mask).to(x.dtype)
        else:
            g += uniform_factor
    if CAPPED:
        slope = x / (shape[0] * shape[1])  # tanh(logit / softcap)
        g *= 1.0 - slope * slope
    return g


@triton.jit
def write_gradient(
    logits, grad, start, cols, highest, log_total, entropy, factors, place, class_weights, shape,
    SLOTS: tl.constexpr, WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr, EDGE: tl.constexpr,
    COMPUTE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    head, vectors = span_of(start, cols, VEC, EDGE)
    first = (start + head) // VEC * VEC
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):  # all loads first, so that they travel together
            tiles += (tl.load(logits + first + (v + u * LANES) * VEC + tile, eviction_policy="evict_first").to(COMPUTE),)
        for u in tl.static_range(UNROLL):
            at = (v + u * LANES) * VEC + tile
            g = gradient_at(
                tiles[u], at, None, highest, log_total, entropy, factors, place - head, class_weights + head, shape,
                SLOTS, WEIGHTED, CAPPED, SCALED,
            )  # fmt: skip
            tl.store(grad + first + at, g.to(grad.dtype.element_ty), eviction_policy="evict_first")
    for v in range(unmasked, vectors, LANES):
        mask = (v + lanes < vectors)[:, None]
        at = v * VEC + tile
        x = tl.load(logits + first + at, mask=mask, other=0.0, eviction_policy="evict_first").to(COMPUTE)
        g = gradient_at(
            x, at, mask & (at >= 0), highest, log_total, entropy, factors, place - head, class_weights + head, shape,
            SLOTS, WEIGHTED, CAPPED, SCALED,
        )  # fmt: skip
        tl.store(grad + first + at, g.to(grad.dtype.element_ty), mask=mask, eviction_policy="evict_first")
    if EDGE:
        columns, exists = edge_of(head, vectors, cols, VEC)
        x = tl.load(logits + start + columns, mask=exists, other=0.0).to(COMPUTE)
        g = gradient_at(
            x, columns, exists, highest, log_total, entropy, factors, place, class_weights, shape, SLOTS, WEIGHTED, CAPPED, SCALED
        )
        tl.store(grad + start + columns, g.to(grad.dtype.element_ty), mask=exists)


@triton.jit
def write_zeros(grad, start, cols, EDGE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr):
    head, vectors = span_of(start, cols, VEC, EDGE)
    first = (start + head) // VEC * VEC
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    for v in range(0, vectors, LANES):
        tl.store(grad + first + v * VEC + tile, tl.zeros((LANES, VEC), grad.dtype.element_ty), mask=(v + lanes < vectors)[:, None])
    if EDGE:
        columns, exists = edge_of(head, vectors, cols, VEC)
        tl.store(grad + start + columns, tl.zeros((2 * VEC,), grad.dtype.element_ty), mask=exists)


def name_of_pass(spec):
    forward, backward = (bool(spec.constants[name]) for name in ("FORWARD", "BACKWARD"))
    return name_of(f"label_rows_{'both' if forward and backward else 'forward' if forward else 'backward'}")(spec)


@triton.jit(repr=name_of_pass, debug=True, do_not_specialize=["rows", "ignore_index", "upstream_stride"])
def rows_kernel(
    logits,  # (rows, cols), row r at r * stride
    labels,  # (rows,)
    class_weights,  # (cols,) where WEIGHTED
    mean_weight,  # () where WEIGHTED
    operands,  # pointers to (rows,)
    losses,  # (2, rows): losses and weights; written where FORWARD
    saved,  # (4, rows): max, log Σ exp(x - max), mean_log_p where the formula takes it, entropy where ENTROPY; written where FORWARD, else read
    grad,  # (rows, cols), row r at r * stride; may be logits: each element is read, then written, by one thread
    upstream,  # of row r at r * upstream_stride
    denominator,  # () where MEAN
    rows, cols, stride, upstream_stride, ignore_index, scalars, shape,
    FORMULA: tl.constexpr, SLOTS: tl.constexpr, ENTROPY: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr, MEAN: tl.constexpr,
    WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr, EDGE: tl.constexpr, COMPUTE: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    SOFTMAX: tl.constexpr = SLOTS[1] or SLOTS[2] or SLOTS[3] or SLOTS[4]
    row = tl.program_id(0).to(tl.int64)
    rows = rows.to(tl.int64)
    start = row * stride
    shape = exact(shape, COMPUTE)
    kept, place = label_of(labels, row, cols, ignore_index)
    loss = tl.zeros((), COMPUTE)
    weight = tl.zeros((), COMPUTE)
    highest = tl.zeros((), COMPUTE)
    log_total = tl.zeros((), COMPUTE)
    mean_log_p = tl.zeros((), COMPUTE)
    entropy = tl.zeros((), COMPUTE)
    if kept:
        picked = transform(tl.load(logits + start + place).to(COMPUTE), shape, CAPPED, SCALED)
        weight += tl.load(class_weights + place).to(COMPUTE) if WEIGHTED else 1.0
        if SOFTMAX and FORWARD:
            pivot = tl.where(tl.abs(picked) < float("inf"), picked, 0.0).to(COMPUTE)
            highest, log_total, spread, entropy = row_statistics(
                logits, start, cols, pivot, class_weights, shape, SLOTS[2] > 0, ENTROPY, WEIGHTED, CAPPED, SCALED,
                "evict_last" if BACKWARD else "evict_first", EDGE, COMPUTE, VEC, LANES, UNROLL,
            )  # fmt: skip
            if SLOTS[2]:
                rest = pivot - highest - log_total
                if WEIGHTED:
                    rest *= tl.load(mean_weight).to(COMPUTE)
                mean_log_p = spread / cols + rest
        elif SOFTMAX:
            highest += tl.load(saved + row)
            log_total += tl.load(saved + rows + row)
            if SLOTS[2]:
                mean_log_p += tl.load(saved + 2 * rows + row)
            if ENTROPY:
                entropy += tl.load(saved + 3 * rows + row)
        values = ()
        for i in tl.static_range(len(operands)):
            values += (tl.load(operands[i] + row).to(COMPUTE),)
        statistics = (picked, (picked - highest) - log_total, mean_log_p, highest + log_total, entropy)
        read, partials = read_formula(FORMULA, SLOTS, statistics, weight, values, exact(scalars, COMPUTE))
        loss += read
        if BACKWARD:
            factor = tl.load(upstream + row * upstream_stride).to(COMPUTE)
            if MEAN:
                factor = factor / tl.load(denominator)
            if SCALED:
                factor *= shape[1]
            d_picked, d_log_p, d_mean_log_p, d_lse, d_entropy = partials
            softmax_factor = d_lse - d_log_p
            if SLOTS[2]:
                softmax_factor -= d_mean_log_p * (tl.load(mean_weight).to(COMPUTE) if WEIGHTED else 1.0)
            factors = (softmax_factor * factor, (d_log_p + d_picked) * factor, d_mean_log_p * factor / cols, d_entropy * factor)
            write_gradient(
                logits, grad, start, cols, highest, log_total, entropy, factors, place, class_weights, shape,
                SLOTS, WEIGHTED, CAPPED, SCALED, EDGE, COMPUTE, VEC, LANES, UNROLL,
            )  # fmt: skip
    elif BACKWARD:
        write_zeros(grad, start, cols, EDGE, VEC, LANES)
    if FORWARD:  # every program writes every output
        tl.store(losses + row, loss.to(losses.dtype.element_ty))
        tl.store(losses + rows + row, weight.to(losses.dtype.element_ty))
        if SOFTMAX:
            tl.store(saved + row, highest)
            tl.store(saved + rows + row, log_total)
        if SLOTS[2]:
            tl.store(saved + 2 * rows + row, mean_log_p)
        if ENTROPY:
            tl.store(saved + 3 * rows + row, entropy)


def launch(
    logits, labels, class_weights, formula, scalars, ignore_index, softcap, scale, slots, saved, losses, grad, upstream, denominator, operands, entropy
):  # fmt: skip
    """One pass over the rows: forward where there are losses to write, backward where there is a gradient, both where both."""
    rows, cols = logits.shape
    stride = logits.stride(0) if rows > 1 else cols
    wide = compute_dtype(logits.dtype)
    vec = 16 // logits.element_size()
    weighted = class_weights is not None
    rows_launch(
        logits=logits, labels=labels.contiguous(), class_weights=class_weights.contiguous() if weighted else logits,
        mean_weight=class_weights.to(wide).mean() if weighted else logits, operands=tuple(operands),
        losses=saved if losses is None else losses, saved=saved, grad=logits if grad is None else grad,
        upstream=saved if upstream is None else upstream, denominator=saved if denominator is None else denominator,
        rows=rows, cols=cols, stride=stride, upstream_stride=upstream.stride(0) if upstream is not None and upstream.dim() else 0,
        ignore_index=ignore_index, scalars=as_scalars(scalars, wide), shape=as_scalars((softcap, scale), wide),
        FORMULA=formula.kernel, SLOTS=slots, ENTROPY=entropy or slots[4] > 0, FORWARD=losses is not None, BACKWARD=grad is not None, MEAN=denominator is not None,
        WEIGHTED=weighted, CAPPED=softcap > 0, SCALED=scale != 1, EDGE=cols % vec != 0 or stride % vec != 0,
        COMPUTE=triton_type(wide), VEC=vec,
    )  # fmt: skip


SAMPLE_BYTES = 256 << 20  # a launch is measured on at most this much


def key(args):
    x = args["logits"]
    flags = tuple(args[name] for name in ("ENTROPY", "FORWARD", "BACKWARD", "WEIGHTED", "CAPPED", "SCALED", "EDGE"))
    return args["FORMULA"].__name__, args["cols"], str(x.dtype), *flags, x.data_ptr() % 16 == 0


def sample(args):
    most = max(SAMPLE_BYTES // max(args["stride"] * args["logits"].element_size(), 1), 1)
    rows = min(args["rows"], most)
    return {**args, "rows": rows, "grad": args["grad"][:rows]}


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


rows_launch = Tuned(rows_kernel, configs=configs, rule=rule, key=key, programs=programs, sample=sample, written=("grad",))
