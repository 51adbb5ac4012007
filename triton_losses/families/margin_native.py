"""margin_rows on a CPU, by ATen: L_r = 1/C Σ_{t∈T} w_t Σ_{j∉T} max(0, m + x_j - x_t)^p.

ATen's loops make no temporaries, and our blocks were no faster a core. They stand in ops of ours because ATen has no second
derivatives of them, and because torch 2.13 compiles multilabel_margin_loss wrongly: labels that are missing become class 0.
"""

import torch

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.op import differentiated_again, op, read_whole, shapes_only
from triton_losses.core.reduction import result_dtype
from triton_losses.families.margin_rows import reduced, whole_gradient

aten = torch.ops.aten


def number_of(reduction):
    return torch.nn._reduction.get_enum(reduction)


@op
def margin_native_forward(
    x: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None, p: int, margin: float, reduction: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reduced loss; for sets of labels, 1 where a column is one of them."""
    if shapes_only():
        members = x.new_empty(labels.shape if labels.shape[1] > 1 else (0,), dtype=compute_dtype(x.dtype))
        return x.new_empty(x.shape[0] if reduction == "none" else (), dtype=dtype), members
    wide = x.to(compute_dtype(x.dtype))
    if labels.shape[1] > 1:
        loss, members = aten.multilabel_margin_loss_forward(wide, labels, number_of(reduction))
    else:
        weight = class_weights if class_weights is None else class_weights.to(wide.dtype)
        loss, members = aten.multi_margin_loss(wide, labels[:, 0], p, margin, weight, number_of(reduction)), wide.new_empty(0)
    if not x.shape[0]:  # ATen returns what happened to lie there
        loss = reduced(wide.new_zeros(0), reduction, dtype)
    return loss.to(dtype), members


@op
def margin_native_backward(
    x: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None, members: torch.Tensor, dout: torch.Tensor, p: int,
    margin: float, reduction: str,
) -> torch.Tensor:  # fmt: skip
    if shapes_only():
        return x.new_empty(x.shape)
    wide, dout = x.to(compute_dtype(x.dtype)), dout.to(compute_dtype(x.dtype)).contiguous()
    if labels.shape[1] > 1:
        return aten.multilabel_margin_loss_backward(dout, wide, labels, number_of(reduction), members).to(x.dtype)
    weight = class_weights if class_weights is None else class_weights.to(wide.dtype)
    return aten.multi_margin_loss_backward(dout, wide, labels[:, 0], p, margin, weight, number_of(reduction)).to(x.dtype)


class MarginNative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, labels, class_weights, formula, p, margin, reduction, dtype):
        ctx.formula, ctx.options = formula, (p, margin, reduction)
        loss, members = margin_native_forward(x, labels, class_weights, *ctx.options, dtype)
        ctx.save_for_backward(x, labels, class_weights, members)
        return loss

    @staticmethod
    def backward(ctx, dout):
        x, labels, class_weights, members = ctx.saved_tensors
        _, margin, reduction = ctx.options
        again = differentiated_again()
        if again or read_whole(dout):
            grad = whole_gradient(x, labels, class_weights, dout, ctx.formula, [margin], reduction)
        else:
            grad = margin_native_backward(x, labels, class_weights, members, dout, *ctx.options)
        return grad, *[None] * 7


def margin_native(formula, x, labels, class_weights, p, margin, reduction):
    """margin_rows of the formula that is max(0, m + d)^p."""
    return MarginNative.apply(x, labels, class_weights, formula.name, p, margin, reduction, result_dtype(x))
