"""The kernels of families/labelled_elements.py, and how they are launched. All rows are one run of elements, walked in vectors of 16 bytes."""

import triton
import triton.language as tl

from triton_losses.core.compiler import WARP
from triton_losses.core.device_math import exact, load_zeros
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import SPAN, name_of


@triton.jit
def bits_at(labels, start, n, background, CLASSES: tl.constexpr, COMPUTE: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Which of a block's elements are their row's label: (BLOCK / VEC, VEC) of 0 and 1. Elements beyond n are read as the last row's."""
    first = start // CLASSES
    rest = (start - first * CLASSES).to(tl.int32)  # from here on 32 bits are enough
    last = tl.minimum((n + CLASSES - 1) // CLASSES - 1 - first, BLOCK).to(tl.int32)
    columns = tl.arange(0, VEC)[None, :]
    place = rest + tl.arange(0, BLOCK // VEC)[:, None] * VEC
    if CLASSES % VEC != 0:  # else a vector lies in one row: one label for all of it
        place = place + columns
    row = place // CLASSES
    column = place - row * CLASSES
    if CLASSES % VEC == 0:
        column = column + columns
    label = tl.load(labels + first + tl.minimum(row, last)).to(tl.int64)
    fits = (label >= 0) & (label < CLASSES)
    tl.device_assert(fits | (label == background), "a target is out of bounds: it is no class and not the background")
    label = tl.where(fits & (label != background), label, -1).to(tl.int32)
    return tl.where(column == label, 1.0, 0.0).to(COMPUTE)


@triton.jit(repr=name_of("labelled_elements_forward"), debug=True, do_not_specialize=["background"])
def forward_kernel(
    x,  # (n,): rows of CLASSES
    labels,  # (n / CLASSES,)
    out,  # (n,) losses; where REDUCE (cdiv(n, SPAN),) partial sums
    n, background, scalars,
    FORMULA: tl.constexpr, CLASSES: tl.constexpr, REDUCE: tl.constexpr, COMPUTE: tl.constexpr, VEC: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    total = tl.zeros((BLOCK // VEC, VEC), COMPUTE)
    for step in range(0, tl.minimum(n - program * SPAN, SPAN).to(tl.int32), BLOCK):
        start = program * SPAN + step
        y = bits_at(labels, start, n, background, CLASSES, COMPUTE, VEC, BLOCK)
        if start + BLOCK <= n:  # no mask, so that loads are 16 bytes wide whatever n
            loss = FORMULA(tl.load(x + start + tile).to(COMPUTE), y, *exact(scalars, COMPUTE))[0]
            if not REDUCE:
                tl.store(out + start + tile, loss.to(out.dtype.element_ty))
        else:
            mask = start + tile < n
            loss = FORMULA(load_zeros(x + start + tile, mask).to(COMPUTE), y, *exact(scalars, COMPUTE))[0]
            loss = tl.where(mask, loss, 0.0).to(COMPUTE)
            if not REDUCE:
                tl.store(out + start + tile, loss.to(out.dtype.element_ty), mask=mask)
        total += loss
    if REDUCE:
        tl.store(out + program, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def gradient_at(
    x, y, upstream, grad, at, mask, divisor, scalars, FORMULA: tl.constexpr, SAME: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    factor = (tl.load(upstream) if SAME else tl.load(upstream + at, mask=mask)).to(COMPUTE) / tl.cast(divisor, COMPUTE)
    partial = FORMULA(load_zeros(x + at, mask).to(COMPUTE), y, *exact(scalars, COMPUTE))[1]
    tl.store(grad + at, (partial * factor).to(grad.dtype.element_ty), mask=mask)


@triton.jit(repr=name_of("labelled_elements_backward"), debug=True, do_not_specialize=["background", "divisor"])
def backward_kernel(
    x,  # (n,): rows of CLASSES
    labels,  # (n / CLASSES,)
    upstream,  # () where SAME, else (n,)
    grad,  # (n,)
    n, background, divisor, scalars,
    FORMULA: tl.constexpr, CLASSES: tl.constexpr, SAME: tl.constexpr, COMPUTE: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    y = bits_at(labels, start, n, background, CLASSES, COMPUTE, VEC, BLOCK)
    if start + BLOCK <= n:
        gradient_at(x, y, upstream, grad, at, None, divisor, scalars, FORMULA, SAME, COMPUTE)
    else:
        gradient_at(x, y, upstream, grad, at, at < n, divisor, scalars, FORMULA, SAME, COMPUTE)


SAMPLE_BYTES = 256 << 20  # a launch is measured on at most this much


def key(args):
    x = args["x"]
    return args["FORMULA"].__name__, args["CLASSES"], str(x.dtype), x.data_ptr() % 16 == 0, args.get("REDUCE", args.get("SAME"))


def sample(args):
    return {**args, "n": min(args["n"], SAMPLE_BYTES // args["x"].element_size())}


def config(block, threads, **more):
    return {**more, "BLOCK": block, "num_warps": threads // WARP}


forward_launch = Tuned(
    forward_kernel,
    configs=lambda args: [config(*c, SPAN=SPAN) for c in ((512, 128), (1024, 128), (1024, 256), (2048, 256))],
    rule=lambda args: config(1024, 128, SPAN=SPAN),
    key=key,
    programs=lambda args, config: -(-args["n"] // SPAN),
    sample=sample,
)
backward_launch = Tuned(
    backward_kernel,
    configs=lambda args: [config(*c) for c in ((512, 128), (1024, 128), (1024, 256), (2048, 256))],
    rule=lambda args: config(1024, 128),
    key=key,
    programs=lambda args, config: -(-args["n"] // config["BLOCK"]),
    sample=sample,
)
