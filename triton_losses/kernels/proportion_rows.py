"""Losses of rows of chances by kernels: one program is one row.

Rows are walked as in distribution_rows.py, in vectors of 16 bytes; what does not fill one is a tile of its own, the
edge.

What a forward leaves for its backward is one tensor, ``state``: runs of one number a row each. First, where the loss is
reduced, the losses, and, where there are labels, 1 for each row that counts; then Σ x and Σ p ∂f/∂p; at last, where
there are labels and a reduction, how many rows count.
"""

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import INTERPRET
from triton_losses.core.device_math import as_scalars, exact, load_zeros
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import planned
from triton_losses.core.reduction import widest
from triton_losses.core.rows import counted, readable
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.distribution_rows import VECTOR, readable_pair, room_for_gradient
from triton_losses.kernels.elementwise import name_of, triton_type
from triton_losses.kernels.finish import finish
from triton_losses.kernels.label_rows import label_of
from triton_losses.kernels.row_pairs import edge_tile
from triton_losses.kernels.rows import configs, rule, span_of

SAVED = 2  # numbers a row that the backward reads


@triton.jit
def sum_of_row(
    x,
    start,
    cols,
    EDGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    head, vectors = span_of(start, cols, VEC, EDGE)
    first = x + (start + head) // VEC * VEC  # says that it is aligned
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    # Triton 3.7 fails on sums of a loop's tiles that are added one after another
    total = tl.zeros((LANES, VEC), COMPUTE)
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
    y,
    x,
    start_y,
    start_x,
    cols,
    inverse,
    scalars,
    FORMULA: tl.constexpr,
    EDGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
):
    """Σ f and Σ p ∂f/∂p of a row and its target."""
    head, vectors = span_of(start_x, cols, VEC, EDGE)
    first_y = y + (start_y + head) // VEC * VEC  # says that it is aligned
    first_x = x + (start_x + head) // VEC * VEC
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    totals = (tl.zeros((LANES,), COMPUTE), tl.zeros((LANES,), COMPUTE))
    unmasked = vectors // LANES * LANES
    for v in range(0, unmasked, LANES):
        totals = add_tile(
            totals, first_y + v * VEC + tile, first_x + v * VEC + tile, None, inverse, scalars, FORMULA, COMPUTE
        )
    for v in range(unmasked, vectors, LANES):
        exists = (v + lanes < vectors)[:, None]
        totals = add_tile(
            totals, first_y + v * VEC + tile, first_x + v * VEC + tile, exists, inverse, scalars, FORMULA, COMPUTE
        )
    if EDGE:
        columns, exists = edge_tile(head, vectors, cols, LANES, VEC)
        totals = add_tile(
            totals, y + start_y + columns, x + start_x + columns, exists, inverse, scalars, FORMULA, COMPUTE
        )
    return tl.sum(totals[0], 0), tl.sum(totals[1], 0)


@triton.jit(
    repr=name_of("proportion_rows_forward"),
    debug=True,
    do_not_specialize=["rows", "ignore_index"],
    do_not_specialize_on_alignment=["losses", "state"],
)
def forward_kernel(
    x,  # (rows, cols), row r at r * stride_x
    y,  # (rows, cols), row r at r * stride_y; labels (rows,) where LABELLED
    losses,  # (rows,); where COUNTED (2, rows): losses, and 1 for each row that counts
    state,  # (AHEAD, rows) of other things, then (2, rows): Σ x, Σ p ∂f/∂p
    rows: tl.int64,
    cols,
    stride_x,
    stride_y,
    ignore_index,
    scalars,
    FORMULA: tl.constexpr,
    LABELLED: tl.constexpr,
    COUNTED: tl.constexpr,
    AHEAD: tl.constexpr,
    EDGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
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
        loss, moved = sums_of_pair(
            y, x, row * stride_y, start, cols, 1.0 / total, values, FORMULA, EDGE, COMPUTE, VEC, LANES
        )
    tl.store(losses + row, loss.to(losses.dtype.element_ty))
    if COUNTED:
        tl.store(losses + rows + row, counts.to(losses.dtype.element_ty))
    tl.store(state + AHEAD * rows + row, total)
    tl.store(state + (AHEAD + 1) * rows + row, moved)


@triton.jit
def store_gradients(
    y,
    x,
    grad_y,
    grad_x,
    exists,
    columns,
    place,
    rowwise,
    scalars,
    FORMULA: tl.constexpr,
    LABELLED: tl.constexpr,
    WANT_Y: tl.constexpr,
    WANT_X: tl.constexpr,
    COMPUTE: tl.constexpr,
):
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
            tl.store(
                grad_y, (out[1] * upstream).to(grad_y.dtype.element_ty), mask=exists, eviction_policy="evict_first"
            )


@triton.jit(
    repr=name_of("proportion_rows_backward"),
    debug=True,
    do_not_specialize=["rows", "ignore_index", "dout_stride"],
    do_not_specialize_on_alignment=["state", "dout"],
)
def backward_kernel(
    x,  # (rows, cols), row r at r * stride_x
    y,  # (rows, cols), row r at r * stride_y; labels (rows,) where LABELLED
    state,  # (AHEAD, rows) of other things, then (2, rows): Σ x, Σ p ∂f/∂p; where COUNTED then how many rows count
    grad_x,
    grad_y,  # as x and y, those that are wanted
    dout,  # of row r at r * dout_stride
    rows: tl.int64,
    cols,
    stride_x,
    stride_y,
    dout_stride,
    ignore_index,
    scalars,
    FORMULA: tl.constexpr,
    LABELLED: tl.constexpr,
    COUNTED: tl.constexpr,
    AHEAD: tl.constexpr,
    MEAN: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_Y: tl.constexpr,
    EDGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values = exact(scalars, COMPUTE)
    start_x = row * stride_x
    upstream = tl.load(dout + row * dout_stride).to(COMPUTE)
    if MEAN:
        upstream = upstream / (tl.load(state + (AHEAD + 2) * rows) if COUNTED else tl.cast(rows, COMPUTE))
    inverse = 1.0 / tl.load(state + AHEAD * rows + row)
    moved = tl.load(state + (AHEAD + 1) * rows + row)
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
                y + first_y + at,
                x + first_x + at,
                grad_y + first_y + at,
                grad_x + first_x + at,
                None,
                at,
                place - head,
                rowwise,
                values,
                FORMULA,
                LABELLED,
                WANT_Y,
                WANT_X,
                COMPUTE,
            )
    for v in range(unmasked, vectors, LANES):
        at = v * VEC + tile
        store_gradients(
            y + first_y + at,
            x + first_x + at,
            grad_y + first_y + at,
            grad_x + first_x + at,
            (v + lanes < vectors)[:, None],
            at,
            place - head,
            rowwise,
            values,
            FORMULA,
            LABELLED,
            WANT_Y,
            WANT_X,
            COMPUTE,
        )
    if EDGE:
        at, exists = edge_tile(head, vectors, cols, LANES, VEC)
        store_gradients(
            y + start_y + at,
            x + start_x + at,
            grad_y + start_y + at,
            grad_x + start_x + at,
            exists,
            at,
            place,
            rowwise,
            values,
            FORMULA,
            LABELLED,
            WANT_Y,
            WANT_X,
            COMPUTE,
        )


def key(args):
    rows = args["x"], args["y"]
    aligned = all(t.data_ptr() % 16 == 0 for t in rows)
    flags = tuple(args.get(name) for name in ("LABELLED", "EDGE", "WANT_X", "WANT_Y"))
    return (
        args["FORMULA"].__name__,
        triton.next_power_of_2(args["cols"]),
        *(str(t.dtype) for t in rows),
        *flags,
        aligned,
    )


SAMPLE_BYTES = 256 << 20  # a launch is measured on at most this much


def sample(args):
    return {
        **args,
        "rows": min(args["rows"], max(SAMPLE_BYTES // max(args["stride_x"] * args["x"].element_size(), 1), 1)),
    }


tuning = {
    "configs": configs,
    "rule": rule,
    "key": key,
    "programs": lambda rows, fixed: rows,
    "size": "rows",
    "sample": sample,
}
forward_launch = Tuned(forward_kernel, **tuning)
backward_launch = Tuned(backward_kernel, **tuning)


def arranged(x, y):
    """As the kernels walk them."""
    if y.is_floating_point():
        return readable_pair(x, y)
    return readable(x), y.contiguous()


def ahead_of(problem, y):
    """How many runs of ``state`` come before what the backward reads."""
    return 0 if problem.reduction == "none" else 1 if y.is_floating_point() else 2


def state_of(x, y, problem):
    ahead = ahead_of(problem, y)
    return x.new_empty((ahead + SAVED) * x.shape[0] + ahead // 2, dtype=widest((x, y)))


@planned
def plan(tensors, problem, wanted):
    """The launch of the forward where nothing is wanted, else of the backward; False where the tensors must be arranged
    first.
    """
    x, y, dout = tensors
    first, second = arranged(x, y)
    if first is not x or second is not y:
        return False
    rows, cols = x.shape
    labelled, none = not y.is_floating_point(), problem.reduction == "none"
    walked = (x,) if labelled else (x, y)
    wide, vec = widest(walked), VECTOR // min(t.element_size() for t in walked)
    strides = [t.stride(0) if rows > 1 else cols for t in walked]
    state = state_of(x, y, problem)
    arguments = {
        "x": x,
        "y": y,
        "state": state,
        "rows": rows,
        "cols": cols,
        "stride_x": strides[0],
        "stride_y": strides[-1],
        "ignore_index": problem.ignore_index,
        "scalars": as_scalars(problem.scalars, wide),
        "FORMULA": FORMULAS[problem.formula].kernel,
        "LABELLED": labelled,
        "COUNTED": labelled and not none,
        "AHEAD": ahead_of(problem, y),
        "EDGE": any(size % vec for size in (cols, *strides)),
        "COMPUTE": triton_type(wide),
        "VEC": vec,
    }
    if not wanted:
        return forward_launch.bind(losses=x.new_empty(rows, dtype=problem.dtype) if none else state, **arguments)
    grads = [room_for_gradient(t) if want else t for t, want in zip((x, y), wanted)]
    return backward_launch.bind(
        grad_x=grads[0],
        grad_y=grads[1],
        dout=dout,
        dout_stride=dout.stride(0) if none and rows > 1 else 0,
        MEAN=problem.reduction == "mean",
        WANT_X=wanted[0],
        WANT_Y=wanted[1],
        **arguments,
    )


def prepared(tensors, problem, wanted=(), dout=None):
    """The launch, and x and y as its kernel wants them."""
    x, y = tensors
    if INTERPRET and not y.is_floating_point():
        counted(y, None, x.shape[1], problem.ignore_index, torch.float32)  # refuses a label that is no class
    launch = plan((x, y, dout), problem, wanted)
    if not launch:
        x, y = arranged(x, y)
        launch = plan((x, y, dout), problem, wanted)
    return launch, x, y


def forward(tensors, problem):
    x, y = tensors
    rows, none = x.shape[0], problem.reduction == "none"
    out, state = x.new_empty(rows if none else (), dtype=problem.dtype), state_of(x, y, problem)
    if shapes_only():
        return [out], [state]
    launch, x, y = prepared(tensors, problem)
    launch(x, y, out if none else state, state, rows)
    if not none:
        finish(state, out, rows, 0 if y.is_floating_point() else 2 + SAVED, problem.reduction == "mean", rows)
    return [out], [state]


def backward(tensors, saved, upstream, problem, wanted):
    (state,), (dout,) = saved, upstream
    if shapes_only():
        return [t.new_empty(t.shape) for t, want in zip(tensors, wanted) if want]
    launch, x, y = prepared(tensors, problem, tuple(wanted), dout)
    grad_x, grad_y = (room_for_gradient(t) if want else t for t, want in zip((x, y), wanted))
    launch(x, y, state, grad_x, grad_y, dout, x.shape[0])
    return [grad for grad, want in zip((grad_x, grad_y), wanted) if want]
