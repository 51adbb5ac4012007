"""Two kernels for a gradient that the forward makes (Problem.gradient_in_forward).

mean_factor   before: 1 / Σ weights, which the gradient of a mean is multiplied by
scale_rows    in the backward: multiplies rows by the upstream gradient, in place. It touches only rows whose factor
              is not 1; ``loss.backward()`` passes 1, and only the device knows whether it is
"""

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.plan import planned
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import triton_type
from triton_losses.kernels.finish import ALONE


@triton.jit(
    repr=lambda spec: "mean_factor",
    do_not_specialize=["rows", "ignore_index"],
    do_not_specialize_on_alignment=["out"],
)
def mean_factor_kernel(
    labels,  # (rows,)
    class_weights,  # (cols,) if WEIGHTED
    out,  # ()
    rows: tl.int64,
    cols,
    ignore_index,
    WEIGHTED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program, which adds in float64 as finish.py does: the forward's mean divides by the same number."""
    total = tl.zeros((BLOCK,), tl.float64)
    lanes = tl.arange(0, BLOCK)
    for first in range(0, rows, BLOCK):
        exists = first + lanes < rows
        label = tl.load(labels + first + lanes, mask=exists, other=0).to(tl.int64)
        counts = exists & (label != ignore_index)
        if WEIGHTED:
            counts = counts & (label >= 0) & (label < cols)  # the kernel of rows reports a label that is no class
            total += tl.load(class_weights + label, mask=counts, other=0.0).to(COMPUTE).to(tl.float64)
        else:
            total += counts.to(tl.float64)
    tl.store(out, 1.0 / tl.sum(total, 0).to(COMPUTE))


mean_factor_launch = Tuned(
    mean_factor_kernel,
    configs=lambda args: [],
    rule=lambda args: {"BLOCK": 1024, "num_warps": 8},
    key=lambda args: (),
    size="rows",
    programs=lambda rows, fixed: 1,
)


@planned
def plan_of_factor(tensors, ignore_index, cols):
    labels, class_weights, out = tensors
    return mean_factor_launch.bind(
        labels=labels,
        class_weights=class_weights if cols else labels,
        out=out,
        rows=1,
        cols=cols,
        ignore_index=ignore_index,
        WEIGHTED=cols > 0,
        COMPUTE=triton_type(out.dtype),
    )


def mean_factor(labels, class_weights, ignore_index, dtype):
    """1 / Σ weights of the rows whose labels count, (); labels and class weights are contiguous."""
    out = torch.empty((), dtype=dtype, device=labels.device)
    if labels.shape[0] <= ALONE:
        weights, cols = (labels, 0) if class_weights is None else (class_weights, class_weights.shape[0])
        plan_of_factor((labels, class_weights, out), ignore_index, cols)(labels, weights, out, labels.shape[0])
        return out
    weights = labels != ignore_index
    if class_weights is not None:
        weights = torch.where(weights, class_weights.to(dtype)[torch.where(weights, labels, 0).long()], 0)
    return weights.sum(dtype=torch.float64).to(dtype).reciprocal_()


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
