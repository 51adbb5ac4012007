"""Margin losses of rows by kernels: one program is one row.

A row is walked as in label_rows.py, in vectors of 16 bytes; what does not fill one is a tile of its own, the edge. Of a
set of labels the forward first marks the columns: it reads the row once for each label, and would search the set each
time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.device_math import as_scalars, exact, load_zeros
from triton_losses.core.formula import FORMULAS
from triton_losses.core.launch import Launch
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import planned
from triton_losses.core.rows import readable
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import name_of, triton_type
from triton_losses.kernels.finish import finish
from triton_losses.kernels.rows import configs, edge_of, rule, span_of

AHEAD_OF_MARKS = 16  # bytes: of the columns before a row's first aligned vector


@triton.jit
def place_of(labels, cols):
    """The label's column, or one that can be read all the same."""
    label = tl.load(labels)
    fits = (label >= 0) & (label < cols)
    tl.device_assert(fits, "a target is out of range: it is no class")
    return tl.where(fits, label, 0).to(tl.int32)


@triton.jit
def factor_of(class_weights, place, cols, WEIGHTED: tl.constexpr, COMPUTE: tl.constexpr):
    """w / C of the label's class."""
    if WEIGHTED:
        return tl.load(class_weights + place).to(COMPUTE) / tl.cast(cols, COMPUTE)
    else:
        return 1.0 / tl.cast(cols, COMPUTE)


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
    """Write 1 at the columns that are labels, else 0; column c is at marks + first + c.

    Threads write what other threads of the program have written before, and will read: hence the barriers.
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
def losses_of(x, columns, exists, chosen, place, marks, scalars, FORMULA: tl.constexpr, LISTED: tl.constexpr):
    """f and f' of one tile. A column that is a label's, or does not exist, has -inf: it exceeds no margin."""
    if LISTED:
        others = load_zeros(marks + columns, exists) == 0
    else:
        others = columns != place
    if exists is not None:
        others = others & exists
    out = FORMULA(tl.where(others, x, -float("inf")) - chosen, *scalars)
    return out[0], out[1]


@triton.jit
def sums_over_others(
    x,
    start,
    head,
    vectors,
    cols,
    place,
    marks,
    scalars,
    FORMULA: tl.constexpr,
    LISTED: tl.constexpr,
    EDGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Of one label of a row: Σ f and Σ f' over the columns that are no label's."""
    first = x + (start + head) // VEC * VEC  # says that it is aligned
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    chosen = tl.load(x + start + place).to(COMPUTE)
    losses = tl.zeros((LANES,), COMPUTE)
    slopes = tl.zeros((LANES,), COMPUTE)
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):  # all loads first, so that they travel together
            tiles += (tl.load(first + (v + u * LANES) * VEC + tile).to(COMPUTE),)
        for u in tl.static_range(UNROLL):
            at = (v + u * LANES) * VEC + tile
            loss, slope = losses_of(tiles[u], at, None, chosen, place - head, marks, scalars, FORMULA, LISTED)
            losses += tl.sum(loss, 1)
            slopes += tl.sum(slope, 1)
    for v in range(unmasked, vectors, LANES):
        exists = (v + lanes < vectors)[:, None]
        at = v * VEC + tile
        values = tl.load(first + at, mask=exists, other=0.0).to(COMPUTE)
        loss, slope = losses_of(values, at, exists & (at >= 0), chosen, place - head, marks, scalars, FORMULA, LISTED)
        losses += tl.sum(loss, 1)
        slopes += tl.sum(slope, 1)
    total = tl.sum(losses, 0)
    total_slope = tl.sum(slopes, 0)
    if EDGE:
        columns, exists = edge_of(head, vectors, cols, VEC)
        values = tl.load(x + start + columns, mask=exists, other=0.0).to(COMPUTE)
        loss, slope = losses_of(values, columns, exists, chosen, place, marks - head, scalars, FORMULA, LISTED)
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
    class_weights,  # (cols,) where WEIGHTED
    marks,  # (rows, width) bytes to write to where LISTED
    losses,  # (rows,)
    slopes,  # (AHEAD, rows) of other things, then (rows, most): of each label that counts, Σ f' · w / C
    rows: tl.int64,
    cols,
    stride,
    most,
    width,
    scalars,
    FORMULA: tl.constexpr,
    LISTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    AHEAD: tl.constexpr,
    EDGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIRST: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values = exact(scalars, COMPUTE)
    labels += row * most
    slopes += AHEAD * rows + row * most
    start = row * stride
    head, vectors = span_of(start, cols, VEC, EDGE)
    if LISTED:
        count = count_of(labels, most, LANES)
        marks += row * width
        mark(marks, width, FIRST - head, labels, count, cols, LANES)
        marks += FIRST
    else:
        count = 1
    loss = tl.zeros((), COMPUTE)
    for k in range(0, count):
        place = place_of(labels + k, cols)
        total, slope = sums_over_others(
            x, start, head, vectors, cols, place, marks, values, FORMULA, LISTED, EDGE, COMPUTE, VEC, LANES, UNROLL
        )
        factor = factor_of(class_weights, place, cols, WEIGHTED, COMPUTE)
        loss += total * factor
        tl.store(slopes + k, slope * factor)
    tl.store(losses + row, loss.to(losses.dtype.element_ty))


@triton.jit
def store_gradient(
    x,
    row,
    labels,
    slopes,
    class_weights,
    count,
    cols,
    columns,
    exists,
    shift,
    only,
    upstream,
    scalars,
    grad,
    FORMULA: tl.constexpr,
    LISTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Write the gradient of one tile x. only: the lone label's column, number, slope and w / C. shift: what a column is
    less by.
    """
    if LISTED:
        of_others = tl.zeros_like(x)
        of_labels = tl.zeros_like(x)
        is_label = columns < 0
        for k in range(0, count):
            place = place_of(labels + k, cols)
            chosen = tl.load(row + place).to(x.dtype)
            of_others += FORMULA(x - chosen, *scalars)[1] * factor_of(class_weights, place, cols, WEIGHTED, x.dtype)
            here = columns == place - shift
            of_labels -= tl.where(here, tl.load(slopes + k), 0.0)
            is_label = is_label | here
        g = tl.where(is_label, of_labels, of_others)
    else:
        place, chosen, slope, factor = only
        g = tl.where(columns == place - shift, -slope, FORMULA(x - chosen, *scalars)[1] * factor)
    tl.store(grad, (g * upstream).to(grad.dtype.element_ty), mask=exists, eviction_policy="evict_first")


@triton.jit(
    repr=name_of("margin_rows_backward"),
    debug=True,
    do_not_specialize=["rows", "dout_stride"],
    do_not_specialize_on_alignment=["labels", "class_weights", "slopes", "dout"],
)
def backward_kernel(
    x,  # (rows, cols), row r at r * stride
    labels,  # (rows, most)
    class_weights,  # (cols,) where WEIGHTED
    slopes,  # (AHEAD, rows) of other things, then (rows, most)
    grad,  # (rows, cols), row r at r * stride
    dout,  # of row r at r * dout_stride
    rows: tl.int64,
    cols,
    stride,
    most,
    dout_stride,
    scalars,
    FORMULA: tl.constexpr,
    LISTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    AHEAD: tl.constexpr,
    MEAN: tl.constexpr,
    EDGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values = exact(scalars, COMPUTE)
    labels += row * most
    slopes += AHEAD * rows + row * most
    start = row * stride
    upstream = tl.load(dout + row * dout_stride).to(COMPUTE)
    if MEAN:
        upstream = upstream / tl.cast(rows, COMPUTE)
    if LISTED:
        count = count_of(labels, most, LANES)
        only = ()
    else:
        count = 1
        place = place_of(labels, cols)
        only = (
            place,
            tl.load(x + start + place).to(COMPUTE),
            tl.load(slopes),
            factor_of(class_weights, place, cols, WEIGHTED, COMPUTE),
        )
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
                tiles[u],
                x + start,
                labels,
                slopes,
                class_weights,
                count,
                cols,
                at,
                None,
                head,
                only,
                upstream,
                values,
                grad + first + at,
                FORMULA,
                LISTED,
                WEIGHTED,
            )
    for v in range(unmasked, vectors, LANES):
        exists = (v + lanes < vectors)[:, None]
        at = v * VEC + tile
        loaded = tl.load(x + first + at, mask=exists, other=0.0, eviction_policy="evict_first").to(COMPUTE)
        store_gradient(
            loaded,
            x + start,
            labels,
            slopes,
            class_weights,
            count,
            cols,
            at,
            exists,
            head,
            only,
            upstream,
            values,
            grad + first + at,
            FORMULA,
            LISTED,
            WEIGHTED,
        )
    if EDGE:
        columns, exists = edge_of(head, vectors, cols, VEC)
        loaded = tl.load(x + start + columns, mask=exists, other=0.0).to(COMPUTE)
        store_gradient(
            loaded,
            x + start,
            labels,
            slopes,
            class_weights,
            count,
            cols,
            columns,
            exists,
            0,
            only,
            upstream,
            values,
            grad + start + columns,
            FORMULA,
            LISTED,
            WEIGHTED,
        )


def key(args):
    x = args["x"]
    flags = tuple(args[name] for name in ("LISTED", "WEIGHTED", "EDGE"))
    return args["FORMULA"].__name__, triton.next_power_of_2(args["cols"]), str(x.dtype), *flags, x.data_ptr() % 16 == 0


SAMPLE_BYTES = 256 << 20  # a launch is measured on at most this much


def sample(args):
    return {
        **args,
        "rows": min(args["rows"], max(SAMPLE_BYTES // max(args["stride"] * args["x"].element_size(), 1), 1)),
    }


options = {"configs": configs, "rule": rule, "key": key, "sample": sample}
options |= {"size": "rows", "programs": lambda rows, fixed: rows}
forward_launch = Tuned(forward_kernel, **options)
backward_launch = Tuned(backward_kernel, **options)


class MarginPlan(NamedTuple):
    readable: bool  # scores, labels and class weights lie as the kernels want them
    wide: torch.dtype
    width: int = 0  # bytes of a row's marks
    launch: Launch | None = None


def slopes_of(labels, ahead, wide):
    """Memory for the labels' slopes, behind one number a row where something is ahead."""
    return labels.new_empty(labels.numel() + ahead * labels.shape[0], dtype=wide)


@planned
def plan(tensors, problem):
    """Of the forward where dout is None, else of the backward."""
    x, labels, class_weights, dout = tensors
    wide, weighted, (rows, cols) = compute_dtype(x.dtype), class_weights is not None, x.shape
    if readable(x) is not x or not labels.is_contiguous() or weighted and not class_weights.is_contiguous():
        return MarginPlan(False, wide)
    listed, ahead = labels.dim() == 2, problem.reduction != "none"
    width = -(-(cols + AHEAD_OF_MARKS) // 16) * 16 if listed else 0
    vec, stride = 16 // x.element_size(), x.stride(0) if rows > 1 else cols
    slopes = slopes_of(labels, ahead, wide)
    arguments = {
        "x": x,
        "labels": labels,
        "class_weights": class_weights if weighted else x,
        "slopes": slopes,
        "rows": rows,
        "cols": cols,
        "stride": stride,
        "most": labels.shape[1] if listed else 1,
        "scalars": as_scalars((problem.margin,), wide),
        "FORMULA": FORMULAS[problem.formula].kernel,
        "LISTED": listed,
        "WEIGHTED": weighted,
        "AHEAD": int(ahead),
        "EDGE": cols % vec != 0 or stride % vec != 0,
        "COMPUTE": triton_type(wide),
        "VEC": vec,
    }
    if dout is None:
        marks = x.new_empty(rows, width, dtype=torch.uint8) if listed else x
        losses = slopes if ahead else x.new_empty(rows, dtype=problem.dtype)
        launch = forward_launch.bind(marks=marks, losses=losses, width=width, FIRST=AHEAD_OF_MARKS, **arguments)
    else:
        grad = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        dout_stride, mean = 0 if ahead else dout.stride(0), problem.reduction == "mean"
        launch = backward_launch.bind(grad=grad, dout=dout, dout_stride=dout_stride, MEAN=mean, **arguments)
    return MarginPlan(True, wide, width, launch)


def prepared(tensors, problem, dout=None):
    """The plan, scores and labels as its kernel wants them, and the class weights or what stands in their place."""
    found = plan((*tensors, dout), problem)
    x, labels, class_weights = tensors
    if not found.readable:
        x, labels = readable(x), labels.contiguous()
        class_weights = class_weights if class_weights is None else class_weights.contiguous()
        found = plan((x, labels, class_weights, dout), problem)
    return found, x, labels, x if class_weights is None else class_weights


def forward(tensors, problem):
    """It saves the labels' slopes, behind the rows' losses where those are added up."""
    x, labels, _ = tensors
    rows, none = x.shape[0], problem.reduction == "none"
    out = x.new_empty(rows if none else (), dtype=problem.dtype)
    slopes = slopes_of(labels, not none, compute_dtype(x.dtype))
    if shapes_only():
        return [out], [slopes]
    found, x, labels, class_weights = prepared(tensors, problem)
    marks = x.new_empty(rows, found.width, dtype=torch.uint8) if found.width else x
    found.launch(x, labels, class_weights, marks, out if none else slopes, slopes, rows)
    if not none:
        finish(slopes, out, rows, mean=problem.reduction == "mean", divisor=rows)
    return [out], [slopes]


def backward(tensors, saved, upstream, problem, wanted):
    x = tensors[0]
    if shapes_only():
        return [x.new_empty(x.shape)]
    found, x, labels, class_weights = prepared(tensors, problem, upstream[0])
    grad = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    found.launch(x, labels, class_weights, saved[0], grad, upstream[0], x.shape[0])
    return [grad]
