"""Rows and their labels on whole tensors, of either layout: for second derivatives, torch.func, and other devices."""

import torch

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.formula import FORMULAS
from triton_losses.core.reduction import cast
from triton_losses.core.rows import LOWEST, arguments_of, slots_of, transform


def losses_of(tensors, problem, operands=()):
    """Losses and weights of the rows, 0 where ignored."""
    logits, labels, class_weights = tensors
    formula, wide = FORMULAS[problem.formula], compute_dtype(logits.dtype)
    slots = slots_of(formula)
    labels = labels.long()  # a comparison of uint8 labels would take -100 for 156
    kept = labels != problem.ignore_index
    labels = torch.where(kept, labels, 0)
    weights = kept.to(wide) if class_weights is None else torch.where(kept, cast(class_weights, wide)[labels], 0)
    x = transform(cast(logits, wide), problem.softcap, problem.scale)
    picked = x.gather(1, labels[:, None])[:, 0]
    log_p = mean_log_p = lse = entropy = None
    if any(slots[1:5]):
        log_rows = x.log_softmax(1)
        log_p = log_rows.gather(1, labels[:, None])[:, 0]
        if slots[2]:
            spread = None if class_weights is None else cast(class_weights, wide).view(-1, *[1] * (x.dim() - 2))
            mean_log_p = (log_rows if spread is None else log_rows * spread).mean(1)
        if slots[3]:
            lse = x.logsumexp(1)
        if slots[4]:
            entropy = -(log_rows.exp() * log_rows.clamp(min=LOWEST)).sum(1)
    statistics = picked, log_p, mean_log_p, lse, entropy
    losses = formula.value(*arguments_of(formula, statistics, weights), *operands, *problem.scalars)
    return torch.where(kept, losses, 0), weights


def forward(tensors, problem):
    losses, weights = losses_of(tensors, problem)
    if problem.reduction != "none":
        losses = losses.sum()
    if problem.reduction == "mean":
        losses = losses / weights.sum()
    return cast(losses, problem.dtype)


def statistics(tensors, problem):
    """log_p and entropy of each row, 0 where ignored."""
    return tuple(
        losses_of((*tensors, None), problem._replace(formula=name))[0] for name in ("chosen_log_p", "row_entropy")
    )
