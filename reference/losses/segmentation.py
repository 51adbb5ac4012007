"""The region losses for segmentation in plain PyTorch."""

import math

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, one_hot

from reference.losses.shared import power


def image(input, target, sigmoid, softmax, other_act, ignore_index):
    """Logits, predictions, one-hot targets and what counts, all (B, C, P)."""
    b, c, pixels = *input.shape[:2], math.prod(input.shape[2:])
    x = input.reshape(b, c, pixels)
    if target.shape == input.shape or c == 1:
        target = target.reshape(b, c, pixels)
        kept = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
        t = target.masked_fill(~kept, 0)
    else:
        target = target.reshape(b, pixels).long()
        kept = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
        t = one_hot(target.masked_fill(~kept, 0), c).movedim(-1, 1) * kept[:, None]
        kept = kept[:, None].expand(t.shape)
        x = x.masked_fill(~kept, 0)  # or a nan there would be the softmax's gradient's
    p = x.softmax(1) if softmax else x.sigmoid() if sigmoid else other_act(x) if other_act else x
    return x, p, t.to(x.dtype), kept


def sums_of(x, p, t, kept, squared=False, soft_label=False):
    p = p.masked_fill(~kept, 0)
    overlap = torch.minimum(p, t) if soft_label and not squared else p * t
    return [overlap.sum(2), (p * p if squared else p).sum(2), (t * t if squared else t).sum(2)]


def chosen(sums, include_background=True, batch=False, classes=None, average="macro"):
    if classes is not None:
        sums = [v[:, list(classes)] for v in sums]
    elif not include_background and sums[0].shape[1] > 1:
        sums = [v[:, 1:] for v in sums]
    sums = [v.sum(0, keepdim=True) for v in sums] if batch else sums
    return [v.sum(1, keepdim=True) for v in sums] if average == "micro" else sums


def score_of(sums, alpha, beta, smooth_nr, smooth_dr):
    overlap, predicted, wanted = sums
    bottom = overlap + alpha * (predicted - overlap) + beta * (wanted - overlap) + smooth_dr
    return torch.where(bottom == 0, 1, (overlap + smooth_nr) / bottom.masked_fill(bottom == 0, 1))


def reduced(score, wanted, dims, batch, weight, log_loss, empty, reduction, gamma=1):
    losses = -score.clamp(min=1e-7).log() if log_loss else 1 - score
    losses = power(losses, gamma) if gamma != 1 else losses
    if weight is not None and losses.shape[1] > 1:
        losses = losses * torch.as_tensor(weight).to(losses.device)
    present = wanted > 0 if empty != "smooth" else torch.ones_like(wanted, dtype=torch.bool)
    losses = losses.masked_fill(~present, 0)
    if reduction == "none":
        return losses[0].view(-1, *[1] * (dims - 2)) if batch else losses.view(*losses.shape, *[1] * (dims - 2))
    if reduction == "sum":
        return losses.sum()
    if empty != "exclude":
        return losses.mean()
    weights = (present * torch.as_tensor(1.0 if weight is None else weight).to(losses)).sum(1)
    return (losses.sum(1) / weights.masked_fill(weights == 0, 1)).mean()


def dice_loss(
    input,
    target,
    include_background=True,
    to_onehot_y=False,
    sigmoid=False,
    softmax=False,
    other_act=None,
    squared_pred=False,
    jaccard=False,
    reduction="mean",
    smooth_nr=1e-5,
    smooth_dr=1e-5,
    batch=False,
    weight=None,
    soft_label=False,
    ignore_index=None,
    *,
    log_loss=False,
    classes=None,
    average="macro",
    empty="smooth",
    process_group=None,
    return_stats=False,
):
    of_images = sums_of(*image(input, target, sigmoid, softmax, other_act, ignore_index), squared_pred, soft_label)
    sums, share = chosen(of_images, include_background, batch, classes, average), 1.0 if jaccard else 0.5
    score = score_of(sums, share, share, smooth_nr / 2, smooth_dr / 2)
    loss = reduced(score, sums[2], input.dim(), batch, weight, log_loss, empty, reduction)
    return (loss, of_images) if return_stats else loss


def jaccard_loss(
    input,
    target,
    include_background=True,
    to_onehot_y=False,
    sigmoid=False,
    softmax=False,
    other_act=None,
    reduction="mean",
    smooth_nr=1e-5,
    smooth_dr=1e-5,
    batch=False,
    weight=None,
    soft_label=False,
    ignore_index=None,
    *,
    log_loss=False,
    classes=None,
    average="macro",
    empty="smooth",
    process_group=None,
    return_stats=False,
):
    of_images = sums_of(*image(input, target, sigmoid, softmax, other_act, ignore_index), False, soft_label)
    sums = chosen(of_images, include_background, batch, classes, average)
    score = score_of(sums, 1, 1, smooth_nr, smooth_dr)
    loss = reduced(score, sums[2], input.dim(), batch, weight, log_loss, empty, reduction)
    return (loss, of_images) if return_stats else loss


def focal_tversky_loss(
    input,
    target,
    include_background=True,
    to_onehot_y=False,
    sigmoid=False,
    softmax=False,
    other_act=None,
    alpha=0.3,
    beta=0.7,
    gamma=0.75,
    reduction="mean",
    smooth_nr=1e-5,
    smooth_dr=1e-5,
    batch=False,
    soft_label=False,
    ignore_index=None,
    *,
    weight=None,
    log_loss=False,
    classes=None,
    average="macro",
    empty="smooth",
    process_group=None,
    return_stats=False,
):
    of_images = sums_of(*image(input, target, sigmoid, softmax, other_act, ignore_index), False, soft_label)
    sums = chosen(of_images, include_background, batch, classes, average)
    score = score_of(sums, alpha, beta, smooth_nr, smooth_dr)
    loss = reduced(score, sums[2], input.dim(), batch, weight, log_loss, empty, reduction, gamma)
    return (loss, of_images) if return_stats else loss


def tversky_loss(
    input,
    target,
    include_background=True,
    to_onehot_y=False,
    sigmoid=False,
    softmax=False,
    other_act=None,
    alpha=0.5,
    beta=0.5,
    reduction="mean",
    smooth_nr=1e-5,
    smooth_dr=1e-5,
    batch=False,
    soft_label=False,
    ignore_index=None,
    *,
    weight=None,
    log_loss=False,
    classes=None,
    average="macro",
    empty="smooth",
    process_group=None,
    return_stats=False,
):
    return focal_tversky_loss(
        input,
        target,
        include_background,
        to_onehot_y,
        sigmoid,
        softmax,
        other_act,
        alpha,
        beta,
        1,
        reduction,
        smooth_nr,
        smooth_dr,
        batch,
        soft_label,
        ignore_index,
        weight=weight,
        log_loss=log_loss,
        classes=classes,
        average=average,
        empty=empty,
        return_stats=return_stats,
    )


def generalized_dice_loss(
    input,
    target,
    include_background=True,
    to_onehot_y=False,
    sigmoid=False,
    softmax=False,
    other_act=None,
    w_type="square",
    reduction="mean",
    smooth_nr=1e-5,
    smooth_dr=1e-5,
    batch=False,
    soft_label=False,
    ignore_index=None,
    *,
    log_loss=False,
    classes=None,
    process_group=None,
    return_stats=False,
):
    of_images = sums_of(*image(input, target, sigmoid, softmax, other_act, ignore_index), False, soft_label)
    overlap, predicted, wanted = chosen(of_images, include_background, batch, classes)
    w = {"square": 1 / wanted**2, "simple": 1 / wanted, "uniform": torch.ones_like(wanted)}[w_type]
    infinite = w.isinf()
    w = w.masked_fill(infinite, 0)
    if w.numel():
        w = torch.where(infinite, w.max(1, keepdim=True)[0], w)
    bottom = ((predicted + wanted) * w).sum(1) + smooth_dr
    score = torch.where(bottom == 0, 1, (2 * (overlap * w).sum(1) + smooth_nr) / bottom.masked_fill(bottom == 0, 1))[
        :, None
    ]
    loss = reduced(score, score, input.dim(), batch, None, log_loss, "smooth", reduction)
    return (loss, of_images) if return_stats else loss


def joined(dice, losses, weights, lambdas, reduction, space=None):
    """Dice and the mean of losses (B, C or 1, P) of whatever weighs something."""
    losses, weights = losses.sum((1, 2)), weights.sum((1, 2))
    if reduction == "none":
        dice = dice.flatten(1).mean(1)
    elif reduction == "mean":
        losses, weights = losses.sum(), weights.sum()
    else:
        weights = torch.ones_like(weights) if space is None else space
    rest = losses / weights.masked_fill(weights == 0, 1)
    return lambdas[0] * dice + lambdas[1] * (rest.sum() if reduction == "sum" else rest)


def each_class(weight, like, background=True):
    count = like.shape[1]
    weight = torch.as_tensor(1.0 if weight is None else weight).to(like).expand(count if background else count - 1)
    return weight if background else torch.cat([like.new_zeros(1), weight])


def by_rows(x, t, kept, weight, smoothing, of_labels, of_log_p):
    """Losses of softmax's rows and their weights, both (B, 1, P)."""
    log_p = x.log_softmax(1)
    share = t + smoothing * (1 / t.shape[1] - t)
    losses = (share * of_log_p(log_p) * weight[:, None]).masked_fill((share == 0) | ~kept, 0).sum(1, keepdim=True)
    weights = (t * weight[:, None]).sum(1, keepdim=True) if of_labels else torch.ones_like(t[:, :1])
    return losses, weights * kept[:, :1]


def dice_ce_loss(
    input,
    target,
    include_background=True,
    to_onehot_y=False,
    sigmoid=False,
    softmax=False,
    other_act=None,
    squared_pred=False,
    jaccard=False,
    reduction="mean",
    smooth_nr=1e-5,
    smooth_dr=1e-5,
    batch=False,
    weight=None,
    lambda_dice=1.0,
    lambda_ce=1.0,
    label_smoothing=0.0,
    *,
    ignore_index=None,
    process_group=None,
    return_stats=False,
):
    of_dice = weight[1:] if isinstance(weight, torch.Tensor) and not include_background else weight
    dice, stats = dice_loss(
        input,
        target,
        include_background,
        to_onehot_y,
        sigmoid,
        softmax,
        other_act,
        squared_pred,
        jaccard,
        reduction,
        smooth_nr,
        smooth_dr,
        batch,
        of_dice,
        ignore_index=ignore_index,
        return_stats=True,
    )
    x, _, t, kept = image(input, target, sigmoid, softmax, other_act, ignore_index)
    if sigmoid or input.shape[1] == 1:
        positive = None if weight is None else each_class(weight, input)[:, None]
        losses = binary_cross_entropy_with_logits(x, t, pos_weight=positive, reduction="none")
        losses, weights = losses.masked_fill(~kept, 0), kept.to(t.dtype)
    else:
        losses, weights = by_rows(
            x, t, kept, each_class(weight, input), label_smoothing, target.shape != input.shape, lambda log_p: -log_p
        )
    loss = joined(dice, losses, weights, (lambda_dice, lambda_ce), reduction)
    return (loss, stats) if return_stats else loss


def dice_focal_loss(
    input,
    target,
    include_background=True,
    to_onehot_y=False,
    sigmoid=False,
    softmax=False,
    other_act=None,
    squared_pred=False,
    jaccard=False,
    reduction="mean",
    smooth_nr=1e-5,
    smooth_dr=1e-5,
    batch=False,
    gamma=2.0,
    weight=None,
    lambda_dice=1.0,
    lambda_focal=1.0,
    alpha=None,
    *,
    use_softmax=False,
    ignore_index=None,
    process_group=None,
    return_stats=False,
):
    dice, stats = dice_loss(
        input,
        target,
        include_background,
        to_onehot_y,
        sigmoid,
        softmax,
        other_act,
        squared_pred,
        jaccard,
        reduction,
        smooth_nr,
        smooth_dr,
        batch,
        weight,
        ignore_index=ignore_index,
        return_stats=True,
    )
    x, _, t, kept = image(input, target, sigmoid, softmax, other_act, ignore_index)
    background = include_background or input.shape[1] == 1
    factors, space = each_class(weight, input, background), kept.to(t.dtype).sum(2).mean(1)
    if use_softmax:
        losses, weights = by_rows(
            x,
            t,
            kept,
            factors,
            0.0,
            target.shape != input.shape,
            lambda log_p: -power(-torch.expm1(log_p), gamma) * log_p,
        )
    else:
        losses = (1 - t) * power(x.sigmoid(), gamma) * -logsigmoid(-x) * (1 if alpha is None else 1 - alpha)
        losses = losses + t * power((-x).sigmoid(), gamma) * -logsigmoid(x) * (1 if alpha is None else alpha)
        losses, weights = (losses * factors[:, None]).masked_fill(~kept, 0), kept[:, not background :].to(t.dtype)
    loss = joined(dice, losses, weights, (lambda_dice, lambda_focal), reduction, space)
    return (loss, stats) if return_stats else loss


def combo_loss(
    input,
    target,
    dice_weight=0.5,
    bce_weight=0.5,
    reduction="mean",
    smooth=1e-6,
    *,
    batch=False,
    weight=None,
    ignore_index=None,
    process_group=None,
    return_stats=False,
):
    return dice_ce_loss(
        input,
        target,
        sigmoid=True,
        reduction=reduction,
        smooth_nr=smooth,
        smooth_dr=smooth,
        batch=batch,
        weight=weight,
        lambda_dice=dice_weight,
        lambda_ce=bce_weight,
        ignore_index=ignore_index,
        return_stats=return_stats,
    )


def lovasz_gradient(wanted):
    """Algorithm 1 of the paper: the Jaccard loss's gradient by errors in descending order."""
    total = wanted.sum()
    jaccard = 1 - (total - wanted.cumsum(0)) / (total + (1 - wanted).cumsum(0))
    return torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])


def lovasz_of(errors, wanted):
    order = errors.detach().argsort(descending=True, stable=True)
    return errors[order].clamp(min=0) @ lovasz_gradient(wanted[order])


def lovasz_loss(
    input, target, mode="softmax", per_image=False, ignore_index=None, reduction="mean", *, classes="present"
):
    images = zip(input.split(1), target.split(1)) if per_image else [(input, target)]
    losses = []
    for x, y in images if len(input) else []:
        if mode == "hinge":
            x, y = x.flatten(), y.flatten()
            kept = y != (float("nan") if ignore_index is None else ignore_index)
            x, y = x[kept], y[kept].to(x.dtype)
            losses.append(lovasz_of(1 - x * (2 * y - 1), y) if len(y) else x.sum())
            continue
        p, y = x.softmax(1).movedim(1, -1).flatten(0, -2), y.flatten()
        kept = torch.ones_like(y, dtype=torch.bool) if ignore_index is None else y != ignore_index
        p, y = p[kept], y[kept]
        each = range(p.shape[1]) if isinstance(classes, str) else classes
        each = [c for c in each if classes != "present" or (y == c).any()]
        of_classes = [lovasz_of(((y == c).to(p.dtype) - p[:, c]).abs(), (y == c).to(p.dtype)) for c in each]
        losses.append(sum(of_classes) / len(each) if each and len(y) else p.sum() * 0)
    losses = torch.stack(losses) if losses else input.new_zeros(0) + input.sum()
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()
