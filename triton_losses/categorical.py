"""Cross entropy as Keras has it: of chances rather than logits, unless it is told."""

import numbers

import torch
from torch import Tensor

from triton_losses.core.compiler import tl
from triton_losses.core.device_math import clamp, log
from triton_losses.core.formula import formula
from triton_losses.core.reduction import DTYPES, promoted, reduction_of, result_dtype
from triton_losses.families.distribution_rows import distribution_rows
from triton_losses.families.label_rows import label_rows
from triton_losses.families.proportion_rows import proportion_rows
from triton_losses.row_formulas import cross_entropy_plain, of_probabilities

EPSILON = 1e-7  # Keras' default
CLIPPED = EPSILON, 1 - EPSILON


@formula
def clipped_cross_entropy(y, p, least, most):
    chance = clamp(p, least, most)
    log_p = log(chance)
    return -y * log_p, -log_p, tl.where(p == chance, -y / chance, 0.0)


@formula
def clipped_cross_entropy_smoothed(y, p, least, most, smoothing, uniform):
    kept = 1.0 - smoothing
    target = kept * y + uniform
    chance = clamp(p, least, most)
    log_p = log(chance)
    return -target * log_p, -kept * log_p, tl.where(p == chance, -target / chance, 0.0)


def check_input(input, target, dim):
    """Check the tensors, and return the dimension of the classes as a non-negative number."""
    for name, value in (("input", input), ("target", target)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a Tensor, got {value!r}")
    if input.dtype not in DTYPES:
        raise NotImplementedError(f"input must be one of {DTYPES}, got {input.dtype}")
    if target.device != input.device:
        raise RuntimeError(
            f"expected all tensors to be on the same device, but input is on {input.device}, target on {target.device}"
        )
    if dim is None:
        dim = 1 if input.dim() > 1 else -1
    if not -input.dim() <= dim < input.dim():
        raise IndexError(f"dim must be a dimension of the input, {tuple(input.shape)}, got {dim}")
    return dim % input.dim()


def as_rows(x, dim):
    return x if x.dim() == 2 and dim == 1 else x.movedim(dim, -1).reshape(-1, x.shape[dim])


def categorical_cross_entropy(
    input: Tensor,
    target: Tensor,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    *,
    dim: int | None = None,
) -> Tensor:
    """``-Σ_j y_j log p_j``, ``p = x / Σ x`` clipped to [1e-7, 1 - 1e-7], y smoothed by ε: cross entropy of two rows of
    chances.

    input: chances, (C), (N, C) or (N, C, d1, ...), floating; they need not sum to 1. from_logits: whether they are
    logits: then p = softmax(x), not clipped. target: chances or one-hot rows, floating or integers, the input's size
    (else ValueError). label_smoothing: ε in [0, 1], else ValueError; y becomes (1 - ε) y + ε/C. dim: the classes'
    dimension; None is torch's, the second where there are two (Keras: the last). reduction: "mean" over rows, "sum",
    "none": the input's shape without C. Where p is clipped, x gets no gradient of its own chance. As
    ``keras.losses.categorical_crossentropy``, the input first.

    >>> output, target = torch.tensor([[3.0, 1.0], [0.2, 0.2]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> categorical_cross_entropy(output, target, reduction="none")
    tensor([0.2877, 0.6931])
    """
    reduction = reduction_of(reduction)
    dim = check_input(input, target, dim)
    if target.shape != input.shape:
        raise ValueError(f"target must have the input's shape, {tuple(input.shape)}, got {tuple(target.shape)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not target.is_floating_point():
        target = target.to(input.dtype)
    x, y = as_rows(input, dim), as_rows(target, dim)
    formula, smoothing = of_probabilities(label_smoothing, x.shape[1])
    if from_logits:
        dtype = result_dtype(input, promoted(input, target))
        losses = distribution_rows(
            formula, y, x, out_dtype=dtype, scalars=smoothing, given=True, one_read=True, reduction=reduction
        )
    else:
        formula = clipped_cross_entropy_smoothed if smoothing else clipped_cross_entropy
        losses = proportion_rows(formula, x, y, (*CLIPPED, *smoothing), reduction=reduction)
    return losses.view(input.shape[:dim] + input.shape[dim + 1 :]) if reduction == "none" else losses


def sparse_categorical_cross_entropy(
    input: Tensor,
    target: Tensor,
    from_logits: bool = False,
    ignore_index: int | None = None,
    reduction: str = "mean",
    *,
    dim: int | None = None,
) -> Tensor:
    """``-log p_t``, ``p = x / Σ x`` clipped to [1e-7, 1 - 1e-7]: cross entropy of a row of chances and the right class.

    input: chances, (C), (N, C) or (N, C, d1, ...), floating; they need not sum to 1. from_logits: whether they are
    logits: then p = softmax(x), not clipped. target: class indices, integers, the input's shape without C (else
    ValueError); those equal to ignore_index (Keras' ignore_class) cost nothing, others outside [0, C) raise IndexError
    (a device assertion on a GPU). dim: the classes' dimension; None is torch's, the second where there are two (Keras:
    the last). reduction: "mean" over the rows that count, "sum", "none". As
    ``keras.losses.sparse_categorical_crossentropy``, the input first.

    >>> sparse_categorical_cross_entropy(torch.tensor([[3.0, 1.0], [0.2, 0.2]]), torch.tensor([0, 1]), reduction="none")
    tensor([0.2877, 0.6931])
    """
    reduction = reduction_of(reduction)
    dim = check_input(input, target, dim)
    rest = input.shape[:dim] + input.shape[dim + 1 :]
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise RuntimeError(f"target must be class indices, integers, got {target.dtype}")
    if target.shape != rest:
        raise ValueError(
            f"target must have the input's shape without its classes, {tuple(rest)}, got {tuple(target.shape)}"
        )
    if ignore_index is None:
        ignore_index = -(2**62)  # no label has this value
    elif not isinstance(ignore_index, numbers.Integral):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    x, labels = as_rows(input, dim), target.reshape(-1).long()
    if from_logits:
        losses = label_rows(cross_entropy_plain, x, labels, ignore_index=int(ignore_index), reduction=reduction)
    else:
        losses = proportion_rows(clipped_cross_entropy, x, labels, CLIPPED, int(ignore_index), reduction)
    return losses.view(rest) if reduction == "none" else losses
