"""Multi-class margin losses: the right classes' scores should exceed the others' by a margin."""

import numbers

import torch
from torch import Tensor

from triton_losses.core.compiler import INTERPRET, runs_kernels, tl
from triton_losses.core.device_math import sign
from triton_losses.core.dispatch import aten_serves, transformed
from triton_losses.core.formula import formula
from triton_losses.core.op import is_watched, readable
from triton_losses.core.reduction import DTYPES, reduction_of
from triton_losses.families.margin_rows import margin_rows, margin_rows_by_aten


@formula
def margin_excess(d, margin):
    z = margin + d
    excess = tl.where(z > 0.0, z, 0.0)  # nan costs 0, as in torch
    return excess, sign(excess)


@formula
def squared_margin_excess(d, margin):
    z = margin + d
    excess = tl.where(z > 0.0, z, 0.0)
    return excess * excess, 2.0 * excess


def check_scores(input, target):
    """Scores must be (N, C) or (C), and labels int64; raises torch's exception types."""
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"target must be a Tensor, got {target!r}")
    if input.dtype not in DTYPES:
        raise NotImplementedError(f"input must be one of {DTYPES}, got {input.dtype}")
    if input.dim() > 2 or 0 in input.shape[-1:]:
        raise RuntimeError(f"expected scores of shape (N, C) or (C), with C > 0, got {tuple(input.shape)}")
    if target.dtype != torch.int64:
        raise RuntimeError(f"expected target dtype to be Long, but got {target.dtype}")
    check_device(input, "target", target)


def check_device(input, name, tensor):
    if tensor.device != input.device:
        raise RuntimeError(
            f"expected all tensors to be on the same device, but input is on {input.device}, {name} on {tensor.device}"
        )


def check_range(target, low, classes):
    """Labels must be in [low, classes), which is checked only for CPU tensors."""
    if readable(target) and target.numel():
        least, most = (int(v) for v in target.aminmax())
        if least < low or most >= classes:
            raise RuntimeError(
                f"target out of range: it must be in [{low}, {classes}), got {least if least < low else most}"
            )


def check_power_and_weight(p, weight):
    if p not in (1, 2):
        raise ValueError(f"only p == 1 and p == 2 supported, got {p}")
    if weight is not None and weight.dim() != 1:
        raise ValueError(f"weight must be one-dimensional, got {tuple(weight.shape)}")


def by_margin(formula, x, labels, weight, margin, reduction, low):
    """The loss of scores (rows, classes). Labels must be at least ``low``, which on a GPU the kernels assert."""
    if INTERPRET or not runs_kernels(x):
        check_range(labels, low, x.shape[1])
    return margin_rows(formula, x, labels, weight, margin, reduction)


def by_aten(formula, input, target, weight, margin, reduction):
    """The loss by ATen, for few numbers on a CPU, where it is fastest. None if ATen cannot serve, or refuses.

    ATen refuses what our checks refuse, but it does not say which label was wrong. It cannot serve in a graph that is
    being recorded, under torch.func, and for 16-bit numbers.
    """
    if not aten_serves(input) or is_watched(input, target, weight) or transformed():
        return None
    if target is None or not target.is_cpu or input.dim() != 2 or not input.numel():
        return None
    if weight is not None and not fits(weight, input):
        return None
    try:
        return margin_rows_by_aten(formula, input, target, weight, margin, reduction)
    except RuntimeError:
        return None


def fits(weight, input):
    """Whether ATen may read the weight, because it does not check all of this itself."""
    alike = weight.dtype == input.dtype and weight.shape == input.shape[1:] and weight.is_cpu
    return alike and not weight.requires_grad


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: float = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``1/C Σ_{j≠t} w_t max(0, m - x_t + x_j)^p``: the multi-class hinge loss of class t against every other.

    input: scores, (N, C) or (C), floating, C > 0. target: class indices, int64, (N) or (); outside [0, C) they raise
    RuntimeError (a device assertion on a GPU). p: 1 or 2, else ValueError. margin: m, in units of ``input``; exactly
    there the gradient is 0, unlike a binary hinge's. weight: (C), of the input's dtype. reduction: "mean" over N,
    "sum", "none"; size_average and reduce are torch's older spelling of it. As
    ``torch.nn.functional.multi_margin_loss``, and for float16 and bfloat16 too. Crammer and Singer 2001,
    jmlr.org/papers/v2/crammer01a.html.

    >>> multi_margin_loss(torch.tensor([[2.0, 1.5, 0.0], [1.0, 3.0, 0.0]]), torch.tensor([0, 1]), reduction="none")
    tensor([0.1667, 0.0000])
    """
    reduction = reduction_of(reduction, size_average, reduce)
    check_power_and_weight(p, weight)
    if not isinstance(margin, (float, numbers.Number, torch.Tensor)):
        raise TypeError(f"margin must be a number, got {margin!r}")
    formula, margin = margin_excess if p == 1 else squared_margin_excess, float(margin)
    if (loss := by_aten(formula, input, target, weight, margin, reduction)) is not None:
        return loss
    check_scores(input, target)
    classes, rows = input.shape[-1] if input.dim() else 1, input.shape[0] if input.dim() == 2 else 1
    if target.dim() > 1 or target.numel() != rows:
        raise RuntimeError(f"target must be 1-D with one label a row: expected ({rows},), got {tuple(target.shape)}")
    if weight is not None:
        check_device(input, "weight", weight)
        if weight.numel() != classes or weight.dtype != input.dtype:
            raise RuntimeError(
                f"weight must be {input.dtype} of size {classes}, got {weight.dtype} of size {weight.numel()}"
            )
        if weight.requires_grad:
            raise RuntimeError(
                "multi_margin_loss is not differentiable with respect to weight: it must not require grad"
            )
    x = input if input.dim() == 2 else input.reshape(rows, classes)
    labels = target if target.dim() else target.reshape(1)
    losses = by_margin(formula, x, labels, weight, margin, reduction, low=0)
    return losses if target.dim() or reduction != "none" else losses.view(())


def multilabel_margin_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean"
) -> Tensor:
    """``1/C Σ_{t∈T} Σ_{j∉T} max(0, 1 - x_t + x_j)``: the hinge loss of every class of a set T against every other
    class.

    input: scores, (N, C) or (C), floating, C > 0. target: class indices, int64, the input's shape; T are those before
    the row's first -1, one that stands there twice counts twice; outside [-1, C) they raise RuntimeError (a device
    assertion on a GPU, for those in T). reduction, size_average, reduce: as in ``multi_margin_loss``, exactly at the
    margin too. As ``torch.nn.functional.multilabel_margin_loss``, and for float16 and bfloat16 too.

    >>> multilabel_margin_loss(torch.tensor([0.1, 0.2, 0.4, 0.8]), torch.tensor([3, 0, -1, 1]))
    tensor(0.8500)
    """
    reduction = reduction_of(reduction, size_average, reduce)
    if (loss := by_aten(margin_excess, input, target, None, 1.0, reduction)) is not None:
        return loss
    check_scores(input, target)
    single = input.dim() < 2
    if target.numel() != input.numel() if single and target.dim() < 2 else target.shape != input.shape:
        raise RuntimeError(f"target must have the input's size, {tuple(input.shape)}, got {tuple(target.shape)}")
    x, labels = (input.reshape(1, -1), target.reshape(1, -1)) if single else (input, target)
    losses = by_margin(margin_excess, x, labels, None, 1.0, reduction, low=-1)
    return losses.view(()) if single else losses
