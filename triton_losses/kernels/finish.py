"""The kernel that finishes a reduced loss: it adds up another kernel's partial sums in a fixed order."""

import torch
import triton
import triton.language as tl

from triton_losses.core.plan import flat_kinds_of, planned
from triton_losses.core.tuning import Tuned

ALONE = 1 << 16  # most numbers that the one program adds up; torch.sum, with many programs, first shortens longer ones


@triton.jit(repr=lambda spec: "finish", do_not_specialize=["count", "divisor"])
def finish_kernel(
    parts,  # (count,) sums of losses; if WEIGHTS_AT followed by (count,) sums of their weights
    out,  # () the loss
    divisor: tl.int64,  # used if MEAN and there are no weights
    count: tl.int64,
    WEIGHTS_AT: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds in float64, so a float32 result is rounded once. Writes the weights' sum to parts[WEIGHTS_AT * count]."""
    total = tl.zeros((BLOCK,), tl.float64)
    weights = tl.zeros((BLOCK,), tl.float64)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, count, BLOCK):
        mask = start + lanes < count
        total += tl.load(parts + start + lanes, mask=mask, other=0.0).to(tl.float64)
        if WEIGHTS_AT:
            weights += tl.load(parts + count + start + lanes, mask=mask, other=0.0).to(tl.float64)
    loss = tl.sum(total, 0)
    if WEIGHTS_AT:
        weight = tl.sum(weights, 0)
        tl.store(parts + WEIGHTS_AT * count, weight.to(parts.dtype.element_ty))
        if MEAN:
            loss = loss / weight
    elif MEAN:
        loss = loss / divisor
    if out.dtype.element_ty != tl.float64:
        loss = loss.to(tl.float32)  # the interpreter cannot convert float64 to bfloat16
    tl.store(out, loss.to(out.dtype.element_ty))


finish_launch = Tuned(
    finish_kernel,
    configs=lambda args: [],
    rule=lambda args: {"BLOCK": 1024, "num_warps": 8},
    key=lambda args: (),
    programs=lambda count, fixed: 1,
    size="count",
)


@planned(kinds=flat_kinds_of)
def plan(tensors, weights_at, mean):
    parts, out = tensors
    return finish_launch.bind(parts=parts, out=out, divisor=1, count=1, WEIGHTS_AT=weights_at, MEAN=mean)


def finish(parts, out, count, weights_at=0, mean=False, divisor=0):
    """Add up the first ``count`` of ``parts`` into ``out``.

    weights_at: unless 0, parts continues with ``count`` weights, and their sum is written to parts[weights_at * count].
    mean: out is divided by that sum or, if there are no weights, by the divisor.
    """
    if count > ALONE:
        runs = -(-count // ALONE)
        short = parts.new_zeros(2 * runs + 1)
        for i in range(2 if weights_at else 1):
            whole = count // ALONE
            these = parts[i * count : (i + 1) * count]
            torch.sum(these[: whole * ALONE].view(whole, ALONE), 1, out=short[i * runs : i * runs + whole])
            if whole < runs:
                torch.sum(these[whole * ALONE :], 0, out=short[i * runs + whole])
        finish(short, out, runs, 2 if weights_at else 0, mean, divisor)
        if weights_at:
            parts[weights_at * count] = short[2 * runs]
    else:
        plan((parts, out), weights_at, mean)(parts, out, divisor, count)
