"""Losses of a row of scores whose labels should outscore the others: L_r = 1/C Σ_{t∈T} w_t Σ_{j∉T} f(x_j - x_t).

T are the row's labels: one, or a set, which ends before the first negative one; a label that stands there twice counts twice.
A formula takes d = x_j - x_t, then scalars, and returns f and f'. With s_t = w_t/C Σ_{j∉T} f'(x_j - x_t),

    ∂L/∂x_t = -s_t        ∂L/∂x_j = 1/C Σ_{t∈T} w_t f'(x_j - x_t)  where j is no label

    forward   reads a row once for each of its labels; writes its loss and saves s_t
    backward  reads a row once and writes its gradient

On a CPU these losses are ATen's: margin_native.py.
"""

import torch

from triton_losses.core.compiler import compute_dtype, runs_kernels, triton
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import differentiated_again, op, read_whole, shapes_only
from triton_losses.core.reduction import cast, result_dtype
from triton_losses.families.label_rows import readable

if triton is not None:
    from triton_losses.kernels.margin_rows import backward_launch, forward_launch, row_arguments


def counted(labels):
    """Which labels count: those before the row's first negative one."""
    return (labels < 0).cumsum(1) == 0


def reduced(losses, reduction, dtype):
    if reduction != "none":
        losses = losses.mean() if reduction == "mean" else losses.sum()
    return cast(losses, dtype)


# PyTorch, whole: differentiable as often as one likes


def labels_in_turn(x, labels, class_weights):
    """Of each of the labels: its columns (rows, 1), x_j - x_t, the columns j that it is held against, and w_t / C (rows,)."""
    counts, cols = counted(labels).unbind(1), x.shape[1]
    columns = torch.arange(cols, device=x.device)
    others = torch.ones_like(x, dtype=torch.bool)
    for label, counts_here in zip(labels.unbind(1), counts):
        others = others & ~((columns == label[:, None]) & counts_here[:, None])
    for label, counts_here in zip(labels.unbind(1), counts):
        place = label.clamp(0, cols - 1)
        factor = torch.full_like(x[:, 0], 1 / cols) if class_weights is None else cast(class_weights, x.dtype)[place] / cols
        yield place[:, None], x - x.gather(1, place[:, None]), others & counts_here[:, None], factor


def whole_loss(x, labels, class_weights, formula, scalars, reduction, dtype):
    x = cast(x, compute_dtype(x.dtype))
    losses = torch.zeros_like(x[:, 0])
    for _, d, others, factor in labels_in_turn(x, labels, class_weights):
        losses = losses + torch.where(others, FORMULAS[formula].value(d, *scalars), 0).sum(1) * factor
    return reduced(losses, reduction, dtype)


def whole_gradient(x, labels, class_weights, dout, formula, scalars, reduction):
    """In plain torch, so that it may be differentiated again."""
    wide, rows = cast(x, compute_dtype(x.dtype)), x.shape[0]
    upstream = cast(dout, wide.dtype) / (rows if reduction == "mean" else 1)
    grad = torch.zeros_like(wide)
    for place, d, others, factor in labels_in_turn(wide, labels, class_weights):
        slopes = torch.where(others, FORMULAS[formula].partials((True,))(d, *scalars)[0], 0) * factor[:, None]
        grad = (grad + slopes).scatter_add(1, place, -slopes.sum(1, keepdim=True))
    return cast(grad * upstream.expand(rows)[:, None], x.dtype)


# Ops: kernels, on a GPU and in the interpreter


def members_of(labels, cols):
    """How many labels of each row count, and 1 at their columns (rows, cols + 1): the last column takes those that do not."""
    counts = counted(labels)
    columns = torch.where(counts, labels.clamp(max=cols), cols)
    return counts.sum(1), labels.new_zeros(labels.shape[0], cols + 1, dtype=torch.uint8).scatter_(1, columns, 1)


@op
def margin_rows_forward(
    x: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None, formula: str, scalars: list[float], reduction: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The reduced loss, and the slope of each label."""
    rows, cols = x.shape
    slopes = x.new_empty(labels.shape, dtype=compute_dtype(x.dtype))
    if shapes_only():
        return x.new_empty(rows if reduction == "none" else (), dtype=dtype), slopes
    counts, members = members_of(labels, cols) if labels.shape[1] > 1 else (None, None)
    losses = x.new_empty(rows, dtype=slopes.dtype)
    forward_launch(
        losses=losses,
        **row_arguments(readable(x), labels.contiguous(), counts, members, class_weights, slopes, FORMULAS[formula], scalars),
    )
    return reduced(losses, reduction, dtype), slopes


@op
def margin_rows_backward(
    x: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None, slopes: torch.Tensor, dout: torch.Tensor, formula: str,
    scalars: list[float], reduction: str,
) -> torch.Tensor:  # fmt: skip
    if shapes_only():
        return x.new_empty(x.shape)
    x = readable(x)
    counts, members = members_of(labels, x.shape[1]) if labels.shape[1] > 1 else (None, None)
    grad = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    backward_launch(
        grad=grad, dout=dout, dout_stride=dout.stride(0) if reduction == "none" else 0, MEAN=reduction == "mean",
        **row_arguments(x, labels.contiguous(), counts, members, class_weights, slopes, FORMULAS[formula], scalars),
    )  # fmt: skip
    return grad


class MarginRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, labels, class_weights, formula, scalars, reduction, dtype):
        ctx.options = formula, scalars, reduction
        loss, slopes = margin_rows_forward(x, labels, class_weights, *ctx.options, dtype)
        ctx.save_for_backward(x, labels, class_weights, slopes)
        return loss

    @staticmethod
    def backward(ctx, dout):
        x, labels, class_weights, slopes = ctx.saved_tensors
        again = differentiated_again()
        if again or read_whole(dout):
            grad = whole_gradient(x, labels, class_weights, dout, *ctx.options)
        else:
            grad = margin_rows_backward(x, labels, class_weights, slopes, dout, *ctx.options)
        return grad, *[None] * 6


class Whole(torch.autograd.Function):
    """By plain torch, with the formula's own partial: for torch.func's transforms and devices without kernels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return whole_loss(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, labels, class_weights, *ctx.options, _ = inputs
        ctx.save_for_backward(x, labels, class_weights)

    @staticmethod
    def backward(ctx, dout):
        return whole_gradient(*ctx.saved_tensors, dout, *ctx.options), *[None] * 6


def margin_rows(formula, x, labels, class_weights=None, scalars=(), reduction="mean", dtype=None):
    """``formula`` of every row of ``x`` (rows, columns), at least one column, and its labels: (rows, 1), or sets (rows, columns).

    The mean is over rows. dtype: of the result, unless autocast makes it float32; that of x when None.
    """
    arguments = x, labels, class_weights, formula.name, [float(s) for s in scalars], reduction, result_dtype(x, dtype)
    if not runs_kernels(x) or read_whole():
        return Whole.apply(*arguments)
    return MarginRows.apply(*arguments)
