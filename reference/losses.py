"""Each loss in the plainest PyTorch that is right in any dtype: the definition of correct, and the bench's baseline.

PyTorch's own function where it has one. Signatures are those of triton_losses.functional.
"""

import torch
from torch.nn.functional import binary_cross_entropy as binary_cross_entropy
from torch.nn.functional import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import gaussian_nll_loss as gaussian_nll_loss
from torch.nn.functional import hinge_embedding_loss as hinge_embedding_loss
from torch.nn.functional import huber_loss as huber_loss
from torch.nn.functional import l1_loss as l1_loss
from torch.nn.functional import mse_loss as mse_loss
from torch.nn.functional import nll_loss as nll_loss
from torch.nn.functional import poisson_nll_loss as poisson_nll_loss
from torch.nn.functional import smooth_l1_loss as smooth_l1_loss
from torch.nn.functional import softplus


def reduced(losses, reduction):
    return losses if reduction == "none" else getattr(losses, reduction)()


def power(miss, gamma):
    """(1 - p)^γ, whose derivative at 1 - p = 0 autograd would make inf · 0 of."""
    return miss.clamp(min=1e-37) ** gamma


def log_cosh_loss(input, target, reduction="mean"):
    d = (input - target).abs()
    return reduced(d + softplus(-2 * d, threshold=50) - torch.tensor(2.0, dtype=torch.float64).log().to(d.dtype), reduction)


def quantile_loss(input, target, quantile=0.5, reduction="mean"):
    d = target - input
    return reduced(torch.maximum(quantile * d, (quantile - 1) * d), reduction)


def multi_quantile_loss(input, target, quantiles=(0.1, 0.5, 0.9), reduction="mean"):
    pairs = zip(input.unbind(-1), quantiles, strict=True)
    return reduced(torch.stack([quantile_loss(x, target, q, "none") for x, q in pairs], -1), reduction)


def hinge_loss(input, target, margin=1.0, reduction="mean"):
    return reduced((margin - target * input).clamp(min=0), reduction)


def squared_hinge_loss(input, target, margin=1.0, reduction="mean"):
    slack = margin - target * input
    return reduced(slack.masked_fill(slack < 0, 0) ** 2, reduction)  # whose gradient keeps nan


def perceptron_loss(input, target, reduction="mean"):
    return reduced((-target * input).clamp(min=0), reduction)


def exponential_loss(input, target, reduction="mean"):
    return reduced(torch.exp(-target * input), reduction)


def soft_margin_loss(input, target, size_average=None, reduce=None, reduction="mean"):
    return reduced(softplus(-target * input, threshold=50), reduction)  # torch's own overflows


def sigmoid_focal_loss(inputs, targets, alpha=0.25, gamma=2, reduction="none"):
    p, q = inputs.sigmoid(), (-inputs).sigmoid()
    entropy = (1 - targets) * softplus(inputs, threshold=50) + targets * softplus(-inputs, threshold=50)
    losses = entropy * power(p * (1 - targets) + q * targets, gamma)
    if alpha >= 0:
        losses = (alpha * targets + (1 - alpha) * (1 - targets)) * losses
    return reduced(losses, reduction)


def kl_div(input, target, size_average=None, reduce=None, reduction="mean", log_target=False):
    zero = (target.exp() if log_target else target) == 0  # torch makes 0 · inf of x = -inf and of the gradient there
    x, y = input.masked_fill(zero, 0), target.masked_fill(zero, 1)
    losses = (y.exp() * (y - x) if log_target else y * (y.log() - x)).masked_fill(zero, 0)
    return losses.sum() / input.shape[0] if reduction == "batchmean" else reduced(losses, reduction)


def relative_entropy(log_p, log_q):
    p = log_p.exp()
    return (p * (log_p.masked_fill(p == 0, 0) - log_q.masked_fill(p == 0, 0))).sum(-1)


def distillation_loss(
    student_logits, teacher_logits, temperature=1.0, direction="forward", beta=0.5, reduction="mean",
    *, labels=None, ignore_index=-100, temperature_squared=False, out_dtype=None,
):  # fmt: skip
    kept = torch.ones_like(student_logits[..., 0], dtype=torch.bool) if labels is None else labels != ignore_index
    logits = (x.where(kept[..., None], 0) / temperature for x in (teacher_logits, student_logits))  # ignored rows: 0, whatever is there
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
    return losses.sum() / kept.sum() if reduction == "mean" else reduced(losses, reduction)


def cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0,
    *, z_loss=0.0, out_dtype=None,
):  # fmt: skip
    losses = torch_cross_entropy(input, target, weight, None, ignore_index, None, "none", label_smoothing)
    dim = min(input.dim() - 1, 1)
    kept = target != ignore_index if not target.is_floating_point() else torch.ones_like(losses, dtype=torch.bool)
    if z_loss:
        losses = losses + z_loss * torch.where(kept, input.logsumexp(dim) ** 2, 0)
    if reduction != "mean":
        return reduced(losses, reduction)
    weights = kept.to(input.dtype)
    if weight is not None and not target.is_floating_point():
        weights = torch.where(kept, weight[torch.where(kept, target, 0)], 0)
    return losses.sum() / weights.sum()


def focal_loss(input, target, weight=None, gamma=2.0, alpha=1.0, ignore_index=-100, reduction="mean"):
    nll = torch_cross_entropy(input, target, None, None, ignore_index, None, "none")
    kept = target != ignore_index
    weights = torch.where(kept, 1 if weight is None else weight[torch.where(kept, target, 0)], 0).to(input.dtype)
    losses = alpha * weights * power(-torch.expm1(-nll), gamma) * nll
    return losses.sum() / weights.sum() if reduction == "mean" else reduced(losses, reduction)


def shaped(logits, softcap, temperature):
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return logits if temperature == 1 else logits / temperature


def log_probs(logits, target, *, temperature=1.0, softcap=0.0, return_entropy=False, ignore_index=-100):
    kept = target != ignore_index
    logits = shaped(logits, softcap, temperature)
    chosen = logits.log_softmax(-1).gather(-1, torch.where(kept, target, 0).long()[..., None])[..., 0]
    chosen = torch.where(kept, chosen, 0).to(wider(logits))
    return (chosen, entropy(logits, kept)) if return_entropy else chosen


def entropy(logits, kept):
    log_p = logits.log_softmax(-1)
    return torch.where(kept, -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1), 0).to(wider(logits))


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


def wider(x):
    """float32 for anything narrower."""
    return torch.promote_types(x.dtype, torch.float32)
