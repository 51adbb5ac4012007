"""Losses of a row of numbers and the index of its class: L_r = f(statistics of the row, weight of its class).

A row formula names the statistics it takes, in this order, then perhaps the weight, then scalars:

    picked      x_t, the label's own input                     log_p   x_t - log Σ_j exp x_j
    mean_log_p  Σ_j w_j log p_j / C                            lse     log Σ_j exp x_j
    entropy     H = -Σ_j p_j log p_j
    weight      w_t, the weight of the label's class: 1 where there are no class weights

and returns the loss, then its partial by each statistic it took. From those, with p = softmax(x) and w̄ = Σ_j w_j / C,

    ∂L/∂x_j = p_j (f_lse - f_log_p - w̄ f_mean_log_p - f_entropy (log p_j + H))
              + [j = t] (f_log_p + f_picked)  +  f_mean_log_p w_j / C

where x is the logit, or scale · softcap · tanh(logit / softcap).

Logits have two layouts: rows (rows, classes) of labels (rows,), which this file walks, and planes (images, classes, pixels) of labels
(images, pixels), where a row is a pixel: label_planes.py walks those.

    forward   reads a row once; writes its loss and saves max x and log Σ exp(x - max x). Apart: their sum would round away
              the digits that a common offset of the logits leaves
    backward  reads a row once and writes its gradient

A formula that takes `picked` alone reads one number a row (on a CPU that is for ATen: no blocks). Rows whose label is `ignore_index` cost nothing and get zeros.
"""

import torch

from triton_losses.core.compiler import compute_dtype, runs_kernels, triton
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import differentiated_again, is_plain, keeps_for_backward, op, read_whole, shapes_only
from triton_losses.core.reduction import cast, result_dtype
from triton_losses.families.label_planes import log_rows_of, planes_backward, planes_forward
from triton_losses.families.label_rows_blocks import counted, slots_of, walk_blocks, whole_losses

if triton is not None:
    from triton_losses.kernels.label_rows import launch

MOST_PADDING = 64  # a row's stride may exceed its length by less than this; beyond it rows are copied


def walk(
    logits, labels, class_weights, formula, scalars, ignore_index, softcap, scale,
    saved, forward=False, grad=None, upstream=None, denominator=None, operands=(), entropy=False, likeliest=None, room=None, exponentials=None,
):  # fmt: skip
    """One pass over the rows, by kernels or in blocks.

    forward: fill ``saved`` (4, rows) with what a backward needs, and return losses and weights (rows,); weights None: all 1.
    entropy: fill saved[3] with the rows' entropies, whether the formula takes them or not.
    likeliest: (rows,) integers, to fill with the first of each row's highest columns, -1 where ignored.
    grad: fill it, which may be ``logits``, with the gradient of Σ upstream · losses / denominator. Both may be asked for.
    room: where logits and grad are both the first columns of it, contiguous (rows, more columns), what lies beyond them is free.
    """
    arguments = (logits, labels, class_weights, FORMULAS[formula], scalars, ignore_index, softcap, scale)
    if not runs_kernels(logits):
        return walk_blocks(*arguments, saved, forward, grad, upstream, denominator, operands, entropy, likeliest, room, exponentials)
    if logits.device.type == "cpu":
        counted(labels, None, logits.shape[1], ignore_index, torch.float32)  # refuses a label that is no class; a GPU asserts
    losses = saved.new_empty(2, logits.shape[0]) if forward else None
    launch(*arguments, slots_of(FORMULAS[formula]), saved, losses, likeliest, grad, upstream, denominator, operands, entropy)
    return (None, None) if losses is None else losses.unbind(0)


def readable(logits):
    """Rows that lie one after another, with little between them."""
    rows, cols = logits.shape
    if logits.stride(1) == 1 and (rows == 1 or 0 <= logits.stride(0) - cols < MOST_PADDING):
        return logits
    return logits.contiguous()


def reduced(losses, weights, reduction, dtype):
    if reduction == "none":
        return cast(losses, dtype)
    total = losses.sum()
    return cast(total / weights.sum() if reduction == "mean" else total, dtype)


@op
def label_rows_forward(
    logits: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None, formula: str, scalars: list[float],
    ignore_index: int, softcap: float, scale: float, reduction: str, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The reduced loss; what the backward needs of each row; the sum of the rows' weights where the mean needs it."""
    forward = planes_forward if logits.dim() == 3 else rows_forward
    return forward(logits, labels, class_weights, formula, scalars, ignore_index, softcap, scale, reduction, dtype)


def rows_forward(logits, labels, class_weights, formula, scalars, ignore_index, softcap, scale, reduction, dtype, exponentials=None):
    rows = logits.shape[0]
    saved = logits.new_empty(4, rows, dtype=compute_dtype(logits.dtype))
    if shapes_only():
        out = logits.new_empty(rows if reduction == "none" else (), dtype=dtype)
        return out, saved, saved.new_empty(() if reduction == "mean" else (0,))
    options = formula, scalars, ignore_index, softcap, scale
    losses, weights = walk(readable(logits), labels, class_weights, *options, saved, forward=True, exponentials=exponentials)
    if reduction == "none":
        return losses.to(dtype, copy=True), saved, saved.new_empty(0)
    total = losses.sum()
    if reduction == "sum":
        return total.to(dtype, copy=True), saved, saved.new_empty(0)
    weight = saved.new_full((), rows) if weights is None else weights.sum()
    return (total / weight).to(dtype), saved, weight


@op
def label_rows_backward(
    logits: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None, saved: torch.Tensor, denominator: torch.Tensor,
    dout: torch.Tensor, operands: list[torch.Tensor], formula: str, scalars: list[float], ignore_index: int, softcap: float,
    scale: float, reduction: str,
) -> torch.Tensor:  # fmt: skip
    options = formula, scalars, ignore_index, softcap, scale, reduction
    if logits.dim() == 3:
        return planes_backward(logits, labels, class_weights, saved, denominator, dout, *options)
    return rows_backward(logits, labels, class_weights, saved, denominator, dout, *options, operands=operands)


def rows_backward(
    logits, labels, class_weights, saved, denominator, dout, formula, scalars, ignore_index, softcap, scale, reduction, exponentials=None,
    operands=(),
):  # fmt: skip
    if shapes_only():
        return logits.new_empty(logits.shape)
    logits = readable(logits)
    grad = room_for_gradient(logits) if exponentials is None else exponentials
    walk(
        logits, labels, class_weights, formula, scalars, ignore_index, softcap, scale, saved, grad=grad, upstream=dout,
        denominator=denominator if reduction == "mean" else None, operands=operands, exponentials=exponentials,
    )  # fmt: skip
    return grad


def room_for_gradient(logits):
    return torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)


def room_for_exponentials(logits, formula):
    """Where the gradient is to lie; None where that does not serve."""
    if not any(slots_of(FORMULAS[formula])[1:5]) or logits.dtype != compute_dtype(logits.dtype):
        return None
    return room_for_gradient(readable(logits))


class LabelRows(torch.autograd.Function):
    """In blocks, where nobody watches, the forward leaves its exponentials where the gradient is to lie: no op would be free to."""

    @staticmethod
    def forward(ctx, logits, labels, class_weights, keep, formula, scalars, ignore_index, softcap, scale, reduction, dtype):
        ctx.options = formula, scalars, ignore_index, softcap, scale
        ctx.reduction, ctx.dtype, ctx.keep, ctx.kept = reduction, dtype, keep, None
        if keep:
            images = logits.dim() == 3
            with torch.autocast("cpu", enabled=False):
                ctx.kept = log_rows_of(logits, formula, softcap, scale) if images else room_for_exponentials(logits, formula)
                arguments = logits, labels, class_weights, *ctx.options, reduction, dtype, ctx.kept
                loss, saved, denominator = planes_forward(*arguments) if images else rows_forward(*arguments)
        else:
            loss, saved, denominator = label_rows_forward(logits, labels, class_weights, *ctx.options, reduction, dtype)
        ctx.save_for_backward(logits, labels, class_weights, saved, denominator)
        return loss

    @staticmethod
    def backward(ctx, dout):
        logits, labels, class_weights, saved, denominator = ctx.saved_tensors
        again = differentiated_again()
        if again or read_whole(dout):
            formula, *options = ctx.options
            with torch.enable_grad():
                rows = whole_losses(logits, labels, class_weights, FORMULAS[formula], *options)
                loss = reduced(*rows, ctx.reduction, ctx.dtype)
            grad = torch.autograd.grad(loss, logits, dout, create_graph=again)[0]
        elif ctx.keep:
            images, kept, ctx.kept = logits.dim() == 3, ctx.kept, None
            with torch.autocast("cpu", enabled=False):
                if kept is None and images:  # in a second backward
                    kept = log_rows_of(logits, ctx.options[0], *ctx.options[-2:])
                backward = planes_backward if images else rows_backward
                grad = backward(logits, labels, class_weights, saved, denominator, dout, *ctx.options, ctx.reduction, kept)
        else:
            grad = label_rows_backward(logits, labels, class_weights, saved, denominator, dout, [], *ctx.options, ctx.reduction)
        return grad, *[None] * 10


def label_rows(
    formula, logits, labels, class_weights=None, scalars=(), ignore_index=-100, reduction="mean", out_dtype=None, softcap=0.0, temperature=1.0
):  # fmt: skip
    """``formula`` of every row of ``logits`` whose label is not ``ignore_index``: (rows, classes), or (images, classes, pixels).

    The mean divides by the sum of the rows' weights. out_dtype: of the result; the logits', or float32 under autocast, when None.
    """
    options = [float(s) for s in scalars], ignore_index, float(softcap), 1.0 / temperature
    dtype = out_dtype or result_dtype(logits)
    if is_plain(logits):
        return reduced(*whole_losses(logits, labels, class_weights, formula, *options), reduction, dtype)
    return LabelRows.apply(logits, labels, class_weights, keeps_for_backward(logits), formula.name, *options, reduction, dtype)


class RowStatistics(torch.autograd.Function):
    """log_p and entropy of each row, differentiable both; 0 where ignored."""

    @staticmethod
    def forward(ctx, logits, labels, ignore_index, softcap, scale):
        ctx.options = [], ignore_index, softcap, scale
        options = *ctx.options, "none", compute_dtype(logits.dtype)
        log_p, saved, denominator = label_rows_forward(logits, labels, None, "log_p_beside_entropy", *options)
        ctx.save_for_backward(logits, labels, saved, denominator)
        return log_p, torch.where(labels != ignore_index, saved[3], 0)

    @staticmethod
    def backward(ctx, d_log_p, d_entropy):
        logits, labels, saved, denominator = ctx.saved_tensors
        again = differentiated_again()
        if again or read_whole(d_log_p, d_entropy):
            with torch.enable_grad():
                results = whole_row_statistics(logits, labels, *ctx.options)
            return torch.autograd.grad(results, logits, (d_log_p, d_entropy), create_graph=again)[0], None, None, None, None
        arguments = saved, denominator, torch.ones_like(d_log_p), [d_log_p, d_entropy], "along", *ctx.options, "none"
        return label_rows_backward(logits, labels, None, *arguments), None, None, None, None


def whole_row_statistics(logits, labels, *options):
    return [whole_losses(logits, labels, None, FORMULAS[name], *options)[0] for name in ("chosen_log_p", "row_entropy")]


def row_statistics(logits, labels, ignore_index=-100, softcap=0.0, temperature=1.0):
    """log_p and entropy of every row of ``logits`` (rows, classes), float32 or wider; 0 where ignored."""
    options = ignore_index, float(softcap), 1.0 / temperature
    if is_plain(logits):
        return whole_row_statistics(logits, labels, [], *options)
    return RowStatistics.apply(logits, labels, *options)
