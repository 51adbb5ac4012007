"""Kernels of labelled elements: all rows are read as one array of elements, in vectors of 16 bytes."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import INTERPRET, WARP, compute_dtype
from triton_losses.core.device_math import as_scalars, exact, load_zeros
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import flat_kinds_of, planned
from triton_losses.core.reduction import divisor_of
from triton_losses.core.rows import counted
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import SPAN, name_of, triton_type
from triton_losses.kernels.finish import finish


class Kind(NamedTuple):
    """Compile-time parameters of the kernels, besides the formula."""

    compute: tl.dtype
    vec: int  # numbers in 16 bytes
    classes: int
    reduced: bool = False  # the forward adds up the losses
    same: bool = False  # one upstream gradient for all elements


@triton.jit
def bits_at(labels, start, n, background, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """A block's one-hot targets, (BLOCK / VEC, VEC): 1 at the column of an element's own row's label, otherwise 0.

    Elements beyond n take the last row's label.
    """
    CLASSES: tl.constexpr = KIND.classes
    VEC: tl.constexpr = KIND.vec
    first = start // CLASSES
    rest = (start - first * CLASSES).to(tl.int32)  # all numbers from here on fit 32 bits
    last = tl.minimum((n + CLASSES - 1) // CLASSES - 1 - first, BLOCK).to(tl.int32)
    columns = tl.arange(0, VEC)[None, :]
    place = rest + tl.arange(0, BLOCK // VEC)[:, None] * VEC
    if CLASSES % VEC != 0:  # otherwise a vector lies in one row and has one label
        place = place + columns
    row = place // CLASSES
    column = place - row * CLASSES
    if CLASSES % VEC == 0:
        column = column + columns
    label = tl.load(labels + first + tl.minimum(row, last)).to(tl.int64)
    fits = (label >= 0) & (label < CLASSES)
    tl.device_assert(fits | (label == background), "a target is out of bounds: it is no class and not the background")
    label = tl.where(fits & (label != background), label, -1).to(tl.int32)
    return tl.where(column == label, 1.0, 0.0).to(KIND.compute)


@triton.jit(
    repr=name_of("labelled_elements_forward"),
    debug=True,
    do_not_specialize=["divisor", "n", "background"],
    do_not_specialize_on_alignment=["labels"],
)
def forward_kernel(
    x,  # (n,): rows of classes
    labels,  # (n / classes,)
    out,  # (n,) losses; if reduced (cdiv(n, SPAN),) partial sums, divided by the divisor
    divisor: tl.int64,
    n: tl.int64,
    background,
    scalars,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK // KIND.vec)[:, None] * KIND.vec + tl.arange(0, KIND.vec)[None, :]
    total = tl.zeros(tile.shape, KIND.compute)
    for step in range(0, tl.minimum(n - program * SPAN, SPAN).to(tl.int32), BLOCK):
        start = program * SPAN + step
        y = bits_at(labels, start, n, background, BLOCK, KIND)
        if start + BLOCK <= n:  # no mask here, so loads are 16 bytes wide for any n
            loss = FORMULA(tl.load(x + start + tile).to(KIND.compute), y, *exact(scalars, KIND.compute))[0]
            if not KIND.reduced:
                tl.store(out + start + tile, loss.to(out.dtype.element_ty))
        else:
            mask = start + tile < n
            loss = FORMULA(load_zeros(x + start + tile, mask).to(KIND.compute), y, *exact(scalars, KIND.compute))[0]
            loss = tl.where(mask, loss, 0.0).to(KIND.compute)
            if not KIND.reduced:
                tl.store(out + start + tile, loss.to(out.dtype.element_ty), mask=mask)
        total += loss
    if KIND.reduced:
        loss = tl.sum(tl.sum(total, 1), 0) / tl.cast(divisor, KIND.compute)
        tl.store(out + program, loss.to(out.dtype.element_ty))


@triton.jit
def gradient_at(pointers, y, at, mask, divisor, scalars, FORMULA: tl.constexpr, KIND: tl.constexpr):
    x, upstream, grad = pointers
    factor = tl.load(upstream) if KIND.same else tl.load(upstream + at, mask=mask)
    factor = factor.to(KIND.compute) / tl.cast(divisor, KIND.compute)
    partial = FORMULA(load_zeros(x + at, mask).to(KIND.compute), y, *exact(scalars, KIND.compute))[1]
    tl.store(grad + at, (partial * factor).to(grad.dtype.element_ty), mask=mask)


@triton.jit(
    repr=name_of("labelled_elements_backward"),
    debug=True,
    do_not_specialize=["divisor", "n", "background"],
    do_not_specialize_on_alignment=["labels"],
)
def backward_kernel(
    x,  # (n,): rows of classes
    labels,  # (n / classes,)
    upstream,  # () if same, otherwise (n,)
    grad,  # (n,)
    divisor: tl.int64,
    n: tl.int64,
    background,
    scalars,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK // KIND.vec)[:, None] * KIND.vec + tl.arange(0, KIND.vec)[None, :]
    y = bits_at(labels, start, n, background, BLOCK, KIND)
    if start + BLOCK <= n:
        gradient_at((x, upstream, grad), y, at, None, divisor, scalars, FORMULA, KIND)
    else:
        gradient_at((x, upstream, grad), y, at, at < n, divisor, scalars, FORMULA, KIND)


def key(args):
    x, kind = args["x"], args["KIND"]
    width = triton.next_power_of_2(kind.classes)
    return args["FORMULA"].__name__, width, str(x.dtype), x.data_ptr() % 16 == 0, kind.reduced, kind.same


def bytes_of_element(args):
    return args["x"].element_size()


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
    bytes_each=bytes_of_element,
)
backward_launch = Tuned(
    backward_kernel,
    configs=lambda args: [config(*c) for c in CONFIGS],
    rule=lambda args: config(1024, 128),
    key=key,
    programs=lambda n, fixed: -(-n // fixed["BLOCK"]),
    size="n",
    bytes_each=bytes_of_element,
)


def fixed_arguments(x, classes, problem, **kind):
    wide = compute_dtype(x.dtype)
    return {
        "x": x,
        "divisor": 1,
        "n": x.numel(),
        "background": problem.background,
        "scalars": as_scalars(problem.scalars, wide),
        "FORMULA": FORMULAS[problem.formula].kernel,
        "KIND": Kind(triton_type(wide), 16 // x.element_size(), classes, **kind),
    }


def readable(tensors, problem):
    """Contiguous logits and labels. The interpreter raises for a label that is no class; on a GPU kernels assert."""
    x, labels = tensors
    if INTERPRET:
        counted(labels, None, x.shape[1], problem.background, torch.float32)
    return x.contiguous(), labels.contiguous()


@planned(kinds=flat_kinds_of)
def forward_plan(tensors, classes, problem, reduced):
    x, labels, out = tensors
    return forward_launch.bind(labels=labels, out=out, **fixed_arguments(x, classes, problem, reduced=reduced))


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


@planned(kinds=flat_kinds_of)
def backward_plan(tensors, classes, problem, same):
    x, labels, upstream = tensors
    arguments = fixed_arguments(x, classes, problem, same=same)
    return backward_launch.bind(labels=labels, upstream=upstream, grad=torch.empty_like(x), **arguments)


def backward(tensors, saved, upstream, problem, wanted):
    x, (dout,) = tensors[0], upstream
    grad = x.new_empty(x.shape)
    if shapes_only():
        return [grad]
    x, labels = readable(tensors, problem)
    same = not any(dout.stride())  # one value, perhaps expanded: loss.sum().backward() passes such a gradient
    dout = dout if same else dout.contiguous()
    launch = backward_plan((x, labels, dout), x.shape[1], problem, same)
    launch(x, labels, dout, grad, divisor_of(x, problem.reduction), x.numel())
    return [grad]
