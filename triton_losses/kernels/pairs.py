"""Kernels of losses of pairs of vectors: each program reads a few rows together, in blocks of columns.

A thread reads vectors of 16 bytes if every row starts at a multiple of them, otherwise single numbers. Each thread
keeps its own sums until the row ends, so threads exchange sums once per row, not once per block.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import WARP
from triton_losses.core.device_math import as_scalars, exact, load_zeros
from triton_losses.core.formula import FORMULAS
from triton_losses.core.launch import Launch
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import planned
from triton_losses.core.reduction import given, widest
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import triton_type
from triton_losses.kernels.finish import finish

VECTOR = 16  # bytes


class Kind(NamedTuple):
    """Compile-time parameters of the kernels, besides the formulas of a coordinate and of a row."""

    compute: tl.dtype
    vec: int  # numbers that a thread loads at once
    pairs: tuple  # indices of vectors, two for each pair
    targeted: bool
    ahead: int  # numbers per row before the sums
    mean: bool = False
    wanted: tuple = ()  # for each vector, whether its gradient is wanted
    want_target: bool = False


@triton.jit
def tiles_of(vectors, strides, row, columns, mask, KIND: tl.constexpr):
    """Load a tile (ROWS, BLOCK) of each vector; zeros outside the mask."""
    values = ()
    for i in tl.static_range(len(vectors)):
        at = row[:, None] * (strides[i] * KIND.vec) + columns[None, :]
        values += (load_zeros(vectors[i] + at, mask).to(KIND.compute),)
    return values


@triton.jit
def add_tiles(totals, values, mask, scalars, FORMULA: tl.constexpr, KIND: tl.constexpr):
    """Add g of each pair of tiles to its sum; nothing outside the mask."""
    new = ()
    for k in tl.static_range(len(totals)):
        g = FORMULA(values[KIND.pairs[2 * k]], values[KIND.pairs[2 * k + 1]], *scalars)[0]
        if mask is not None:
            g = tl.where(mask, g, 0.0)
        new += (totals[k] + g,)
    return new


def direction(which):
    return lambda spec: f"pairs_{which}_{spec.constants['LOSS'].__name__}"


@triton.jit(
    repr=direction("forward"), do_not_specialize=["rows"], do_not_specialize_on_alignment=["target", "losses", "sums"]
)
def forward_kernel(
    vectors,  # pointers to (rows, cols), row r of the i-th at r * strides[i] * vec
    target,  # (rows,) where targeted
    losses,  # (rows,)
    sums,  # (ahead, rows) unused here, then (pairs, rows)
    rows: tl.int64,
    cols,
    strides,
    scalars,
    loss_scalars,
    FORMULA: tl.constexpr,
    LOSS: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    read = tl.minimum(row, rows - 1)  # beyond the last row, the last row is read again and nothing is written
    lanes = tl.arange(0, BLOCK)
    COUNT: tl.constexpr = len(KIND.pairs) // 2
    values_of = exact(scalars, KIND.compute)
    totals = ()
    for _ in tl.static_range(COUNT):
        totals += (tl.zeros((ROWS, BLOCK), KIND.compute),)
    whole = cols // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        values = tiles_of(vectors, strides, read, start + lanes, None, KIND)
        totals = add_tiles(totals, values, None, values_of, FORMULA, KIND)
    for start in range(whole, cols, BLOCK):
        mask = ((start + lanes) // KIND.vec < cols // KIND.vec)[None, :]  # a mask of whole vectors keeps loads wide
        values = tiles_of(vectors, strides, read, start + lanes, mask, KIND)
        totals = add_tiles(totals, values, mask, values_of, FORMULA, KIND)
    values = ()
    for k in tl.static_range(COUNT):
        values += (tl.sum(totals[k], 1),)
        tl.store(sums + (KIND.ahead + k) * rows + row, values[k], mask=row < rows)
    if KIND.targeted:
        values += (tl.load(target + read).to(KIND.compute),)
    loss = LOSS(*values, *exact(loss_scalars, KIND.compute))[0]
    tl.store(losses + row, loss.to(losses.dtype.element_ty), mask=row < rows)


@triton.jit
def store_gradients(values, grads, at, mask, slopes, scalars, FORMULA: tl.constexpr, KIND: tl.constexpr):
    """Write one tile of the gradient of each vector that wants one."""
    for i in tl.static_range(len(grads)):
        if KIND.wanted[i]:
            total = tl.zeros_like(values[i])
            for k in tl.static_range(len(slopes)):
                out = FORMULA(values[KIND.pairs[2 * k]], values[KIND.pairs[2 * k + 1]], *scalars)
                if KIND.pairs[2 * k] == i:
                    total += out[1] * slopes[k]
                if KIND.pairs[2 * k + 1] == i:
                    total += out[2] * slopes[k]
            tl.store(grads[i] + at, total.to(grads[i].dtype.element_ty), mask=mask)


@triton.jit(
    repr=direction("backward"),
    do_not_specialize=["rows", "dout_stride"],
    do_not_specialize_on_alignment=["target", "sums", "dout", "grad_target"],
)
def backward_kernel(
    vectors,  # pointers to (rows, cols), row r of the i-th at r * strides[i] * vec
    target,  # (rows,) where targeted
    sums,  # (ahead, rows) unused here, then (pairs, rows)
    dout,  # of row r at r * dout_stride
    grads,  # pointers to (rows, cols), contiguous, one per vector; written if wanted
    grad_target,  # (rows,), written if want_target
    rows: tl.int64,
    cols,
    strides,
    dout_stride,
    scalars,
    loss_scalars,
    FORMULA: tl.constexpr,
    LOSS: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    read = tl.minimum(row, rows - 1)
    lanes = tl.arange(0, BLOCK)
    COUNT: tl.constexpr = len(KIND.pairs) // 2
    values_of = exact(scalars, KIND.compute)
    factor = tl.load(dout + read * dout_stride).to(KIND.compute)
    if KIND.mean:
        factor = factor / tl.cast(rows, KIND.compute)
    operands = ()
    for k in tl.static_range(COUNT):
        operands += (tl.load(sums + (KIND.ahead + k) * rows + read),)
    if KIND.targeted:
        operands += (tl.load(target + read).to(KIND.compute),)
    out = LOSS(*operands, *exact(loss_scalars, KIND.compute))
    slopes = ()
    for k in tl.static_range(COUNT):
        slopes += ((out[1 + k] * factor)[:, None],)
    if KIND.want_target:
        tl.store(grad_target + row, (out[1 + COUNT] * factor).to(grad_target.dtype.element_ty), mask=row < rows)
    exists = (row < rows)[:, None]
    first = row[:, None] * (cols // KIND.vec * KIND.vec)
    whole = cols // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        columns = start + lanes
        values = tiles_of(vectors, strides, read, columns, None, KIND)
        store_gradients(values, grads, first + columns[None, :], exists, slopes, values_of, FORMULA, KIND)
    for start in range(whole, cols, BLOCK):
        columns = start + lanes
        mask = (columns // KIND.vec < cols // KIND.vec)[None, :]
        values = tiles_of(vectors, strides, read, columns, mask, KIND)
        store_gradients(values, grads, first + columns[None, :], exists & mask, slopes, values_of, FORMULA, KIND)


def key(args):
    vectors, kind = args["vectors"], args["KIND"]
    aligned = all(v.data_ptr() % VECTOR == 0 for v in vectors)
    dtypes = tuple(str(v.dtype) for v in vectors)
    formulas = args["FORMULA"].__name__, args["LOSS"].__name__
    return *formulas, triton.next_power_of_2(args["cols"]), *dtypes, aligned, kind.pairs, kind.vec, kind.wanted


def bytes_of_row(args):
    return args["cols"] * sum(v.element_size() for v in args["vectors"])


def config(args, warps, each):
    """Tiles of ``each`` numbers per thread."""
    block = min(triton.next_power_of_2(max(args["cols"], 1)), warps * WARP * each)
    return {"ROWS": warps * WARP * each // block, "BLOCK": block, "num_warps": warps}


def each_of(args):
    """The numbers that a thread loads at once, or four if it loads single numbers."""
    vec = args["KIND"].vec
    return vec if vec > 1 else 4


def configs(args):
    return [config(args, warps, each_of(args) * vectors) for warps, vectors in ((4, 1), (4, 2), (2, 1), (8, 1))]


def rule(args):
    return config(args, 4, each_of(args))


def programs(rows, fixed):
    return -(-rows // fixed["ROWS"])


options = {
    "configs": configs,
    "rule": rule,
    "key": key,
    "programs": programs,
    "size": "rows",
    "bytes_each": bytes_of_row,
}
forward_launch = Tuned(forward_kernel, **options)
backward_launch = Tuned(backward_kernel, **options)


class PairsPlan(NamedTuple):
    readable: bool  # every vector's coordinates have stride 1
    wide: torch.dtype
    launch: Launch | None = None


def fixed_arguments(vectors, target, problem, wide, **kind):
    rows, cols = vectors[0].shape
    strides = [v.stride(0) if rows > 1 else 0 for v in vectors]
    vec = VECTOR // min(v.element_size() for v in vectors)
    if any(size % vec for size in (cols, *strides)):
        vec = 1
    return {
        "vectors": vectors,
        "target": vectors[0] if target is None else target,
        "rows": rows,
        "cols": cols,
        "strides": tuple(stride // vec for stride in strides),
        "scalars": as_scalars(problem.coordinate_scalars, wide),
        "loss_scalars": as_scalars(problem.scalars, wide),
        "FORMULA": FORMULAS[problem.coordinate].kernel,
        "LOSS": FORMULAS[problem.formula].kernel,
        "KIND": Kind(
            triton_type(wide), vec, problem.pairs, target is not None, int(problem.reduction != "none"), **kind
        ),
    }


@planned
def plan(tensors, problem, wanted):
    """The forward's plan if nothing is wanted, otherwise the backward's."""
    *vectors, target, dout = tensors
    vectors = tuple(given(vectors))
    wide = widest([*vectors, *given([target])])
    rows, cols = vectors[0].shape
    if any(v.stride(1) != 1 and cols > 1 for v in vectors) or target is not None and not target.is_contiguous():
        return PairsPlan(False, wide)
    sums = vectors[0].new_empty((1 + len(problem.pairs) // 2) * rows, dtype=wide)
    if not wanted:
        losses = vectors[0].new_empty(rows, dtype=problem.dtype) if problem.reduction == "none" else sums
        return PairsPlan(
            True, wide, forward_launch.bind(losses=losses, sums=sums, **fixed_arguments(vectors, target, problem, wide))
        )
    want_target = len(wanted) == 4 and wanted[3]
    kind = {"mean": problem.reduction == "mean", "wanted": wanted[: len(vectors)], "want_target": want_target}
    arguments = fixed_arguments(vectors, target, problem, wide, **kind)
    launch = backward_launch.bind(
        sums=sums,
        dout=dout,
        grads=tuple(v.new_empty(v.shape) if want else v for v, want in zip(vectors, wanted)),
        grad_target=torch.empty_like(target) if want_target else sums,
        dout_stride=dout.stride(0) if problem.reduction == "none" and rows > 1 else 0,
        **arguments,
    )
    return PairsPlan(True, wide, launch)


def prepared(tensors, problem, wanted=(), dout=None):
    """The plan, the vectors, and the target or a placeholder."""
    found = plan((*tensors, dout), problem, wanted)
    if not found.readable:
        *vectors, target = tensors
        vectors = [v if v is None or v.stride(1) == 1 else v.contiguous() for v in vectors]
        tensors = (*vectors, target if target is None else target.contiguous())
        found = plan((*tensors, dout), problem, wanted)
    *vectors, target = tensors
    return found, tuple(given(vectors)), vectors[0] if target is None else target


def forward(tensors, problem):
    x, none, count = tensors[0], problem.reduction == "none", len(problem.pairs) // 2
    rows = x.shape[0]
    out = x.new_empty(rows if none else (), dtype=problem.dtype)
    if shapes_only():
        return [out], [x.new_empty((count + 1 - none) * rows, dtype=widest(given(tensors)))]
    found, vectors, target = prepared(tensors, problem)
    sums = x.new_empty((count + 1 - none) * rows, dtype=found.wide)
    found.launch(vectors, target, out if none else sums, sums, rows)
    if not none:
        finish(sums, out, rows, mean=problem.reduction == "mean", divisor=rows)
    return [out], [sums]


def backward(tensors, saved, upstream, problem, wanted):
    *given_vectors, target = tensors
    want_target = len(wanted) == 4 and wanted[3]
    grads = tuple(v.new_empty(v.shape) if want else v for v, want in zip(given_vectors, wanted) if v is not None)
    grad_target = torch.empty_like(target, memory_format=torch.contiguous_format) if want_target else saved[0]
    if not shapes_only():
        found, vectors, target = prepared(tensors, problem, tuple(wanted), upstream[0])
        found.launch(vectors, target, saved[0], upstream[0], grads, grad_target, tensors[0].shape[0])
    return [*(g for g, want in zip(grads, wanted) if want), *([grad_target] if want_target else [])]
