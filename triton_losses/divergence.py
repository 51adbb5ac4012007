"""Divergences: how far is one distribution from another?"""

import warnings
from typing import Any

import torch
from torch import Tensor

from triton_losses.core.collectives import Group, name_of
from triton_losses.core.compiler import compute_dtype, tl
from triton_losses.core.device_math import exp, log
from triton_losses.core.dtensors import for_dtensors
from triton_losses.core.formula import formula
from triton_losses.core.reduction import DTYPES, check_divisor, mean_of, promoted, reduction_of, result_dtype
from triton_losses.families.distribution_rows import distribution_rows
from triton_losses.families.elementwise import elementwise
from triton_losses.families.sharded_distributions import sharded_distributions
from triton_losses.row_formulas import check_counting, divergence_formula, rows_that_count


@formula
def pointwise_divergence(x, y):
    slope = log(y) - x
    return tl.where(y == 0.0, y, y * slope), -y, tl.where(y == 0.0, y, slope + 1.0)


@formula
def pointwise_divergence_of_logs(x, y):
    p = exp(y)
    value = tl.where(p == 0.0, p, p * (y - x))
    return value, -p, value + p


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """``y (log y - x)``, of log-probabilities x and probabilities y; ``e^y (y - x)`` where log_target: Kullback-Leibler
    divergence.

    input: log-probabilities, target: probabilities, or log-probabilities where log_target; floating, any shapes that
    broadcast. Where the target is 0 so is the loss, even at ``x = -inf``, and its gradient to the target, where torch
    has nan. reduction: "batchmean" divides the sum by input's first size and is the divergence; "mean" divides by the
    number of elements, with torch's warning; "sum", "none"; size_average and reduce are torch's older spelling of it.
    As ``torch.nn.functional.kl_div``. Kullback and Leibler 1951, doi:10.1214/aoms/1177729694.

    >>> kl_div(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]), reduction="batchmean")
    tensor(0.6931)
    """
    if size_average is None and reduce is None and reduction == "mean" and not torch.compiler.is_compiling():
        warnings.warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
            "'mean' will be changed to behave the same as 'batchmean' in the next major release.",
            stacklevel=2,
        )
    reduction = reduction_of(reduction, size_average, reduce, ("batchmean",))
    for name, tensor in (("input", input), ("target", target)):
        if not tensor.is_floating_point():
            raise RuntimeError(f"kl_div: Integral inputs not supported, nor complex ones: {name} is {tensor.dtype}")
    chosen = pointwise_divergence_of_logs if log_target else pointwise_divergence
    if reduction != "batchmean":
        return elementwise(chosen, (input, target), (), reduction)
    dtype = result_dtype(input, promoted(input, target))
    total = elementwise(chosen, (input, target), (), "sum", dtype=compute_dtype(dtype))
    return (total / input.shape[0] if input.dim() else total).to(dtype)  # only this rounds to the dtype


@for_dtensors(rows_that_count, logits=("student_logits", "teacher_logits"), rows=("labels",))
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    direction: str = "forward",
    beta: float = 0.5,
    reduction: str = "mean",
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    temperature_squared: bool = False,
    out_dtype: torch.dtype | None = None,
    num_items: float | Tensor | None = None,
    process_group: Group | None = None,
    group: Group | None = None,
) -> Tensor:
    """``Σ_j p_j log(p_j / q_j)``, ``p = softmax(teacher / T)``, ``q = softmax(student / T)``: what a student has yet to
    learn.

    direction: "forward" KL(p‖q), as above, covers all that the teacher says; "reverse" KL(q‖p) keeps to what it says
    most; "jsd" ``β KL(p‖m) + (1-β) KL(q‖m)`` with ``m = β p + (1-β) q``, the generalised Jensen-Shannon divergence of
    GKD; "tv" ``½ Σ_j |p_j - q_j|``, with gradient 0 where they are equal. beta: of "jsd" alone, 0 < β < 1, else
    ValueError (divided by β it tends to the forward divergence as β → 0, by 1-β to the reverse one as β → 1: choose
    those by name). student_logits, teacher_logits: (..., C), floating; gradients reach the teacher too if it requires
    them. temperature: T > 0, else ValueError. temperature_squared: multiply by T², which keeps gradients as large as at
    T = 1 (Hinton et al. do, language models' trainers do not). labels: (...), integers; rows with ignore_index cost
    nothing, other values do not matter. reduction: "mean" over the rows that count (nan when there are none), "sum",
    "none": (...). out_dtype: of the result. num_items, process_group: as in ``cross_entropy``. group: each of its
    processes holds both logits of some of the classes, the same ones, each class on one process (vocabulary-parallel).
    The gradient is made in the forward, in chunks of rows, in plain PyTorch; two exchanges of a few numbers per row.
    Hinton et al. 2015, arXiv:1503.02531; GKD: Agarwal et al. 2023, arXiv:2306.13649.

    >>> distillation_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    tensor(0.3278)
    """
    reduction = reduction_of(reduction)
    for name, value in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a Tensor, got {value!r}")
        if value.dtype not in DTYPES or not value.dim():
            raise ValueError(
                f"{name} must be one of {DTYPES}, with a dimension of classes; got {value.dtype} {tuple(value.shape)}"
            )
    if student_logits.shape != teacher_logits.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"student_logits and teacher_logits must have the same shape, got {shapes}")
    for name, given in (("teacher_logits", teacher_logits), ("labels", labels)):
        if given is not None and given.device != student_logits.device:
            found = f"{student_logits.device}, and {name} on {given.device}"
            raise RuntimeError(f"expected all tensors to be on the same device, but found student_logits on {found}")
    chosen, scalars, one_read = divergence_formula(direction, beta)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    check_counting(labels, student_logits.shape[:-1], ignore_index, out_dtype)
    if labels is not None:
        labels = labels.reshape(-1).long()  # uint8 cannot hold -100
    q, p = student_logits, teacher_logits
    if q.dim() != 2:
        q, p = (x.flatten(0, -2) if x.dim() > 1 else x[None] for x in (q, p))
    dtype = out_dtype or result_dtype(student_logits, promoted(student_logits, teacher_logits))
    options: dict[str, Any] = {
        "scalars": scalars,
        "scale": 1.0 / temperature,
        "one_read": one_read,
        "ignore_index": int(ignore_index),
    }
    factor = float(temperature**2) if temperature_squared else 1.0
    check_divisor(reduction, num_items, process_group)
    divided = num_items is not None or process_group is not None
    first, second = (q, p) if direction == "reverse" else (p, q)
    if group is None:
        within = "sum" if divided else reduction
        result = compute_dtype(dtype) if divided else out_dtype
        losses = distribution_rows(
            chosen, first, second, None, labels, result, reduction=within, factor=factor, **options
        )
        if not divided:
            return losses.view(student_logits.shape[:-1]) if reduction == "none" else losses
    else:
        if teacher_logits.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("group: the teacher takes no gradient, but teacher_logits requires it: detach it")
        options["student_first"] = direction == "reverse"
        losses = factor * sharded_distributions(
            chosen, (q, None, None, labels), "logits", [p], name_of(group), **options
        )
    if reduction == "mean":
        counted = losses.new_full((), q.shape[0]) if labels is None else (labels != ignore_index).sum().to(losses.dtype)
        return mean_of(losses.sum(), counted, num_items, process_group).to(dtype)
    return losses.sum().to(dtype) if reduction == "sum" else losses.to(dtype).view(student_logits.shape[:-1])
