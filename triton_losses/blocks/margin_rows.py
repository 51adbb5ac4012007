"""Margin losses of rows on a CPU, by ATen: it makes no temporaries, and blocks of ours were no faster per core.

An op of ours calls ATen, because ATen has no second derivatives of these losses, and because torch 2.13 compiles
multilabel_margin_loss incorrectly: labels that are missing become class 0.
"""

import torch

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.op import shapes_only
from triton_losses.core.reduction import cast, reduced

aten = torch.ops.aten
POWERS = {"margin_excess": 1, "squared_margin_excess": 2}
NUMBERS = {"none": 0, "mean": 1, "sum": 2}  # ATen's numbers of the reductions


def loss_of(x, labels, class_weights, formula, margin, reduction):
    """The loss by ATen's functions, which autograd can follow."""
    if labels.dim() == 2:
        return torch._C._nn.multilabel_margin_loss(x, labels, NUMBERS[reduction])
    return torch._C._nn.multi_margin_loss(x, labels, POWERS[formula], margin, class_weights, NUMBERS[reduction])


def widened(x, class_weights):
    wide = compute_dtype(x.dtype)
    return cast(x, wide), class_weights if class_weights is None else cast(class_weights, wide)


def forward(tensors, problem):
    """saved, for sets of labels: 1 where a column is one of them."""
    x, labels, class_weights = tensors
    formula, margin, reduction, dtype = problem
    if shapes_only():
        members = [x.new_empty(labels.shape, dtype=compute_dtype(x.dtype))] if labels.dim() == 2 else []
        return [x.new_empty(x.shape[0] if reduction == "none" else (), dtype=dtype)], members
    x, class_weights = widened(x, class_weights)
    members = []
    if labels.dim() == 2:
        loss, *members = aten.multilabel_margin_loss_forward(x, labels, NUMBERS[reduction])
    else:
        loss = loss_of(x, labels, class_weights, formula, margin, reduction)
    if not x.shape[0]:  # ATen returns uninitialised memory
        loss = reduced(x.new_zeros(0), reduction, dtype)
    return [cast(loss, dtype)], members


def backward(tensors, saved, upstream, problem, wanted):
    x, labels, class_weights = tensors
    if shapes_only():
        return [x.new_empty(x.shape)]
    dtype = x.dtype
    x, class_weights = widened(x, class_weights)
    dout, reduction = cast(upstream[0], x.dtype).contiguous(), NUMBERS[problem.reduction]
    if labels.dim() == 2:
        grad = aten.multilabel_margin_loss_backward(dout, x, labels, reduction, *saved)
    else:
        options = POWERS[problem.formula], problem.margin, class_weights, reduction
        grad = aten.multi_margin_loss_backward(dout, x, labels, *options)
    return [cast(grad, dtype)]
