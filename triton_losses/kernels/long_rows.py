"""The kernel of long rows and their labels: a program reads one row at a time.

There is one program per row. Or, if a row is read twice, once for its statistics and once for its gradient
(``Kind.in_turn``), there are fewer programs, and each takes one row after another: the second read finds the row in the
L2 cache if all rows that are being read at the same time fit there together.
"""

import triton
import triton.language as tl

from triton_losses.core.compiler import WARP
from triton_losses.core.device_math import exact
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.rows import (
    bytes_of_row,
    config,
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


@triton.jit
def read_row(
    row, tensors, sizes, numbers, FORMULA: tl.constexpr, KIND: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr
):
    """One row's loss, its gradient, or both. tensors, sizes, numbers: the arguments of rows_kernel."""
    SOFTMAX: tl.constexpr = KIND.slots[1] or KIND.slots[2] or KIND.slots[3] or KIND.slots[4]
    logits, labels, weights, operands, losses, saved, likeliest, grad, upstream = tensors
    rows, cols, stride, upstream_stride, ignore_index = sizes
    class_weights, mean_weight = weights
    scalars, scaling = numbers
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
    tensors = (logits, labels, weights, operands, losses, saved, likeliest, grad, upstream)
    sizes = (rows, cols, stride, upstream_stride, ignore_index)
    first = tl.program_id(0).to(tl.int64)
    if KIND.in_turn:
        for row in range(first, rows, tl.num_programs(0)):
            read_row(row, tensors, sizes, (scalars, scaling), FORMULA, KIND, LANES, UNROLL)
    else:
        read_row(first, tensors, sizes, (scalars, scaling), FORMULA, KIND, LANES, UNROLL)


MULTIPROCESSORS, L2_BYTES = 132, 30 << 20  # of an H100 or H200; of its L2 cache what rows can count on


def programs_in_turn(args):
    """How many programs a multiprocessor runs, and all: as many as the rows that fit in the L2 cache together."""
    row_bytes = triton.next_power_of_2(args["cols"]) * 16 // args["KIND"].vec
    fit = max(1, L2_BYTES // row_bytes)
    of_each = max(1, min(8, fit // MULTIPROCESSORS))
    return of_each, min(fit, of_each * MULTIPROCESSORS)


def config_in_turn(args, warps, unroll):
    """For up to so many warps on each multiprocessor, which read so many vectors at a time (per 32 threads)."""
    of_each, _ = programs_in_turn(args)
    return config(min(triton.next_power_of_2(warps // of_each + 1) // 2, 1024 // WARP), max(unroll * 32 // WARP, 1))


IN_TURN = ((32, 4), (32, 2), (64, 2), (16, 4))  # 64 kB in flight on a multiprocessor, or half of it


rows_launch = Tuned(
    rows_kernel,
    configs=lambda args: [config_in_turn(args, *c) for c in IN_TURN] if args["KIND"].in_turn else configs(args),
    rule=lambda args: config_in_turn(args, *IN_TURN[0]) if args["KIND"].in_turn else rule(args),
    key=lambda args: (*key(args), "in turn") if args["KIND"].in_turn else key(args),
    programs=lambda rows, fixed: min(rows, programs_in_turn(fixed)[1]) if fixed["KIND"].in_turn else rows,
    size="rows",
    bytes_each=bytes_of_row,
    written=("grad",),
)
