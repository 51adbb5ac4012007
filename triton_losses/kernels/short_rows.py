"""Short rows and their labels by kernels: one program is several rows, side by side, each in registers as a whole.

The arguments are those of label_rows.py's kernel, which has one row a program: of rows this short it would wait more
than read. A formula that takes `picked` alone reads one number a row: its forward has as many rows a program as
threads.
"""

import triton
import triton.language as tl

from triton_losses.core.compiler import WARP
from triton_losses.core.device_math import exact, exp
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import name_of
from triton_losses.kernels.rows import (
    LOWEST,
    LOWEST_DOUBLE,
    factors_of,
    gradient_at,
    key,
    read_formula,
    sample,
    transform,
    weighted_sum,
)

LONGEST = 4096  # columns of a short row


def name_of_pass(spec):
    forward, backward = (bool(spec.constants[name]) for name in ("FORWARD", "BACKWARD"))
    return name_of(f"short_rows_{'both' if forward and backward else 'forward' if forward else 'backward'}")(spec)


@triton.jit(
    repr=name_of_pass,
    debug=True,
    do_not_specialize=["rows", "ignore_index", "upstream_stride"],
    do_not_specialize_on_alignment=["losses", "saved", "likeliest", "upstream"],
)
def short_rows_kernel(
    # as in label_rows.py
    logits,
    labels,
    class_weights,
    mean_weight,
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
    shape,
    FORMULA: tl.constexpr,
    SLOTS: tl.constexpr,
    AHEAD: tl.constexpr,
    ENTROPY: tl.constexpr,
    LIKELIEST: tl.constexpr,
    FORWARD: tl.constexpr,
    REDUCED: tl.constexpr,
    BACKWARD: tl.constexpr,
    MEAN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SOFTMAX: tl.constexpr = SLOTS[1] or SLOTS[2] or SLOTS[3] or SLOTS[4]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    read = tl.minimum(row, rows - 1)  # what lies beyond the last row is the last row again, and not written
    saved += AHEAD * rows
    shape = exact(shape, COMPUTE)
    start = read * stride
    label = tl.load(labels + read).to(tl.int64)
    fits = (label >= 0) & (label < cols)
    tl.device_assert(fits | (label == ignore_index), "a target is out of bounds: it is no class and not ignore_index")
    kept = exists & (label != ignore_index)
    place = tl.where(fits, label, 0).to(tl.int32)
    picked = transform(tl.load(logits + start + place, mask=kept, other=0.0).to(COMPUTE), shape, CAPPED, SCALED)
    weight = tl.where(kept, 1.0, 0.0).to(COMPUTE)
    if WEIGHTED:
        weight = tl.load(class_weights + place, mask=kept, other=0.0).to(COMPUTE)
    highest = tl.zeros((ROWS,), COMPUTE)
    log_total = highest
    mean_log_p = highest
    entropy = highest
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < cols
    at = start[:, None] + columns
    if SOFTMAX:
        loaded = tl.load(logits + at, mask=inside & kept[:, None], other=0.0).to(COMPUTE)
    else:
        loaded = tl.zeros((ROWS, BLOCK), COMPUTE)
    if SOFTMAX and FORWARD:
        x = tl.where(inside, transform(loaded, shape, CAPPED, SCALED), -float("inf"))
        top = tl.max(x, 1)
        highest = tl.maximum(top, LOWEST_DOUBLE if COMPUTE == tl.float64 else LOWEST)
        raised = exp(x - highest[:, None])
        total = tl.sum(raised, 1)
        log_total = tl.log(total)
        if SLOTS[2]:
            pivot = tl.where(tl.abs(picked) < float("inf"), picked, 0.0).to(COMPUTE)
            spread = tl.sum(weighted_sum(x, columns, inside, class_weights, pivot[:, None], WEIGHTED), 1)
            rest = pivot - highest - log_total
            if WEIGHTED:
                rest *= tl.load(mean_weight).to(COMPUTE)
            mean_log_p = spread / cols + rest
        if ENTROPY:
            d = tl.maximum(x - highest[:, None], LOWEST)  # finite, for 0 · -inf is nan
            entropy = log_total - tl.sum(raised * d, 1) / total
        if LIKELIEST:
            first = tl.min(tl.where(inside & (x == top[:, None]), columns, cols - 1), 1)
            tl.store(likeliest + row, tl.where(kept, first, -1).to(likeliest.dtype.element_ty), mask=exists)
    elif SOFTMAX:
        highest = tl.load(saved + read)
        log_total = tl.load(saved + rows + read)
        if SLOTS[2]:
            mean_log_p = tl.load(saved + 2 * rows + read)
        if ENTROPY:
            entropy = tl.load(saved + 3 * rows + read)
    values = ()
    for i in tl.static_range(len(operands)):
        values += (tl.load(operands[i] + read).to(COMPUTE),)
    statistics = (picked, (picked - highest) - log_total, mean_log_p, highest + log_total, entropy)
    loss, partials = read_formula(FORMULA, SLOTS, statistics, weight, values, exact(scalars, COMPUTE))
    if FORWARD:
        loss = tl.where(kept, loss, 0.0)
        tl.store(losses + row, loss.to(losses.dtype.element_ty), mask=exists)
        if REDUCED:
            tl.store(losses + rows + row, weight.to(losses.dtype.element_ty), mask=exists)
        if SOFTMAX:
            tl.store(saved + row, tl.where(kept, highest, 0.0), mask=exists)
            tl.store(saved + rows + row, tl.where(kept, log_total, 0.0), mask=exists)
        if SLOTS[2]:
            tl.store(saved + 2 * rows + row, tl.where(kept, mean_log_p, 0.0), mask=exists)
        if ENTROPY:
            tl.store(saved + 3 * rows + row, tl.where(kept, entropy, 0.0), mask=exists)
    if BACKWARD:
        factor = tl.load(upstream + read * upstream_stride).to(COMPUTE)
        if MEAN:
            factor = factor / tl.load(saved + 4 * rows)
        if SCALED:
            factor *= shape[1]
        softmax_factor, label_factor, uniform_factor, entropy_factor = factors_of(
            partials, factor, mean_weight, cols, SLOTS, WEIGHTED
        )
        factors = (softmax_factor[:, None], label_factor[:, None], uniform_factor[:, None], entropy_factor[:, None])
        if CAPPED and not SOFTMAX:
            loaded = tl.load(logits + at, mask=inside & kept[:, None], other=0.0).to(COMPUTE)
        g = gradient_at(
            loaded,
            columns,
            inside,
            highest[:, None],
            log_total[:, None],
            entropy[:, None],
            factors,
            place[:, None],
            class_weights,
            shape,
            SLOTS,
            WEIGHTED,
            CAPPED,
            SCALED,
        )
        g = tl.where(kept[:, None], g, 0.0)  # whatever stood there, nan too
        tl.debug_barrier()  # grad may be the logits, of which every thread has read its label's by now
        tl.store(grad + at, g.to(grad.dtype.element_ty), mask=inside & exists[:, None])


def config(args, elements, warps):
    if args["FORWARD"] and not args["BACKWARD"] and not any(args["SLOTS"][1:5]):
        return {"ROWS": warps * WARP, "BLOCK": 1, "num_warps": warps}
    block = triton.next_power_of_2(max(args["cols"], 1))
    # a thread has one row at most: more would not fit its registers
    rows = min(max(elements // block, 1), warps * WARP)
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps}


def configs(args):
    return [config(args, *choice) for choice in ((4096, 4), (2048, 4), (4096, 8), (8192, 8))]


short_rows_launch = Tuned(
    short_rows_kernel,
    configs=configs,
    rule=lambda args: config(args, 4096 if args["COMPUTE"] == tl.float32 else 2048, 4),
    key=key,
    programs=lambda rows, fixed: -(-rows // fixed["ROWS"]),
    size="rows",
    sample=sample,
    written=("grad",),
)


def serves(cols, task, slots):
    """Whether rows are short enough; or nothing but each row's picked number is read."""
    return 0 < cols <= LONGEST or task.forward and not task.backward and not any(slots[1:5])
