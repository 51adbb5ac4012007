"""Lovász losses: the Jaccard loss, made convex in the pixels' errors. All is plain PyTorch, the sorting too."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.op import readable
from triton_losses.core.reduction import reduction_of, result_dtype
from triton_losses.region_scores import check_image, ignorable

MODES = ("softmax", "hinge")


def extension(errors, wanted):
    """The Lovász extension of the Jaccard loss, for each row of errors (rows, n) and of wanted truth values."""
    errors, order = torch.sort(errors, dim=1, descending=True, stable=True)
    wanted = wanted.gather(1, order)
    total, found = wanted.sum(1, keepdim=True), wanted.cumsum(1)  # integers: exact for any number of pixels
    seen = torch.arange(1, errors.shape[1] + 1, device=errors.device)
    jaccard = 1 - (total - found).to(errors.dtype) / (total + seen - found)
    steps = torch.cat([jaccard[:, :1], jaccard[:, 1:] - jaccard[:, :-1]], 1)
    return (errors.clamp(min=0) * steps).sum(1), total[:, 0]


def of_hinge(x, target, groups, ignore_index):
    if target.shape != x.shape and x.shape[1] > 1:
        raise ValueError(f'target must be a map {tuple(x.shape)} for mode="hinge", got {tuple(target.shape)}')
    t = target.reshape(x.shape)
    kept = torch.ones_like(t, dtype=torch.bool) if ignore_index is None else t != ignore_index
    if readable(t) and ((t != 0) & (t != 1) & kept).any():
        raise ValueError(f'every target must be 0 or 1 for mode="hinge", got {t[(t != 0) & (t != 1) & kept][0].item()}')
    wanted = (t == 1) & kept
    # ignored pixels sort to the end and cost 0
    errors = torch.where(kept, 1 - x * (2 * t.to(x.dtype) - 1), -float("inf"))
    size = x[:1].numel() * (x.shape[0] // max(groups, 1))
    return extension(errors.reshape(groups, size), wanted.reshape(groups, size).long())[0]


def of_softmax(x, target, groups, ignore_index, classes):
    images, count, *space = x.shape
    if target.shape == x.shape or count == 1:
        raise ValueError(
            'target must be labels of more than 1 class for mode="softmax", '
            f"got {tuple(target.shape)} for {tuple(x.shape)}"
        )
    labels = target.reshape(images, 1, *space)
    kept = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    check_class_labels(labels, kept, count)
    wanted = (labels == torch.arange(count, device=x.device).view(-1, *[1] * len(space))) & kept
    # ignored pixels sort to the end and cost 0
    errors = torch.where(kept, (wanted.to(x.dtype) - torch.where(kept, x, 0).softmax(1)).abs(), 0)
    if not isinstance(classes, str):
        errors, wanted = (torch.stack([v[:, c] for c in classes], 1) for v in (errors, wanted))
    elif classes not in ("present", "all"):
        raise ValueError(f'classes must be "present", "all" or a list of class indices, got {classes!r}')
    rows, size = errors.shape[1], math.prod(space) * (images // max(groups, 1))
    errors, wanted = (v.transpose(0, 1).reshape(rows * groups, size) for v in (errors, wanted.long()))
    losses, total = (v.view(rows, groups) for v in extension(errors, wanted))
    weights = (total > 0).to(x.dtype) if classes == "present" else torch.ones_like(losses)
    return (losses * weights).sum(0) / weights.sum(0).clamp(min=1)


def check_class_labels(labels, kept, classes):
    """Raise for a label that is no class, for CPU tensors; on a GPU assert it, or it would silently match no class."""
    valid = (labels >= 0) & (labels < classes) | ~kept
    if readable(labels):
        wrong = labels[~valid]
        if wrong.numel():
            raise IndexError(
                f"Target {wrong[0].item()} is out of bounds: it must be in [0, {classes}), or ignore_index"
            )
    elif labels.is_cuda:
        torch._assert_async(valid.all())


def lovasz_loss(
    input: Tensor,
    target: Tensor,
    mode: str = "softmax",
    per_image: bool = False,
    ignore_index: int | None = None,
    reduction: str = "mean",
    *,
    classes: str | Sequence[int] | None = "present",
) -> Tensor:
    """``Δ̄_J(m)``, the Lovász extension of the Jaccard loss: of ``m = |t - softmax(x)|`` per class, or ``m = 1 - (2t -
    1) x``.

    input: logits (B, C, *), floating. mode: "softmax", where target is labels (B, *) or (B, 1, *), and each class's
    loss is averaged over classes, "present" in the target, "all", or a list of indices; "hinge", where target is a map
    of the input's shape, of 0 and 1, and all its numbers are one set of pixels (of one class, (B, *) will do).
    per_image: the loss of each image, then reduction "mean", "sum" or "none": (B,); else of the batch, (1,) for "none".
    ignore_index: pixels that count nowhere; where none counts the loss is 0. Berman et al. 2018, arXiv:1705.08790.

    >>> lovasz_loss(torch.tensor([[[4.0, -4.0]]]), torch.tensor([[[1, 1]]]), mode="hinge")
    tensor(2.5000)
    """
    reduction = reduction_of(reduction)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    check_image(input, target, False)
    ignore_index = ignorable(ignore_index, target)
    x = input.to(compute_dtype(input.dtype))
    groups = input.shape[0] if per_image else min(input.shape[0], 1)
    if mode == "hinge":
        losses = of_hinge(x, target, groups, ignore_index)
    else:
        losses = of_softmax(x, target, groups, ignore_index, classes)
    losses = losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()
    return losses.to(result_dtype(input))
