"""Labelled elements by kernels: all rows are one run of elements, walked in vectors of 16 bytes."""

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import INTERPRET, WARP, compute_dtype
from triton_losses.core.device_math import as_scalars, exact, load_zeros
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import flat_kind_of, planned
from triton_losses.core.reduction import divisor_of
from triton_losses.core.rows import counted
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import SPAN, name_of, triton_type
from triton_losses.kernels.finish import finish


@triton.jit
def bits_at(
    labels, start, n, background, CLASSES: tl.constexpr, COMPUTE: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr
):
    """Which of a block's elements are their row's label: (BLOCK / VEC, VEC) of 0 and 1.

    Elements beyond n are read as the last row's.
    """
    first = start // CLASSES
    rest = (start - first * CLASSES).to(tl.int32)  # what follows fits 32 bits
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


@triton.jit(
    repr=name_of("labelled_elements_forward"),
    debug=True,
    do_not_specialize=["divisor", "n", "background"],
    do_not_specialize_on_alignment=["labels"],
)
def forward_kernel(
    x,  # (n,): rows of CLASSES
    labels,  # (n / CLASSES,)
    out,  # (n,) losses; where REDUCE (cdiv(n, SPAN),) partial sums, divided
    divisor: tl.int64,
    n: tl.int64,
    background,
    scalars,
    FORMULA: tl.constexpr,
    CLASSES: tl.constexpr,
    REDUCE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
        loss = tl.sum(tl.sum(total, 1), 0) / tl.cast(divisor, COMPUTE)
        tl.store(out + program, loss.to(out.dtype.element_ty))


@triton.jit
def gradient_at(
    x, y, upstream, grad, at, mask, divisor, scalars, FORMULA: tl.constexpr, SAME: tl.constexpr, COMPUTE: tl.constexpr
):
    factor = (tl.load(upstream) if SAME else tl.load(upstream + at, mask=mask)).to(COMPUTE) / tl.cast(divisor, COMPUTE)
    partial = FORMULA(load_zeros(x + at, mask).to(COMPUTE), y, *exact(scalars, COMPUTE))[1]
    tl.store(grad + at, (partial * factor).to(grad.dtype.element_ty), mask=mask)


@triton.jit(
    repr=name_of("labelled_elements_backward"),
    debug=True,
    do_not_specialize=["divisor", "n", "background"],
    do_not_specialize_on_alignment=["labels"],
)
def backward_kernel(
    x,  # (n,): rows of CLASSES
    labels,  # (n / CLASSES,)
    upstream,  # () where SAME, else (n,)
    grad,  # (n,)
    divisor: tl.int64,
    n: tl.int64,
    background,
    scalars,
    FORMULA: tl.constexpr,
    CLASSES: tl.constexpr,
    SAME: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    y = bits_at(labels, start, n, background, CLASSES, COMPUTE, VEC, BLOCK)
    if start + BLOCK <= n:
        gradient_at(x, y, upstream, grad, at, None, divisor, scalars, FORMULA, SAME, COMPUTE)
    else:
        gradient_at(x, y, upstream, grad, at, at < n, divisor, scalars, FORMULA, SAME, COMPUTE)


SAMPLE_BYTES = 256 << 20  # a launch is measured on at most this much


def key(args):
    x, flag = args["x"], args.get("REDUCE", args.get("SAME"))
    return args["FORMULA"].__name__, triton.next_power_of_2(args["CLASSES"]), str(x.dtype), x.data_ptr() % 16 == 0, flag


def sample(args):
    return {**args, "n": min(args["n"], SAMPLE_BYTES // args["x"].element_size())}


def config(block, threads, **more):
    return {**more, "BLOCK": block, "num_warps": threads // WARP}


CONFIGS = ((512, 128), (1024, 128), (1024, 256), (2048, 256))
forward_launch = Tuned(
    forward_kernel,
    configs=lambda args: [config(*c, SPAN=SPAN) for c in CONFIGS],
    rule=lambda args: config(1024, 128, SPAN=SPAN),
    key=key,
    programs=lambda n, fixed: -(-n // SPAN),
    size="n",
    sample=sample,
)
backward_launch = Tuned(
    backward_kernel,
    configs=lambda args: [config(*c) for c in CONFIGS],
    rule=lambda args: config(1024, 128),
    key=key,
    programs=lambda n, fixed: -(-n // fixed["BLOCK"]),
    size="n",
    sample=sample,
)


def fixed_arguments(x, classes, problem):
    wide = compute_dtype(x.dtype)
    return {
        "divisor": 1,
        "n": x.numel(),
        "background": problem.background,
        "scalars": as_scalars(problem.scalars, wide),
        "FORMULA": FORMULAS[problem.formula].kernel,
        "CLASSES": classes,
        "COMPUTE": triton_type(wide),
        "VEC": 16 // x.element_size(),
    }


def readable(tensors, problem):
    """Logits and labels without gaps. The interpreter refuses a label that is no class here; a GPU asserts."""
    x, labels = tensors
    if INTERPRET:
        counted(labels, None, x.shape[1], problem.background, torch.float32)
    return x.contiguous(), labels.contiguous()


@planned(kind=flat_kind_of)
def forward_plan(tensors, classes, problem, reduce):
    x, labels, out = tensors
    return forward_launch.bind(x=x, labels=labels, out=out, REDUCE=reduce, **fixed_arguments(x, classes, problem))


def forward(tensors, problem):
    (x, labels), none = tensors, problem.reduction == "none"
    out = x.new_empty(x.shape if none else (), dtype=problem.dtype)
    if shapes_only():
        return [out], []
    x, labels = readable(tensors, problem)
    n, divisor = x.numel(), divisor_of(x, problem.reduction)
    if n == 0 and not none:
        out.fill_(float("nan") if problem.reduction == "mean" else 0.0)
    elif none or n <= SPAN:
        forward_plan((x, labels, out), x.shape[1], problem, not none)(x, labels, out, divisor, n)
    else:
        sums = x.new_empty(-(-n // SPAN), dtype=compute_dtype(x.dtype))
        forward_plan((x, labels, sums), x.shape[1], problem, True)(x, labels, sums, divisor, n)
        finish(sums, out, sums.shape[0])
    return [out], []


@planned(kind=flat_kind_of)
def backward_plan(tensors, classes, problem, same):
    x, labels, upstream = tensors
    arguments = fixed_arguments(x, classes, problem)
    return backward_launch.bind(x=x, labels=labels, upstream=upstream, grad=torch.empty_like(x), SAME=same, **arguments)


def backward(tensors, saved, upstream, problem, wanted):
    x, (dout,) = tensors[0], upstream
    grad = x.new_empty(x.shape)
    if shapes_only():
        return [grad]
    x, labels = readable(tensors, problem)
    same = not any(dout.stride())  # one value, or one value expanded: what loss.sum().backward() sends
    dout = dout if same else dout.contiguous()
    launch = backward_plan((x, labels, dout), x.shape[1], problem, same)
    launch(x, labels, dout, grad, divisor_of(x, problem.reduction), x.numel())
    return [grad]
