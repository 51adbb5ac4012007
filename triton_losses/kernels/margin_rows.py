"""Kernels of margin losses of rows: one program per row.

A row is read as in label_rows.py, in vectors of 16 bytes; the elements that do not fill one are a tile of their own,
the edge. If a row has a set of labels, the forward first marks their columns, because it reads the row once for each
label and would otherwise search the set each time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.device_math import as_scalars, exact, load_zeros
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import planned
from triton_losses.core.rows import empty_with_strides, readable
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import name_of, triton_type
from triton_losses.kernels.finish import finish
from triton_losses.kernels.rows import configs, edge_of, rule, span_of

AHEAD_OF_MARKS = tl.constexpr(16)  # bytes of marks for the columns before a row's first aligned vector


class MarginKind(NamedTuple):
    """Compile-time parameters of a kernel of margin losses."""

    listed: bool  # a row has a set of labels; otherwise it has one
    weighted: bool  # there are class weights
    mean: bool  # in the backward: the loss is a mean
    ahead: int  # numbers per row that precede the labels' slopes
    edge: bool  # rows may start or end within a vector
    vec: int  # elements of a vector
    compute: tl.dtype  # the type of the sums


@triton.jit
def place_of(labels, cols):
    """The label's column, or column 0 if the label is no class."""
    label = tl.load(labels)
    fits = (label >= 0) & (label < cols)
    tl.device_assert(fits, "a target is out of range: it is no class")
    return tl.where(fits, label, 0).to(tl.int32)


@triton.jit
def factor_of(class_weights, place, cols, KIND: tl.constexpr):
    """w / C: the weight of the label's class over the number of classes."""
    if KIND.weighted:
        return tl.load(class_weights + place).to(KIND.compute) / tl.cast(cols, KIND.compute)
    else:
        return 1.0 / tl.cast(cols, KIND.compute)


@triton.jit
def count_of(labels, most, LANES: tl.constexpr):
    """How many labels of a row count: those before its first negative one."""
    lanes = tl.arange(0, LANES)
    start = tl.zeros((), tl.int32)
    count = tl.zeros((), tl.int32) + most
    while start < count:
        at = start + lanes
        label = tl.load(labels + at, mask=at < most, other=0)
        count = tl.minimum(count, tl.min(tl.where(label < 0, at, most), 0))
        start += LANES
    return count


@triton.jit
def mark(marks, width, first, labels, count, cols, LANES: tl.constexpr):
    """Write 1 at the columns that are labels and 0 at all others; column c is at marks + first + c.

    Threads overwrite and read bytes that other threads of the program have written, so barriers are needed.
    """
    at = tl.arange(0, 16 * LANES)
    for start in range(0, width, 16 * LANES):
        tl.store(marks + start + at, tl.zeros((16 * LANES,), tl.uint8), mask=(start + at) // 16 < width // 16)
    tl.debug_barrier()
    lanes = tl.arange(0, LANES)
    for start in range(0, count, LANES):
        exists = start + lanes < count
        label = tl.load(labels + start + lanes, mask=exists, other=0)
        tl.store(marks + first + label, tl.full((LANES,), 1, tl.uint8), mask=exists & (label < cols))
    tl.debug_barrier()


@triton.jit
def losses_of(x, columns, exists, label, marks, scalars, FORMULA: tl.constexpr, KIND: tl.constexpr):
    """f and f' of one tile. Columns of labels and columns that do not exist count as -inf, which exceeds no margin."""
    chosen, place = label
    if KIND.listed:
        others = load_zeros(marks + columns, exists) == 0
    else:
        others = columns != place
    if exists is not None:
        others = others & exists
    out = FORMULA(tl.where(others, x, -float("inf")) - chosen, *scalars)
    return out[0], out[1]


@triton.jit
def sums_over_others(
    row,
    place,
    marks,
    scalars,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Σ f and Σ f' of one label, over the columns of no label. row: x, the row's offset, its `span_of`, its length."""
    x, start, head, vectors, cols = row
    first = x + (start + head) // KIND.vec * KIND.vec  # tells the compiler that it is aligned
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * KIND.vec + tl.arange(0, KIND.vec)[None, :]
    chosen = tl.load(x + start + place).to(KIND.compute)
    label = (chosen, place - head)  # its score, and its column counted from the first vector
    losses = tl.zeros((LANES,), KIND.compute)
    slopes = tl.zeros((LANES,), KIND.compute)
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):  # all loads are issued first, so that they overlap
            tiles += (tl.load(first + (v + u * LANES) * KIND.vec + tile).to(KIND.compute),)
        for u in tl.static_range(UNROLL):
            at = (v + u * LANES) * KIND.vec + tile
            loss, slope = losses_of(tiles[u], at, None, label, marks, scalars, FORMULA, KIND)
            losses += tl.sum(loss, 1)
            slopes += tl.sum(slope, 1)
    for v in range(unmasked, vectors, LANES):
        exists = (v + lanes < vectors)[:, None]
        at = v * KIND.vec + tile
        values = tl.load(first + at, mask=exists, other=0.0).to(KIND.compute)
        loss, slope = losses_of(values, at, exists & (at >= 0), label, marks, scalars, FORMULA, KIND)
        losses += tl.sum(loss, 1)
        slopes += tl.sum(slope, 1)
    total = tl.sum(losses, 0)
    total_slope = tl.sum(slopes, 0)
    if KIND.edge:
        columns, exists = edge_of(head, vectors, cols, KIND.vec)
        values = tl.load(x + start + columns, mask=exists, other=0.0).to(KIND.compute)
        loss, slope = losses_of(values, columns, exists, (chosen, place), marks - head, scalars, FORMULA, KIND)
        total += tl.sum(loss, 0)
        total_slope += tl.sum(slope, 0)
    return total, total_slope


@triton.jit(
    repr=name_of("margin_rows_forward"),
    debug=True,
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["labels", "class_weights", "losses", "slopes"],
)
def forward_kernel(
    x,  # (rows, cols), row r at r * stride
    labels,  # (rows, most)
    class_weights,  # (cols,) where weighted
    marks,  # (rows, width) bytes, written if listed
    losses,  # (rows,)
    slopes,  # (ahead, rows) unused here, then (rows, most): of each label that counts, Σ f' · w / C
    rows: tl.int64,
    cols,
    strides,  # stride, most
    width,
    scalars,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stride, most = strides
    values = exact(scalars, KIND.compute)
    labels += row * most
    slopes += KIND.ahead * rows + row * most
    start = row * stride
    head, vectors = span_of(start, cols, KIND.vec, KIND.edge)
    if KIND.listed:
        count = count_of(labels, most, LANES)
        marks += row * width
        mark(marks, width, AHEAD_OF_MARKS - head, labels, count, cols, LANES)
        marks += AHEAD_OF_MARKS
    else:
        count = 1
    of_row = (x, start, head, vectors, cols)
    loss = tl.zeros((), KIND.compute)
    for k in range(0, count):
        place = place_of(labels + k, cols)
        total, slope = sums_over_others(of_row, place, marks, values, FORMULA, KIND, LANES, UNROLL)
        factor = factor_of(class_weights, place, cols, KIND)
        loss += total * factor
        tl.store(slopes + k, slope * factor)
    tl.store(losses + row, loss.to(losses.dtype.element_ty))


@triton.jit
def gradient_of(x, columns, shift, chosen, scalars, FORMULA: tl.constexpr, KIND: tl.constexpr):
    """The gradient of one tile x for an upstream gradient of 1. columns: the row's columns minus the shift.

    chosen: for one label its column, score, slope and w / C; for a set the pointers and sizes to load those with.
    """
    if KIND.listed:
        row, labels, slopes, class_weights, count, cols = chosen
        of_others = tl.zeros_like(x)
        of_labels = tl.zeros_like(x)
        is_label = columns < 0
        for k in range(0, count):
            place = place_of(labels + k, cols)
            score = tl.load(row + place).to(KIND.compute)
            of_others += FORMULA(x - score, *scalars)[1] * factor_of(class_weights, place, cols, KIND)
            here = columns == place - shift
            of_labels -= tl.where(here, tl.load(slopes + k), 0.0)
            is_label = is_label | here
        return tl.where(is_label, of_labels, of_others)
    else:
        place, score, slope, factor = chosen
        return tl.where(columns == place - shift, -slope, FORMULA(x - score, *scalars)[1] * factor)


@triton.jit(
    repr=name_of("margin_rows_backward"),
    debug=True,
    do_not_specialize=["rows", "dout_stride"],
    do_not_specialize_on_alignment=["labels", "class_weights", "slopes", "dout"],
)
def backward_kernel(
    x,  # (rows, cols), row r at r * stride
    labels,  # (rows, most)
    class_weights,  # (cols,) where weighted
    slopes,  # (ahead, rows) unused here, then (rows, most)
    grad,  # (rows, cols), row r at r * stride
    dout,  # of row r at r * dout_stride
    rows: tl.int64,
    cols,
    strides,  # stride, most
    dout_stride,
    scalars,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    stride, most = strides
    values = exact(scalars, KIND.compute)
    labels += row * most
    slopes += KIND.ahead * rows + row * most
    start = row * stride
    upstream = tl.load(dout + row * dout_stride).to(KIND.compute)
    if KIND.mean:
        upstream = upstream / tl.cast(rows, KIND.compute)
    if KIND.listed:
        chosen = (x + start, labels, slopes, class_weights, count_of(labels, most, LANES), cols)
    else:
        place = place_of(labels, cols)
        score = tl.load(x + start + place).to(KIND.compute)
        chosen = (place, score, tl.load(slopes), factor_of(class_weights, place, cols, KIND))
    head, vectors = span_of(start, cols, KIND.vec, KIND.edge)
    first = (start + head) // KIND.vec * KIND.vec  # tells the compiler that it is aligned
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * KIND.vec + tl.arange(0, KIND.vec)[None, :]
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):  # all loads are issued first, so that they overlap
            pointers = x + first + (v + u * LANES) * KIND.vec + tile
            tiles += (tl.load(pointers, eviction_policy="evict_first").to(KIND.compute),)
        for u in tl.static_range(UNROLL):
            at = (v + u * LANES) * KIND.vec + tile
            g = gradient_of(tiles[u], at, head, chosen, values, FORMULA, KIND) * upstream
            tl.store(grad + first + at, g.to(grad.dtype.element_ty), eviction_policy="evict_first")
    for v in range(unmasked, vectors, LANES):
        exists = (v + lanes < vectors)[:, None]
        at = v * KIND.vec + tile
        loaded = tl.load(x + first + at, mask=exists, other=0.0, eviction_policy="evict_first").to(KIND.compute)
        g = gradient_of(loaded, at, head, chosen, values, FORMULA, KIND) * upstream
        tl.store(grad + first + at, g.to(grad.dtype.element_ty), mask=exists, eviction_policy="evict_first")
    if KIND.edge:
        columns, exists = edge_of(head, vectors, cols, KIND.vec)
        loaded = tl.load(x + start + columns, mask=exists, other=0.0).to(KIND.compute)
        g = gradient_of(loaded, columns, 0, chosen, values, FORMULA, KIND) * upstream
        tl.store(grad + start + columns, g.to(grad.dtype.element_ty), mask=exists, eviction_policy="evict_first")


def key(args):
    x = args["x"]
    kind = args["KIND"]._replace(mean=False, ahead=0, compute=None)  # these do not matter, or follow from the rest
    return args["FORMULA"].__name__, triton.next_power_of_2(args["cols"]), str(x.dtype), *kind, x.data_ptr() % 16 == 0


def bytes_of_row(args):
    return args["strides"][0] * args["x"].element_size()


options = {"configs": configs, "rule": rule, "key": key, "bytes_each": bytes_of_row}
options |= {"size": "rows", "programs": lambda rows, fixed: rows}
forward_launch = Tuned(forward_kernel, **options)
backward_launch = Tuned(backward_kernel, **options)


def slopes_of(labels, ahead, wide):
    """Memory for the labels' slopes, which one number per row precedes if ahead."""
    return labels.new_empty(labels.numel() + ahead * labels.shape[0], dtype=wide)


def width_of(cols):
    """How many bytes the marks of a row with this number of columns take."""
    return triton.cdiv(cols, 16) * 16 + AHEAD_OF_MARKS.value


def marks_of(x, labels):
    """Memory for the marks, which only sets of labels need."""
    return x.new_empty(len(x), width_of(x.shape[1]), dtype=torch.uint8) if labels.dim() == 2 else x


def arranged(tensors):
    """The tensors in the layout that the kernels read."""
    x, labels, class_weights = tensors
    return readable(x), labels.contiguous(), class_weights if class_weights is None else class_weights.contiguous()


@planned
def plan(tensors, problem):
    """The forward's launch if dout is None, otherwise the backward's; False if tensors must be copied first."""
    x, labels, class_weights, dout = tensors
    if any(ready is not t for ready, t in zip(arranged(tensors[:3]), tensors)):
        return False
    wide, (rows, cols) = compute_dtype(x.dtype), x.shape
    listed, ahead = labels.dim() == 2, problem.reduction != "none"
    vec, stride = 16 // x.element_size(), x.stride(0) if rows > 1 else cols
    slopes = slopes_of(labels, ahead, wide)
    kind = MarginKind(
        listed=listed,
        weighted=class_weights is not None,
        mean=dout is not None and problem.reduction == "mean",
        ahead=int(ahead),
        edge=cols % vec != 0 or stride % vec != 0,
        vec=vec,
        compute=triton_type(wide),
    )
    arguments = {
        "x": x,
        "labels": labels,
        "class_weights": x if class_weights is None else class_weights,
        "slopes": slopes,
        "rows": rows,
        "cols": cols,
        "strides": (stride, labels.shape[1] if listed else 1),
        "scalars": as_scalars((problem.margin,), wide),
        "FORMULA": FORMULAS[problem.formula].kernel,
        "KIND": kind,
    }
    if dout is None:
        losses = slopes if ahead else x.new_empty(rows, dtype=problem.dtype)
        return forward_launch.bind(marks=marks_of(x, labels), losses=losses, width=width_of(cols), **arguments)
    dout_stride = 0 if ahead else dout.stride(0)
    return backward_launch.bind(grad=empty_with_strides(x), dout=dout, dout_stride=dout_stride, **arguments)


def prepared(tensors, problem, dout=None):
    """The launch, scores and labels in the layout that its kernel reads, and the class weights or a placeholder."""
    launch = plan((*tensors, dout), problem)
    if not launch:
        tensors = arranged(tensors)
        launch = plan((*tensors, dout), problem)
    x, labels, class_weights = tensors
    return launch, x, labels, x if class_weights is None else class_weights


def forward(tensors, problem):
    """Saves the labels' slopes, which the rows' losses precede if they are reduced."""
    x, labels, _ = tensors
    rows, none = x.shape[0], problem.reduction == "none"
    out = x.new_empty(rows if none else (), dtype=problem.dtype)
    slopes = slopes_of(labels, not none, compute_dtype(x.dtype))
    if shapes_only():
        return [out], [slopes]
    launch, x, labels, class_weights = prepared(tensors, problem)
    launch(x, labels, class_weights, marks_of(x, labels), out if none else slopes, slopes, rows)
    if not none:
        finish(slopes, out, rows, mean=problem.reduction == "mean", divisor=rows)
    return [out], [slopes]


def backward(tensors, saved, upstream, problem, wanted):
    x = tensors[0]
    if shapes_only():
        return [x.new_empty(x.shape)]
    launch, x, labels, class_weights = prepared(tensors, problem, upstream[0])
    grad = empty_with_strides(x)
    launch(x, labels, class_weights, saved[0], grad, upstream[0], x.shape[0])
    return [grad]
