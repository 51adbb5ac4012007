"""What Dice and its kin share: their options, their scores, and how both become a problem of families/regions.py."""

import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from triton_losses.core.collectives import name_of, reduce_with_grad
from triton_losses.core.compiler import compute_dtype, tl
from triton_losses.core.device_math import at_least, at_least_tiny, power
from triton_losses.core.formula import formula
from triton_losses.core.op import readable
from triton_losses.core.reduction import cast, reduction_of, result_dtype
from triton_losses.core.regions import loss_of_scores
from triton_losses.families.regions import Problem, SumsProblem, region_sums, regions

AVERAGES = ("macro", "micro")
EMPTY = ("smooth", "zero", "exclude")


class Image(NamedTuple):
    """An image, its target, and how they are read. ``dice_loss`` documents the options."""

    input: torch.Tensor
    target: torch.Tensor
    to_onehot_y: bool
    sigmoid: bool
    softmax: bool
    other_act: Callable | None
    ignore_index: int | None
    squared_pred: bool = False
    soft_label: bool = False


class Options(NamedTuple):
    """How the sums of images become a loss."""

    include_background: bool
    reduction: str
    smooth_nr: float
    smooth_dr: float
    batch: bool
    process_group: Any
    return_stats: bool


class OfClasses(NamedTuple):
    """How the scores of classes become a loss."""

    weight: Any = None
    log_loss: bool = False
    classes: Any = None
    average: str = "macro"
    empty: str = "smooth"
    gamma: float = 1


# Scores of Σ p t, Σ p and Σ t; a score is 1 if it would be 0 / 0, which is possible without smoothing


@formula
def dice_score(overlap, predicted, wanted, smooth_nr, smooth_dr):
    denominator = predicted + wanted + smooth_dr
    nothing = denominator == 0.0
    divisor = tl.where(nothing, 1.0, denominator)
    score = tl.where(nothing, 1.0, (2.0 * overlap + smooth_nr) / divisor)
    slope = tl.where(nothing, 0.0, 1.0 / divisor)
    return score, 2.0 * slope, -score * slope, -score * slope


@formula
def tversky_score(overlap, predicted, wanted, alpha, beta, smooth_nr, smooth_dr):
    misses = alpha * (predicted - overlap) + beta * (wanted - overlap)
    denominator = overlap + misses + smooth_dr
    nothing = denominator == 0.0
    divisor = tl.where(nothing, 1.0, denominator)
    score = tl.where(nothing, 1.0, (overlap + smooth_nr) / divisor)
    slope = tl.where(nothing, 0.0, 1.0 / divisor)
    return score, (1.0 - score * (1.0 - alpha - beta)) * slope, -alpha * score * slope, -beta * score * slope


# The loss of a score; logarithms are of 1e-7 at least, and the power of a perfect score's loss has a finite slope


@formula
def one_less_score(score):
    return 1.0 - score, -1.0


@formula
def power_of_one_less_score(score, gamma):
    loss = 1.0 - score
    least = at_least_tiny(loss)
    raised = power(least, gamma)
    return raised, tl.where(loss >= least, -gamma * raised / least, 0.0)


@formula
def minus_log_score(score):
    least = at_least(score, 1e-7)
    return -tl.log(least), tl.where(score >= least, -1.0 / least, 0.0)


@formula
def power_of_minus_log_score(score, gamma):
    p = at_least(score, 1e-7)
    loss = -tl.log(p)
    least = at_least_tiny(loss)
    raised = power(least, gamma)
    return raised, tl.where((score >= p) & (loss >= least), -gamma * raised / (least * p), 0.0)


def link_of(log_loss, gamma):
    """The formula of a score's loss, and its scalars."""
    if gamma == 1:
        return (minus_log_score if log_loss else one_less_score), ()
    return (power_of_minus_log_score if log_loss else power_of_one_less_score), (gamma,)


def dice_or_jaccard(options, jaccard):
    """A score's formula and its scalars."""
    if jaccard:
        return tversky_score, (1.0, 1.0, options.smooth_nr / 2, options.smooth_dr / 2)
    return dice_score, (options.smooth_nr, options.smooth_dr)


# Checks of arguments


def activation_of(input, sigmoid, softmax, other_act=None):
    if other_act is not None and not callable(other_act):
        raise TypeError(f"other_act must be None or callable, got a {type(other_act).__name__}")
    if bool(sigmoid) + bool(softmax) + (other_act is not None) > 1:
        raise ValueError(
            f"at most one of sigmoid, softmax and other_act may be given, got {sigmoid=}, {softmax=}, {other_act=}"
        )
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
        raise RuntimeError(
            f"expected all tensors to be on the same device, but input is on {input.device}, target on {target.device}"
        )
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
    """ignore_index, or None if the target's dtype cannot hold it: compared with uint8, -100 would be taken for 156."""
    if ignore_index is None:
        return None
    if not isinstance(ignore_index, numbers.Integral):  # includes NumPy's integers
        raise TypeError(f"ignore_index must be an integer or None, got {ignore_index!r}")
    if target.dtype != torch.bool and not target.is_floating_point():
        limits = torch.iinfo(target.dtype)
        return int(ignore_index) if limits.min <= ignore_index <= limits.max else None
    return int(ignore_index)


def check_smooth(**smooth):
    for name, value in smooth.items():
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")


def check_not_negative(**values):
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must be no less than 0, got {value}")


def check_average(average):
    if average not in AVERAGES:
        raise ValueError(f"average must be one of {AVERAGES}, got {average!r}")


def named_classes(classes, include_background, count):
    """The indices of the classes that are named, None if none are. count: how many classes there are."""
    if classes is None:
        if not include_background and count == 1:
            warnings.warn("single channel prediction, `include_background=False` ignored.", stacklevel=4)
        return None
    classes = list(classes)
    if not classes or not all(isinstance(c, numbers.Integral) and 0 <= c < count for c in classes):
        raise ValueError(f"classes must be a list of class indices in [0, {count}), got {classes}")
    if not include_background:
        rule = "classes says which classes count: include_background=False has no place beside it"
        raise ValueError(f"{rule}, got {classes=}")
    return classes


def class_weights_of(weight, input, count):
    """(count,) numbers on the input's device, or None. They must be >= 0, which is checked only on a CPU."""
    if weight is None:
        return None
    dtype = None if isinstance(weight, torch.Tensor) else compute_dtype(input.dtype)
    weight = torch.as_tensor(weight, dtype=dtype, device=input.device)
    if weight.dim() > 1 or weight.dim() == 1 and weight.shape[0] != count:
        shape = f"({count},), one for each class that counts"
        raise ValueError(f"weight must be a number or have shape {shape}, got {tuple(weight.shape)}")
    if weight.requires_grad:
        raise RuntimeError("the loss is not differentiable with respect to weight: it must not require grad")
    if readable(weight) and not (weight >= 0).all():
        raise ValueError(f"every weight must be no less than 0, got {weight.tolist()}")
    return weight.expand(count) if weight.dim() == 0 else weight


# From an image to its loss


def flat_image(input, target):
    """Logits (B, C, P), and labels (B, P) or a map (B, C, P); for one class, its labels are a map."""
    images, classes, *space = input.shape
    pixels = math.prod(space)
    whole = target.shape == input.shape or classes == 1
    return input.reshape(images, classes, pixels), target.reshape(
        (images, classes, pixels) if whole else (images, pixels)
    )


def check_ignored(problem, target):
    if problem.ignore_index is not None and target.dim() == 3 and problem.activation == "softmax":
        raise ValueError("ignore_index beside softmax needs labels: a map's pixels share their classes' probabilities")


def flat_problem(image):
    """Logits (B, C, P), their targets, and the problem of their sums without a formula."""
    input, target, other_act = image.input, image.target, image.other_act
    check_image(input, target, image.to_onehot_y)
    activation = activation_of(input, image.sigmoid, image.softmax, other_act)
    ignore_index = ignorable(image.ignore_index, target)
    logits, target = flat_image(input if other_act is None else other_act(input), target)
    squared = bool(image.squared_pred)
    smaller = bool(image.soft_label) and not squared  # with squared sums, p t is right for soft maps too
    problem = SumsProblem(activation, ignore_index, squared, smaller, "", (), 0.0)
    check_ignored(problem, target)
    return logits, target, problem


def problem_of(of_sums, input, options, score, of_classes, lambdas=(), means_of_space=False):
    """The problem of the sums, completed by the options. score: a formula and its scalars."""
    check_smooth(smooth_nr=options.smooth_nr, smooth_dr=options.smooth_dr)
    if of_classes.empty not in EMPTY:
        raise ValueError(f"empty must be one of {EMPTY}, got {of_classes.empty!r}")
    if options.process_group is not None and not options.batch:
        raise ValueError("process_group sums a batch across processes: it needs batch=True, got batch=False")
    link, link_scalars = link_of(of_classes.log_loss, of_classes.gamma)
    return Problem(
        *of_sums,
        background=bool(options.include_background or input.shape[1] == 1),
        batch=bool(options.batch),
        average=of_classes.average,
        score=score[0].name,
        score_scalars=tuple(map(float, score[1])),
        link=link.name,
        link_scalars=tuple(map(float, link_scalars)),
        empty=of_classes.empty,
        lambdas=tuple(map(float, lambdas)),
        means_of_space=means_of_space,
        reduction=reduction_of(options.reduction),
        dtype=result_dtype(input),
    )


def chosen_sums(sums, classes, process_group):
    """Sums of the classes that are named, (B, 3, C), or of the batches of all processes, (1, 3, C)."""
    if classes is not None:
        sums = torch.stack([sums[:, :, c] for c in classes], 2)
    if process_group is not None:
        sums = reduce_with_grad(sums.sum(0, keepdim=True), name_of(process_group))
    return sums


def loss_of_regions(image, options, score, of_classes):
    """1 - score, or -log score, to the power gamma, of each image and class; weighted and reduced.

    With reduction "none" (B, C, 1, 1, ...), or (C, 1, 1, ...) with batch. With return_stats the sums are returned too.
    """
    logits, target, of_sums = flat_problem(image)
    problem = problem_of(of_sums, image.input, options, score, of_classes)
    classes = named_classes(of_classes.classes, options.include_background, logits.shape[1])
    count = logits.shape[1] - (not problem.background) if classes is None else len(classes)
    weighted = count > 1 and problem.average == "macro"
    weight, of_images = class_weights_of(of_classes.weight, logits, count) if weighted else None, None
    if classes is None and options.process_group is None and not options.return_stats:
        loss = regions(problem, logits, target, weight)
    else:
        of_images, _ = region_sums(of_sums, logits, target)
        sums = chosen_sums(of_images, classes, options.process_group)
        loss = cast(loss_of_scores(sums, weight, problem), problem.dtype)
    if problem.reduction == "none":
        loss = loss.view(*loss.shape, *[1] * (image.input.dim() - 2))
    return with_stats(loss, of_images, options)


def with_stats(loss, of_images, options):
    return (loss, of_images.detach().unbind(1)) if options.return_stats else loss
