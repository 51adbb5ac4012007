"""Kernels of short rows and their labels: each program reads several rows at once, each one whole in registers.

The arguments are those of label_rows.py's kernel, which has one program per row: with rows this short, it would wait
for memory longer than it reads. For a formula that takes only `picked`, the forward reads one number per row, so a
program has as many rows as threads.
"""

import triton
import triton.language as tl

from triton_losses.core.compiler import WARP
from triton_losses.core.device_math import exact, exp
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.rows import (
    LOWEST,
    LOWEST_DOUBLE,
    bytes_of_row,
    factors_of,
    gradient_at,
    key,
    name_of_pass,
    read_formula,
    transform,
    weighted_sum,
)

LONGEST = 4096  # most columns of a short row


@triton.jit(
    repr=name_of_pass("short_rows"),
    debug=True,
    do_not_specialize=["rows", "ignore_index", "upstream_stride"],
    do_not_specialize_on_alignment=["losses", "saved", "likeliest", "upstream"],
)
def short_rows_kernel(
    # the arguments are as in label_rows.py
    logits,
    labels,
    weights,
    operands,
    losses,
    saved,
    likeliest,
    grad,
    upstream,
    rows: tl.int64,
    cols,
    stride,
    upstream_stride,
    ignore_index,
    scalars,
    scaling,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SOFTMAX: tl.constexpr = KIND.slots[1] or KIND.slots[2] or KIND.slots[3] or KIND.slots[4]
    class_weights, mean_weight = weights
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    read = tl.minimum(row, rows - 1)  # beyond the last row, the last row is read again and nothing is written
    saved += KIND.ahead * rows
    scaling = exact(scaling, KIND.compute)
    start = read * stride
    label = tl.load(labels + read).to(tl.int64)
    fits = (label >= 0) & (label < cols)
    tl.device_assert(fits | (label == ignore_index), "a target is out of bounds: it is no class and not ignore_index")
    kept = exists & (label != ignore_index)
    place = tl.where(fits, label, 0).to(tl.int32)
    picked = transform(tl.load(logits + start + place, mask=kept, other=0.0).to(KIND.compute), scaling, KIND)
    weight = tl.where(kept, 1.0, 0.0).to(KIND.compute)
    if KIND.weighted:
        weight = tl.load(class_weights + place, mask=kept, other=0.0).to(KIND.compute)
    highest = tl.zeros((ROWS,), KIND.compute)
    log_total = highest
    mean_log_p = highest
    entropy = highest
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < cols
    at = start[:, None] + columns
    if SOFTMAX:
        loaded = tl.load(logits + at, mask=inside & kept[:, None], other=0.0).to(KIND.compute)
    else:
        loaded = tl.zeros((ROWS, BLOCK), KIND.compute)
    if SOFTMAX and KIND.forward:
        x = tl.where(inside, transform(loaded, scaling, KIND), -float("inf"))
        top = tl.max(x, 1)
        highest = tl.maximum(top, LOWEST_DOUBLE if KIND.compute == tl.float64 else LOWEST)
        raised = exp(x - highest[:, None])
        total = tl.sum(raised, 1)
        log_total = tl.log(total)
        if KIND.slots[2]:
            pivot = tl.where(tl.abs(picked) < float("inf"), picked, 0.0).to(KIND.compute)
            spread = tl.sum(weighted_sum(x, columns, inside, class_weights, pivot[:, None], KIND), 1)
            rest = pivot - highest - log_total
            if KIND.weighted:
                rest *= tl.load(mean_weight).to(KIND.compute)
            mean_log_p = spread / cols + rest
        if KIND.entropy:
            d = tl.maximum(x - highest[:, None], LOWEST)  # finite, because 0 · -inf is nan
            entropy = log_total - tl.sum(raised * d, 1) / total
        if KIND.likeliest:
            first = tl.min(tl.where(inside & (x == top[:, None]), columns, cols - 1), 1)
            tl.store(likeliest + row, tl.where(kept, first, -1).to(likeliest.dtype.element_ty), mask=exists)
    elif SOFTMAX:
        highest = tl.load(saved + read)
        log_total = tl.load(saved + rows + read)
        if KIND.slots[2]:
            mean_log_p = tl.load(saved + 2 * rows + read)
        if KIND.entropy:
            entropy = tl.load(saved + 3 * rows + read)
    values = ()
    for i in tl.static_range(len(operands)):
        values += (tl.load(operands[i] + read).to(KIND.compute),)
    statistics = (picked, (picked - highest) - log_total, mean_log_p, highest + log_total, entropy)
    loss, partials = read_formula(FORMULA, statistics, weight, values, exact(scalars, KIND.compute), KIND)
    if KIND.forward:
        loss = tl.where(kept, loss, 0.0)
        tl.store(losses + row, loss.to(losses.dtype.element_ty), mask=exists)
        if KIND.reduced:
            tl.store(losses + rows + row, weight.to(losses.dtype.element_ty), mask=exists)
        if SOFTMAX:
            tl.store(saved + row, tl.where(kept, highest, 0.0), mask=exists)
            tl.store(saved + rows + row, tl.where(kept, log_total, 0.0), mask=exists)
        if KIND.slots[2]:
            tl.store(saved + 2 * rows + row, tl.where(kept, mean_log_p, 0.0), mask=exists)
        if KIND.entropy:
            tl.store(saved + 3 * rows + row, tl.where(kept, entropy, 0.0), mask=exists)
    if KIND.backward:
        factor = tl.load(upstream + read * upstream_stride).to(KIND.compute)
        if KIND.mean:
            factor = factor / tl.load(saved + 4 * rows)
        if KIND.scaled:
            factor *= scaling[1]
        softmax, at_label, uniform, by_entropy = factors_of(partials, factor, mean_weight, cols, KIND)
        factors = (softmax[:, None], at_label[:, None], uniform[:, None], by_entropy[:, None])
        of_row = (highest[:, None], log_total[:, None], entropy[:, None], factors)
        if KIND.capped and not SOFTMAX:
            loaded = tl.load(logits + at, mask=inside & kept[:, None], other=0.0).to(KIND.compute)
        g = gradient_at(loaded, columns, inside, place[:, None], of_row, class_weights, scaling, KIND)
        g = tl.where(kept[:, None], g, 0.0)  # ignored rows get 0 even if their logits are nan
        tl.debug_barrier()  # grad may be the logits: all threads must have read their labels' logits first
        tl.store(grad + at, g.to(grad.dtype.element_ty), mask=inside & exists[:, None])


def config(args, elements, warps):
    if reads_one_number(args["KIND"]):
        return {"ROWS": warps * WARP, "BLOCK": 1, "num_warps": warps}
    block = triton.next_power_of_2(max(args["cols"], 1))
    # at most one row per thread: more would not fit in its registers
    rows = min(max(elements // block, 1), warps * WARP)
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps}


def reads_one_number(kind):
    """Whether the kernel reads only one number per row: the logit of its label."""
    return kind.forward and not kind.backward and not any(kind.slots[1:5])


def configs(args):
    return [config(args, *choice) for choice in ((4096, 4), (2048, 4), (4096, 8), (8192, 8))]


short_rows_launch = Tuned(
    short_rows_kernel,
    configs=configs,
    rule=lambda args: config(args, 4096 if args["KIND"].compute == tl.float32 else 2048, 4),
    key=key,
    programs=lambda rows, fixed: -(-rows // fixed["ROWS"]),
    size="rows",
    bytes_each=bytes_of_row,
    written=("grad",),
)


def serves(cols, kind):
    """Whether the rows are short enough, or the kernel reads only one number per row."""
    return 0 < cols <= LONGEST or reads_one_number(kind)
