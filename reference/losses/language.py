"""The language losses in plain PyTorch."""

import torch

from reference.losses.classification import cross_entropy
from reference.losses.divergence import distillation_loss
from reference.losses.shared import shaped, wider


def entropy(logits, kept):
    log_p = logits.log_softmax(-1)
    return torch.where(kept, -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1), 0).to(
        wider(logits)
    )


def log_probs(logits, target, *, temperature=1.0, softcap=0.0, return_entropy=False, ignore_index=-100):
    kept = target != ignore_index
    logits = shaped(logits, softcap, temperature)
    chosen = logits.log_softmax(-1).gather(-1, torch.where(kept, target, 0).long()[..., None])[..., 0]
    chosen = torch.where(kept, chosen, 0).to(wider(logits))
    return (chosen, entropy(logits, kept)) if return_entropy else chosen


def linear_log_probs(
    input,
    linear_weight,
    target,
    *,
    linear_bias=None,
    temperature=1.0,
    softcap=0.0,
    return_entropy=False,
    ignore_index=-100,
    chunk_bytes=0,
    kept_tokens="count",
):
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    options = {
        "temperature": temperature,
        "softcap": softcap,
        "return_entropy": return_entropy,
        "ignore_index": ignore_index,
    }
    return log_probs(logits, target, **options)


def linear_cross_entropy(
    input,
    linear_weight,
    target,
    *,
    linear_bias=None,
    weight=None,
    reduction="mean",
    ignore_index=None,
    label_smoothing=0.0,
    options=None,
    softcap=0.0,
    temperature=1.0,
    z_loss=0.0,
    token_weights=None,
    shift=False,
    chunk_bytes=0,
    kept_tokens="count",
    out_dtype=None,
    return_stats=False,
    num_items=None,
):
    ignore_index = -100 if ignore_index is None else ignore_index
    if shift:  # position i predicts target i + 1
        target = target.roll(-1, -1)
        target[..., -1:] = ignore_index
    logits = shaped(torch.nn.functional.linear(input, linear_weight, linear_bias), softcap, temperature)
    logits, labels = logits.flatten(0, -2), target.flatten()
    given = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    losses = cross_entropy(logits, labels, weight, **given, reduction="none").to(out_dtype or wider(input))
    kept = labels != ignore_index
    each = losses
    weights = kept.to(losses.dtype) if weight is None else kept * weight[torch.where(kept, labels, 0).long()]
    if token_weights is not None:
        losses, weights = losses * token_weights.flatten(), weights * token_weights.flatten()
    loss = (
        losses.view(target.shape)
        if reduction == "none"
        else losses.sum() / (1 if reduction == "sum" else weights.sum() if num_items is None else num_items)
    )
    if not return_stats:
        return loss
    predicted, log_sum_exp = (
        torch.where(kept, logits.argmax(-1), -1),
        torch.where(kept, logits.logsumexp(-1), 0).to(each.dtype),
    )
    stats = each, log_sum_exp, entropy(logits, kept), predicted, predicted == labels
    return loss, [v.view(target.shape).detach() for v in stats]


def linear_distillation_loss(
    student_hidden,
    student_weight,
    teacher_hidden=None,
    teacher_weight=None,
    *,
    temperature=1.0,
    direction="forward",
    beta=0.5,
    labels=None,
    ignore_index=-100,
    student_bias=None,
    teacher_bias=None,
    teacher_logits=None,
    teacher_ids=None,
    teacher_log_probs=None,
    tail=True,
    reduction="mean",
    temperature_squared=False,
    chunk_bytes=0,
    kept_tokens="count",
    out_dtype=None,
    num_items=None,
):
    student, teacher = torch.nn.functional.linear(student_hidden, student_weight, student_bias), teacher_logits
    if teacher_hidden is not None:
        teacher = torch.nn.functional.linear(teacher_hidden, teacher_weight, teacher_bias)
    if teacher_ids is not None:
        student, teacher = few_bins(student / temperature, teacher_ids, teacher_log_probs, tail)
        student, teacher = temperature * student, temperature * teacher
    given = {"labels": labels, "ignore_index": ignore_index, "temperature_squared": temperature_squared}
    given["num_items"] = num_items
    loss = distillation_loss(student, teacher, temperature, direction, beta, reduction, **given)
    return loss.to(out_dtype or wider(student_hidden))


def few_bins(logits, ids, log_p, tail):
    """Logits of the named classes, one by one, and of all others together where there is a tail; the same of log p."""
    exists = log_p != -float("inf")
    log_q = logits.log_softmax(-1)
    bins = torch.where(exists, log_q.gather(-1, torch.where(exists, ids, 0).long()), -float("inf"))
    if not tail:
        return bins, log_p
    named = torch.zeros_like(logits).scatter_add_(-1, torch.where(exists, ids, 0).long(), exists.to(logits.dtype)) > 0
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(wider(log_p)).eps)
    of_student = log_q.masked_fill(named, -float("inf")).logsumexp(-1, keepdim=True)
    # no other class, and no more than rounding left for it
    rest = rest.masked_fill((of_student == -float("inf")) & (rest < 0.05), 0)
    return torch.cat([bins, of_student], -1), torch.cat([log_p, rest.log()], -1)
