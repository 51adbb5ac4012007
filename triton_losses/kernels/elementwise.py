"""Kernels of elementwise losses."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import WARP
from triton_losses.core.device_math import as_scalars, exact, load_zeros
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import flat_kinds_of, planned
from triton_losses.core.reduction import divisor_of, given, widest
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.finish import finish

SPAN = 8192  # elements that one program sums: fixed, so that tuning never changes the partial sums


class Kind(NamedTuple):
    """Compile-time parameters of the kernels, besides the formula."""

    compute: tl.dtype
    weighted: bool  # the last operand is a weight
    reduced: bool = False  # the forward adds up the losses
    wanted: tuple = ()  # for each operand, whether its gradient is wanted
    same: bool = False  # one upstream gradient for all elements
    reads: tuple = ()  # how each operand is laid out: see Layout


def triton_type(dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def load_all(operands, sizes, start, lanes, mask, KIND: tl.constexpr):
    values = ()
    for i in tl.static_range(len(operands)):
        if KIND.reads[i] == 0:
            at = start + lanes
        else:
            rest = (start % sizes[i]).to(tl.int32) + lanes  # only `start` needs the slow 64-bit division
            at = rest % sizes[i] if KIND.reads[i] > 0 else start // sizes[i] + rest // sizes[i]
        values += (load_zeros(operands[i] + at, mask).to(KIND.compute),)
    return values


@triton.jit
def losses_at(operands, sizes, start, lanes, mask, scalars, FORMULA: tl.constexpr, KIND: tl.constexpr):
    values = load_all(operands, sizes, start, lanes, mask, KIND)
    if KIND.weighted:
        return FORMULA(*values[:-1], *exact(scalars, KIND.compute))[0] * values[-1]
    else:
        return FORMULA(*values, *exact(scalars, KIND.compute))[0]


def name_of(kernel):
    return lambda spec: f"{kernel}_{spec.constants['FORMULA'].__name__}"


@triton.jit(repr=name_of("elementwise_forward"), do_not_specialize=["divisor", "n"])
def forward_kernel(
    operands,  # pointers to (n,), or fewer numbers: see Layout; the last is the weight if weighted
    out,  # (n,) losses; if reduced (cdiv(n, SPAN),) partial sums, divided by the divisor
    divisor: tl.int64,
    n: tl.int64,
    sizes,  # Layout.sizes
    scalars,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    start = program * SPAN
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), KIND.compute)
    if start + SPAN <= n:  # no mask here, so loads are 16 bytes wide for any n
        for step in range(0, SPAN, BLOCK):
            offsets = start + step + lanes
            loss = losses_at(operands, sizes, start + step, lanes, None, scalars, FORMULA, KIND)
            if KIND.reduced:
                total += loss
            else:
                tl.store(out + offsets, loss.to(out.dtype.element_ty))
    else:
        for step in range(0, (n - start).to(tl.int32), BLOCK):
            offsets = start + step + lanes
            mask = offsets < n
            loss = losses_at(operands, sizes, start + step, lanes, mask, scalars, FORMULA, KIND)
            if KIND.reduced:
                total += tl.where(mask, loss, 0.0).to(KIND.compute)
            else:
                tl.store(out + offsets, loss.to(out.dtype.element_ty), mask=mask)
    if KIND.reduced:
        tl.store(out + program, (tl.sum(total, 0) / tl.cast(divisor, KIND.compute)).to(out.dtype.element_ty))


@triton.jit
def gradients_at(pointers, divisor, start, lanes, mask, scalars, FORMULA: tl.constexpr, KIND: tl.constexpr):
    """Write one block's gradients. pointers: operands, Layout.sizes, gradients and the upstream gradient."""
    operands, sizes, grads, dout = pointers
    offsets = start + lanes
    if KIND.same:
        factor = tl.load(dout).to(KIND.compute) / tl.cast(divisor, KIND.compute)
    else:
        factor = tl.load(dout + offsets, mask=mask).to(KIND.compute)
    values = load_all(operands, sizes, start, lanes, mask, KIND)
    count: tl.constexpr = len(operands)
    if KIND.weighted:
        results = FORMULA(*values[:-1], *exact(scalars, KIND.compute))
        if KIND.wanted[count - 1]:
            grad = grads[count - 1]
            tl.store(grad + offsets, (results[0] * factor).to(grad.dtype.element_ty), mask=mask)
        factor = factor * values[-1]
    else:
        results = FORMULA(*values, *exact(scalars, KIND.compute))
    for i in tl.static_range(count - KIND.weighted):
        if KIND.wanted[i]:
            tl.store(grads[i] + offsets, (results[i + 1] * factor).to(grads[i].dtype.element_ty), mask=mask)


@triton.jit(repr=name_of("elementwise_backward"), do_not_specialize=["divisor", "n"])
def backward_kernel(
    operands,  # as in the forward
    grads,  # pointers to (n,), one per operand; written if wanted
    dout,  # () if same, otherwise (n,)
    divisor: tl.int64,
    n: tl.int64,
    sizes,  # Layout.sizes
    scalars,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    pointers = (operands, sizes, grads, dout)
    if start + BLOCK <= n:
        gradients_at(pointers, divisor, start, lanes, None, scalars, FORMULA, KIND)
    else:
        gradients_at(pointers, divisor, start, lanes, start + lanes < n, scalars, FORMULA, KIND)


def key(args):
    dtypes = tuple(str(v.dtype) for v in args["operands"])
    aligned = all(v.data_ptr() % 16 == 0 for v in args["operands"])
    kind = args["KIND"]
    return args["FORMULA"].__name__, *dtypes, kind.weighted, aligned, kind.wanted or kind.reduced, *kind.reads


def bytes_of_element(args):
    return sum(v.element_size() for v in args["operands"])


def config(block, threads, **more):  # threads, not warps: warps differ in size, and 8 elements per thread are 16 bytes
    return {**more, "BLOCK": block, "num_warps": threads // WARP}


def forward_rule(args):
    if args["KIND"].compute == tl.float64:
        return config(1024, 256, SPAN=SPAN)
    # with 256 threads some weighted losses spill registers
    return config(2048, 128, SPAN=SPAN) if args["KIND"].weighted else config(2048, 256, SPAN=SPAN)


forward_launch = Tuned(
    forward_kernel,
    configs=lambda args: [config(*c, SPAN=SPAN) for c in ((1024, 128), (2048, 128), (2048, 256), (4096, 256))],
    rule=forward_rule,
    key=key,
    size="n",
    programs=lambda n, fixed: -(-n // SPAN),
    bytes_each=bytes_of_element,
)
backward_launch = Tuned(
    backward_kernel,
    configs=lambda args: [config(*c) for c in ((512, 128), (1024, 128), (2048, 128), (2048, 256))],
    rule=lambda args: config(1024, 128),
    key=key,
    size="n",
    programs=lambda n, fixed: -(-n // fixed["BLOCK"]),
    bytes_each=bytes_of_element,
)


class Layout(NamedTuple):
    """How operands are laid out in memory that broadcast to the first one, which is n contiguous numbers.

    reads: 0 for n contiguous numbers; 1 for fewer numbers, which are repeated as a whole; -1 for fewer numbers, each of
    which is repeated for several neighbours. sizes: for 1 how many numbers there are, for -1 how many neighbours.
    """

    reads: tuple[int, ...]
    sizes: tuple[int, ...]


ALIKE = [Layout((0,) * count, (0,) * count) for count in range(8)]
MOST = 2**31 - (1 << 16)  # a repeated run's length; kernels add a block's lanes to it in 32 bits


def read_of(t, shape):
    """An expanded tensor's entries in `reads` and `sizes` of a Layout; None if no Layout describes it."""
    sizes = [d for d in range(len(shape)) if shape[d] != 1]
    expanded, kept = ([d for d in sizes if (t.stride(d) == 0) == zero] for zero in (True, False))
    dense = 1
    for d in reversed(kept):
        if t.stride(d) != dense:
            return None
        dense *= shape[d]
    if not kept or kept[0] > expanded[-1]:
        read = 1, dense
    elif kept[-1] < expanded[0]:
        read = -1, math.prod(shape[d] for d in expanded)
    else:
        return None
    return read if 0 < read[1] <= MOST else None


def flattened(tensors, wanted=()):
    """The tensors permuted so that the first is contiguous, the permutation that undoes it or None, and the Layout.

    wanted: for each tensor, whether its gradient is wanted. Such a tensor is expanded to as many numbers as the first.
    """
    for t in tensors:
        if not t.is_contiguous():
            break
    else:
        return tensors, None, ALIKE[len(tensors)]
    first = tensors[0]
    if first.is_contiguous():
        found, reads, sizes = [], [], []
        for i, t in enumerate(tensors):
            free = not (t.is_contiguous() or i < len(wanted) and wanted[i])
            read = read_of(t, first.shape) if free and 0 in t.stride() else None
            found.append(t if read else t.contiguous())
            reads.append(read[0] if read else 0)
            sizes.append(read[1] if read else 0)
        return found, None, Layout(tuple(reads), tuple(sizes))
    order = sorted(range(first.dim()), key=lambda d: -first.stride(d))
    back = [order.index(d) for d in range(first.dim())]
    return [t.permute(order).contiguous() for t in tensors], back, ALIKE[len(tensors)]


def fixed_arguments(operands, problem, layout, **kind):
    wide = widest(operands)
    return {
        "operands": tuple(operands),
        "divisor": 1,
        "n": operands[0].numel(),
        "sizes": layout.sizes,
        "scalars": as_scalars(problem.scalars, wide),
        "FORMULA": FORMULAS[problem.formula].kernel,
        "KIND": Kind(triton_type(wide), problem.weighted, reads=layout.reads, **kind),
    }


@planned(kinds=flat_kinds_of)
def forward_plan(tensors, problem, layout, reduced):
    *operands, out = tensors
    return forward_launch.bind(out=out, **fixed_arguments(operands, problem, layout, reduced=reduced))


def forward(tensors, problem):
    operands = given(tensors)
    x, none = operands[0], problem.reduction == "none"
    if shapes_only():
        return [x.new_empty(x.shape if none else (), dtype=problem.dtype)], []
    operands, back, layout = flattened(operands)
    n, divisor = x.numel(), divisor_of(x, problem.reduction)
    if none:
        out = operands[0].new_empty(operands[0].shape, dtype=problem.dtype)
        forward_plan((*operands, out), problem, layout, False)(tuple(operands), out, divisor, n)
        return [out if back is None else out.permute(back)], []
    out = x.new_empty((), dtype=problem.dtype)
    if n == 0:
        out.fill_(float("nan") if problem.reduction == "mean" else 0.0)
    elif n <= SPAN:
        forward_plan((*operands, out), problem, layout, True)(tuple(operands), out, divisor, n)
    else:
        sums = x.new_empty(-(-n // SPAN), dtype=widest(operands))
        forward_plan((*operands, sums), problem, layout, True)(tuple(operands), sums, divisor, n)
        finish(sums, out, sums.shape[0])
    return [out], []


@planned(kinds=flat_kinds_of)
def backward_plan(tensors, problem, layout, wanted, same):
    *operands, dout = tensors
    grads = tuple(torch.empty_like(v) if want else v for v, want in zip(operands, wanted))
    arguments = fixed_arguments(operands, problem, layout, wanted=wanted, same=same)
    return backward_launch.bind(grads=grads, dout=dout, **arguments)


def backward(tensors, saved, upstream, problem, wanted):
    operands, (dout,) = given(tensors), upstream
    wanted = tuple(wanted[: len(operands)])
    if shapes_only():
        return [torch.empty_like(v) for v, want in zip(operands, wanted) if want]
    x = operands[0]
    same = not any(dout.stride())  # one value, perhaps expanded: loss.sum().backward() passes such a gradient
    if same:
        operands, back, layout = flattened(operands, wanted)
    else:
        (*operands, dout), back, layout = flattened([*operands, dout], (*wanted, True))
        layout = Layout(layout.reads[:-1], layout.sizes[:-1])
    grads = [torch.empty_like(v) if want else v for v, want in zip(operands, wanted)]
    plan = backward_plan((*operands, dout), problem, layout, wanted, same)
    plan(tuple(operands), tuple(grads), dout, divisor_of(x, problem.reduction), x.numel())
    return [g if back is None else g.permute(back) for g, want in zip(grads, wanted) if want]
