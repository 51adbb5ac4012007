"""Kernels of losses of rows of unnormalised probabilities, p = x / Σ x: one program per row.

Rows are read as in distribution_rows.py, in vectors of 16 bytes; the elements that do not fill one are a tile of their
own, the edge.

The forward saves one tensor for the backward, ``state``. It holds arrays of one number per row. If the loss is reduced,
the first array is the losses, and if there are also labels, the second is 1 for each row that counts. Then come Σ x and
Σ p ∂f/∂p. If there are labels and a reduction, the last number is how many rows count.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import INTERPRET
from triton_losses.core.device_math import as_scalars, exact, load_zeros
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import planned
from triton_losses.core.reduction import widest
from triton_losses.core.rows import counted, empty_with_strides, readable
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.distribution_rows import VECTOR, readable_pair
from triton_losses.kernels.elementwise import name_of, triton_type
from triton_losses.kernels.finish import finish
from triton_losses.kernels.long_rows import label_of
from triton_losses.kernels.row_pairs import edge_tile
from triton_losses.kernels.rows import configs, rule, span_of

SAVED = 2  # numbers per row that the backward reads


class ProportionKind(NamedTuple):
    """Compile-time parameters of a kernel of proportions."""

    labelled: bool  # y holds one label per row; otherwise probabilities
    wanted: tuple  # in the backward: whether the gradients of x and of y are wanted
    mean: bool  # in the backward: the loss is a mean
    ahead: int  # arrays of ``state`` before those that the backward reads: 1 the losses, 2 also which rows count
    edge: bool  # rows may start or end within a vector
    vec: int  # elements of a vector
    compute: tl.dtype  # the type of the sums


@triton.jit
def sum_of_row(x, start, cols, KIND: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr):
    head, vectors = span_of(start, cols, KIND.vec, KIND.edge)
    first = x + (start + head) // KIND.vec * KIND.vec  # tells the compiler that it is aligned
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * KIND.vec + tl.arange(0, KIND.vec)[None, :]
    # tiles are added, and summed at the end: Triton 3.7 fails on a loop that adds up the sums of several tiles
    total = tl.zeros(tile.shape, KIND.compute)
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):  # all loads are issued first, so that they overlap
            pointers = first + (v + u * LANES) * KIND.vec + tile
            tiles += (tl.load(pointers, eviction_policy="evict_last").to(KIND.compute),)
        for u in tl.static_range(UNROLL):
            total += tiles[u]
    for v in range(unmasked, vectors, LANES):
        exists = (v + lanes < vectors)[:, None]
        total += tl.load(first + v * KIND.vec + tile, mask=exists, other=0.0).to(KIND.compute)
    if KIND.edge:
        columns, exists = edge_tile(head, vectors, cols, LANES, KIND.vec)
        total += tl.load(x + start + columns, mask=exists, other=0.0).to(KIND.compute)
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit
def add_tile(totals, x, y, exists, inverse, scalars, FORMULA: tl.constexpr, KIND: tl.constexpr):
    """Add f and p ∂f/∂p of one tile to each lane's sums."""
    p = load_zeros(x, exists).to(KIND.compute) * inverse
    out = FORMULA(load_zeros(y, exists).to(KIND.compute), p, *scalars)
    f = out[0]
    moved = p * out[2]
    if exists is not None:
        f = tl.where(exists, f, 0.0)
        moved = tl.where(exists, moved, 0.0)
    return totals[0] + tl.sum(f, 1), totals[1] + tl.sum(moved, 1)


@triton.jit
def sums_of_pair(
    pair,
    starts,
    cols,
    inverse,
    scalars,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
):
    """Σ f and Σ p ∂f/∂p of a row and its target."""
    x, y = pair
    start_x, start_y = starts
    head, vectors = span_of(start_x, cols, KIND.vec, KIND.edge)
    first_y = y + (start_y + head) // KIND.vec * KIND.vec  # tells the compiler that it is aligned
    first_x = x + (start_x + head) // KIND.vec * KIND.vec
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * KIND.vec + tl.arange(0, KIND.vec)[None, :]
    totals = (tl.zeros((LANES,), KIND.compute), tl.zeros((LANES,), KIND.compute))
    unmasked = vectors // LANES * LANES
    for v in range(0, unmasked, LANES):
        at_x = first_x + v * KIND.vec + tile
        at_y = first_y + v * KIND.vec + tile
        totals = add_tile(totals, at_x, at_y, None, inverse, scalars, FORMULA, KIND)
    for v in range(unmasked, vectors, LANES):
        at_x = first_x + v * KIND.vec + tile
        at_y = first_y + v * KIND.vec + tile
        exists = (v + lanes < vectors)[:, None]
        totals = add_tile(totals, at_x, at_y, exists, inverse, scalars, FORMULA, KIND)
    if KIND.edge:
        columns, exists = edge_tile(head, vectors, cols, LANES, KIND.vec)
        totals = add_tile(totals, x + start_x + columns, y + start_y + columns, exists, inverse, scalars, FORMULA, KIND)
    return tl.sum(totals[0], 0), tl.sum(totals[1], 0)


@triton.jit(
    repr=name_of("proportion_rows_forward"),
    debug=True,
    do_not_specialize=["rows", "ignore_index"],
    do_not_specialize_on_alignment=["losses", "state"],
)
def forward_kernel(
    x,  # (rows, cols), row r at r * stride_x
    y,  # (rows, cols), row r at r * stride_y; labels (rows,) if labelled
    losses,  # (rows,); if ahead is 2 (2, rows): losses, and 1 for each row that counts
    state,  # (ahead, rows) not written here, then (2, rows): Σ x, Σ p ∂f/∂p
    rows: tl.int64,
    cols,
    strides,  # stride_x, stride_y
    ignore_index,
    scalars,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values = exact(scalars, KIND.compute)
    start = row * strides[0]
    total = sum_of_row(x, start, cols, KIND, LANES, UNROLL)
    counts = tl.full((), 1.0, KIND.compute)
    if KIND.labelled:
        kept, place = label_of(y, row, cols, ignore_index)
        p = tl.load(x + start + place).to(KIND.compute) / total
        out = FORMULA(counts, p, *values)
        loss = tl.where(kept, out[0], 0.0)
        moved = p * out[2]
        counts = tl.where(kept, counts, 0.0)
    else:
        starts = (start, row * strides[1])
        loss, moved = sums_of_pair((x, y), starts, cols, 1.0 / total, values, FORMULA, KIND, LANES)
    tl.store(losses + row, loss.to(losses.dtype.element_ty))
    if KIND.ahead == 2:
        tl.store(losses + rows + row, counts.to(losses.dtype.element_ty))
    tl.store(state + KIND.ahead * rows + row, total)
    tl.store(state + (KIND.ahead + 1) * rows + row, moved)


@triton.jit
def store_gradients(tensors, first, at, exists, of_row, scalars, FORMULA: tl.constexpr, KIND: tl.constexpr):
    """Write one tile's gradients. first: the offsets in x and in y, and the label's column, that belong to ``at`` 0."""
    x, y, grad_x, grad_y = tensors
    first_x, first_y, place = first
    inverse, moved, at_label, upstream = of_row
    if KIND.labelled:
        g = tl.where(at == place, at_label - moved, -moved) * (upstream * inverse)
        tl.store(grad_x + first_x + at, g.to(grad_x.dtype.element_ty), mask=exists, eviction_policy="evict_first")
    else:
        p = load_zeros(x + first_x + at, exists).to(KIND.compute) * inverse
        out = FORMULA(load_zeros(y + first_y + at, exists).to(KIND.compute), p, *scalars)
        if KIND.wanted[0]:
            g = (out[2] - moved) * (upstream * inverse)
            tl.store(grad_x + first_x + at, g.to(grad_x.dtype.element_ty), mask=exists, eviction_policy="evict_first")
        if KIND.wanted[1]:
            g = out[1] * upstream
            tl.store(grad_y + first_y + at, g.to(grad_y.dtype.element_ty), mask=exists, eviction_policy="evict_first")


@triton.jit(
    repr=name_of("proportion_rows_backward"),
    debug=True,
    do_not_specialize=["rows", "ignore_index", "dout_stride"],
    do_not_specialize_on_alignment=["state", "dout"],
)
def backward_kernel(
    x,  # (rows, cols), row r at r * stride_x
    y,  # (rows, cols), row r at r * stride_y; labels (rows,) if labelled
    state,  # (ahead, rows) unused here, then (2, rows): Σ x, Σ p ∂f/∂p; if ahead is 2 then how many rows count
    grad_x,
    grad_y,  # both gradients as x and y; written if wanted
    dout,  # of row r at r * dout_stride
    rows: tl.int64,
    cols,
    strides,  # stride_x, stride_y
    dout_stride,
    ignore_index,
    scalars,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values = exact(scalars, KIND.compute)
    start_x = row * strides[0]
    upstream = tl.load(dout + row * dout_stride).to(KIND.compute)
    if KIND.mean:
        counts = tl.load(state + (KIND.ahead + 2) * rows) if KIND.ahead == 2 else tl.cast(rows, KIND.compute)
        upstream = upstream / counts
    inverse = 1.0 / tl.load(state + KIND.ahead * rows + row)
    moved = tl.load(state + (KIND.ahead + 1) * rows + row)
    if KIND.labelled:
        start_y = start_x  # y holds labels: no row of it is read
        kept, place = label_of(y, row, cols, ignore_index)
        p = tl.load(x + start_x + place).to(KIND.compute) * inverse
        at_label = FORMULA(tl.full((), 1.0, KIND.compute), p, *values)[2]
        inverse = tl.where(kept, inverse, 0.0)
        moved = tl.where(kept, moved, 0.0)
        at_label = tl.where(kept, at_label, 0.0)
    else:
        start_y = row * strides[1]
        place = 0
        at_label = moved
    tensors = (x, y, grad_x, grad_y)
    of_row = (inverse, moved, at_label, upstream)
    head, vectors = span_of(start_x, cols, KIND.vec, KIND.edge)
    first_x = (start_x + head) // KIND.vec * KIND.vec  # tells the compiler that it is aligned
    first_y = (start_y + head) // KIND.vec * KIND.vec
    first = (first_x, first_y, place - head)
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * KIND.vec + tl.arange(0, KIND.vec)[None, :]
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        for u in tl.static_range(UNROLL):
            at = (v + u * LANES) * KIND.vec + tile
            store_gradients(tensors, first, at, None, of_row, values, FORMULA, KIND)
    for v in range(unmasked, vectors, LANES):
        exists = (v + lanes < vectors)[:, None]
        store_gradients(tensors, first, v * KIND.vec + tile, exists, of_row, values, FORMULA, KIND)
    if KIND.edge:
        at, exists = edge_tile(head, vectors, cols, LANES, KIND.vec)
        store_gradients(tensors, (start_x, start_y, place), at, exists, of_row, values, FORMULA, KIND)


def key(args):
    rows = args["x"], args["y"]
    aligned = all(t.data_ptr() % 16 == 0 for t in rows)
    kind = args["KIND"]._replace(mean=False, ahead=0, compute=None)  # these do not matter, or follow from the rest
    dtypes = (str(t.dtype) for t in rows)
    return args["FORMULA"].__name__, triton.next_power_of_2(args["cols"]), *dtypes, *kind, aligned


def bytes_of_row(args):
    return args["strides"][0] * args["x"].element_size()


tuning = {"configs": configs, "rule": rule, "key": key, "bytes_each": bytes_of_row}
tuning |= {"size": "rows", "programs": lambda rows, fixed: rows}
forward_launch = Tuned(forward_kernel, **tuning)
backward_launch = Tuned(backward_kernel, **tuning)


def arranged(x, y):
    """x and y in the layout that the kernels read."""
    if y.is_floating_point():
        return readable_pair(x, y)
    return readable(x), y.contiguous()


def ahead_of(problem, y):
    """How many arrays of ``state`` come before those that the backward reads."""
    return 0 if problem.reduction == "none" else 1 if y.is_floating_point() else 2


def state_of(x, y, problem):
    ahead = ahead_of(problem, y)
    return x.new_empty((ahead + SAVED) * x.shape[0] + ahead // 2, dtype=widest((x, y)))


def grads_of(x, y, wanted):
    """Memory for the gradients that are wanted; x or y takes the place of a gradient that is not."""
    return tuple(empty_with_strides(t) if want else t for t, want in zip((x, y), wanted))


@planned
def plan(tensors, problem, wanted):
    """The forward's launch if nothing is wanted, otherwise the backward's; False if tensors must be copied first."""
    x, y, dout = tensors
    first, second = arranged(x, y)
    if first is not x or second is not y:
        return False
    rows, cols = x.shape
    labelled, none = not y.is_floating_point(), problem.reduction == "none"
    walked = (x,) if labelled else (x, y)
    wide, vec = widest(walked), VECTOR // min(t.element_size() for t in walked)
    strides = tuple(t.stride(0) if rows > 1 else cols for t in walked)
    state = state_of(x, y, problem)
    kind = ProportionKind(
        labelled=labelled,
        wanted=wanted,
        mean=bool(wanted) and problem.reduction == "mean",
        ahead=ahead_of(problem, y),
        edge=any(size % vec for size in (cols, *strides)),
        vec=vec,
        compute=triton_type(wide),
    )
    arguments = {
        "x": x,
        "y": y,
        "state": state,
        "rows": rows,
        "cols": cols,
        "strides": strides,
        "ignore_index": problem.ignore_index,
        "scalars": as_scalars(problem.scalars, wide),
        "FORMULA": FORMULAS[problem.formula].kernel,
        "KIND": kind,
    }
    if not wanted:
        return forward_launch.bind(losses=x.new_empty(rows, dtype=problem.dtype) if none else state, **arguments)
    grad_x, grad_y = grads_of(x, y, wanted)
    dout_stride = dout.stride(0) if none and rows > 1 else 0
    return backward_launch.bind(grad_x=grad_x, grad_y=grad_y, dout=dout, dout_stride=dout_stride, **arguments)


def prepared(tensors, problem, wanted=(), dout=None):
    """The launch, and x and y in the layout that its kernel reads."""
    x, y = tensors
    if INTERPRET and not y.is_floating_point():
        counted(y, None, x.shape[1], problem.ignore_index, torch.float32)  # raises for a label that is no class
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
    grads = grads_of(x, y, wanted)
    launch(x, y, state, *grads, dout, x.shape[0])
    return [grad for grad, want in zip(grads, wanted) if want]
