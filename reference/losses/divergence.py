"""The divergence losses in plain PyTorch."""

import torch

from reference.losses.shared import reduced


def kl_div(input, target, size_average=None, reduce=None, reduction="mean", log_target=False):
    zero = (target.exp() if log_target else target) == 0  # torch makes 0 · inf of x = -inf and of the gradient there
    x, y = input.masked_fill(zero, 0), target.masked_fill(zero, 1)
    losses = (y.exp() * (y - x) if log_target else y * (y.log() - x)).masked_fill(zero, 0)
    return losses.sum() / input.shape[0] if reduction == "batchmean" else reduced(losses, reduction)


def relative_entropy(log_p, log_q):
    p = log_p.exp()
    return (p * (log_p.masked_fill(p == 0, 0) - log_q.masked_fill(p == 0, 0))).sum(-1)


def distillation_loss(
    student_logits,
    teacher_logits,
    temperature=1.0,
    direction="forward",
    beta=0.5,
    reduction="mean",
    *,
    labels=None,
    ignore_index=-100,
    temperature_squared=False,
    out_dtype=None,
    num_items=None,
):
    kept = torch.ones_like(student_logits[..., 0], dtype=torch.bool) if labels is None else labels != ignore_index
    # ignored rows: 0, whatever is there
    logits = (x.where(kept[..., None], 0) / temperature for x in (teacher_logits, student_logits))
    log_p, log_q = (x.log_softmax(-1) for x in logits)
    if direction == "forward":
        losses = relative_entropy(log_p, log_q)
    elif direction == "reverse":
        losses = relative_entropy(log_q, log_p)
    elif direction == "jsd":
        log_mean = (beta * log_p.exp() + (1 - beta) * log_q.exp()).clamp(min=torch.finfo(log_p.dtype).tiny).log()
        losses = beta * relative_entropy(log_p, log_mean) + (1 - beta) * relative_entropy(log_q, log_mean)
    else:
        losses = 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    if temperature_squared:
        losses = losses * temperature**2
    if reduction != "mean":
        return reduced(losses, reduction)
    return losses.sum() / (kept.sum() if num_items is None else num_items)
