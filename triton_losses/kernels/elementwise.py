"""Elementwise losses by kernels."""

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import WARP
from triton_losses.core.device_math import as_scalars, exact, load_zeros
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import flat_kind_of, planned
from triton_losses.core.reduction import divisor_of, given, widest
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.finish import finish

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


@triton.jit(repr=name_of("elementwise_forward"), do_not_specialize=["divisor", "n"])
def forward_kernel(
    operands,  # pointers to (n,); the last is the weight where WEIGHTED
    out,  # (n,) losses; where REDUCE (cdiv(n, SPAN),) partial sums, divided
    divisor: tl.int64,
    n: tl.int64,
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
    operands,
    grads,
    dout,
    offsets,
    mask,
    divisor,
    scalars,
    FORMULA: tl.constexpr,
    COMPUTE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WANTED: tl.constexpr,
    SAME: tl.constexpr,
):
    upstream = (
        tl.load(dout).to(COMPUTE) / tl.cast(divisor, COMPUTE)
        if SAME
        else tl.load(dout + offsets, mask=mask).to(COMPUTE)
    )
    values = load_all(operands, offsets, mask, COMPUTE)
    count: tl.constexpr = len(operands)
    if WEIGHTED:
        results = FORMULA(*values[:-1], *exact(scalars, COMPUTE))
        if WANTED[count - 1]:
            tl.store(
                grads[count - 1] + offsets, (results[0] * upstream).to(grads[count - 1].dtype.element_ty), mask=mask
            )
        upstream = upstream * values[-1]
    else:
        results = FORMULA(*values, *exact(scalars, COMPUTE))
    for i in tl.static_range(count - WEIGHTED):
        if WANTED[i]:
            tl.store(grads[i] + offsets, (results[i + 1] * upstream).to(grads[i].dtype.element_ty), mask=mask)


@triton.jit(repr=name_of("elementwise_backward"), do_not_specialize=["divisor", "n"])
def backward_kernel(
    operands,  # pointers to (n,); the last is the weight where WEIGHTED
    grads,  # pointers to (n,), one per operand; written where WANTED
    dout,  # () where SAME, else (n,)
    divisor: tl.int64,
    n: tl.int64,
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
        gradients_at(
            operands, grads, dout, offsets, offsets < n, divisor, scalars, FORMULA, COMPUTE, WEIGHTED, WANTED, SAME
        )


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
    # else some weighted losses spill
    return config(2048, 128, SPAN=SPAN) if args["WEIGHTED"] else config(2048, 256, SPAN=SPAN)


forward_launch = Tuned(
    forward_kernel,
    configs=lambda args: [config(*c, SPAN=SPAN) for c in ((1024, 128), (2048, 128), (2048, 256), (4096, 256))],
    rule=forward_rule,
    key=key,
    size="n",
    programs=lambda n, fixed: -(-n // SPAN),
    sample=sample,
)
backward_launch = Tuned(
    backward_kernel,
    configs=lambda args: [config(*c) for c in ((512, 128), (1024, 128), (2048, 128), (2048, 256))],
    rule=lambda args: config(1024, 128),
    key=key,
    size="n",
    programs=lambda n, fixed: -(-n // fixed["BLOCK"]),
    sample=sample,
)


def flattened(tensors):
    """The tensors in the memory order of the first, contiguous; and the permutation that undoes it."""
    for t in tensors:
        if not t.is_contiguous():
            break
    else:
        return tensors, None
    first = tensors[0]
    order = sorted(range(first.dim()), key=lambda d: -first.stride(d))
    back = [order.index(d) for d in range(first.dim())]
    return [t.permute(order).contiguous() for t in tensors], back


def fixed_arguments(operands, problem):
    wide = widest(operands)
    return {
        "scalars": as_scalars(problem.scalars, wide),
        "FORMULA": FORMULAS[problem.formula].kernel,
        "COMPUTE": triton_type(wide),
        "WEIGHTED": problem.weighted,
    }


@planned(kind=flat_kind_of)
def forward_plan(tensors, problem, reduce):
    *operands, out = tensors
    arguments = fixed_arguments(operands, problem)
    return forward_launch.bind(
        operands=tuple(operands), out=out, divisor=1, n=operands[0].numel(), REDUCE=reduce, **arguments
    )


def forward(tensors, problem):
    operands = given(tensors)
    x, none = operands[0], problem.reduction == "none"
    if shapes_only():
        return [x.new_empty(x.shape if none else (), dtype=problem.dtype)], []
    operands, back = flattened(operands)
    n, divisor = x.numel(), divisor_of(x, problem.reduction)
    if none:
        out = operands[0].new_empty(operands[0].shape, dtype=problem.dtype)
        forward_plan((*operands, out), problem, False)(tuple(operands), out, divisor, n)
        return [out if back is None else out.permute(back)], []
    out = x.new_empty((), dtype=problem.dtype)
    if n == 0:
        out.fill_(float("nan") if problem.reduction == "mean" else 0.0)
    elif n <= SPAN:
        forward_plan((*operands, out), problem, True)(tuple(operands), out, divisor, n)
    else:
        sums = x.new_empty(-(-n // SPAN), dtype=widest(operands))
        forward_plan((*operands, sums), problem, True)(tuple(operands), sums, divisor, n)
        finish(sums, out, sums.shape[0])
    return [out], []


@planned(kind=flat_kind_of)
def backward_plan(tensors, problem, wanted, same):
    *operands, dout = tensors
    grads = tuple(torch.empty_like(v) if want else v for v, want in zip(operands, wanted))
    return backward_launch.bind(
        operands=tuple(operands),
        grads=grads,
        dout=dout,
        divisor=1,
        n=operands[0].numel(),
        WANTED=wanted,
        SAME=same,
        **fixed_arguments(operands, problem),
    )


def backward(tensors, saved, upstream, problem, wanted):
    operands, (dout,) = given(tensors), upstream
    wanted = tuple(wanted[: len(operands)])
    if shapes_only():
        return [torch.empty_like(v) for v, want in zip(operands, wanted) if want]
    x = operands[0]
    same = not any(dout.stride())  # one value, or one value expanded: what loss.sum().backward() sends
    if same:
        operands, back = flattened(operands)
    else:
        (*operands, dout), back = flattened([*operands, dout])
    grads = [torch.empty_like(v) if want else v for v, want in zip(operands, wanted)]
    plan = backward_plan((*operands, dout), problem, wanted, same)
    plan(tuple(operands), tuple(grads), dout, divisor_of(x, problem.reduction), x.numel())
    return [g if back is None else g.permute(back) for g, want in zip(grads, wanted) if want]
