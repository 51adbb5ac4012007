"""Margin losses of rows on whole tensors: for second derivatives, torch.func, and other devices."""

import torch

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.formula import FORMULAS
from triton_losses.core.reduction import cast, divisor_of, reduced


def labels_in_turn(x, labels, class_weights):
    """For each label: its columns (rows, 1), x_j - x_t, a mask of the columns j that count, and w_t / C (rows,)."""
    labels = labels if labels.dim() == 2 else labels[:, None]
    counts, cols = ((labels < 0).cumsum(1) == 0).unbind(1), x.shape[1]  # those before the first negative one count
    columns = torch.arange(cols, device=x.device)
    others = torch.ones_like(x, dtype=torch.bool)
    for label, counts_here in zip(labels.unbind(1), counts):
        others = others & ~((columns == label[:, None]) & counts_here[:, None])
    for label, counts_here in zip(labels.unbind(1), counts):
        place = label.clamp(0, cols - 1)
        factor = (
            torch.full_like(x[:, 0], 1 / cols) if class_weights is None else cast(class_weights, x.dtype)[place] / cols
        )
        yield place[:, None], x - x.gather(1, place[:, None]), others & counts_here[:, None], factor


def forward(tensors, problem):
    x, labels, class_weights = tensors
    x = cast(x, compute_dtype(x.dtype))
    losses = torch.zeros_like(x[:, 0])
    for _, d, others, factor in labels_in_turn(x, labels, class_weights):
        losses = losses + torch.where(others, FORMULAS[problem.formula].value(d, problem.margin), 0).sum(1) * factor
    return reduced(losses, problem.reduction, problem.dtype)


def backward(tensors, upstream, problem, wanted):
    x, labels, class_weights = tensors
    wide = cast(x, compute_dtype(x.dtype))
    factors = cast(upstream[0], wide.dtype) / divisor_of(wide[:, 0], problem.reduction)
    grad = torch.zeros_like(wide)
    for place, d, others, factor in labels_in_turn(wide, labels, class_weights):
        slopes = (
            torch.where(others, FORMULAS[problem.formula].partials((True,))(d, problem.margin)[0], 0) * factor[:, None]
        )
        grad = (grad + slopes).scatter_add(1, place, -slopes.sum(1, keepdim=True))
    return [cast(grad * factors.expand(x.shape[0])[:, None], x.dtype)]
