"""The kernel of families/label_rows.py, and how it is launched. One program is one row."""

import triton
import triton.language as tl

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.device_math import as_scalars, exact, exp, load_zeros
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import name_of, triton_type
from triton_losses.kernels.rows import LOWEST, configs, edge_of, programs, row_statistics, rule, span_of, transform, write_zeros


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
def factors_of(partials, upstream, mean_weight, cols, SLOTS: tl.constexpr, WEIGHTED: tl.constexpr):
    """What a row's gradient is made of: of its softmax, at its label, in every column, and by its entropy."""
    d_picked, d_log_p, d_mean_log_p, d_lse, d_entropy = partials
    softmax_factor = d_lse - d_log_p
    if SLOTS[2]:
        softmax_factor -= d_mean_log_p * (tl.load(mean_weight).to(upstream.dtype) if WEIGHTED else 1.0)
    return softmax_factor * upstream, (d_log_p + d_picked) * upstream, d_mean_log_p * upstream / cols, d_entropy * upstream


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
    likeliest,  # (rows,) where LIKELIEST: the first of the highest columns, -1 where ignored; written where FORWARD
    grad,  # (rows, cols), row r at r * stride; may be logits: each element is read, then written, by one thread
    upstream,  # of row r at r * upstream_stride
    denominator,  # () where MEAN
    rows, cols, stride, upstream_stride, ignore_index, scalars, shape,
    FORMULA: tl.constexpr, SLOTS: tl.constexpr, ENTROPY: tl.constexpr, LIKELIEST: tl.constexpr, FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr, MEAN: tl.constexpr, WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr, EDGE: tl.constexpr, COMPUTE: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    SOFTMAX: tl.constexpr = SLOTS[1] or SLOTS[2] or SLOTS[3] or SLOTS[4]
    row = tl.program_id(0).to(tl.int64)
    rows = tl.cast(rows, tl.int64)
    start = row * stride
    shape = exact(shape, COMPUTE)
    kept, place = label_of(labels, row, cols, ignore_index)
    loss = tl.zeros((), COMPUTE)
    weight = tl.zeros((), COMPUTE)
    highest = tl.zeros((), COMPUTE)
    log_total = tl.zeros((), COMPUTE)
    mean_log_p = tl.zeros((), COMPUTE)
    entropy = tl.zeros((), COMPUTE)
    best = tl.full((), -1, tl.int32)
    if kept:
        picked = transform(tl.load(logits + start + place).to(COMPUTE), shape, CAPPED, SCALED)
        weight += tl.load(class_weights + place).to(COMPUTE) if WEIGHTED else 1.0
        if SOFTMAX and FORWARD:
            pivot = tl.where(tl.abs(picked) < float("inf"), picked, 0.0).to(COMPUTE)
            highest, log_total, spread, entropy, best = row_statistics(
                logits, start, cols, pivot, class_weights, shape, SLOTS[2] > 0, ENTROPY, LIKELIEST, WEIGHTED, CAPPED, SCALED,
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
            factors = factors_of(partials, factor, mean_weight, cols, SLOTS, WEIGHTED)
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
        if LIKELIEST:
            tl.store(likeliest + row, best.to(likeliest.dtype.element_ty))


def launch(
    logits, labels, class_weights, formula, scalars, ignore_index, softcap, scale, slots, saved, losses, likeliest, grad, upstream,
    denominator, operands, entropy,
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
        losses=saved if losses is None else losses, saved=saved, likeliest=labels if likeliest is None else likeliest, grad=logits if grad is None else grad,
        upstream=saved if upstream is None else upstream, denominator=saved if denominator is None else denominator,
        rows=rows, cols=cols, stride=stride, upstream_stride=upstream.stride(0) if upstream is not None and upstream.dim() else 0,
        ignore_index=ignore_index, scalars=as_scalars(scalars, wide), shape=as_scalars((softcap, scale), wide),
        FORMULA=formula.kernel, SLOTS=slots, ENTROPY=entropy or slots[4] > 0, LIKELIEST=likeliest is not None, FORWARD=losses is not None,
        BACKWARD=grad is not None, MEAN=denominator is not None, WEIGHTED=weighted, CAPPED=softcap > 0, SCALED=scale != 1, EDGE=cols % vec != 0 or stride % vec != 0,
        COMPUTE=triton_type(wide), VEC=vec,
    )  # fmt: skip


SAMPLE_BYTES = 256 << 20  # a launch is measured on at most this much


def key(args):
    x = args["logits"]
    flags = tuple(args[name] for name in ("ENTROPY", "LIKELIEST", "FORWARD", "BACKWARD", "WEIGHTED", "CAPPED", "SCALED", "EDGE"))
    return args["FORMULA"].__name__, args["cols"], str(x.dtype), *flags, x.data_ptr() % 16 == 0


def sample(args):
    most = max(SAMPLE_BYTES // max(args["stride"] * args["logits"].element_size(), 1), 1)
    rows = min(args["rows"], most)
    return {**args, "rows": rows, "grad": args["grad"][:rows]}


rows_launch = Tuned(rows_kernel, configs=configs, rule=rule, key=key, programs=programs, sample=sample, written=("grad",))
