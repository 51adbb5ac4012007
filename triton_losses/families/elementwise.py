"""Losses of the form L_i = w_i · f(x_i, y_i, ...): one value per element.

    forward   reads every operand once; writes L, or one partial sum per SPAN elements
    backward  reads every operand again; writes ∂L/∂operand · upstream for each wanted operand

Nothing but the operands is saved between the two, so a second backward is simply right.
"""

import torch

from triton_losses.core.compiler import runs_kernels, triton
from triton_losses.core.device_math import as_scalars
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import is_plain, op, read_whole, shapes_only
from triton_losses.core.reduction import cast, promoted, result_dtype
from triton_losses.core.threads import elements, share

if triton is not None:
    from triton_losses.kernels.elementwise import SPAN, backward_launch, forward_launch, triton_type

MOST_OPERANDS = 4


def read_value(formula, values, scalars, weighted):
    """L from operands that are already in the compute type."""
    if not weighted:
        return formula.value(*values, *scalars)
    return formula.value(*values[:-1], *scalars) * values[-1]


def read_partials(formula, values, scalars, weighted, wanted):
    """∂L/∂operand of each wanted operand; the weight, where there is one, is the last."""
    if not weighted:
        return formula.partials(wanted)(*values, *scalars)
    partials = formula.partials(wanted[:-1])(*values[:-1], *scalars) if any(wanted[:-1]) else ()
    own = (formula.value(*values[:-1], *scalars),) if wanted[-1] else ()
    return (*(partial * values[-1] for partial in partials), *own)


def widest(operands):
    return torch.float64 if any(v.dtype == torch.float64 for v in operands) else torch.float32


def divisor_of(x, reduction):
    return x.numel() if reduction == "mean" else 1


# PyTorch, in blocks that stay in a CPU's cache


def blocks(tensors, most):
    """Slices of at most ``most`` elements of tensors of one shape; flat ones where every tensor is contiguous."""
    if all(t.is_contiguous() for t in tensors):
        tensors = [t.view(-1) for t in tensors]
    size, shape = tensors[0].numel(), tensors[0].shape
    if size <= most:
        yield tensors
    elif size // shape[0] > most:
        for parts in zip(*(t.unbind(0) for t in tensors)):
            yield from blocks(parts, most)
    else:
        yield from zip(*(t.split(most * shape[0] // size) for t in tensors))


def forward_blocks(operands, formula, scalars, weighted, reduction, dtype):
    wide = widest(operands)
    if reduction == "none":
        out = operands[0].new_empty(operands[0].shape, dtype=dtype)
        parts = list(blocks([*operands, out], elements(wide)))

        def write(i):
            *values, o = parts[i]
            o.copy_(read_value(formula, [v.to(wide) for v in values], scalars, weighted))

        share(write, len(parts))
        return out
    parts = list(blocks(operands, elements(wide)))
    sums = [None] * len(parts)

    def add(i):
        sums[i] = read_value(formula, [v.to(wide) for v in parts[i]], scalars, weighted).sum()

    share(add, len(parts))
    total = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
    return (total / operands[0].numel() if reduction == "mean" else total).to(dtype)


def backward_blocks(operands, dout, formula, scalars, weighted, wanted, reduction):
    wide = widest(operands)
    grads = [torch.empty_like(v, memory_format=torch.contiguous_format) for v, want in zip(operands, wanted) if want]
    whole = reduction != "none"
    upstream = dout.to(wide) / divisor_of(operands[0], reduction) if whole else dout
    count = len(operands)
    parts = list(blocks([*operands, *grads, *(() if whole else (dout,))], elements(wide)))

    def write(i):
        values = [v.to(wide) for v in parts[i][:count]]
        factor = upstream if whole else parts[i][-1].to(wide)
        for partial, grad in zip(read_partials(formula, values, scalars, weighted, wanted), parts[i][count:]):
            if grad.dtype == wide:
                torch.mul(partial, factor, out=grad)
            else:
                grad.copy_(partial * factor)

    share(write, len(parts))
    return grads


# Ops: kernels on a GPU and in the interpreter, blocks on a CPU


def flattened(tensors):
    """The tensors in the memory order of the first, contiguous; and the permutation that undoes it."""
    if all(t.is_contiguous() for t in tensors):
        return tensors, None
    first = tensors[0]
    order = sorted(range(first.dim()), key=lambda d: -first.stride(d))
    back = [order.index(d) for d in range(first.dim())]
    return [t.permute(order).contiguous() for t in tensors], back


@op
def elementwise_forward(
    operands: list[torch.Tensor], formula: str, scalars: list[float], weighted: bool, reduction: str, dtype: torch.dtype
) -> torch.Tensor:
    x = operands[0]
    if shapes_only():
        return x.new_empty(x.shape if reduction == "none" else (), dtype=dtype)
    if not runs_kernels(x):
        return forward_blocks(operands, FORMULAS[formula], scalars, weighted, reduction, dtype)
    operands, back = flattened(operands)
    n, wide, reduce = x.numel(), widest(operands), reduction != "none"
    if reduce:
        partial_sums = max(-(-n // SPAN), 1)
        out = x.new_empty((), dtype=dtype) if partial_sums == 1 else x.new_empty(partial_sums, dtype=wide)
        if n == 0:
            out.fill_(float("nan") if reduction == "mean" else 0.0)
    else:
        out = operands[0].new_empty(operands[0].shape, dtype=dtype)
    forward_launch(
        operands=tuple(operands), out=out, n=n, divisor=divisor_of(x, reduction), scalars=as_scalars(scalars, wide),
        FORMULA=FORMULAS[formula].kernel, COMPUTE=triton_type(wide), WEIGHTED=weighted, REDUCE=reduce,
    )  # fmt: skip
    if reduce:
        return out if out.dim() == 0 else out.sum().to(dtype)
    return out if back is None else out.permute(back)


@op
def elementwise_backward(
    operands: list[torch.Tensor], dout: torch.Tensor, formula: str, scalars: list[float], weighted: bool, wanted: list[bool], reduction: str
) -> list[torch.Tensor]:
    if shapes_only():
        return [torch.empty_like(v) for v, want in zip(operands, wanted) if want]
    if not runs_kernels(dout):
        return backward_blocks(operands, dout, FORMULAS[formula], scalars, weighted, tuple(wanted), reduction)
    x = operands[0]
    same = not any(dout.stride())  # one value, or one value expanded: what loss.sum().backward() sends
    flat, back = flattened(operands if same else [*operands, dout])
    operands, dout = (flat, dout.as_strided((), ())) if same else (flat[:-1], flat[-1])
    wide = widest(operands)
    grads = [torch.empty_like(v) if want else v for v, want in zip(operands, wanted)]
    backward_launch(
        operands=tuple(operands), grads=tuple(grads), dout=dout, n=x.numel(), divisor=divisor_of(x, reduction),
        scalars=as_scalars(scalars, wide), FORMULA=FORMULAS[formula].kernel, COMPUTE=triton_type(wide), WEIGHTED=weighted,
        WANTED=tuple(wanted), SAME=same,
    )  # fmt: skip
    return [g if back is None else g.permute(back) for g, want in zip(grads, wanted) if want]


def whole_gradients(operands, wanted, dout, formula, scalars, weighted, reduction):
    """In plain torch, so that it may be differentiated again."""
    wide = widest(operands)
    upstream = cast(dout, wide) / divisor_of(operands[0], reduction)
    partials = iter(read_partials(FORMULAS[formula], [cast(v, wide) for v in operands], scalars, weighted, wanted))
    return [cast(next(partials) * upstream, v.dtype) if want else None for v, want in zip(operands, wanted)]


class Elementwise(torch.autograd.Function):
    """By kernels, or in blocks. (forward takes ctx: with setup_context, apply spends 25 µs on the signature.)"""

    @staticmethod
    def forward(ctx, formula, scalars, weighted, reduction, dtype, *operands):
        ctx.options = formula, scalars, weighted, reduction
        ctx.save_for_backward(*operands)
        return elementwise_forward(list(operands), *ctx.options, dtype)

    @staticmethod
    def backward(ctx, dout):
        operands, wanted = ctx.saved_tensors, ctx.needs_input_grad[5:]
        if torch.is_grad_enabled() or read_whole(dout):  # then it may be differentiated again, or is batched
            return None, None, None, None, None, *whole_gradients(operands, wanted, dout, *ctx.options)
        formula, scalars, weighted, reduction = ctx.options
        grads = iter(elementwise_backward(list(operands), dout, formula, scalars, weighted, list(wanted), reduction))
        return None, None, None, None, None, *(next(grads) if want else None for want in wanted)


class Whole(torch.autograd.Function):
    """By plain torch: for torch.compile, torch.func's transforms and devices without kernels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(formula, scalars, weighted, reduction, dtype, a, b, c, d):  # no *args: Dynamo counts parameters
        operands = [v for v in (a, b, c, d) if v is not None]
        wide = widest(operands)
        loss = read_value(FORMULAS[formula], [cast(v, wide) for v in operands], scalars, weighted)
        return cast(loss if reduction == "none" else loss.sum() / divisor_of(a, reduction), dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.formula, ctx.scalars, ctx.weighted, ctx.reduction, _, *operands = inputs
        ctx.save_for_backward(*operands)

    @staticmethod
    def backward(ctx, dout):
        operands = [v for v in ctx.saved_tensors if v is not None]
        wanted = ctx.needs_input_grad[5 : 5 + len(operands)]
        grads = whole_gradients(operands, wanted, dout, ctx.formula, ctx.scalars, ctx.weighted, ctx.reduction)
        return None, None, None, None, None, *grads, *[None] * (MOST_OPERANDS - len(operands))


def elementwise(formula, operands, scalars=(), reduction="mean", weight=None, dtype=None):
    """Reduce ``weight * formula(*operands, *scalars)``; operands and weight broadcast; the mean is over elements.

    dtype: of the result, unless autocast makes it float32; the operands' promoted type when None.
    """
    x = operands[0]
    dtype = result_dtype(x, dtype or promoted(*operands[:2]))
    if weight is not None:
        operands = (*operands, weight)
    for v in operands[1:]:
        if v.device != x.device:
            raise RuntimeError(f"expected all tensors to be on the same device, but found {x.device} and {v.device}")
    if any(v.shape != x.shape for v in operands):
        operands = torch.broadcast_tensors(*operands)
    options = formula.name, [float(s) for s in scalars], weight is not None, reduction, dtype
    if torch.compiler.is_compiling() or is_plain(x):
        return Whole.apply(*options, *operands, *[None] * (MOST_OPERANDS - len(operands)))
    return Elementwise.apply(*options, *operands)
