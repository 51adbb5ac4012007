"""Similarity rows by kernels. A program reads one tile of a chunk's products.

statistics   writes the statistics of the tile's rows and of its columns; `merge` adds up the tiles', in a fixed
             order: those of a row, and to those that a column has of earlier chunks
gradient     writes the tile of G, in the type of the features
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.device_math import as_scalars, exact, exp, sigmoid, softplus
from triton_losses.core.plan import planned
from triton_losses.core.similarities import Sides
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import triton_type
from triton_losses.kernels.rows import LOWEST

# rows and columns of a tile, few enough for registers; what it writes of its columns is 6% of what it reads
HEIGHTS = {"statistics": 32, "gradient": 16}
WIDTH = 128
LANES = 128


class Kind(NamedTuple):
    """Compile-time parameters of the kernels."""

    compute: tl.dtype
    sets: tuple
    columns: bool  # columns have statistics
    same: bool  # b is a: columns have those of rows
    ids: bool
    apart: bool
    sums: bool
    spread: bool
    signed: bool
    biased: bool
    normalized: bool
    totals: bool = False  # the gradient's rows are added up, for that of the bias


@triton.jit
def tile_of(products, sides, start, rows, cols, stride, offset, ignored, KIND: tl.constexpr, SHAPE: tl.constexpr):
    """Similarities of a tile, which of them count, which are of positives; its rows, among all rows, and columns."""
    scale, bias, row_scales, column_scales, row_ids, column_ids = sides
    across = tl.cdiv(cols, SHAPE[1])
    program = tl.program_id(0)
    down = tl.arange(0, SHAPE[0])
    first = program // across * SHAPE[0]
    row = first + down
    column = program % across * SHAPE[1] + tl.arange(0, SHAPE[1])
    mask = (row < rows)[:, None] & (column < cols)[None, :]
    at = start + row
    tile = products + first.to(tl.int64) * stride + (down[:, None] * stride + column[None, :])
    x = tl.load(tile, mask=mask, other=0.0).to(KIND.compute)
    factor = tl.load(scale).to(KIND.compute)
    if KIND.normalized:
        x *= (factor * tl.load(row_scales + at, mask=row < rows, other=0.0))[:, None]
        x *= tl.load(column_scales + column, mask=column < cols, other=0.0)[None, :]
    else:
        x *= factor
    if KIND.biased:
        x += tl.load(bias).to(KIND.compute)
    own = at[:, None] + offset == column[None, :]
    counts = mask
    match = own & mask
    if KIND.ids:
        of_row = tl.load(row_ids + at, mask=row < rows, other=ignored)
        of_column = tl.load(column_ids + column, mask=column < cols, other=ignored)
        counts = (of_row != ignored)[:, None] & (of_column != ignored)[None, :]
        match = (of_row[:, None] == of_column[None, :]) & counts
    if KIND.apart:
        counts = counts & (own == 0)
        match = match & counts
    return x, counts, match, row, column


@triton.jit
def within(x, counts, match, SET: tl.constexpr):
    """x, with -inf outside the set."""
    if SET == 1:
        counts = counts & (match == 0)
    if SET == 2:
        counts = match
    return tl.where(counts, x, -float("inf"))


@triton.jit(repr=lambda spec: "similarity_statistics", do_not_specialize=["offset", "ignored"])
def statistics_kernel(
    products,  # (rows, cols), rows ``stride`` apart
    scale,  # ()
    bias,  # () if biased
    row_scales,  # (all rows,) if normalized
    column_scales,  # (cols,)
    row_ids,  # (all rows,) if ids
    column_ids,  # (cols,)
    of_rows,  # (tiles across, least, rows)
    of_columns,  # (tiles down, 4, cols) if columns
    start: tl.int64,  # of the chunk, among all rows
    rows: tl.int64,
    cols,
    stride,
    offset,
    ignored,
    factors,
    KIND: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sides = scale, bias, row_scales, column_scales, row_ids, column_ids
    x, counts, match, row, column = tile_of(
        products, sides, start, rows, cols, stride, offset, ignored, KIND, (HEIGHT, WIDTH)
    )
    across = tl.cdiv(cols, WIDTH)
    program = tl.program_id(0)
    SETS: tl.constexpr = len(KIND.sets)
    each = exact(factors, KIND.compute)
    own = of_rows + (program % across).to(tl.int64) * (2 * SETS + 3) * rows + row
    there = row < rows
    for k in tl.static_range(SETS):
        y = within(x * each[k], counts, match, KIND.sets[k])
        top = tl.maximum(tl.max(y, 1), LOWEST).to(KIND.compute)
        tl.store(own + k * rows, tl.sum(exp(y - top[:, None]), 1), mask=there)
        tl.store(own + (SETS + k) * rows, top, mask=there)
    zeros = tl.zeros((HEIGHT,), KIND.compute)
    of_positives, of_all, of_signed = zeros, zeros, zeros
    if KIND.sums:
        of_positives = tl.sum(tl.where(match, x, 0.0), 1)
    if KIND.spread:
        of_all = tl.sum(tl.where(counts, x, 0.0), 1)
    if KIND.signed:
        of_signed = tl.sum(tl.where(counts, softplus(tl.where(match, -x, x)), 0.0), 1)
    tl.store(own + 2 * SETS * rows, of_positives, mask=there)
    tl.store(own + (2 * SETS + 1) * rows, of_all, mask=there)
    tl.store(own + (2 * SETS + 2) * rows, of_signed, mask=there)
    if KIND.columns:
        beside = of_columns + (program // across).to(tl.int64) * 4 * cols + column
        there = column < cols
        y = within(x, counts, match, 0)
        top = tl.maximum(tl.max(y, 0), LOWEST).to(KIND.compute)
        tl.store(beside, tl.sum(exp(y - top[None, :]), 0), mask=there)
        tl.store(beside + cols, top, mask=there)
        zeros = tl.zeros((WIDTH,), KIND.compute)
        of_positives, of_all = zeros, zeros
        if KIND.sums:
            of_positives = tl.sum(tl.where(match, x, 0.0), 0)
        if KIND.spread:
            of_all = tl.sum(tl.where(counts, x, 0.0), 0)
        tl.store(beside + 2 * cols, of_positives, mask=there)
        tl.store(beside + 3 * cols, of_all, mask=there)


@triton.jit(repr=lambda spec: "similarity_merge")
def merge_kernel(
    parts,  # (pieces, 2 · SETS + SUMS, n): totals of exponentials, their maxima, sums
    out,  # (2 · SETS + SUMS, length): what they are added to, from ``start`` on
    pieces: tl.int64,
    start: tl.int64,
    length: tl.int64,
    n: tl.int64,
    SETS: tl.constexpr,
    SUMS: tl.constexpr,
    LANES: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = lane < n
    step = (2 * SETS + SUMS) * n
    for k in tl.static_range(SETS):
        totals = parts + k * n + lane
        tops = parts + (SETS + k) * n + lane
        total = tl.load(out + k * length + start + lane, mask=mask, other=0.0)
        before = tl.load(out + (SETS + k) * length + start + lane, mask=mask, other=0.0)
        top = before
        for p in range(0, pieces):
            top = tl.maximum(top, tl.load(tops + p * step, mask=mask, other=0.0))
        total *= exp(before - top)
        for p in range(0, pieces):
            shrink = exp(tl.load(tops + p * step, mask=mask, other=0.0) - top)
            total += shrink * tl.load(totals + p * step, mask=mask, other=0.0)
        tl.store(out + k * length + start + lane, total, mask=mask)
        tl.store(out + (SETS + k) * length + start + lane, top, mask=mask)
    for k in tl.static_range(SUMS):
        place = out + (2 * SETS + k) * length + start + lane
        total = tl.load(place, mask=mask, other=0.0)
        for p in range(0, pieces):
            total += tl.load(parts + p * step + (2 * SETS + k) * n + lane, mask=mask, other=0.0)
        tl.store(place, total, mask=mask)


@triton.jit
def vector(slopes, k, length, at, mask):
    return tl.load(slopes + k * length + at, mask=mask, other=0.0)


@triton.jit(repr=lambda spec: "similarity_gradient", do_not_specialize=["offset", "ignored"])
def gradient_kernel(
    products,  # these seven as above
    scale,
    bias,
    row_scales,
    column_scales,
    row_ids,
    column_ids,
    row_slopes,  # (least, all rows): weights of the exponentials, their maxima, slopes of the sums
    column_slopes,  # (4, cols), or the rows' if same
    grad,  # (rows, cols), rows ``grad_stride`` apart
    totals,  # (tiles across, rows) if totals
    start: tl.int64,
    length: tl.int64,  # all rows
    rows: tl.int64,
    cols,
    stride,
    grad_stride,
    offset,
    ignored,
    factors,
    KIND: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sides = scale, bias, row_scales, column_scales, row_ids, column_ids
    x, counts, match, row, column = tile_of(
        products, sides, start, rows, cols, stride, offset, ignored, KIND, (HEIGHT, WIDTH)
    )
    SETS: tl.constexpr = len(KIND.sets)
    each = exact(factors, KIND.compute)
    at, there, beside = start + row, row < rows, column < cols
    g = tl.zeros((HEIGHT, WIDTH), KIND.compute)
    for k in tl.static_range(SETS):
        y = within(x * each[k], counts, match, KIND.sets[k])
        top = vector(row_slopes, SETS + k, length, at, there)
        g += exp(y - top[:, None]) * vector(row_slopes, k, length, at, there)[:, None]
        if KIND.same:
            top = vector(row_slopes, SETS + k, length, column, beside)
            g += exp(y - top[None, :]) * vector(row_slopes, k, length, column, beside)[None, :]
    if KIND.columns:
        y = within(x, counts, match, 0)
        top = vector(column_slopes, 1, cols, column, beside)
        g += exp(y - top[None, :]) * vector(column_slopes, 0, cols, column, beside)[None, :]
    if KIND.sums:
        slope = vector(row_slopes, 2 * SETS, length, at, there)[:, None]
        if KIND.same:
            slope += vector(row_slopes, 2 * SETS, length, column, beside)[None, :]
        elif KIND.columns:
            slope += vector(column_slopes, 2, cols, column, beside)[None, :]
        g += tl.where(match, slope, 0.0)
    if KIND.spread:
        slope = vector(row_slopes, 2 * SETS + 1, length, at, there)[:, None]
        if KIND.same:
            slope += vector(row_slopes, 2 * SETS + 1, length, column, beside)[None, :]
        elif KIND.columns:
            slope += vector(column_slopes, 3, cols, column, beside)[None, :]
        g += tl.where(counts, slope, 0.0)
    if KIND.signed:
        slope = vector(row_slopes, 2 * SETS + 2, length, at, there)[:, None]
        if KIND.same:
            slope += vector(row_slopes, 2 * SETS + 2, length, column, beside)[None, :]
        share = sigmoid(tl.where(match, -x, x))
        g += tl.where(counts, tl.where(match, -share, share), 0.0) * slope
    across = tl.cdiv(cols, WIDTH)
    if KIND.totals:
        tl.store(totals + (tl.program_id(0) % across) * rows + row, tl.sum(g, 1), mask=there)
    if KIND.normalized:
        g *= tl.load(row_scales + at, mask=there, other=0.0)[:, None]
        g *= tl.load(column_scales + column, mask=beside, other=0.0)[None, :]
    down = tl.arange(0, HEIGHT)
    first = (tl.program_id(0) // across * HEIGHT).to(tl.int64) * grad_stride
    tile = grad + first + (down[:, None] * grad_stride + column[None, :])
    tl.store(tile, g.to(grad.dtype.element_ty), mask=there[:, None] & beside[None, :])


def tiles(rows, fixed):
    return triton.cdiv(rows, fixed["HEIGHT"]) * triton.cdiv(fixed["cols"], WIDTH)


def height_of(kernel, dtype):
    return HEIGHTS[kernel] // 2 if dtype == torch.float64 else HEIGHTS[kernel]


def statistics_tile(args):
    return {"HEIGHT": height_of("statistics", args["of_rows"].dtype), "WIDTH": WIDTH, "num_warps": 8}


def gradient_tile(args):
    return {"HEIGHT": height_of("gradient", args["row_slopes"].dtype), "WIDTH": WIDTH, "num_warps": 8}


by_rule = {"configs": lambda args: [], "key": lambda args: ()}
statistics_launch = Tuned(statistics_kernel, rule=statistics_tile, programs=tiles, size="rows", **by_rule)
gradient_launch = Tuned(gradient_kernel, rule=gradient_tile, programs=tiles, size="rows", **by_rule)
merge_launch = Tuned(
    merge_kernel,
    rule=lambda args: {"LANES": LANES, "num_warps": 4},
    programs=lambda n, fixed: triton.cdiv(n, LANES),
    size="n",
    **by_rule,
)


def shape(products, part, sides, problem):
    """Nothing: the kernels read products."""


def kind_of(sides, problem, **more):
    return Kind(
        triton_type(compute_dtype(problem.dtype)),
        problem.sets,
        problem.columns,
        ids=sides.row_ids is not None and problem.positives == "ids",
        apart=problem.apart,
        sums=problem.sums,
        spread=problem.spread,
        signed=problem.signed,
        biased=sides.bias is not None,
        normalized=problem.normalize,
        **more,
    )


def shared(products, sides, problem):
    """Arguments of both kernels."""
    x = products
    return dict(zip(Sides._fields, (x if side is None else side for side in sides))) | {
        "products": x,
        "start": 0,
        "rows": len(x),
        "cols": x.shape[1],
        "stride": x.stride(0),
        "offset": problem.offset,
        "ignored": problem.ignore_index,
        "factors": as_scalars(problem.factors, x.dtype),
    }


@planned
def statistics_plan(tensors, problem):
    products, of_rows, of_columns, *sides = tensors
    sides = Sides(*sides)
    given = shared(products, sides, problem)
    return statistics_launch.bind(
        **given, of_rows=of_rows, of_columns=of_columns, KIND=kind_of(sides, problem, same=False)
    )


@planned
def merge_plan(tensors, sets, sums):
    parts, out = tensors
    return merge_launch.bind(parts=parts, out=out, pieces=1, start=0, length=1, n=1, SETS=sets, SUMS=sums)


@planned
def gradient_plan(tensors, problem, same, totals):
    products, row_slopes, column_slopes, grad, sums, *sides = tensors
    sides = Sides(*sides)
    return gradient_launch.bind(
        **shared(products, sides, problem),
        row_slopes=row_slopes,
        column_slopes=column_slopes,
        grad=grad,
        totals=sums,
        length=1,
        grad_stride=grad.stride(0),
        KIND=kind_of(sides, problem, same=same, totals=totals)._replace(columns=problem.columns and not same),
    )


def pointers(sides, products):
    return [products if side is None else side for side in sides]


def merged(parts, out, start, sets):
    """Add parts (pieces, statistics, n) to ``out`` (statistics, all), from ``start`` on."""
    pieces, statistics, n = parts.shape
    flat = parts.view(-1), out.view(-1)
    merge_plan(flat, sets, statistics - 2 * sets)(*flat, pieces, start, out.shape[1], n)


def statistics(products, part, sides, found, problem):
    """As in blocks. The chunk's rows start at part.start."""
    rows, columns = found
    count, cols = products.shape
    down, across = triton.cdiv(count, height_of("statistics", rows.dtype)), triton.cdiv(cols, WIDTH)
    of_rows = rows.new_empty(across, problem.least, count)
    of_columns = rows.new_empty(down if problem.columns else 0, 4, cols)
    flat = of_rows.view(-1), of_columns.view(-1) if problem.columns else of_rows.view(-1)
    launch = statistics_plan((products, *flat, *sides), problem)
    launch(products, *pointers(sides, products), *flat, part.start, count)
    merged(of_rows, rows, part.start, len(problem.sets))
    if problem.columns:
        merged(of_columns, columns, 0, 1)


def gradient(products, part, sides, slopes, made, problem):
    """As in blocks."""
    of_rows, of_columns = slopes
    grad, sums = made
    count, cols = products.shape
    same, totals = of_columns is of_rows, len(sums) > 0
    parts = of_rows.new_empty(triton.cdiv(cols, WIDTH) if totals else 0, count)
    flat = [of_rows.view(-1), of_rows.view(-1) if of_columns is None else of_columns.view(-1)]
    flat += [grad, parts.view(-1) if totals else of_rows.view(-1)]
    launch = gradient_plan((products, *flat, *sides), problem, same, totals)
    launch(products, *pointers(sides, products), *flat, part.start, of_rows.shape[1], count)
    if totals:
        sums[part] = parts.sum(0)
