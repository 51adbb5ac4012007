"""Losses of a row of numbers that are chances up to a factor: p_j = x_j / Σ_k x_k, and L_r = Σ_j f(y_j, p_j).

A formula takes y, p, then scalars, and returns f and its partials by both. From those, with the sum over the row,

    ∂L/∂x_j = (∂f/∂p_j - Σ_k p_k ∂f/∂p_k) / Σ_k x_k        ∂L/∂y_j = ∂f/∂y_j

A label t may stand for y_j = [j = t]. Then f and ∂f/∂p must be 0 where y is, so that p_t and Σ x are all that counts; rows whose
label is `ignore_index` cost nothing, and the mean is over the others.

    forward   reads x twice, the second time out of the cache, and y; with labels x once. Saves Σ x and Σ p ∂f/∂p
    backward  reads x and y and writes the gradients; with labels it reads nothing
"""

import torch

from triton_losses.core.compiler import compute_dtype, runs_kernels, triton
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import differentiated_again, is_plain, op, read_whole, shapes_only
from triton_losses.core.reduction import cast, promoted, result_dtype
from triton_losses.core.threads import share
from triton_losses.families.distribution_rows import readable_pair
from triton_losses.families.label_rows import readable
from triton_losses.families.label_rows_blocks import counted, row_blocks

if triton is not None:
    from triton_losses.kernels.proportion_rows import backward_launch, forward_launch, row_arguments


def wide_dtype(x, y):
    return compute_dtype(torch.promote_types(x.dtype, y.dtype) if y.is_floating_point() else x.dtype)


# PyTorch, whole: differentiable as often as one likes


def chances(x, y, ignore_index):
    """Of each row: y, p, Σ x, and which rows count (None: all). With labels, of p_t alone: (rows, 1)."""
    wide = wide_dtype(x, y)
    x = cast(x, wide)
    total = x.sum(1, keepdim=True)
    if y.is_floating_point():
        return cast(y, wide), x / total, total, None
    kept = y != ignore_index
    p = x.gather(1, torch.where(kept, y, 0).long()[:, None]) / total
    return torch.ones_like(p), p, total, kept


def reduced(losses, kept, reduction, dtype):
    if kept is not None:
        losses = torch.where(kept, losses, 0)
    if reduction == "none":
        return cast(losses, dtype)
    number = losses.shape[0] if kept is None else kept.sum()
    return cast(losses.sum() / (number if reduction == "mean" else 1), dtype)


def whole_loss(x, y, formula, scalars, ignore_index, reduction, dtype):
    target, p, _, kept = chances(x, y, ignore_index)
    return reduced(FORMULAS[formula].value(target, p, *scalars).sum(1), kept, reduction, dtype)


def whole_gradients(x, y, dout, wanted, formula, scalars, ignore_index, reduction):
    """In plain torch, so that they may be differentiated again."""
    target, p, total, kept = chances(x, y, ignore_index)
    upstream = cast(dout, p.dtype)
    if reduction == "mean":
        upstream = upstream / (x.shape[0] if kept is None else kept.sum())
    upstream = upstream.expand(x.shape[0])
    upstream = (upstream if kept is None else torch.where(kept, upstream, 0))[:, None]
    d_y, d_p = FORMULAS[formula].partials((True, True))(target, p, *scalars)
    shift = -(p * d_p).sum(1, keepdim=True)
    if kept is None:
        grad = (d_p + shift) * (upstream / total)
    else:
        label = torch.where(kept, y, 0).long()[:, None]
        factor = upstream / torch.where(kept[:, None], total, 1)  # 0 · nan
        d_p, shift = (torch.where(kept[:, None], d, 0) for d in (d_p, shift))
        grad = (shift * factor).expand_as(x).scatter_add(1, label, d_p * factor)
    return cast(grad, x.dtype) if wanted[0] else None, cast(d_y * upstream, y.dtype) if wanted[1] else None


# PyTorch, in blocks of rows that stay in a CPU's cache


def forward_blocks(x, y, formula, scalars, ignore_index, reduction, dtype):
    rows, wide = x.shape[0], wide_dtype(x, y)
    parts = row_blocks(*x.shape, wide)
    saved = x.new_zeros(2, rows, dtype=wide)  # the second is for kernels
    totals, losses = saved[0], x.new_empty(rows, dtype=wide)

    def add(i):
        torch.sum(x[parts[i]].to(wide), 1, out=totals[parts[i]])

    def work(i):
        block = x[parts[i]].to(wide)
        total = torch.sum(block, 1, out=totals[parts[i]])
        losses[parts[i]] = formula.value(y[parts[i]].to(wide), block / total[:, None], *scalars).sum(1)

    if y.is_floating_point():
        share(work, len(parts))
        return reduced(losses, None, reduction, dtype), saved, saved.new_tensor(rows)
    kept, label, _ = counted(y, None, x.shape[1], ignore_index, wide)
    share(add, len(parts))
    p = x.gather(1, label)[:, 0].to(wide) / totals
    number = saved.new_tensor(rows) if kept is None else kept.sum().to(wide)
    return reduced(formula.value(torch.ones_like(p), p, *scalars), kept, reduction, dtype), saved, number


def backward_blocks(x, y, saved, number, dout, formula, scalars, ignore_index, reduction, wanted):
    rows, wide, parts = x.shape[0], saved.dtype, row_blocks(*x.shape, saved.dtype)
    grads = [torch.empty(t.shape, dtype=t.dtype) if want else None for t, want in zip((x, y), wanted)]
    upstream = (dout.to(wide) / (number if reduction == "mean" else 1)).expand(rows)[:, None]
    totals, partials_of = saved[0][:, None], formula.partials(wanted[::-1])

    def write(grad, part, value, factor):
        if grad.dtype == wide:
            torch.mul(value, factor, out=grad[part])
        else:
            grad[part] = value * factor

    def work(i):
        part = parts[i]
        p = x[part].to(wide) / totals[part]
        partials = list(partials_of(y[part].to(wide), p, *scalars))
        if wanted[0]:
            d = partials.pop()
            write(grads[0], part, d - (p * d).sum(1, keepdim=True), upstream[part] / totals[part])
        if wanted[1]:
            write(grads[1], part, partials[0], upstream[part])

    if y.is_floating_point():
        share(work, len(parts))
        return [grad for grad in grads if grad is not None]
    kept, label, _ = counted(y, None, x.shape[1], ignore_index, wide)
    p = x.gather(1, label).to(wide) / totals
    (d,) = formula.partials((False, True))(torch.ones_like(p), p, *scalars)
    at_label, elsewhere = (d * upstream / totals, -p * d * upstream / totals)
    if kept is not None:  # whatever stood in those rows, nan too
        at_label, elsewhere = (torch.where(kept[:, None], g, 0) for g in (at_label, elsewhere))
    grads[0].copy_(elsewhere.expand(x.shape)).scatter_(1, label, (elsewhere + at_label).to(x.dtype))
    return grads[:1]


# Ops: kernels on a GPU and in the interpreter, blocks on a CPU


@op
def proportion_rows_forward(
    x: torch.Tensor, y: torch.Tensor, formula: str, scalars: list[float], ignore_index: int, reduction: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reduced loss; what the backward needs of each row; how many rows count."""
    rows, wide = x.shape[0], wide_dtype(x, y)
    if shapes_only():
        out = x.new_empty(rows if reduction == "none" else (), dtype=dtype)
        return out, x.new_empty(2, rows, dtype=wide), x.new_empty((), dtype=wide)
    if not runs_kernels(x):
        return forward_blocks(x, y, FORMULAS[formula], scalars, ignore_index, reduction, dtype)
    x, y = arranged(x, y, ignore_index)
    saved, losses = x.new_empty(2, rows, dtype=wide), x.new_empty(2, rows, dtype=wide)
    forward_launch(losses=losses, **row_arguments(x, y, saved, FORMULAS[formula], scalars, ignore_index))
    if reduction == "none":
        return losses[0].to(dtype, copy=True), saved, saved.new_empty(())
    total, number = losses.sum(1)
    return (total / number if reduction == "mean" else total).to(dtype, copy=True), saved, number.clone()


def arranged(x, y, ignore_index):
    """As the kernels walk them."""
    if y.is_floating_point():
        return readable_pair(y, x)[::-1]
    if x.device.type == "cpu":
        counted(y, None, x.shape[1], ignore_index, torch.float32)  # refuses a label that is no class; a GPU asserts
    return readable(x), y.contiguous()


@op
def proportion_rows_backward(
    x: torch.Tensor, y: torch.Tensor, saved: torch.Tensor, number: torch.Tensor, dout: torch.Tensor, formula: str, scalars: list[float],
    ignore_index: int, reduction: str, wanted: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """The gradients of x and of y, those that are wanted."""
    if shapes_only():
        return [t.new_empty(t.shape) for t, want in zip((x, y), wanted) if want]
    if not runs_kernels(x):
        return backward_blocks(x, y, saved, number, dout, FORMULAS[formula], scalars, ignore_index, reduction, tuple(wanted))
    x, y = arranged(x, y, ignore_index)
    grads = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) if want else t for t, want in zip((x, y), wanted)]
    backward_launch(
        grad_x=grads[0], grad_y=grads[1], dout=dout, denominator=number, dout_stride=dout.stride(0) if reduction == "none" else 0,
        MEAN=reduction == "mean", WANT_X=wanted[0], WANT_Y=wanted[1],
        **row_arguments(x, y, saved, FORMULAS[formula], scalars, ignore_index),
    )  # fmt: skip
    return [grad for grad, want in zip(grads, wanted) if want]


class ProportionRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, formula, scalars, ignore_index, reduction, dtype):
        ctx.options = formula, scalars, ignore_index, reduction
        loss, saved, number = proportion_rows_forward(x, y, *ctx.options, dtype)
        ctx.save_for_backward(x, y, saved, number)
        return loss

    @staticmethod
    def backward(ctx, dout):
        x, y, saved, number = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        again = differentiated_again()
        if again or read_whole(dout):
            grads = whole_gradients(x, y, dout, wanted, *ctx.options)
        else:
            found = iter(proportion_rows_backward(x, y, saved, number, dout, *ctx.options, list(wanted)))
            grads = [next(found) if want else None for want in wanted]
        return *grads, *[None] * 5


class Whole(torch.autograd.Function):
    """By plain torch, with the formula's own partials: for torch.func's transforms and devices without kernels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return whole_loss(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, *ctx.options, _ = inputs
        ctx.save_for_backward(x, y)

    @staticmethod
    def backward(ctx, dout):
        return *whole_gradients(*ctx.saved_tensors, dout, ctx.needs_input_grad[:2], *ctx.options), *[None] * 5


def proportion_rows(formula, x, y, scalars=(), ignore_index=-100, reduction="mean"):
    """``formula`` of every row of ``x`` (rows, columns) and its target, a row of ``y``, or a label (rows,)."""
    dtype = result_dtype(x, promoted(x, y) if y.is_floating_point() else x.dtype)
    arguments = x, y, formula.name, [float(s) for s in scalars], ignore_index, reduction, dtype
    if is_plain(x) or x.shape[1] == 0:
        return Whole.apply(*arguments)
    return ProportionRows.apply(*arguments)
