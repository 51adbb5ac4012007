"""Compound losses for segmentation: Dice and a loss of the single pixels, from one read of the logits."""

import math

import torch

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.reduction import reduction_of
from triton_losses.element_formulas import class_balance, logistic, sigmoid_focal, weighted_logistic
from triton_losses.region_scores import (
    check_image,
    check_not_negative,
    check_smooth,
    chosen_sums,
    class_weights_of,
    dice_score,
    finished,
    ignorable,
    loss_of_scores,
    region_sums,
    tversky_score,
)
from triton_losses.row_formulas import cross_entropy_plain, softmax_focal


def counted(input, target, sums, ignore_index):
    """Of each image, how many numbers of each class count (B, C); and how many pixels are of each class, where labels say so."""
    images, classes = input.shape[:2]
    if target.shape != input.shape and classes > 1:
        of_class = sums[:, 2].detach()  # ones are their own squares
        return of_class.sum(1, keepdim=True).expand(-1, classes), of_class
    pixels = math.prod(input.shape[2:])
    if ignore_index is None:
        return sums.new_full((images, classes), pixels), None
    return (target != ignore_index).reshape(images, classes, pixels).sum(2).to(sums.dtype), None


def row_weights(numbers, of_class, class_weights):
    """Σ w of each image: of its pixels' labels; maps share a pixel among the classes, so there it is the pixels' number."""
    if of_class is None:
        return numbers[:, 0]
    return of_class.sum(1) if class_weights is None else (of_class * class_weights).sum(1)


def compound(
    input, target, formula, scalars, class_weights, smoothing, by_softmax, weights_of, mean_over_space, lambdas, dice_weight,
    include_background, to_onehot_y, sigmoid, softmax, other_act, squared_pred, jaccard, reduction, smooth_nr, smooth_dr, batch,
    ignore_index, process_group, return_stats,
):  # fmt: skip
    """λ₁ Dice + λ₂ Σ losses / Σ weights; where nothing counts the second is 0.

    by_softmax: the formula is of rows, else of elements. weights_of: what ``counted`` says -> Σ weights of each image.
    mean_over_space: "sum" adds up the images' means over space, not all losses.
    """
    reduction, ignore_index = reduction_of(reduction), ignorable(ignore_index, target)
    check_smooth(smooth_nr=smooth_nr, smooth_dr=smooth_dr)
    check_not_negative(**lambdas)
    if batch and reduction == "none":
        raise ValueError('reduction="none" gives each image\'s loss, and with batch=True there is one Dice for all')
    beside = {"formula": formula, "scalars": scalars, "class_weights": class_weights, "smoothing": smoothing}
    together = (softmax if by_softmax else sigmoid) and other_act is None
    of_images, losses = region_sums(
        input, target, to_onehot_y, sigmoid, softmax, other_act, ignore_index, squared_pred, **beside if together else {}
    )
    if not together:  # Dice and the formula see the input differently: another read
        _, losses = region_sums(input, target, to_onehot_y, not by_softmax, by_softmax, None, ignore_index, **beside)
    sums = chosen_sums(of_images, include_background, None, batch, process_group)
    score = tversky_score(sums, 1.0, 1.0, smooth_nr / 2, smooth_dr / 2) if jaccard else dice_score(sums, smooth_nr, smooth_dr)
    dice = loss_of_scores(score, sums[:, 2], 2, batch, dice_weight, False, 1, "smooth", reduction)
    numbers, of_class = counted(input, target, of_images, ignore_index)
    weights = weights_of(numbers, of_class)
    if reduction == "none":
        dice = dice.mean(1)
    elif reduction == "mean":
        losses, weights = losses.sum(), weights.sum()
    else:
        weights = numbers.mean(1) if mean_over_space else torch.ones_like(weights)
    rest = losses / torch.where(weights == 0, 1, weights)
    rest = rest.sum() if reduction == "sum" else rest
    loss = sum(factor * part for factor, part in zip(lambdas.values(), (dice, rest), strict=True))
    return finished(loss, input, of_images, return_stats)


def class_weights_for(weight, input, background=True):
    """(C,) or None; without background the first is 0, which no one gives."""
    if weight is None and background:
        return None
    classes = input.shape[1] if input.dim() > 1 else 1
    count = classes if background or classes == 1 else classes - 1
    ones = torch.ones((), dtype=compute_dtype(input.dtype), device=input.device)
    weight = ones if weight is None else class_weights_of(weight, ones, count)
    weight = weight.expand(count) if weight.dim() == 0 else weight
    return weight if count == classes else torch.cat([torch.zeros_like(weight[:1]), weight])


def dice_ce_loss(
    input, target, include_background=True, to_onehot_y=False, sigmoid=False, softmax=False, other_act=None, squared_pred=False,
    jaccard=False, reduction="mean", smooth_nr=1e-5, smooth_dr=1e-5, batch=False, weight=None, lambda_dice=1.0, lambda_ce=1.0,
    label_smoothing=0.0, *, ignore_index=None, process_group=None, return_stats=False,
):  # fmt: skip
    """``λ₁ Dice + λ₂ CE``: Dice, and cross entropy of softmax or, with sigmoid or one class, binary cross entropy; from one read.

    input: logits (B, C, *), floating; with neither sigmoid nor softmax, Dice takes them as they are, which needs another read.
    target: labels or a map, as in ``dice_loss``. weight: of ``dice_loss`` (there without the background's, where that does not
    count); of cross entropy, whose mean divides by the sum of the labels' weights; pos_weight of the binary one. lambda_dice,
    lambda_ce: λ₁ and λ₂, >= 0. label_smoothing: of cross entropy. ignore_index: in both parts; where all is ignored the second
    is 0. reduction: "mean", "sum", or "none": the loss of each image, (B,), not with batch. The other options are Dice's, as in
    ``dice_loss``, in the order of MONAI's ``DiceCELoss``. Isensee et al. 2021, doi:10.1038/s41592-020-01008-z.

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
    if by_softmax:
        formula, weights_of = cross_entropy_plain, lambda numbers, of_class: row_weights(numbers, of_class, weights)
    else:
        formula, weights_of = logistic if weights is None else weighted_logistic, lambda numbers, _: numbers.sum(1)
    return compound(
        input, target, formula, (), weights, label_smoothing, by_softmax, weights_of, False,
        {"lambda_dice": lambda_dice, "lambda_ce": lambda_ce}, weights if weights is None or include_background else weights[1:],
        include_background, to_onehot_y, sigmoid, softmax, other_act, squared_pred, jaccard, reduction, smooth_nr, smooth_dr, batch,
        ignore_index, process_group, return_stats,
    )  # fmt: skip


def dice_focal_loss(
    input, target, include_background=True, to_onehot_y=False, sigmoid=False, softmax=False, other_act=None, squared_pred=False,
    jaccard=False, reduction="mean", smooth_nr=1e-5, smooth_dr=1e-5, batch=False, gamma=2.0, weight=None, lambda_dice=1.0,
    lambda_focal=1.0, alpha=None, *, use_softmax=False, ignore_index=None, process_group=None, return_stats=False,
):  # fmt: skip
    """``λ₁ Dice + λ₂ Focal``, the focal loss of each class's sigmoid or, with use_softmax, of softmax's rows.

    One read where both parts take the input alike, sigmoid with sigmoid or softmax with use_softmax. gamma: >= 0. alpha: of the
    focal loss by sigmoid, in [0, 1]; None weighs nothing. weight: a factor of each class that counts, in both parts; a class 0
    that does not count costs nothing in either. reduction: "mean" over all numbers (softmax: over the labels' weights), "sum" of
    each image's and class's mean over space, "none" the loss of each image, (B,), not with batch. The other options: as in
    ``dice_ce_loss``, in the order of MONAI's ``DiceFocalLoss``. Zhu et al. 2019, arXiv:1808.05238.

    >>> dice_focal_loss(torch.tensor([[[4.0, 0.0], [0.0, 2.0]]]), torch.tensor([[0, 1]]), softmax=True, use_softmax=True)
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
    if use_softmax:
        formula, scalars, weights_of = softmax_focal, (gamma, 1.0), lambda numbers, of_class: row_weights(numbers, of_class, weights)
    else:
        formula, scalars, weights_of = sigmoid_focal, (*class_balance(alpha), gamma), lambda numbers, _: numbers[:, without:].sum(1)
    return compound(
        input, target, formula, scalars, weights, 0.0, bool(use_softmax), weights_of, True,
        {"lambda_dice": lambda_dice, "lambda_focal": lambda_focal}, weight, include_background, to_onehot_y, sigmoid, softmax,
        other_act, squared_pred, jaccard, reduction, smooth_nr, smooth_dr, batch, ignore_index, process_group, return_stats,
    )  # fmt: skip


def combo_loss(
    input, target, dice_weight=0.5, bce_weight=0.5, reduction="mean", smooth=1e-6,
    *, batch=False, weight=None, ignore_index=None, process_group=None, return_stats=False,
):  # fmt: skip
    """``w₁ (1 - (2 Σ p t + s) / (Σ p + Σ t + s)) + w₂ BCE``, ``p = σ(x)``: Dice and binary cross entropy of each class; one read.

    dice_weight, bce_weight: w₁ and w₂, >= 0. smooth: s >= 0. weight: of positive examples, for each class, as pos_weight of
    ``binary_cross_entropy_with_logits``, and of Dice's classes. input, target and the other options: as in ``dice_ce_loss`` with
    sigmoid. Taghanaki et al. 2019, arXiv:1805.02798.

    >>> combo_loss(torch.tensor([[[4.0, -4.0]]]), torch.tensor([[[1.0, 0.0]]]))
    tensor(0.0181)
    """
    check_image(input, target, False)
    weights = class_weights_for(weight, input)
    return compound(
        input, target, logistic if weights is None else weighted_logistic, (), weights, 0.0, False, lambda numbers, _: numbers.sum(1),
        False, {"dice_weight": dice_weight, "bce_weight": bce_weight}, weight, True, False, True, False, None, False, False, reduction,
        smooth, smooth, batch, ignore_index, process_group, return_stats,
    )  # fmt: skip
