"""Region losses for segmentation: Dice and its kin, of the overlap between what is predicted and what is there."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from triton_losses.region_scores import (
    Image,
    OfClasses,
    Options,
    check_average,
    check_not_negative,
    dice_or_jaccard,
    loss_of_regions,
    tversky_score,
)

W_TYPES = ("square", "simple", "uniform")


def dice_loss(
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
    soft_label: bool = False,
    ignore_index: int | None = None,
    *,
    log_loss: bool = False,
    classes: Sequence[int] | None = None,
    average: str = "macro",
    empty: str = "smooth",
    process_group: Any = None,
    return_stats: bool = False,
) -> Any:
    """``1 - (2 Σ p t + s₁) / (Σ p + Σ t + s₂)`` per image and class, sums over pixels: the Dice loss.

    input: (B, C, *), floating: logits with sigmoid or softmax, any values with other_act (a function), else
    probabilities. target: labels (B, *) or (B, 1, *) of any integer type (floating too with to_onehot_y), in [0, C),
    else IndexError (a device assertion on a GPU); or a map of the input's shape, binary or soft, for softmax too.
    smooth_nr, smooth_dr: s₁ and s₂, >= 0; 0 / 0 counts as a score of 1. include_background: whether class 0 counts.
    squared_pred: p² and t² in the denominator. jaccard: Σ p t is subtracted from the denominator, which is then
    doubled. batch: sums over the batch too. soft_label: min(p, t) in place of p t, which is right for soft maps.
    weight: a factor of each class's loss, a number or one for each class that counts. reduction: "mean" over images and
    classes, "sum", "none": (B, C, 1, ...), (C, 1, ...) with batch. ignore_index: pixels of this label count nowhere; of
    a map (not beside softmax), elements of this value. log_loss: -log score. classes: the indices of those that count.
    average: "micro" sums over classes first. empty: what a class absent from the target costs: "smooth" what the
    formula says, "zero" nothing, "exclude" nothing, and the mean is then of each image's mean over the classes that it
    has, by their weights.
    process_group: with batch, sums across its processes. return_stats: also the sums (B, C) of pt, p and t, without
    gradient. Options in the order of MONAI's ``DiceLoss``. Milletari et al. 2016, arXiv:1606.04797.

    >>> dice_loss(torch.tensor([[[0.9, 0.2]]]), torch.tensor([[[1.0, 0.0]]]))
    tensor(0.1429)
    """
    image = Image(input, target, to_onehot_y, sigmoid, softmax, other_act, ignore_index, squared_pred, soft_label)
    options = Options(include_background, reduction, smooth_nr, smooth_dr, batch, process_group, return_stats)
    of_classes = OfClasses(weight, log_loss, classes, average, empty)
    check_average(average)
    return loss_of_regions(image, options, dice_or_jaccard(options, jaccard), of_classes)


def jaccard_loss(
    input: Tensor,
    target: Tensor,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    weight: Tensor | None = None,
    soft_label: bool = False,
    ignore_index: int | None = None,
    *,
    log_loss: bool = False,
    classes: Sequence[int] | None = None,
    average: str = "macro",
    empty: str = "smooth",
    process_group: Any = None,
    return_stats: bool = False,
) -> Any:
    """``1 - (Σ p t + s₁) / (Σ p + Σ t - Σ p t + s₂)`` per image and class: the Jaccard loss, or soft IoU.

    input, target and options: as in ``dice_loss``. Rahman and Wang 2016, doi:10.1007/978-3-319-50835-1_22; soft_label:
    Wang et al. 2023, arXiv:2302.05666.

    >>> jaccard_loss(torch.tensor([[[0.9, 0.2]]]), torch.tensor([[[1.0, 0.0]]]))
    tensor(0.2500)
    """
    image = Image(input, target, to_onehot_y, sigmoid, softmax, other_act, ignore_index, soft_label=soft_label)
    options = Options(include_background, reduction, smooth_nr, smooth_dr, batch, process_group, return_stats)
    of_classes = OfClasses(weight, log_loss, classes, average, empty)
    return tversky(image, options, 1.0, 1.0, of_classes)


def tversky_loss(
    input: Tensor,
    target: Tensor,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    alpha: float = 0.5,
    beta: float = 0.5,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    soft_label: bool = False,
    ignore_index: int | None = None,
    *,
    weight: Tensor | None = None,
    log_loss: bool = False,
    classes: Sequence[int] | None = None,
    average: str = "macro",
    empty: str = "smooth",
    process_group: Any = None,
    return_stats: bool = False,
) -> Any:
    """``1 - (Σ p t + s₁) / (Σ p t + α Σ p(1-t) + β Σ (1-p)t + s₂)`` per image and class: the Tversky loss.

    alpha: α, of what is wrongly predicted. beta: β, of what is missed; both >= 0, else ValueError. At ½ and ½ this is
    Dice, at 1 and 1 Jaccard. input, target and the other options: as in ``dice_loss``. Options in the order of MONAI's
    ``TverskyLoss``. Salehi et al. 2017, arXiv:1706.05721.

    >>> tversky_loss(torch.tensor([[[0.9, 0.2]]]), torch.tensor([[[1.0, 0.0]]]), beta=0.9)
    tensor(0.1743)
    """
    image = Image(input, target, to_onehot_y, sigmoid, softmax, other_act, ignore_index, soft_label=soft_label)
    options = Options(include_background, reduction, smooth_nr, smooth_dr, batch, process_group, return_stats)
    of_classes = OfClasses(weight, log_loss, classes, average, empty)
    return tversky(image, options, alpha, beta, of_classes)


def focal_tversky_loss(
    input: Tensor,
    target: Tensor,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 0.75,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    soft_label: bool = False,
    ignore_index: int | None = None,
    *,
    weight: Tensor | None = None,
    log_loss: bool = False,
    classes: Sequence[int] | None = None,
    average: str = "macro",
    empty: str = "smooth",
    process_group: Any = None,
    return_stats: bool = False,
) -> Any:
    """``(1 - TI)^γ`` per image and class, TI the Tversky index: looks at the hard regions first for γ < 1.

    gamma: γ > 0, else ValueError. The defaults are the paper's: ¾ = 1 / (4/3), and 0.7 of what is missed, its α and
    here, as in ``tversky_loss``, β. input, target and the other options: as in ``dice_loss``. Abraham and Khan 2018,
    arXiv:1810.07842.

    >>> focal_tversky_loss(torch.tensor([[[0.9, 0.2]]]), torch.tensor([[[1.0, 0.0]]]))
    tensor(0.2118)
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be > 0, got {gamma}")
    image = Image(input, target, to_onehot_y, sigmoid, softmax, other_act, ignore_index, soft_label=soft_label)
    options = Options(include_background, reduction, smooth_nr, smooth_dr, batch, process_group, return_stats)
    of_classes = OfClasses(weight, log_loss, classes, average, empty, gamma)
    return tversky(image, options, alpha, beta, of_classes)


def tversky(image, options, alpha, beta, of_classes):
    check_not_negative(alpha=alpha, beta=beta)
    check_average(of_classes.average)
    score = tversky_score, (alpha, beta, options.smooth_nr, options.smooth_dr)
    return loss_of_regions(image, options, score, of_classes)


def generalized_dice_loss(
    input: Tensor,
    target: Tensor,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    w_type: str = "square",
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    soft_label: bool = False,
    ignore_index: int | None = None,
    *,
    log_loss: bool = False,
    classes: Sequence[int] | None = None,
    process_group: Any = None,
    return_stats: bool = False,
) -> Any:
    """``1 - (2 Σ_c w_c Σ p t + s₁) / (Σ_c w_c (Σ p + Σ t) + s₂)`` per image, ``w_c = 1 / (Σ t)²``: the generalized Dice
    loss.

    w_type: "square" as above, "simple" 1 / Σ t, "uniform" 1; a class absent from the target gets the largest weight of
    the others. reduction: "mean" over images, "sum", "none": (B, 1, 1, ...), (1, 1, ...) with batch. input, target and
    the other options: as in ``dice_loss``. Options in the order of MONAI's ``GeneralizedDiceLoss``. Sudre et al. 2017,
    arXiv:1707.03237.

    >>> generalized_dice_loss(torch.tensor([[[0.9, 0.2], [0.1, 0.8]]]), torch.tensor([[0, 1]]))
    tensor(0.1500)
    """
    w_type = getattr(w_type, "value", w_type)
    if w_type not in W_TYPES:
        raise ValueError(f"w_type must be one of {W_TYPES}, got {w_type!r}")
    image = Image(input, target, to_onehot_y, sigmoid, softmax, other_act, ignore_index, soft_label=soft_label)
    options = Options(include_background, reduction, smooth_nr, smooth_dr, batch, process_group, return_stats)
    average = "micro" if w_type == "uniform" else w_type
    of_classes = OfClasses(log_loss=log_loss, classes=classes, average=average)
    return loss_of_regions(image, options, dice_or_jaccard(options, False), of_classes)
