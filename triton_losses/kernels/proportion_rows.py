"""The kernels of families/proportion_rows.py, and how they are launched. One program is one row.

Rows are walked as in distribution_rows.py, in vectors of 16 bytes; what does not fill one is a tile of its own, the edge.
"""

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.device_math import as_scalars, exact, load_zeros
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.distribution_rows import edge_tile
from triton_losses.kernels.elementwise import name_of, triton_type
from triton_losses.kernels.label_rows import label_of
from triton_losses.kernels.rows import configs, programs, rule, span_of


@triton.jit
def sum_of_row(
    x, start, cols, EDGE: tl.constexpr, COMPUTE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    head, vectors = span_of(start, cols, VEC, EDGE)
    first = x + (start + head) // VEC * VEC  # says that it is aligned
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    total = tl.zeros((LANES, VEC), COMPUTE)  # Triton 3.7 fails on sums of a loop's tiles that are added one after another
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):  # all loads first, so that they travel together
            tiles += (tl.load(first + (v + u * LANES) * VEC + tile, eviction_policy="evict_last").to(COMPUTE),)
        for u in tl.static_range(UNROLL):
            total += tiles[u]
    for v in range(unmasked, vectors, LANES):
        total += tl.load(first + v * VEC + tile, mask=(v + lanes < vectors)[:, None], other=0.0).to(COMPUTE)
    if EDGE:
        columns, exists = edge_tile(head, vectors, cols, LANES, VEC)
        total += tl.load(x + start + columns, mask=exists, other=0.0).to(COMPUTE)
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit
def add_tile(totals, y, x, exists, inverse, scalars, FORMULA: tl.constexpr, COMPUTE: tl.constexpr):
    """Add f and p ∂f/∂p of one tile to each lane's sums."""
    p = load_zeros(x, exists).to(COMPUTE) * inverse
    out = FORMULA(load_zeros(y, exists).to(COMPUTE), p, *scalars)
    f = out[0]
    moved = p * out[2]
    if exists is not None:
        f = tl.where(exists, f, 0.0)
        moved = tl.where(exists, moved, 0.0)
    return totals[0] + tl.sum(f, 1), totals[1] + tl.sum(moved, 1)


@triton.jit
def sums_of_pair(
    y, x, start_y, start_x, cols, inverse, scalars, FORMULA: tl.constexpr, EDGE: tl.constexpr, COMPUTE: tl.constexpr, VEC: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Σ f and Σ p ∂f/∂p of a row and its target."""
    head, vectors = span_of(start_x, cols, VEC, EDGE)
    first_y = y + (start_y + head) // VEC * VEC  # says that it is aligned
    first_x = x + (start_x + head) // VEC * VEC
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    totals = (tl.zeros((LANES,), COMPUTE), tl.zeros((LANES,), COMPUTE))
    unmasked = vectors // LANES * LANES
    for v in range(0, unmasked, LANES):
        totals = add_tile(totals, first_y + v * VEC + tile, first_x + v * VEC + tile, None, inverse, scalars, FORMULA, COMPUTE)
    for v in range(unmasked, vectors, LANES):
        exists = (v + lanes < vectors)[:, None]
        totals = add_tile(totals, first_y + v * VEC + tile, first_x + v * VEC + tile, exists, inverse, scalars, FORMULA, COMPUTE)
    if EDGE:
        columns, exists = edge_tile(head, vectors, cols, LANES, VEC)
        totals = add_tile(totals, y + start_y + columns, x + start_x + columns, exists, inverse, scalars, FORMULA, COMPUTE)
    return tl.sum(totals[0], 0), tl.sum(totals[1], 0)


@triton.jit(repr=name_of("proportion_rows_forward"), debug=True, do_not_specialize=["rows", "ignore_index"])
def forward_kernel(
    x,  # (rows, cols), row r at r * stride_x
    y,  # (rows, cols), row r at r * stride_y; labels (rows,) where LABELLED
    losses,  # (2, rows): losses, and 1 for each row that counts
    saved,  # (2, rows): Σ x, Σ p ∂f/∂p
    rows, cols, stride_x, stride_y, ignore_index, scalars,
    FORMULA: tl.constexpr, LABELLED: tl.constexpr, EDGE: tl.constexpr, COMPUTE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rows = tl.cast(rows, tl.int64)
    values = exact(scalars, COMPUTE)
    start = row * stride_x
    total = sum_of_row(x, start, cols, EDGE, COMPUTE, VEC, LANES, UNROLL)
    counts = tl.full((), 1.0, COMPUTE)
    if LABELLED:
        kept, place = label_of(y, row, cols, ignore_index)
        p = tl.load(x + start + place).to(COMPUTE) / total
        out = FORMULA(counts, p, *values)
        loss = tl.where(kept, out[0], 0.0)
        moved = p * out[2]
        counts = tl.where(kept, counts, 0.0)
    else:
        loss, moved = sums_of_pair(y, x, row * stride_y, start, cols, 1.0 / total, values, FORMULA, EDGE, COMPUTE, VEC, LANES)
    tl.store(losses + row, loss.to(losses.dtype.element_ty))
    tl.store(losses + rows + row, counts.to(losses.dtype.element_ty))
    tl.store(saved + row, total)
    tl.store(saved + rows + row, moved)


@triton.jit
def store_gradients(
    y, x, grad_y, grad_x, exists, columns, place, rowwise, scalars,
    FORMULA: tl.constexpr, LABELLED: tl.constexpr, WANT_Y: tl.constexpr, WANT_X: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one tile."""
    inverse, moved, at_label, upstream = rowwise
    if LABELLED:
        g = tl.where(columns == place, at_label - moved, -moved) * (upstream * inverse)
        tl.store(grad_x, g.to(grad_x.dtype.element_ty), mask=exists, eviction_policy="evict_first")
    else:
        out = FORMULA(load_zeros(y, exists).to(COMPUTE), load_zeros(x, exists).to(COMPUTE) * inverse, *scalars)
        if WANT_X:
            g = (out[2] - moved) * (upstream * inverse)
            tl.store(grad_x, g.to(grad_x.dtype.element_ty), mask=exists, eviction_policy="evict_first")
        if WANT_Y:
            tl.store(grad_y, (out[1] * upstream).to(grad_y.dtype.element_ty), mask=exists, eviction_policy="evict_first")


@triton.jit(repr=name_of("proportion_rows_backward"), debug=True, do_not_specialize=["rows", "ignore_index", "dout_stride"])
def backward_kernel(
    x,  # (rows, cols), row r at r * stride_x
    y,  # (rows, cols), row r at r * stride_y; labels (rows,) where LABELLED
    saved,  # (2, rows): Σ x, Σ p ∂f/∂p
    grad_x, grad_y,  # as x and y, those that are wanted
    dout,  # of row r at r * dout_stride
    denominator,  # () where MEAN
    rows, cols, stride_x, stride_y, dout_stride, ignore_index, scalars,
    FORMULA: tl.constexpr, LABELLED: tl.constexpr, MEAN: tl.constexpr, WANT_X: tl.constexpr, WANT_Y: tl.constexpr, EDGE: tl.constexpr,
    COMPUTE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rows = tl.cast(rows, tl.int64)
    values = exact(scalars, COMPUTE)
    start_x = row * stride_x
    upstream = tl.load(dout + row * dout_stride).to(COMPUTE)
    if MEAN:
        upstream = upstream / tl.load(denominator)
    inverse = 1.0 / tl.load(saved + row)
    moved = tl.load(saved + rows + row)
    if LABELLED:
        start_y = start_x  # y holds labels: nobody reads a row of it
        kept, place = label_of(y, row, cols, ignore_index)
        at_label = FORMULA(tl.full((), 1.0, COMPUTE), tl.load(x + start_x + place).to(COMPUTE) * inverse, *values)[2]
        inverse = tl.where(kept, inverse, 0.0)
        moved = tl.where(kept, moved, 0.0)
        at_label = tl.where(kept, at_label, 0.0)
    else:
        start_y = row * stride_y
        place = 0
        at_label = moved
    rowwise = (inverse, moved, at_label, upstream)
    head, vectors = span_of(start_x, cols, VEC, EDGE)
    first_x = (start_x + head) // VEC * VEC  # says that it is aligned
    first_y = (start_y + head) // VEC * VEC
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        for u in tl.static_range(UNROLL):
            at = (v + u * LANES) * VEC + tile
            store_gradients(
                y + first_y + at, x + first_x + at, grad_y + first_y + at, grad_x + first_x + at, None, at, place - head, rowwise, values,
                FORMULA, LABELLED, WANT_Y, WANT_X, COMPUTE,
            )  # fmt: skip
    for v in range(unmasked, vectors, LANES):
        at = v * VEC + tile
        store_gradients(
            y + first_y + at, x + first_x + at, grad_y + first_y + at, grad_x + first_x + at, (v + lanes < vectors)[:, None], at,
            place - head, rowwise, values, FORMULA, LABELLED, WANT_Y, WANT_X, COMPUTE,
        )  # fmt: skip
    if EDGE:
        at, exists = edge_tile(head, vectors, cols, LANES, VEC)
        store_gradients(
            y + start_y + at, x + start_x + at, grad_y + start_y + at, grad_x + start_x + at, exists, at, place, rowwise, values,
            FORMULA, LABELLED, WANT_Y, WANT_X, COMPUTE,
        )  # fmt: skip


def row_arguments(x, y, saved, formula, scalars, ignore_index):
    """What both kernels take."""
    rows, cols = x.shape
    labelled = not y.is_floating_point()
    strides = [t.stride(0) if rows > 1 else cols for t in ((x,) if labelled else (x, y))]
    wide, vec = compute_dtype(x.dtype), 16 // x.element_size()
    if not labelled:
        wide, vec = compute_dtype(torch.promote_types(x.dtype, y.dtype)), 16 // min(x.element_size(), y.element_size())
    return dict(
        x=x, y=y, saved=saved, rows=rows, cols=cols, stride_x=strides[0], stride_y=strides[-1], ignore_index=ignore_index,
        scalars=as_scalars(scalars, wide), FORMULA=formula.kernel, LABELLED=labelled, EDGE=any(size % vec for size in (cols, *strides)),
        COMPUTE=triton_type(wide), VEC=vec,
    )  # fmt: skip


def key(args):
    rows = args["x"], args["y"]
    aligned = all(t.data_ptr() % 16 == 0 for t in rows)
    flags = tuple(args.get(name) for name in ("cols", "LABELLED", "EDGE", "WANT_X", "WANT_Y"))
    return (args["FORMULA"].__name__, *(str(t.dtype) for t in rows), *flags, aligned)


SAMPLE_BYTES = 256 << 20  # a launch is measured on at most this much


def sample(args):
    return {**args, "rows": min(args["rows"], max(SAMPLE_BYTES // max(args["stride_x"] * args["x"].element_size(), 1), 1))}


forward_launch = Tuned(forward_kernel, configs=configs, rule=rule, key=key, programs=programs, sample=sample)
backward_launch = Tuned(backward_kernel, configs=configs, rule=rule, key=key, programs=programs, sample=sample)
