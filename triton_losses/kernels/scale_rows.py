"""The kernel that multiplies rows by a factor in place, but touches only rows whose factor is not 1.

A gradient that the forward made is right if the upstream gradient is 1, as ``loss.backward()`` passes it. Only the
device knows whether it is.
"""

import triton
import triton.language as tl

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.plan import planned
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import triton_type

ELEMENTS = 2048  # that a program reads at once


@triton.jit(
    repr=lambda spec: "scale_rows",
    do_not_specialize=["rows", "factor_stride"],
    do_not_specialize_on_alignment=["factors"],
)
def scale_rows_kernel(
    values,  # (rows, cols), row r at r * stride
    factors,  # of row r at r * factor_stride
    rows: tl.int64,
    cols,
    stride,
    factor_stride,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    factor = tl.load(factors + row * factor_stride, mask=row < rows, other=1.0).to(COMPUTE)
    changes = factor != 1.0  # true for nan
    if tl.max(changes.to(tl.int32), 0) > 0:
        for first in range(0, cols, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            at = values + row[:, None] * stride + columns[None, :]
            mask = changes[:, None] & (columns < cols)[None, :]
            x = tl.load(at, mask=mask).to(COMPUTE) * factor[:, None]
            tl.store(at, x.to(values.dtype.element_ty), mask=mask)


def rule(args):
    block = min(triton.next_power_of_2(max(args["cols"], 1)), ELEMENTS)
    return {"ROWS": ELEMENTS // block, "BLOCK": block, "num_warps": 4}


scale_rows_launch = Tuned(
    scale_rows_kernel,
    configs=lambda args: [],
    rule=rule,
    key=lambda args: (),
    size="rows",
    programs=lambda rows, fixed: -(-rows // fixed["ROWS"]),
)


@planned
def plan(tensors):
    values, factors = tensors
    rows, cols = values.shape
    return scale_rows_launch.bind(
        values=values,
        factors=factors,
        rows=rows,
        cols=cols,
        stride=values.stride(0) if rows > 1 else cols,
        factor_stride=factors.stride(0) if factors.dim() else 0,
        COMPUTE=triton_type(compute_dtype(values.dtype)),
    )


def scale_rows(values, factors):
    """Multiply the rows of values (rows, cols) by factors, () or (rows,), in place."""
    plan((values, factors))(values, factors, values.shape[0])
