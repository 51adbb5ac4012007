"""Compound losses for segmentation: Dice and a loss of the single pixels, from one read of the logits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.formula import Formula
from triton_losses.core.reduction import cast
from triton_losses.core.regions import beside, divisors, loss_of_scores
from triton_losses.element_formulas import logistic, sigmoid_focal_formula, weighted_logistic
from triton_losses.families.regions import region_sums, regions
from triton_losses.region_scores import (
    Image,
    OfClasses,
    Options,
    check_ignored,
    check_image,
    check_not_negative,
    chosen_sums,
    class_weights_of,
    dice_or_jaccard,
    flat_image,
    flat_problem,
    named_classes,
    problem_of,
    with_stats,
)
from triton_losses.row_formulas import cross_entropy_plain, softmax_focal_formula


class Beside(NamedTuple):
    """The loss of single pixels that is added to Dice."""

    formula: Formula
    scalars: tuple[float, ...]
    lambdas: dict[str, float]  # λ₁ of Dice and λ₂ of this, by their public names
    by_softmax: bool  # the formula takes rows; otherwise elements
    class_weights: Any = None
    smoothing: float = 0.0
    means_of_space: bool = False  # "sum" adds up the images' means over space, not all losses


def compound(image, options, jaccard, other):
    """λ₁ Dice + λ₂ Σ losses / Σ weights; the second term is 0 if no pixel counts."""
    check_not_negative(**other.lambdas)
    logits, labels, of_dice = flat_problem(image)
    together = (image.softmax if other.by_softmax else image.sigmoid) and image.other_act is None
    of_both = of_dice._replace(
        activation="softmax" if other.by_softmax else "sigmoid",
        formula=other.formula.name,
        scalars=tuple(map(float, other.scalars)),
        smoothing=float(other.smoothing),
    )
    check_ignored(of_both, labels)
    score, lambdas = dice_or_jaccard(options, jaccard), other.lambdas.values()
    problem = problem_of(of_both, image.input, options, score, OfClasses(), lambdas, other.means_of_space)
    if problem.batch and problem.reduction == "none":
        raise ValueError('reduction="none" gives each image\'s loss, and with batch=True there is one Dice for all')
    named_classes(None, options.include_background, logits.shape[1])
    weights, of_images = other.class_weights, None
    counts_are_known = labels.dim() == 2 or problem.ignore_index is None  # from the sums, or from the image's size
    if together and counts_are_known and options.process_group is None and not options.return_stats:
        loss = regions(problem, logits, labels, weights)
    else:
        if together:
            of_images, losses = region_sums(of_both, logits, labels, weights)
        else:  # Dice and the formula have different activations, so the input is read twice
            of_images, _ = region_sums(of_dice, logits, labels)
            _, losses = region_sums(of_both, *flat_image(image.input, image.target), weights)
        dice = loss_of_scores(chosen_sums(of_images, None, options.process_group), weights, problem)
        loss = cast(beside(dice, losses, divisors(of_images, labels, weights, problem), problem), problem.dtype)
    return with_stats(loss, of_images, options)


def class_weights_for(weight, input, background=True):
    """Weights (C,) or None; without background, a 0 for class 0 precedes the weights that were given."""
    if weight is None and background:
        return None
    classes = input.shape[1]
    if background or classes == 1:
        return class_weights_of(weight, input, classes)
    if weight is None:
        return torch.arange(classes, dtype=compute_dtype(input.dtype), device=input.device).clamp_(max=1)
    weight = class_weights_of(weight, input, classes - 1)
    return torch.cat([torch.zeros_like(weight[:1]), weight])


def dice_ce_loss(
    input: Tensor,
    target: Tensor,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    squared_pred: bool = False,
    jaccard: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    weight: Tensor | None = None,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    label_smoothing: float = 0.0,
    *,
    ignore_index: int | None = None,
    process_group: Any = None,
    return_stats: bool = False,
) -> Any:
    """``λ₁ Dice + λ₂ CE``: Dice, and cross entropy of softmax or, with sigmoid or one class, binary cross entropy; from
    one read.

    input: logits (B, C, *), floating; with neither sigmoid nor softmax, Dice takes them as they are, which needs
    another read. target: labels or a map, as in ``dice_loss``. weight: of ``dice_loss`` (there without the
    background's, where that does not count); of cross entropy, whose mean divides by the sum of the labels' weights;
    pos_weight of the binary one. lambda_dice, lambda_ce: λ₁ and λ₂, >= 0. label_smoothing: of cross entropy.
    ignore_index: in both parts; where all is ignored the second is 0. reduction: "mean", "sum", or "none": the loss of
    each image, (B,), not with batch. The other options are Dice's, as in ``dice_loss``, in the order of MONAI's
    ``DiceCELoss``. Isensee et al. 2021, doi:10.1038/s41592-020-01008-z.

    >>> dice_ce_loss(torch.tensor([[[4.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]]), softmax=True)
    tensor(0.1413)
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    check_image(input, target, to_onehot_y)
    by_softmax = not sigmoid and input.shape[1] > 1
    if label_smoothing and not by_softmax:
        raise ValueError(f"label_smoothing is of softmax's cross entropy, not of the binary one, got {label_smoothing}")
    weights = class_weights_for(weight, input)
    formula = cross_entropy_plain if by_softmax else logistic if weights is None else weighted_logistic
    lambdas = {"lambda_dice": lambda_dice, "lambda_ce": lambda_ce}
    image = Image(input, target, to_onehot_y, sigmoid, softmax, other_act, ignore_index, squared_pred)
    options = Options(include_background, reduction, smooth_nr, smooth_dr, batch, process_group, return_stats)
    return compound(image, options, jaccard, Beside(formula, (), lambdas, by_softmax, weights, label_smoothing))


def dice_focal_loss(
    input: Tensor,
    target: Tensor,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    squared_pred: bool = False,
    jaccard: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    lambda_dice: float = 1.0,
    lambda_focal: float = 1.0,
    alpha: float | None = None,
    *,
    use_softmax: bool = False,
    ignore_index: int | None = None,
    process_group: Any = None,
    return_stats: bool = False,
) -> Any:
    """``λ₁ Dice + λ₂ Focal``, the focal loss of each class's sigmoid or, with use_softmax, of softmax's rows.

    One read where both parts take the input alike, sigmoid with sigmoid or softmax with use_softmax. gamma: >= 0.
    alpha: of the focal loss by sigmoid, in [0, 1]; None weighs nothing. weight: a factor of each class that counts, in
    both parts; a class 0 that does not count costs nothing in either. reduction: "mean" over all numbers (softmax: over
    the labels' weights), "sum" of each image's and class's mean over space, "none" the loss of each image, (B,), not
    with batch. The other options: as in ``dice_ce_loss``, in the order of MONAI's ``DiceFocalLoss``. Zhu et al. 2019,
    arXiv:1808.05238.

    >>> logits, labels = torch.tensor([[[4.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]])
    >>> dice_focal_loss(logits, labels, softmax=True, use_softmax=True)
    tensor(0.0697)
    """
    check_not_negative(gamma=gamma)
    check_image(input, target, to_onehot_y)
    if alpha is not None and (use_softmax or not 0 <= alpha <= 1):
        raise ValueError(f"alpha must be in [0, 1], and is not for softmax, got {alpha}, {use_softmax=}")
    if use_softmax and input.shape[1] == 1:
        raise ValueError("use_softmax over 1 class is 1 everywhere: the focal loss by sigmoid is meant for one class")
    without = not include_background and input.shape[1] > 1
    weights = class_weights_for(weight, input, not without)
    formula, scalars = softmax_focal_formula(gamma, 1.0) if use_softmax else sigmoid_focal_formula(alpha, gamma)
    lambdas = {"lambda_dice": lambda_dice, "lambda_focal": lambda_focal}
    image = Image(input, target, to_onehot_y, sigmoid, softmax, other_act, ignore_index, squared_pred)
    options = Options(include_background, reduction, smooth_nr, smooth_dr, batch, process_group, return_stats)
    other = Beside(formula, scalars, lambdas, bool(use_softmax), weights, means_of_space=True)
    return compound(image, options, jaccard, other)


def combo_loss(
    input: Tensor,
    target: Tensor,
    dice_weight: float = 0.5,
    bce_weight: float = 0.5,
    reduction: str = "mean",
    smooth: float = 1e-6,
    *,
    batch: bool = False,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    process_group: Any = None,
    return_stats: bool = False,
) -> Any:
    """``w₁ (1 - (2 Σ p t + s) / (Σ p + Σ t + s)) + w₂ BCE``, ``p = σ(x)``: Dice and binary cross entropy of each class;
    one read.

    dice_weight, bce_weight: w₁ and w₂, >= 0. smooth: s >= 0. weight: of positive examples, for each class, as
    pos_weight of ``binary_cross_entropy_with_logits``, and of Dice's classes. input, target and the other options: as
    in ``dice_ce_loss`` with sigmoid. Taghanaki et al. 2019, arXiv:1805.02798.

    >>> combo_loss(torch.tensor([[[4.0, -4.0]]]), torch.tensor([[[1.0, 0.0]]]))
    tensor(0.0181)
    """
    check_image(input, target, False)
    weights = class_weights_for(weight, input)
    formula = logistic if weights is None else weighted_logistic
    other = Beside(formula, (), {"dice_weight": dice_weight, "bce_weight": bce_weight}, False, weights)
    image = Image(input, target, False, True, False, None, ignore_index)
    return compound(image, Options(True, reduction, smooth, smooth, batch, process_group, return_stats), False, other)
