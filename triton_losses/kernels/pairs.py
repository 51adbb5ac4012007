"""The kernels of families/pairs.py, and how they are launched. One program is a few rows, walked together in blocks of columns.

A thread reads vectors of 16 bytes where every row starts at a multiple of them, and single numbers where not. Sums are kept
per thread until the row ends: one exchange between threads, not one a block.
"""

import triton
import triton.language as tl

from triton_losses.core.compiler import WARP
from triton_losses.core.device_math import as_scalars, exact, load_zeros
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import name_of, triton_type

VECTOR = 16  # bytes


@triton.jit
def tiles_of(vectors, strides, row, columns, mask, COMPUTE: tl.constexpr, VEC: tl.constexpr):
    """A tile (ROWS, BLOCK) of each vector, zeros where the mask forbids."""
    values = ()
    for i in tl.static_range(len(vectors)):
        at = row[:, None] * (strides[i] * VEC) + columns[None, :]
        values += (load_zeros(vectors[i] + at, mask).to(COMPUTE),)
    return values


@triton.jit
def add_tiles(totals, values, mask, scalars, FORMULA: tl.constexpr, PAIRS: tl.constexpr):
    """Add g of each pair of tiles to its sum; nothing where the mask forbids."""
    new = ()
    for k in tl.static_range(len(totals)):
        g = FORMULA(values[PAIRS[2 * k]], values[PAIRS[2 * k + 1]], *scalars)[0]
        if mask is not None:
            g = tl.where(mask, g, 0.0)
        new += (totals[k] + g,)
    return new


@triton.jit(repr=name_of("pair_sums_forward"), do_not_specialize=["rows"])
def forward_kernel(
    vectors,  # pointers to (rows, cols), row r of the i-th at r * strides[i] * VEC
    sums,  # pointers to (rows,), one a pair
    rows, cols, strides, scalars,
    FORMULA: tl.constexpr, PAIRS: tl.constexpr, COMPUTE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    read = tl.minimum(row, rows - 1)  # what lies beyond the last row is the last row again, and not written
    lanes = tl.arange(0, BLOCK)
    values_of = exact(scalars, COMPUTE)
    totals = ()
    for _ in tl.static_range(len(sums)):
        totals += (tl.zeros((ROWS, BLOCK), COMPUTE),)
    whole = cols // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        values = tiles_of(vectors, strides, read, start + lanes, None, COMPUTE, VEC)
        totals = add_tiles(totals, values, None, values_of, FORMULA, PAIRS)
    for start in range(whole, cols, BLOCK):
        mask = ((start + lanes) // VEC < cols // VEC)[None, :]  # of whole vectors
        values = tiles_of(vectors, strides, read, start + lanes, mask, COMPUTE, VEC)
        totals = add_tiles(totals, values, mask, values_of, FORMULA, PAIRS)
    for k in tl.static_range(len(sums)):
        tl.store(sums[k] + row, tl.sum(totals[k], 1), mask=row < rows)


@triton.jit
def store_gradients(
    values, grads, at, mask, slopes, scalars, FORMULA: tl.constexpr, PAIRS: tl.constexpr, WANTED: tl.constexpr
):  # fmt: skip
    """Write the gradients of one tile of each wanted vector."""
    for i in tl.static_range(len(grads)):
        if WANTED[i]:
            total = tl.zeros_like(values[i])
            for k in tl.static_range(len(slopes)):
                out = FORMULA(values[PAIRS[2 * k]], values[PAIRS[2 * k + 1]], *scalars)
                if PAIRS[2 * k] == i:
                    total += out[1] * slopes[k]
                if PAIRS[2 * k + 1] == i:
                    total += out[2] * slopes[k]
            tl.store(grads[i] + at, total.to(grads[i].dtype.element_ty), mask=mask)


@triton.jit(repr=name_of("pair_sums_backward"), do_not_specialize=["rows"])
def backward_kernel(
    vectors,  # pointers to (rows, cols), row r of the i-th at r * strides[i] * VEC
    douts,  # pointers to (rows,), one a pair
    grads,  # pointers to (rows, cols), contiguous, one a vector; written where WANTED
    rows, cols, strides, scalars,
    FORMULA: tl.constexpr, PAIRS: tl.constexpr, WANTED: tl.constexpr, COMPUTE: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    read = tl.minimum(row, rows - 1)
    lanes = tl.arange(0, BLOCK)
    values_of = exact(scalars, COMPUTE)
    slopes = ()
    for k in tl.static_range(len(douts)):
        slopes += (tl.load(douts[k] + read).to(COMPUTE)[:, None],)
    exists = (row < rows)[:, None]
    first = row[:, None] * (cols // VEC * VEC)
    whole = cols // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        columns = start + lanes
        values = tiles_of(vectors, strides, read, columns, None, COMPUTE, VEC)
        store_gradients(values, grads, first + columns[None, :], exists, slopes, values_of, FORMULA, PAIRS, WANTED)
    for start in range(whole, cols, BLOCK):
        columns = start + lanes
        mask = (columns // VEC < cols // VEC)[None, :]
        values = tiles_of(vectors, strides, read, columns, mask, COMPUTE, VEC)
        store_gradients(values, grads, first + columns[None, :], exists & mask, slopes, values_of, FORMULA, PAIRS, WANTED)


def row_arguments(vectors, formula, scalars, pairs, wide):
    """What both kernels take."""
    rows, cols = vectors[0].shape
    vectors = [v if v.stride(1) == 1 or cols < 2 else v.contiguous() for v in vectors]
    strides = [v.stride(0) if rows > 1 else 0 for v in vectors]
    vec = VECTOR // min(v.element_size() for v in vectors)
    if any(size % vec for size in (cols, *strides)):
        vec = 1
    return dict(
        vectors=tuple(vectors), rows=rows, cols=cols, strides=tuple(stride // vec for stride in strides), scalars=as_scalars(scalars, wide),
        FORMULA=formula.kernel, PAIRS=tuple(pairs), COMPUTE=triton_type(wide), VEC=vec,
    )  # fmt: skip


def key(args):
    aligned = all(v.data_ptr() % VECTOR == 0 for v in args["vectors"])
    dtypes = tuple(str(v.dtype) for v in args["vectors"])
    return (args["FORMULA"].__name__, args["cols"], *dtypes, aligned, *(args.get(name) for name in ("PAIRS", "VEC", "WANTED")))


SAMPLE_BYTES = 256 << 20  # a launch is measured on at most this much


def sample(args):
    width = args["cols"] * sum(v.element_size() for v in args["vectors"])
    return {**args, "rows": min(args["rows"], max(SAMPLE_BYTES // max(width, 1), 1))}


def config(args, warps, each):
    """Tiles of ``each`` numbers a thread."""
    block = min(triton.next_power_of_2(max(args["cols"], 1)), warps * WARP * each)
    return {"ROWS": warps * WARP * each // block, "BLOCK": block, "num_warps": warps}


def each_of(args):
    """Numbers a thread reads at once, or four where it reads them one by one."""
    return args["VEC"] if args["VEC"] > 1 else 4


def configs(args):
    return [config(args, warps, each_of(args) * vectors) for warps in (2, 4, 8) for vectors in (1, 2)]


def rule(args):
    return config(args, 4, each_of(args))


def programs(args, config):
    return -(-args["rows"] // config["ROWS"])


forward_launch = Tuned(forward_kernel, configs=configs, rule=rule, key=key, programs=programs, sample=sample)
backward_launch = Tuned(backward_kernel, configs=configs, rule=rule, key=key, programs=programs, sample=sample)
