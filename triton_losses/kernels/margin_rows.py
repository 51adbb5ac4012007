"""The kernels of families/margin_rows.py, and how they are launched. One program is one row.

A row is walked as in label_rows.py, in vectors of 16 bytes; what does not fill one is a tile of its own, the edge.
Of a set of labels, `members` marks the columns, so that nobody need search the set for each column.
"""

import triton
import triton.language as tl

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.device_math import as_scalars, exact, load_zeros
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.distribution_rows import edge_tile
from triton_losses.kernels.elementwise import name_of, triton_type
from triton_losses.kernels.rows import configs, programs, rule, span_of


@triton.jit
def place_of(labels, cols):
    """The label's column, or one that can be read all the same."""
    label = tl.load(labels)
    fits = (label >= 0) & (label < cols)
    tl.device_assert(fits, "a target is out of range: it is no class")
    return tl.where(fits, label, 0).to(tl.int32)


@triton.jit
def others_in(columns, exists, place, members, LISTED: tl.constexpr):
    """Which columns exist and are no label's."""
    if LISTED:
        others = load_zeros(members, exists) == 0
    else:
        others = columns != place
    return others if exists is None else others & exists


@triton.jit
def add_tile(totals, x, columns, exists, chosen, place, members, scalars, FORMULA: tl.constexpr, LISTED: tl.constexpr):
    """Add f and f' of one tile to each lane's sums."""
    out = FORMULA(x - chosen, *scalars)
    others = others_in(columns, exists, place, members, LISTED)
    return totals[0] + tl.sum(tl.where(others, out[0], 0.0), 1), totals[1] + tl.sum(tl.where(others, out[1], 0.0), 1)


@triton.jit
def sums_over_others(
    x, start, cols, place, members, scalars, FORMULA: tl.constexpr, LISTED: tl.constexpr, EDGE: tl.constexpr,
    COMPUTE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Of one label of a row: Σ f and Σ f' over the columns that are no label's."""
    head, vectors = span_of(start, cols, VEC, EDGE)
    first = x + (start + head) // VEC * VEC  # says that it is aligned
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    chosen = tl.load(x + start + place).to(COMPUTE)
    totals = (tl.zeros((LANES,), COMPUTE), tl.zeros((LANES,), COMPUTE))
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):  # all loads first, so that they travel together
            tiles += (tl.load(first + (v + u * LANES) * VEC + tile).to(COMPUTE),)
        for u in tl.static_range(UNROLL):
            at = (v + u * LANES) * VEC + tile
            totals = add_tile(totals, tiles[u], at, None, chosen, place - head, members + head + at, scalars, FORMULA, LISTED)
    for v in range(unmasked, vectors, LANES):
        exists = (v + lanes < vectors)[:, None]
        at = v * VEC + tile
        values = tl.load(first + at, mask=exists, other=0.0).to(COMPUTE)
        totals = add_tile(totals, values, at, exists & (at >= 0), chosen, place - head, members + head + at, scalars, FORMULA, LISTED)
    if EDGE:
        columns, exists = edge_tile(head, vectors, cols, LANES, VEC)
        values = tl.load(x + start + columns, mask=exists, other=0.0).to(COMPUTE)
        totals = add_tile(totals, values, columns, exists, chosen, place, members + columns, scalars, FORMULA, LISTED)
    return tl.sum(totals[0], 0), tl.sum(totals[1], 0)


@triton.jit
def factor_of(class_weights, place, cols, WEIGHTED: tl.constexpr, COMPUTE: tl.constexpr):
    """w / C of the label's class."""
    if WEIGHTED:
        return tl.load(class_weights + place).to(COMPUTE) / tl.cast(cols, COMPUTE)
    else:
        return 1.0 / tl.cast(cols, COMPUTE)


@triton.jit(repr=name_of("margin_rows_forward"), debug=True, do_not_specialize=["rows", "most"])
def forward_kernel(
    x,  # (rows, cols), row r at r * stride
    labels,  # (rows, most)
    counts,  # (rows,), how many of a row's labels count, where LISTED
    members,  # (rows, cols + 1), not 0 at the columns that are labels, where LISTED
    class_weights,  # (cols,) where WEIGHTED
    losses,  # (rows,)
    slopes,  # (rows, most): of each label that counts, Σ f' · w / C
    rows, cols, stride, most, scalars,
    FORMULA: tl.constexpr, LISTED: tl.constexpr, WEIGHTED: tl.constexpr, EDGE: tl.constexpr, COMPUTE: tl.constexpr,
    VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    values = exact(scalars, COMPUTE)
    labels += row * most
    slopes += row * most
    members += row * (cols + 1)
    count = 1
    if LISTED:
        count = tl.load(counts + row).to(tl.int32)
    loss = tl.zeros((), COMPUTE)
    for k in range(0, count):
        place = place_of(labels + k, cols)
        total, slope = sums_over_others(x, row * stride, cols, place, members, values, FORMULA, LISTED, EDGE, COMPUTE, VEC, LANES, UNROLL)
        factor = factor_of(class_weights, place, cols, WEIGHTED, COMPUTE)
        loss += total * factor
        tl.store(slopes + k, slope * factor)
    tl.store(losses + row, loss.to(losses.dtype.element_ty))


@triton.jit
def store_gradient(
    x, row, labels, slopes, class_weights, count, cols, columns, exists, shift, members, only, upstream, scalars, grad,
    FORMULA: tl.constexpr, LISTED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one tile x. only: the lone label's column, number, slope and w / C. shift: what a column is less by."""
    if LISTED:
        others = load_zeros(members, exists) == 0
        g = tl.zeros_like(x)
        for k in range(0, count):
            place = place_of(labels + k, cols)
            chosen = tl.load(row + place).to(x.dtype)
            d = FORMULA(x - chosen, *scalars)[1] * factor_of(class_weights, place, cols, WEIGHTED, x.dtype)
            g += tl.where(others, d, tl.where(columns == place - shift, -tl.load(slopes + k), 0.0))
    else:
        place, chosen, slope, factor = only
        g = tl.where(columns == place - shift, -slope, FORMULA(x - chosen, *scalars)[1] * factor)
    tl.store(grad, (g * upstream).to(grad.dtype.element_ty), mask=exists, eviction_policy="evict_first")


@triton.jit(repr=name_of("margin_rows_backward"), debug=True, do_not_specialize=["rows", "most", "dout_stride"])
def backward_kernel(
    x,  # (rows, cols), row r at r * stride
    labels,  # (rows, most)
    counts,  # (rows,), how many of a row's labels count, where LISTED
    members,  # (rows, cols + 1), not 0 at the columns that are labels, where LISTED
    class_weights,  # (cols,) where WEIGHTED
    slopes,  # (rows, most)
    grad,  # (rows, cols), row r at r * stride
    dout,  # of row r at r * dout_stride
    rows, cols, stride, most, dout_stride, scalars,
    FORMULA: tl.constexpr, LISTED: tl.constexpr, WEIGHTED: tl.constexpr, MEAN: tl.constexpr, EDGE: tl.constexpr,
    COMPUTE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    values = exact(scalars, COMPUTE)
    labels += row * most
    slopes += row * most
    members += row * (cols + 1)
    start = row * stride
    upstream = tl.load(dout + row * dout_stride).to(COMPUTE)
    if MEAN:
        upstream = upstream / tl.cast(rows, COMPUTE)
    if LISTED:
        count = tl.load(counts + row).to(tl.int32)
        only = ()
    else:
        count = 1
        place = place_of(labels, cols)
        only = (place, tl.load(x + start + place).to(COMPUTE), tl.load(slopes), factor_of(class_weights, place, cols, WEIGHTED, COMPUTE))
    head, vectors = span_of(start, cols, VEC, EDGE)
    first = (start + head) // VEC * VEC  # says that it is aligned
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):  # all loads first, so that they travel together
            tiles += (tl.load(x + first + (v + u * LANES) * VEC + tile, eviction_policy="evict_first").to(COMPUTE),)
        for u in tl.static_range(UNROLL):
            at = (v + u * LANES) * VEC + tile
            store_gradient(
                tiles[u], x + start, labels, slopes, class_weights, count, cols, at, None, head, members + head + at, only, upstream,
                values, grad + first + at, FORMULA, LISTED, WEIGHTED,
            )  # fmt: skip
    for v in range(unmasked, vectors, LANES):
        exists = (v + lanes < vectors)[:, None]
        at = v * VEC + tile
        loaded = tl.load(x + first + at, mask=exists, other=0.0, eviction_policy="evict_first").to(COMPUTE)
        store_gradient(
            loaded, x + start, labels, slopes, class_weights, count, cols, at, exists, head, members + head + at, only, upstream,
            values, grad + first + at, FORMULA, LISTED, WEIGHTED,
        )  # fmt: skip
    if EDGE:
        columns, exists = edge_tile(head, vectors, cols, LANES, VEC)
        loaded = tl.load(x + start + columns, mask=exists, other=0.0).to(COMPUTE)
        store_gradient(
            loaded, x + start, labels, slopes, class_weights, count, cols, columns, exists, 0, members + columns, only, upstream,
            values, grad + start + columns, FORMULA, LISTED, WEIGHTED,
        )  # fmt: skip


def row_arguments(x, labels, counts, members, class_weights, slopes, formula, scalars):
    """What both kernels take."""
    rows, cols = x.shape
    stride = x.stride(0) if rows > 1 else cols
    wide = compute_dtype(x.dtype)
    vec = 16 // x.element_size()
    return dict(
        x=x, labels=labels, counts=labels if counts is None else counts, members=labels if members is None else members,
        class_weights=x if class_weights is None else class_weights.contiguous(), slopes=slopes, rows=rows, cols=cols, stride=stride,
        most=labels.shape[1], scalars=as_scalars(scalars, wide), FORMULA=formula.kernel, LISTED=members is not None,
        WEIGHTED=class_weights is not None, EDGE=cols % vec != 0 or stride % vec != 0, COMPUTE=triton_type(wide), VEC=vec,
    )  # fmt: skip


def key(args):
    x = args["x"]
    flags = tuple(args[name] for name in ("LISTED", "WEIGHTED", "EDGE"))
    return args["FORMULA"].__name__, args["cols"], str(x.dtype), *flags, x.data_ptr() % 16 == 0


SAMPLE_BYTES = 256 << 20  # a launch is measured on at most this much


def sample(args):
    return {**args, "rows": min(args["rows"], max(SAMPLE_BYTES // max(args["stride"] * args["x"].element_size(), 1), 1))}


forward_launch = Tuned(forward_kernel, configs=configs, rule=rule, key=key, programs=programs, sample=sample)
backward_launch = Tuned(backward_kernel, configs=configs, rule=rule, key=key, programs=programs, sample=sample)
