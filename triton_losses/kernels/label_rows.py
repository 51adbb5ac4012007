"""Kernels of rows and their labels: one program per row. Images go to label_planes.py.

The forward saves one tensor for the backward, ``state``. It holds six arrays of one number per row: the loss, its
weight, max x, log Σ exp(x - max), mean_log_p and the entropy. The sum of the weights follows them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import INTERPRET, compute_dtype
from triton_losses.core.device_math import as_scalars, exact
from triton_losses.core.formula import FORMULAS
from triton_losses.core.launch import Launch
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import planned
from triton_losses.core.rows import Pass, counted, empty_with_strides, readable, slots_of
from triton_losses.core.tuning import Tuned
from triton_losses.kernels import label_planes, short_rows
from triton_losses.kernels.elementwise import triton_type
from triton_losses.kernels.finish import finish
from triton_losses.kernels.rows import (
    Kind,
    bytes_of_row,
    configs,
    edge_of,
    factors_of,
    gradient_at,
    key,
    name_of_pass,
    read_formula,
    row_statistics,
    rule,
    span_of,
    transform,
    write_zeros,
)


@triton.jit
def label_of(labels, row, cols, ignore_index):
    """Whether the row's label counts, and its column, or column 0 if the label is no class."""
    label = tl.load(labels + row).to(tl.int64)
    kept = label != ignore_index
    fits = (label >= 0) & (label < cols)
    tl.device_assert(fits | (label == ignore_index), "a target is out of bounds: it is no class and not ignore_index")
    return kept, tl.where(fits, label, 0).to(tl.int32)


@triton.jit
def write_gradient(
    logits,
    grad,
    row,  # (the row's offset, the number of columns)
    label,
    of_row,  # as in gradient_at
    class_weights,
    scaling,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    start, cols = row
    head, vectors = span_of(start, cols, KIND.vec, KIND.edge)
    first = (start + head) // KIND.vec * KIND.vec
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * KIND.vec + tl.arange(0, KIND.vec)[None, :]
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):  # all loads are issued first, so that they overlap
            x = tl.load(logits + first + (v + u * LANES) * KIND.vec + tile, eviction_policy="evict_first")
            tiles += (x.to(KIND.compute),)
        for u in tl.static_range(UNROLL):
            at = (v + u * LANES) * KIND.vec + tile
            g = gradient_at(tiles[u], at, None, label - head, of_row, class_weights + head, scaling, KIND)
            tl.store(grad + first + at, g.to(grad.dtype.element_ty), eviction_policy="evict_first")
    for v in range(unmasked, vectors, LANES):
        mask = (v + lanes < vectors)[:, None]
        at = v * KIND.vec + tile
        x = tl.load(logits + first + at, mask=mask, other=0.0, eviction_policy="evict_first").to(KIND.compute)
        g = gradient_at(x, at, mask & (at >= 0), label - head, of_row, class_weights + head, scaling, KIND)
        tl.store(grad + first + at, g.to(grad.dtype.element_ty), mask=mask, eviction_policy="evict_first")
    if KIND.edge:
        columns, exists = edge_of(head, vectors, cols, KIND.vec)
        x = tl.load(logits + start + columns, mask=exists, other=0.0).to(KIND.compute)
        g = gradient_at(x, columns, exists, label, of_row, class_weights, scaling, KIND)
        tl.store(grad + start + columns, g.to(grad.dtype.element_ty), mask=exists)


@triton.jit(
    repr=name_of_pass("label_rows"),
    debug=True,
    do_not_specialize=["rows", "ignore_index", "upstream_stride"],
    do_not_specialize_on_alignment=["losses", "saved", "likeliest", "upstream"],
)
def rows_kernel(
    logits,  # (rows, cols), row r at r * stride
    labels,  # (rows,)
    weights,  # class weights, (cols,), if weighted; their mean, (), if weighted and the formula takes mean_log_p
    operands,  # pointers to (rows,)
    losses,  # written in a forward: (2, rows), losses and weights; if not reduced (rows,), only losses
    saved,  # (ahead, rows) unused here; max x, log Σ exp(x - max), mean_log_p, entropy; the sum of the weights
    likeliest,  # (rows,) if KIND.likeliest: the first of the highest columns, -1 if ignored; written in a forward
    grad,  # (rows, cols), row r at r * stride; may be logits: the thread that writes an element has read it before
    upstream,  # of row r at r * upstream_stride
    rows: tl.int64,
    cols,
    stride,
    upstream_stride,
    ignore_index,
    scalars,
    scaling,  # softcap, scale
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    SOFTMAX: tl.constexpr = KIND.slots[1] or KIND.slots[2] or KIND.slots[3] or KIND.slots[4]
    class_weights, mean_weight = weights
    row = tl.program_id(0).to(tl.int64)
    start = row * stride
    saved += KIND.ahead * rows
    scaling = exact(scaling, KIND.compute)
    kept, label = label_of(labels, row, cols, ignore_index)
    loss = tl.zeros((), KIND.compute)
    weight = tl.zeros((), KIND.compute)
    highest = tl.zeros((), KIND.compute)
    log_total = tl.zeros((), KIND.compute)
    mean_log_p = tl.zeros((), KIND.compute)
    entropy = tl.zeros((), KIND.compute)
    best = tl.full((), -1, tl.int32)
    if kept:
        picked = transform(tl.load(logits + start + label).to(KIND.compute), scaling, KIND)
        weight += tl.load(class_weights + label).to(KIND.compute) if KIND.weighted else 1.0
        if SOFTMAX and KIND.forward:
            pivot = tl.where(tl.abs(picked) < float("inf"), picked, 0.0).to(KIND.compute)
            highest, log_total, spread, entropy, best = row_statistics(
                logits, (start, cols), pivot, class_weights, scaling, KIND, LANES, UNROLL
            )
            if KIND.slots[2]:
                rest = pivot - highest - log_total
                if KIND.weighted:
                    rest *= tl.load(mean_weight).to(KIND.compute)
                mean_log_p = spread / cols + rest
        elif SOFTMAX:
            highest += tl.load(saved + row)
            log_total += tl.load(saved + rows + row)
            if KIND.slots[2]:
                mean_log_p += tl.load(saved + 2 * rows + row)
            if KIND.entropy:
                entropy += tl.load(saved + 3 * rows + row)
        values = ()
        for i in tl.static_range(len(operands)):
            values += (tl.load(operands[i] + row).to(KIND.compute),)
        statistics = (picked, (picked - highest) - log_total, mean_log_p, highest + log_total, entropy)
        read, partials = read_formula(FORMULA, statistics, weight, values, exact(scalars, KIND.compute), KIND)
        loss += read
        if KIND.backward:
            factor = tl.load(upstream + row * upstream_stride).to(KIND.compute)
            if KIND.mean:
                factor = factor / tl.load(saved + 4 * rows)
            if KIND.scaled:
                factor *= scaling[1]
            of_row = (highest, log_total, entropy, factors_of(partials, factor, mean_weight, cols, KIND))
            write_gradient(logits, grad, (start, cols), label, of_row, class_weights, scaling, KIND, LANES, UNROLL)
    elif KIND.backward:
        write_zeros(grad, start, cols, KIND.edge, KIND.vec, LANES)
    if KIND.forward:  # ignored rows write too, because nothing else initialises the outputs
        tl.store(losses + row, loss.to(losses.dtype.element_ty))
        if KIND.reduced:
            tl.store(losses + rows + row, weight.to(losses.dtype.element_ty))
        if SOFTMAX:
            tl.store(saved + row, highest)
            tl.store(saved + rows + row, log_total)
        if KIND.slots[2]:
            tl.store(saved + 2 * rows + row, mean_log_p)
        if KIND.entropy:
            tl.store(saved + 3 * rows + row, entropy)
        if KIND.likeliest:
            tl.store(likeliest + row, best.to(likeliest.dtype.element_ty))


rows_launch = Tuned(
    rows_kernel,
    configs=configs,
    rule=rule,
    key=key,
    programs=lambda rows, fixed: rows,
    size="rows",
    bytes_each=bytes_of_row,
    written=("grad",),
)


class Task(NamedTuple):
    """What a pass does: the fields of Kind of the same names."""

    forward: bool = False
    backward: bool = False
    reduced: bool = True
    mean: bool = False
    entropy: bool = False
    likeliest: bool = False
    ahead: int = 0


class RowsPlan(NamedTuple):
    readable: bool  # logits, labels and class weights have the layout that the kernel reads
    wide: torch.dtype
    mean_weight: bool  # whether the kernel needs the mean of the class weights
    launch: Launch | None


@planned
def plan(tensors, problem, task):
    logits, labels, class_weights, upstream, *operands = tensors
    wide, weighted = compute_dtype(logits.dtype), class_weights is not None
    if readable(logits) is not logits or not labels.is_contiguous() or weighted and not class_weights.is_contiguous():
        return RowsPlan(False, wide, False, None)
    formula, (rows, cols) = FORMULAS[problem.formula], logits.shape
    slots, vec = slots_of(formula), 16 // logits.element_size()
    stride = logits.stride(0) if rows > 1 else cols
    state = logits.new_empty(6 * rows + 1, dtype=wide)
    softcap, scale = problem.softcap, problem.scale
    kind = Kind(
        triton_type(wide),
        vec,
        edge=cols % vec != 0 or stride % vec != 0,
        slots=slots,
        weighted=weighted,
        capped=softcap > 0,
        scaled=scale != 1,
        **task._replace(entropy=task.entropy or slots[4] > 0)._asdict(),
    )
    short = short_rows.serves(cols, kind)
    launch = (short_rows.short_rows_launch if short else rows_launch).bind(
        logits=logits,
        labels=labels,
        weights=(class_weights if weighted else logits, state if weighted and slots[2] else logits),
        operands=tuple(operands),
        losses=state if task.reduced or not task.forward else logits.new_empty(rows, dtype=problem.dtype),
        saved=state,
        likeliest=labels.new_empty(rows, dtype=torch.int64) if task.likeliest else labels,
        grad=empty_with_strides(logits) if task.backward else logits,
        upstream=state if upstream is None else upstream,
        rows=rows,
        cols=cols,
        stride=stride,
        upstream_stride=upstream.stride(0) if upstream is not None and upstream.dim() else 0,
        ignore_index=problem.ignore_index,
        scalars=as_scalars(problem.scalars, wide),
        scaling=as_scalars((softcap, scale), wide),
        FORMULA=formula.kernel,
        KIND=kind,
    )
    return RowsPlan(True, wide, weighted and slots[2] > 0, launch)


def prepared(tensors, problem, task, upstream=None, operands=()):
    """The plan; logits and labels in the layout that its kernel reads; the class weights and their mean."""
    logits, labels, class_weights = tensors
    found = plan((*tensors, upstream, *operands), problem, task)
    if not found.readable:
        logits, labels = readable(logits), labels.contiguous()
        class_weights = class_weights if class_weights is None else class_weights.contiguous()
        found = plan((logits, labels, class_weights, upstream, *operands), problem, task)
    if INTERPRET:
        # raises for a label that is no class; on a GPU the kernel asserts
        counted(labels, None, logits.shape[1], problem.ignore_index, torch.float32)
    mean_weight = class_weights.to(found.wide).mean() if found.mean_weight else logits
    return found, logits, labels, (logits if class_weights is None else class_weights, mean_weight)


OF_REDUCED = Task(forward=True, ahead=2)
OF_EACH = Task(forward=True, reduced=False, ahead=2)
BACKWARD = Task(backward=True, ahead=2)
BACKWARD_OF_MEAN = Task(backward=True, mean=True, ahead=2)


def forward(tensors, problem):
    logits = tensors[0]
    if logits.dim() == 3:
        return label_planes.forward(tensors, problem)
    rows, none = logits.shape[0], problem.reduction == "none"
    out = logits.new_empty(rows if none else (), dtype=problem.dtype)
    if shapes_only():
        return [out], [logits.new_empty(6 * rows + 1, dtype=compute_dtype(logits.dtype))]
    found, logits, labels, weights = prepared(tensors, problem, OF_EACH if none else OF_REDUCED)
    state = logits.new_empty(6 * rows + 1, dtype=found.wide)
    losses = out if none else state
    found.launch(logits, labels, weights, (), losses, state, labels, logits, state, rows)
    if not none:
        finish(state, out, rows, weights_at=6, mean=problem.reduction == "mean")
    return [out], [state]


def backward(tensors, saved, upstream, problem, wanted):
    logits = tensors[0]
    if logits.dim() == 3:
        return label_planes.backward(tensors, saved, upstream, problem)
    if shapes_only():
        return [logits.new_empty(logits.shape)]
    (state,), (dout,) = saved, upstream
    task = BACKWARD_OF_MEAN if problem.reduction == "mean" else BACKWARD
    found, logits, labels, weights = prepared(tensors, problem, task, dout)
    grad = empty_with_strides(logits)
    found.launch(logits, labels, weights, (), state, state, labels, grad, dout, logits.shape[0])
    return [grad]


def walk(tensors, problem, task):
    """Run one Pass. The rows of the logits must not need a copy."""
    saved, forward, entropy, likeliest, grad, upstream, operands, _ = task
    kind = Task(forward, grad is not None, True, False, entropy, likeliest is not None)
    found, logits, labels, weights = prepared(tensors, problem, kind, upstream, operands)
    rows = logits.shape[0]
    losses = saved.new_empty(2, rows) if forward else saved
    found.launch(
        logits,
        labels,
        weights,
        tuple(operands),
        losses,
        saved,
        labels if likeliest is None else likeliest,
        logits if grad is None else grad,
        saved if upstream is None else upstream,
        rows,
    )
    return losses.unbind(0) if forward else (None, None)


def statistics_forward(tensors, problem):
    logits, labels = tensors
    saved = logits.new_empty(4, logits.shape[0], dtype=compute_dtype(logits.dtype))
    if shapes_only():
        return [torch.empty_like(saved[0]), torch.empty_like(saved[0])], [saved]
    log_p, _ = walk((*tensors, None), problem, Pass(saved, forward=True))
    return [log_p.clone(), torch.where(labels != problem.ignore_index, saved[3], 0)], [saved]


def statistics_backward(tensors, saved, upstream, problem, wanted):
    logits = tensors[0]
    if shapes_only():
        return [logits.new_empty(logits.shape)]
    logits = readable(logits)
    grad = empty_with_strides(logits)
    task = Pass(saved[0], grad=grad, upstream=torch.ones_like(upstream[0]), operands=upstream)
    walk((logits, tensors[1], None), problem._replace(formula="along"), task)
    return [grad]
