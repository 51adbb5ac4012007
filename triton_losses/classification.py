"""Multi-class losses: a row of logits, or of log-probabilities, and the index of the right class."""

import numbers

import torch

from triton_losses.compiler import runs_kernels
from triton_losses.device_math import at_least_tiny, exp, expm1, power
from triton_losses.families.label_rows import label_rows
from triton_losses.families.reduction import DTYPES, reduction_of, result_dtype
from triton_losses.formula import formula


@formula
def negative_log_likelihood(picked, weight):
    return -weight * picked, -weight


@formula
def cross_entropy_plain(log_p, weight):
    return -weight * log_p, -weight


@formula
def cross_entropy_with_z_loss(log_p, lse, weight, z_loss):
    return z_loss * lse * lse - weight * log_p, -weight, 2.0 * z_loss * lse


@formula
def cross_entropy_smoothed(log_p, mean_log_p, lse, weight, smoothing, z_loss):
    sharp = (1.0 - smoothing) * weight
    return z_loss * lse * lse - sharp * log_p - smoothing * mean_log_p, -sharp, -smoothing + 0.0 * weight, 2.0 * z_loss * lse


@formula
def softmax_focal(log_p, weight, gamma, alpha):
    miss = at_least_tiny(-expm1(log_p))  # 1 - p, without the difference
    modulator = alpha * weight * power(miss, gamma)
    return -modulator * log_p, modulator * (gamma * log_p * exp(log_p) / miss - 1.0)


def check_types(input, target, ignore_index):
    for name, value in (("input", input), ("target", target)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a Tensor, got {value!r}")
    if not isinstance(ignore_index, numbers.Integral):  # NumPy's integers too
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")


def check_logits(input):
    if input.dtype not in DTYPES:
        raise NotImplementedError(f"input must be one of {DTYPES}, got {input.dtype}")
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, of classes: got a scalar")


def check_labels(input, target, weight):
    """torch's rules for (C), (N, C) and (N, C, d1, ...) with class indices, and torch's exception types."""
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"expected target dtype to be Long or Byte, but got {target.dtype}")
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(f"expected all tensors to be on the same device, but input is on {input.device}, {name} on {tensor.device}")
    if input.dim() == 1:
        if target.dim() > 1:
            raise RuntimeError(f"0D or 1D target expected for 1D input, but got target size: {tuple(target.shape)}")
        if target.numel() != 1:
            raise ValueError(f"For 1D input, 1D target must have size 1, but got target size: {tuple(target.shape)}")
    elif target.dim() == 0 or target.shape[0] != input.shape[0]:
        got = target.shape[0] if target.dim() else "none, a scalar"
        raise ValueError(f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({got}).")
    elif target.shape[1:] != input.shape[2:]:
        wanted = (input.shape[0], *input.shape[2:])
        raise RuntimeError(f"Expected target size {list(wanted)}, got {list(target.shape)} for input of size {list(input.shape)}")
    classes = input.shape[min(input.dim() - 1, 1)]
    if weight is not None:
        if weight.shape != (classes,) or not weight.is_floating_point():
            raise RuntimeError(f"weight must be floating-point of shape ({classes},), got {weight.dtype} {tuple(weight.shape)}")
        if weight.requires_grad:
            raise RuntimeError("the loss is not differentiable with respect to weight: it must not require grad")


def by_rows(formula, input, target, weight, scalars, ignore_index, reduction, out_dtype=None):
    """label_rows over (C), (N, C) or (N, C, d1, ...): classes are the second dimension where there are two."""
    check_logits(input)
    check_labels(input, target, weight)
    if input.dim() == 1:
        logits = input[None]
    elif input.dim() == 2:
        logits = input
    else:
        logits = input.movedim(1, -1).reshape(-1, input.shape[1])
    losses = label_rows(formula, logits, target.reshape(-1), weight, scalars, int(ignore_index), reduction, out_dtype)
    if reduction != "none":
        return losses
    return losses.view(target.shape if input.dim() > 1 else ())  # unbatched, so is the loss, though the target may have size 1


def nll_loss(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean"):
    """``-w_t x_t``: negative log likelihood, of log-probabilities x.

    input: (C), (N, C) or (N, C, d1, ...), floating. target: class indices, int64 or uint8, the input's shape without C; those
    equal to ignore_index cost nothing, others outside [0, C) raise IndexError (a device assertion on a GPU). weight: (C,).
    reduction: "mean" divides by the sum of the targets' weights (nan when all are ignored), "sum", "none"; size_average and
    reduce are torch's older spelling of it. As ``torch.nn.functional.nll_loss``.

    >>> nll_loss(torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.tensor([0, 1]))
    tensor(2.5000)
    """
    reduction = reduction_of(reduction, size_average, reduce)
    check_types(input, target, ignore_index)
    if input.device.type == "cpu" and not runs_kernels(input):  # a gather: nothing of ours is faster than ATen's own loop
        check_logits(input)
        check_labels(input, target, weight)
        weight = weight if weight is None else weight.to(input.dtype)
        input, target = input.contiguous(), target.long()  # its backward takes no other strides, nor images bytes
        return torch.nn.functional.nll_loss(input, target, weight, ignore_index=ignore_index, reduction=reduction)
    return by_rows(negative_log_likelihood, input, target, weight, (), ignore_index, reduction)


def cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0,
    *, z_loss=0.0, out_dtype=None,
):  # fmt: skip
    """``-(1-ε) w_t log p_t - ε/C Σ_j w_j log p_j + z lse²``, ``p = softmax(x)``: cross entropy, smoothed by ε, with a z-loss.

    input: logits, (C), (N, C) or (N, C, d1, ...), floating. target: class indices, int64 or uint8, the input's shape without
    C; those equal to ignore_index cost nothing, others outside [0, C) raise IndexError (a device assertion on a GPU). Or class
    probabilities: floating, of the input's shape. weight: (C,). reduction: "mean" divides by the sum of the targets' weights
    (nan when all are ignored), "sum", "none"; size_average and reduce are torch's older spelling of it. label_smoothing: ε in
    [0, 1], else RuntimeError. z_loss: factor of the squared log-sum-exp that keeps logits from drifting (PaLM,
    arXiv:2204.02311), >= 0, else ValueError. out_dtype: of the result; torch.float32 keeps what bfloat16 would round away.
    As ``torch.nn.functional.cross_entropy``. Label smoothing: arXiv:1512.00567.

    >>> cross_entropy(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    tensor(1.1269)
    """
    reduction = reduction_of(reduction, size_average, reduce)
    check_types(input, target, ignore_index)
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss must be >= 0, got {z_loss}")
    if out_dtype not in (None, *DTYPES):
        raise TypeError(f"out_dtype must be one of {DTYPES}, got {out_dtype!r}")
    if target.is_floating_point() or target.shape == input.shape:
        return probability_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing, z_loss, out_dtype)
    if label_smoothing:
        formula, scalars = cross_entropy_smoothed, (label_smoothing, z_loss)
    elif z_loss:
        formula, scalars = cross_entropy_with_z_loss, (z_loss,)
    else:
        formula, scalars = cross_entropy_plain, ()
    return by_rows(formula, input, target, weight, scalars, ignore_index, reduction, out_dtype)


def probability_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing, z_loss, out_dtype):
    """Cross entropy against class probabilities, in plain torch; the mean divides by the number of rows."""
    loss = torch.nn.functional.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction="none" if z_loss else reduction, label_smoothing=label_smoothing
    )
    if z_loss:
        loss = loss + z_loss * input.logsumexp(min(input.dim() - 1, 1)) ** 2
        loss = loss if reduction == "none" else getattr(loss, reduction)()
    return loss.to(out_dtype or result_dtype(loss))


def focal_loss(input, target, weight=None, gamma=2.0, alpha=1.0, ignore_index=-100, reduction="mean"):
    """``-α w_t (1 - p_t)^γ log p_t``, ``p = softmax(x)``: cross entropy that looks away from rows already right.

    input: logits, (C), (N, C) or (N, C, d1, ...), floating. target: class indices, int64 or uint8, the input's shape without
    C; those equal to ignore_index cost nothing, others outside [0, C) raise IndexError (a device assertion on a GPU). weight:
    (C,), α per class. gamma: >= 0, else ValueError; at 0, with alpha 1, this is ``cross_entropy``. alpha: a factor of every
    row. reduction: "mean" divides by the sum of the targets' weights (nan when all are ignored), "sum", "none".
    Lin et al. 2017, arXiv:1708.02002.

    >>> focal_loss(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    tensor(0.8259)
    """
    check_types(input, target, ignore_index)
    if not gamma >= 0:
        raise ValueError(f"gamma must be >= 0, got {gamma}")
    return by_rows(softmax_focal, input, target, weight, (gamma, alpha), ignore_index, reduction_of(reduction))
