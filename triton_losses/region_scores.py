"""What Dice and its kin share: an image and its target become sums, sums become scores, scores a loss.

The sums are of the size (images, classes): all of this is plain torch, for autograd to differentiate.
"""

import math
import numbers
import warnings

import torch

from triton_losses.core.op import readable
from triton_losses.core.reduction import reduction_of, result_dtype
from triton_losses.families.regions import regions

AVERAGES = ("macro", "micro")
EMPTY = ("smooth", "zero", "exclude")
LEAST_SCORE = 1e-7  # what a logarithm is taken of at least


# From an image to its sums


def activation_of(input, sigmoid, softmax, other_act=None):
    if other_act is not None and not callable(other_act):
        raise TypeError(f"other_act must be None or callable, got a {type(other_act).__name__}")
    if bool(sigmoid) + bool(softmax) + (other_act is not None) > 1:
        raise ValueError(f"at most one of sigmoid, softmax and other_act may be given, got {sigmoid=}, {softmax=}, {other_act=}")
    if softmax and input.shape[1] == 1:
        raise ValueError("softmax over 1 class is 1 everywhere: sigmoid=True is meant for one class")
    return "softmax" if softmax else "sigmoid" if sigmoid else "none"


def check_image(input, target, to_onehot_y):
    """input (B, C, *), floating; target labels (B, *) or (B, 1, *), or a map of the input's shape."""
    for name, value in (("input", input), ("target", target)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a Tensor, got {value!r}")
    result_dtype(input)  # refuses what is not floating
    if input.dim() < 2 or not input.shape[1]:
        raise ValueError(f"input must have shape (B, C, *) with at least one class, got {tuple(input.shape)}")
    if target.device != input.device:
        raise RuntimeError(f"expected all tensors to be on the same device, but input is on {input.device}, target on {target.device}")
    if target.requires_grad:
        raise RuntimeError("the loss is not differentiable with respect to target: it must not require grad")
    if target.is_complex():
        raise TypeError(f"target must be integers, truth values or floating-point, got {target.dtype}")
    of_labels = [(input.shape[0], *input.shape[2:]), (input.shape[0], 1, *input.shape[2:])]
    if target.shape == input.shape and not (to_onehot_y and input.shape[1] > 1):
        return
    if tuple(target.shape) not in of_labels:
        forms = f"labels {of_labels[0]} or {of_labels[1]}" + ("" if to_onehot_y else f", or a map {tuple(input.shape)}")
        raise ValueError(f"target must be {forms} for an input of {tuple(input.shape)}, got {tuple(target.shape)}")
    if target.is_floating_point() and input.shape[1] > 1 and not to_onehot_y:
        raise ValueError(f"labels must be integers unless to_onehot_y=True, got {target.dtype}")


def ignorable(ignore_index, target):
    """None where the target's type cannot hold it: a comparison would take it for another number, -100 for 156 among bytes."""
    if ignore_index is None:
        return None
    if not isinstance(ignore_index, numbers.Integral):  # NumPy's integers too
        raise TypeError(f"ignore_index must be an integer or None, got {ignore_index!r}")
    if target.dtype != torch.bool and not target.is_floating_point():
        limits = torch.iinfo(target.dtype)
        return int(ignore_index) if limits.min <= ignore_index <= limits.max else None
    return int(ignore_index)


def flat_image(input, target):
    """Logits (B, C, P), and labels (B, P) or a map (B, C, P); of one class, labels are its map."""
    images, classes, *space = input.shape
    pixels = math.prod(space)
    whole = target.shape == input.shape or classes == 1
    return input.reshape(images, classes, pixels), target.reshape((images, classes, pixels) if whole else (images, pixels))


def region_sums(
    input, target, to_onehot_y, sigmoid, softmax, other_act, ignore_index, squared=False, smaller=False,
    formula=None, scalars=(), class_weights=None, smoothing=0.0,
):  # fmt: skip
    """Sums (B, 3, C) of pt, p, t, and (B,) of the formula of the same pixels."""
    check_image(input, target, to_onehot_y)
    activation = activation_of(input, sigmoid, softmax, other_act)
    ignore_index = ignorable(ignore_index, target)
    logits, target = flat_image(input if other_act is None else other_act(input), target)
    if ignore_index is not None and target.dim() == 3 and activation == "softmax":
        raise ValueError("ignore_index beside softmax needs labels: a map's pixels share their classes' probabilities")
    return regions(logits, target, activation, class_weights, ignore_index, squared, smaller, formula, scalars, smoothing)


class AllReduce(torch.autograd.Function):
    """The sum over the processes of a group, of values and of gradients: DistributedDataParallel's mean is then exact."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return summed(x, group)

    @staticmethod
    def backward(ctx, dout):
        return summed(dout, ctx.group), None


def summed(x, group):
    x = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(x, group=group)
    return x


def chosen_sums(sums, include_background, classes, batch, process_group):
    """Sums of the classes that count, (B, 3, C) or for the whole batch (1, 3, C), and across processes."""
    count = sums.shape[2]
    if process_group is not None and not batch:
        raise ValueError("process_group sums a batch across processes: it needs batch=True, got batch=False")
    if classes is not None:
        classes = list(classes)
        if not classes or not all(isinstance(c, numbers.Integral) and 0 <= c < count for c in classes):
            raise ValueError(f"classes must be a list of class indices in [0, {count}), got {classes}")
        if not include_background:
            raise ValueError(f"classes says which classes count: include_background=False has no place beside it, got {classes=}")
        sums = torch.stack([sums[:, :, c] for c in classes], 2)
    elif not include_background:
        if count == 1:
            warnings.warn("single channel prediction, `include_background=False` ignored.", stacklevel=3)
        else:
            sums = sums[:, :, 1:]
    if batch:
        sums = sums.sum(0, keepdim=True)
        if process_group is not None:
            sums = AllReduce.apply(sums, process_group)
    return sums


# From sums to a loss


def check_smooth(**smooth):
    for name, value in smooth.items():
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")


def check_not_negative(**values):
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must be no less than 0, got {value}")


def ratio(numerator, denominator, smooth_dr):
    """1 where there is neither, which without smoothing may be: nothing was there and nothing was said to be."""
    if smooth_dr > 0:
        return numerator / denominator
    nothing = denominator == 0
    return torch.where(nothing, 1, numerator / torch.where(nothing, 1, denominator))


def dice_score(sums, smooth_nr, smooth_dr):
    overlap, predicted, wanted = sums.unbind(1)
    return ratio(2 * overlap + smooth_nr, predicted + wanted + smooth_dr, smooth_dr)


def tversky_score(sums, alpha, beta, smooth_nr, smooth_dr):
    overlap, predicted, wanted = sums.unbind(1)
    misses = alpha * (predicted - overlap) + beta * (wanted - overlap)
    return ratio(overlap + smooth_nr, overlap + misses + smooth_dr, smooth_dr)


def class_weights_of(weight, like, count):
    """(count,) numbers >= 0, or one number, on the sums' device; checked where that costs nothing."""
    if weight is None:
        return None
    weight = torch.as_tensor(weight, dtype=None if isinstance(weight, torch.Tensor) else like.dtype, device=like.device)
    if weight.dim() > 1 or weight.dim() == 1 and weight.shape[0] != count:
        raise ValueError(f"weight must be a number or have shape ({count},), one for each class that counts, got {tuple(weight.shape)}")
    if weight.requires_grad:
        raise RuntimeError("the loss is not differentiable with respect to weight: it must not require grad")
    if readable(weight) and not (weight >= 0).all():
        raise ValueError(f"every weight must be no less than 0, got {weight.tolist()}")
    return weight


def loss_of_scores(score, wanted, dims, batch, weight, log_loss, gamma, empty, reduction):
    """1 - score, or -log score, to the power gamma, of each image and class; weighted and reduced.

    wanted: Σ t, which says where a class is absent. dims: of the input. Of "none" (B, C, 1, 1, ...), or (C, 1, 1, ...) for a whole batch.
    """
    reduction = reduction_of(reduction)
    if empty not in EMPTY:
        raise ValueError(f"empty must be one of {EMPTY}, got {empty!r}")
    losses = -torch.log(score.clamp(min=LEAST_SCORE)) if log_loss else 1 - score
    if gamma != 1:
        losses = losses.clamp(min=1e-37) ** gamma  # or a perfect score's gradient would be inf · 0
    weight = class_weights_of(weight, losses, losses.shape[1]) if losses.shape[1] > 1 else None
    losses = losses if weight is None else losses * weight
    if empty != "smooth":
        losses = torch.where(wanted > 0, losses, 0)
    if reduction == "none":
        return losses.view(*losses.shape[bool(batch) :], *[1] * (dims - 2))
    if reduction == "sum":
        return losses.sum()
    if empty == "exclude":  # each image's own mean first
        present = ((wanted > 0) * (1.0 if weight is None else weight)).sum(1)
        return (losses.sum(1) / torch.where(present == 0, 1, present)).mean()
    return losses.sum() / losses.numel()


def averaged(sums, average):
    """For "micro" one sum over all classes."""
    if average not in AVERAGES:
        raise ValueError(f"average must be one of {AVERAGES}, got {average!r}")
    return sums.sum(2, keepdim=True) if average == "micro" else sums


def finished(loss, input, sums, return_stats):
    loss = loss.to(result_dtype(input))
    return (loss, sums.detach().unbind(1)) if return_stats else loss
