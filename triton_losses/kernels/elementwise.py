"""The kernels of families/elementwise.py, and how they are launched."""

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import WARP
from triton_losses.core.device_math import exact, load_zeros
from triton_losses.core.tuning import Tuned

SPAN = 8192  # elements whose losses one program sums: fixed, so that tuning never moves the partial sums


def triton_type(dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def load_all(operands, offsets, mask, COMPUTE: tl.constexpr):
    values = ()
    for i in tl.static_range(len(operands)):
        values += (load_zeros(operands[i] + offsets, mask).to(COMPUTE),)
    return values


@triton.jit
def losses_at(operands, offsets, mask, scalars, FORMULA: tl.constexpr, COMPUTE: tl.constexpr, WEIGHTED: tl.constexpr):
    values = load_all(operands, offsets, mask, COMPUTE)
    if WEIGHTED:
        return FORMULA(*values[:-1], *exact(scalars, COMPUTE))[0] * values[-1]
    else:
        return FORMULA(*values, *exact(scalars, COMPUTE))[0]


def name_of(kernel):
    return lambda spec: f"{kernel}_{spec.constants['FORMULA'].__name__}"


@triton.jit(repr=name_of("elementwise_forward"), do_not_specialize=["divisor"])
def forward_kernel(
    operands,  # pointers to (n,); the last is the weight where WEIGHTED
    out,  # (n,) losses; where REDUCE (cdiv(n, SPAN),) partial sums, divided
    n,
    divisor,
    scalars,
    FORMULA: tl.constexpr,
    COMPUTE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    REDUCE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    start = program * SPAN
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), COMPUTE)
    if start + SPAN <= n:  # no mask, so that loads are 16 bytes wide whatever n
        for step in range(0, SPAN, BLOCK):
            offsets = start + step + lanes
            loss = losses_at(operands, offsets, None, scalars, FORMULA, COMPUTE, WEIGHTED)
            if REDUCE:
                total += loss
            else:
                tl.store(out + offsets, loss.to(out.dtype.element_ty))
    else:
        for step in range(0, (n - start).to(tl.int32), BLOCK):
            offsets = start + step + lanes
            mask = offsets < n
            loss = losses_at(operands, offsets, mask, scalars, FORMULA, COMPUTE, WEIGHTED)
            if REDUCE:
                total += tl.where(mask, loss, 0.0).to(COMPUTE)
            else:
                tl.store(out + offsets, loss.to(out.dtype.element_ty), mask=mask)
    if REDUCE:
        tl.store(out + program, (tl.sum(total, 0) / tl.cast(divisor, COMPUTE)).to(out.dtype.element_ty))


@triton.jit
def gradients_at(
    operands, grads, dout, offsets, mask, divisor, scalars,
    FORMULA: tl.constexpr, COMPUTE: tl.constexpr, WEIGHTED: tl.constexpr, WANTED: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    upstream = tl.load(dout).to(COMPUTE) / tl.cast(divisor, COMPUTE) if SAME else tl.load(dout + offsets, mask=mask).to(COMPUTE)
    values = load_all(operands, offsets, mask, COMPUTE)
    count: tl.constexpr = len(operands)
    if WEIGHTED:
        results = FORMULA(*values[:-1], *exact(scalars, COMPUTE))
        if WANTED[count - 1]:
            tl.store(grads[count - 1] + offsets, (results[0] * upstream).to(grads[count - 1].dtype.element_ty), mask=mask)
        upstream = upstream * values[-1]
    else:
        results = FORMULA(*values, *exact(scalars, COMPUTE))
    for i in tl.static_range(count - WEIGHTED):
        if WANTED[i]:
            tl.store(grads[i] + offsets, (results[i + 1] * upstream).to(grads[i].dtype.element_ty), mask=mask)


@triton.jit(repr=name_of("elementwise_backward"), do_not_specialize=["divisor"])
def backward_kernel(
    operands,  # pointers to (n,); the last is the weight where WEIGHTED
    grads,  # pointers to (n,), one per operand; written where WANTED
    dout,  # () where SAME, else (n,)
    n,
    divisor,
    scalars,
    FORMULA: tl.constexpr,
    COMPUTE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WANTED: tl.constexpr,
    SAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        gradients_at(operands, grads, dout, offsets, None, divisor, scalars, FORMULA, COMPUTE, WEIGHTED, WANTED, SAME)
    else:
        gradients_at(operands, grads, dout, offsets, offsets < n, divisor, scalars, FORMULA, COMPUTE, WEIGHTED, WANTED, SAME)


SAMPLE_BYTES = 256 << 20  # a launch is measured on at most this much


def key(args):
    dtypes = tuple(str(v.dtype) for v in args["operands"])
    aligned = all(v.data_ptr() % 16 == 0 for v in args["operands"])
    return (args["FORMULA"].__name__, *dtypes, args["WEIGHTED"], aligned, args.get("REDUCE", args.get("WANTED")))


def sample(args):
    width = sum(v.element_size() for v in args["operands"])
    return {**args, "n": min(args["n"], SAMPLE_BYTES // width)}


def config(block, threads, **more):  # in threads, for 8 elements a thread are 16 bytes whatever the warp
    return {**more, "BLOCK": block, "num_warps": threads // WARP}


def forward_rule(args):
    if args["COMPUTE"] == tl.float64:
        return config(1024, 256, SPAN=SPAN)
    return config(2048, 128, SPAN=SPAN) if args["WEIGHTED"] else config(2048, 256, SPAN=SPAN)  # else some weighted losses spill


forward_launch = Tuned(
    forward_kernel,
    configs=lambda args: [config(*c, SPAN=SPAN) for c in ((1024, 128), (2048, 128), (2048, 256), (4096, 256))],
    rule=forward_rule,
    key=key,
    programs=lambda args, config: -(-args["n"] // SPAN),
    sample=sample,
)
backward_launch = Tuned(
    backward_kernel,
    configs=lambda args: [config(*c) for c in ((512, 128), (1024, 128), (2048, 128), (2048, 256), (4096, 256))],
    rule=lambda args: config(1024, 128),
    key=key,
    programs=lambda args, config: -(-args["n"] // config["BLOCK"]),
    sample=sample,
)
