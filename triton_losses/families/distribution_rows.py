"""Losses of two rows, L_r = Σ_j f(log p_j, log q_j), straight from logits: p = softmax(y / T), q = softmax(x / T).

A row formula takes log_p, log_q, then scalars, and returns f and its partials by both. From those, with the sums over the row,

    ∂L/∂x_j = (∂f/∂log q_j - q_j Σ_k ∂f/∂log q_k) / T        and the same of y and p

p may be *given* as probabilities instead, which need not sum to 1: then f takes p itself, and ∂L/∂p_j = ∂f/∂p_j. A weight of
each column multiplies f. A z-loss adds z · lse², lse = log Σ exp(x / T).

    forward   reads both rows; writes the loss and saves six numbers a row: max and log Σ exp(· - max) of each (apart, as in
              label_rows), and the two sums of partials
    backward  reads both rows and writes the gradients

**The rule of one read.** In general f needs both log Σ first: two reads, the second out of the cache. One is enough where f is
linear in log q and, for p from logits, ∂f/∂log q = -p. For then moving log q by b and log p by a makes of f
e^a (f + (b - a) ∂f/∂log q), so sums made with the maxima so far can be moved to the final ones, and Σ exp(log p) is at hand.
"""

import functools

import torch

from triton_losses.core.compiler import compute_dtype, runs_kernels, triton
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import differentiated_again, is_plain, op, read_whole, shapes_only
from triton_losses.core.reduction import cast, promoted, result_dtype
from triton_losses.core.threads import share
from triton_losses.families.label_rows import readable
from triton_losses.families.label_rows_blocks import row_blocks

if triton is not None:
    from triton_losses.kernels.distribution_rows import backward_launch, forward_launch, row_arguments

VECTOR = 16  # bytes; both rows of a pair must start at the same place within one


@functools.cache
def reading_of(name, outputs):
    return FORMULAS[name].reading(outputs, in_tuple=True)


def wide_dtype(p, q):
    return compute_dtype(torch.promote_types(p.dtype, q.dtype))


# PyTorch, whole: differentiable as often as one likes


def log_rows(p, q, scale, given):
    wide = wide_dtype(p, q)
    return cast(p, wide) if given else (cast(p, wide) * scale).log_softmax(1), (cast(q, wide) * scale).log_softmax(1)


def whole_loss(p, q, weight, labels, formula, scalars, given, one_read, ignore_index, reduction, dtype):
    scale, z_loss, *scalars = scalars
    a, b = log_rows(p, q, scale, given)
    f = FORMULAS[formula].value(a, b, *scalars)
    losses = (f if weight is None else f * cast(weight, f.dtype)).sum(1)
    if z_loss:
        losses = losses + z_loss * (cast(q, b.dtype) * scale).logsumexp(1) ** 2
    rows = q.shape[0]
    if labels is not None:
        kept = labels != ignore_index
        losses, rows = torch.where(kept, losses, 0), kept.sum()
    return cast(losses if reduction == "none" else losses.sum() / (rows if reduction == "mean" else 1), dtype)


def whole_gradients(p, q, weight, labels, dout, wanted, formula, scalars, given, ignore_index, reduction):
    """In plain torch, so that they may be differentiated again."""
    scale, z_loss, *scalars = scalars
    a, b = log_rows(p, q, scale, given)
    upstream = cast(dout, b.dtype)
    if labels is not None:
        kept = labels != ignore_index
        upstream = upstream / kept.sum() if reduction == "mean" else upstream
        upstream = torch.where(kept, upstream, 0)
    elif reduction == "mean":
        upstream = upstream / q.shape[0]
    upstream = upstream.expand(q.shape[0])[:, None]
    d_p, d_q = (d if weight is None else d * cast(weight, d.dtype) for d in FORMULAS[formula].partials((True, True))(a, b, *scalars))
    grad_p = d_p if given else (d_p - a.exp() * d_p.sum(1, keepdim=True)) * scale
    slope = d_q.sum(1, keepdim=True)
    if z_loss:
        slope = slope - 2 * z_loss * (cast(q, b.dtype) * scale).logsumexp(1, keepdim=True)
    grads = grad_p * upstream, (d_q - b.exp() * slope) * (upstream * scale)
    if labels is not None:  # 0 · inf
        grads = [torch.where(kept[:, None], g, 0) for g in grads]
    return [cast(g, x.dtype) if want else None for g, x, want in zip(grads, (p, q), wanted)]


# PyTorch, in blocks of rows that stay in a CPU's cache


def centred(x, scale, wide):
    """x · scale - max, and the maxima."""
    x = x.to(wide).contiguous()  # for the order of the sums
    if scale != 1:
        x = x * scale
    highest = x.amax(1, keepdim=True)
    return x - highest, highest


def walk_blocks(
    p, q, weight, labels, formula, scalars, given, ignore_index,
    saved, losses=None, one_read=False, grads=(None, None), upstream=None, denominator=None,
):  # fmt: skip
    """walk, in PyTorch. Where losses and gradients are both wanted, the gradients are made while a block is in the cache."""
    rows, cols = q.shape
    wide = saved.dtype
    scale, z_loss, *scalars = scalars
    weight = weight if weight is None else weight.to(wide)
    parts = row_blocks(rows, cols, wide)
    dropped = None if labels is None else labels == ignore_index
    wanted = tuple(grad is not None for grad in grads)
    if any(wanted):
        partials_of = FORMULAS[formula].partials(wanted)
        upstream = (upstream.to(wide) / (1 if denominator is None else denominator)).expand(rows)[:, None]

    def total(t):
        return t.sum(1) if weight is None else t.mv(weight)

    def read(i):
        highest_p, log_total_p, highest_q, log_total_q, slope_p, slope_q = saved[:, parts[i], None]
        b, highest_q[:] = centred(q[parts[i]], scale, wide)
        total_q = b.exp().sum(1, keepdim=True)
        torch.log(total_q, out=log_total_q)
        if given:
            a = p[parts[i]].to(wide)
        else:
            a, highest_p[:] = centred(p[parts[i]], scale, wide)
        if one_read:
            f, d_q = (total(t)[:, None] for t in reading_of(formula, (0, 2))(a, b, *scalars))
            if given:
                loss = f - log_total_q * d_q
            else:
                torch.log(-d_q, out=log_total_p)
                loss = torch.log(total_q / -d_q) - f / d_q  # not a difference of logarithms: those are rounded
                d_q = d_q / -d_q  # -1, or the NaN of a row that has one
            d_p = loss - d_q
        else:
            torch.log(a.exp().sum(1, keepdim=True), out=log_total_p)
            loss, d_p, d_q = (total(t)[:, None] for t in reading_of(formula, (0, 1, 2))(a.sub_(log_total_p), b.sub_(log_total_q), *scalars))
        if z_loss:
            lse = highest_q + log_total_q
            loss, d_q = loss + z_loss * lse * lse, d_q - 2 * z_loss * lse
        losses[0, parts[i]], slope_p[:], slope_q[:] = loss[:, 0], d_p, d_q

    def write(i):
        highest_p, log_total_p, highest_q, log_total_q, *slopes = saved[:, parts[i], None]
        a, b, factor = p[parts[i]].to(wide), q[parts[i]].to(wide), upstream[parts[i]]
        if not given:
            a = (a if scale == 1 else a * scale).sub(highest_p).sub_(log_total_p)
        b = (b if scale == 1 else b * scale).sub(highest_q).sub_(log_total_q)
        partials = iter(partials_of(a, b, *scalars))
        for grad, log_row, slope, is_given in zip(grads, (a, b), slopes, (given, False)):
            if grad is None:
                continue
            d = next(partials) if weight is None else next(partials) * weight
            out = grad[parts[i]] if grad.dtype == wide else None
            if is_given:
                g = torch.mul(d, factor, out=out)
            else:
                g = torch.addcmul(d, log_row.exp_(), slope, value=-1, out=out).mul_(factor * scale)
            if dropped is not None:
                g.masked_fill_(dropped[parts[i], None], 0)  # 0 · nan
            if out is None:
                grad[parts[i]] = g

    def work(i):
        if losses is not None:
            read(i)
        if any(wanted):
            write(i)

    share(work, len(parts))
    if losses is not None:
        losses[1].fill_(1.0)
        if dropped is not None:
            losses.masked_fill_(dropped, 0)


# Ops: kernels on a GPU and in the interpreter, blocks on a CPU


def readable_pair(p, q):
    """Both with rows one after another, and starting at the same place within a vector; on a CPU as they are."""
    if not runs_kernels(q):
        return p, q
    p, q = readable(p), readable(q)
    if q.shape[0] > 1 and (p.stride(0) - q.stride(0)) % VECTOR:
        p, q = p.contiguous(), q.contiguous()
    return p, q


def room_for_gradient(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) if runs_kernels(x) else x.new_empty(x.shape)


def walk(
    p, q, weight, labels, formula, scalars, given, ignore_index,
    saved, losses=None, one_read=False, grads=(None, None), upstream=None, denominator=None,
):  # fmt: skip
    """One pass over the pairs, by kernels, which want a readable pair, or in blocks.

    losses: fill them, (2, rows), with losses and a 1 for each row that counts, and ``saved`` (6, rows) with what a backward
    needs. grads: fill those of p and of q that are not None, and may be p and q themselves, with the gradients of
    Σ upstream · losses / denominator. Both may be asked for.
    """
    if not runs_kernels(q):
        options = formula, scalars, given, ignore_index, saved, losses, one_read, grads, upstream, denominator
        return walk_blocks(p, q, weight, labels, *options)
    arguments = row_arguments(p, q, weight, labels, FORMULAS[formula], scalars, given, ignore_index)
    if losses is not None:
        forward_launch(losses=losses, saved=saved, ONE_READ=one_read, **arguments)
    wanted = [grad is not None for grad in grads]
    if any(wanted):
        grad_p, grad_q = (x if grad is None else grad for x, grad in zip((p, q), grads))
        backward_launch(
            saved=saved, grad_p=grad_p, grad_q=grad_q, dout=upstream, denominator=saved if denominator is None else denominator,
            dout_stride=upstream.stride(0) if upstream.dim() else 0, MEAN=denominator is not None, WANT_P=wanted[0], WANT_Q=wanted[1],
            **arguments,
        )  # fmt: skip


@op
def distribution_rows_forward(
    q: torch.Tensor, p: torch.Tensor, weight: torch.Tensor | None, labels: torch.Tensor | None, formula: str, scalars: list[float],
    given: bool, one_read: bool, ignore_index: int, reduction: str, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The reduced loss; what the backward needs of each row; how many rows count."""
    rows, wide = q.shape[0], wide_dtype(p, q)
    saved = q.new_empty(6, rows, dtype=wide)
    if shapes_only():
        out = q.new_empty(rows if reduction == "none" else (), dtype=dtype)
        return out, saved, q.new_empty((), dtype=wide)
    p, q = readable_pair(p, q)
    losses = q.new_empty(2, rows, dtype=wide)
    walk(p, q, weight, labels, formula, scalars, given, ignore_index, saved, losses, one_read)
    if reduction == "none":
        return losses[0].to(dtype, copy=True), saved, saved.new_empty(())
    total, counted = losses.sum(1)
    return (total / counted if reduction == "mean" else total).to(dtype, copy=True), saved, counted.clone()


@op
def distribution_rows_backward(
    q: torch.Tensor, p: torch.Tensor, weight: torch.Tensor | None, labels: torch.Tensor | None, saved: torch.Tensor,
    counted: torch.Tensor, dout: torch.Tensor, formula: str, scalars: list[float], given: bool, ignore_index: int, reduction: str,
    wanted: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """The gradients of p and of q, those that are wanted."""
    if shapes_only():
        return [x.new_empty(x.shape) for x, want in zip((p, q), wanted) if want]
    p, q = readable_pair(p, q)
    grads = [room_for_gradient(x) if want else None for x, want in zip((p, q), wanted)]
    denominator = counted if reduction == "mean" else None
    walk(p, q, weight, labels, formula, scalars, given, ignore_index, saved, grads=grads, upstream=dout, denominator=denominator)
    return [grad for grad in grads if grad is not None]


class DistributionRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, q, weight, labels, formula, scalars, given, one_read, ignore_index, reduction, dtype):
        ctx.options = formula, scalars, given, ignore_index, reduction
        loss, saved, counted = distribution_rows_forward(
            q, p, weight, labels, formula, scalars, given, one_read, ignore_index, reduction, dtype
        )  # fmt: skip
        ctx.save_for_backward(p, q, weight, labels, saved, counted)
        return loss

    @staticmethod
    def backward(ctx, dout):
        p, q, weight, labels, saved, counted = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        again = differentiated_again()
        if again or read_whole(dout):
            grads = whole_gradients(p, q, weight, labels, dout, wanted, *ctx.options)
        else:
            found = iter(distribution_rows_backward(q, p, weight, labels, saved, counted, dout, *ctx.options, list(wanted)))
            grads = [next(found) if want else None for want in wanted]
        return *grads, *[None] * 9


class Whole(torch.autograd.Function):
    """By plain torch, with the formula's own partials: for torch.func's transforms and devices without kernels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return whole_loss(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        p, q, weight, labels, *ctx.options = inputs
        ctx.save_for_backward(p, q, weight, labels)

    @staticmethod
    def backward(ctx, dout):
        formula, scalars, given, _, ignore_index, reduction, _ = ctx.options
        options = formula, scalars, given, ignore_index, reduction
        return *whole_gradients(*ctx.saved_tensors, dout, ctx.needs_input_grad[:2], *options), *[None] * 9


def distribution_rows(
    formula, p, q, scalars=(), *, temperature=1.0, given=False, one_read=False, weight=None, z_loss=0.0, labels=None, ignore_index=-100,
    reduction="mean", out_dtype=None,
):  # fmt: skip
    """``formula`` of every pair of rows of ``p`` and ``q`` (rows, columns), both logits unless p is given as probabilities.

    one_read: the formula follows the rule of one read. labels: (rows,); rows with ignore_index cost nothing; the mean is over
    the others. out_dtype: of the result; the promoted type, or float32 under autocast, when None.
    """
    dtype = out_dtype or result_dtype(q, promoted(p, q))
    scalars = [1.0 / temperature, float(z_loss), *(float(s) for s in scalars)]
    arguments = p, q, weight, labels, formula.name, scalars, given, one_read, ignore_index, reduction, dtype
    if weight is not None and weight.requires_grad:
        return whole_loss(*arguments)
    if is_plain(q) or q.shape[1] == 0:
        return Whole.apply(*arguments)
    return DistributionRows.apply(*arguments)
