"""The language losses in plain PyTorch."""

import torch

from reference.losses.classification import cross_entropy
from reference.losses.shared import shaped, wider


def entropy(logits, kept):
    log_p = logits.log_softmax(-1)
    return torch.where(kept, -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1), 0).to(wider(logits))


def log_probs(logits, target, *, temperature=1.0, softcap=0.0, return_entropy=False, ignore_index=-100):
    kept = target != ignore_index
    logits = shaped(logits, softcap, temperature)
    chosen = logits.log_softmax(-1).gather(-1, torch.where(kept, target, 0).long()[..., None])[..., 0]
    chosen = torch.where(kept, chosen, 0).to(wider(logits))
    return (chosen, entropy(logits, kept)) if return_entropy else chosen


def linear_log_probs(
    input, linear_weight, target, *, linear_bias=None, temperature=1.0, softcap=0.0, return_entropy=False, ignore_index=-100,
    chunk_bytes=0, kept_tokens=0,
):  # fmt: skip
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    options = {"temperature": temperature, "softcap": softcap, "return_entropy": return_entropy, "ignore_index": ignore_index}
    return log_probs(logits, target, **options)


def linear_cross_entropy(
    input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean", ignore_index=None, label_smoothing=0.0,
    options=None, softcap=0.0, temperature=1.0, z_loss=0.0, token_weights=None, shift=False, chunk_bytes=0, kept_tokens=0,
    out_dtype=None, return_stats=False,
):  # fmt: skip
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
    loss = losses.view(target.shape) if reduction == "none" else losses.sum() / (weights.sum() if reduction == "mean" else 1)
    if not return_stats:
        return loss
    predicted, log_sum_exp = torch.where(kept, logits.argmax(-1), -1), torch.where(kept, logits.logsumexp(-1), 0).to(each.dtype)
    stats = each, log_sum_exp, entropy(logits, kept), predicted, predicted == labels
    return loss, [v.view(target.shape).detach() for v in stats]
