"""Preference and policy losses: which of two answers is better, or how good was this one?

All are plain torch over log-probabilities of answers. A model's head gives one per token, (batch, length), with a mask
of the tokens that count: the answer's, neither the prompt's nor the padding. `grpo_loss` takes those. All others take
one number per sequence, which `sequence_log_probs` makes of them: the sum or the mean, each says which.

    token_log_probs = linear_log_probs(hidden, weight, target)  # chosen answers, then rejected ones: (2 batch, length)
    chosen, rejected = sequence_log_probs(token_log_probs, target != -100).chunk(2)
    loss = dpo_loss(chosen, rejected, reference_chosen, reference_rejected)

16-bit log-probabilities are widened first: losses and rewards are float32 (float64 for float64). Numbers from
a reference model, from the policy that sampled or from a critic are constants: no gradient flows into them. Rewards are
detached, and there is one per sequence for every reduction.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.device_math import tiny
from triton_losses.core.reduction import DTYPES, reduction_of

PREFERENCES = ("sigmoid", "ipo", "hinge")
NORMALISERS = ("grpo", "dapo", "dr_grpo", "bnpo")
LEVELS = ("token", "sequence")


def widened(name, x):
    if x.dtype not in DTYPES:
        raise NotImplementedError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
    return x.to(compute_dtype(x.dtype))


def check(name, rule, holds, value):
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def check_shape(name, x, other, shape):
    if x.shape != shape:  # the message is made only if needed, because sizes may be symbols
        raise ValueError(f"{name} must have the shape of {other}, {tuple(shape)}, got {tuple(x.shape)}")


def masked(log_probs, mask):
    """log_probs, 0 outside the mask before any exp (inf · 0 is NaN, in the backward too), and the mask as bool."""
    if mask is None:
        return log_probs, torch.ones_like(log_probs, dtype=torch.bool)
    check_shape("mask", mask, "token_log_probs", log_probs.shape)
    return log_probs.masked_fill(~mask.bool(), 0.0), mask.bool()


def constant(name, x, other, shape):
    check_shape(name, x, other, shape)
    return widened(name, x).detach()


def per_sequence(**log_probs):
    """The tensors, widened. Each must have one number per sequence, and all must have one shape."""
    first = next(iter(log_probs))
    for name, x in log_probs.items():
        check(
            name,
            "(batch,), one number per sequence: sequence_log_probs makes it of one per token",
            x.dim() < 2,
            tuple(x.shape),
        )
        check_shape(name, x, first, log_probs[first].shape)
    return [widened(name, x) for name, x in log_probs.items()]


def answer(losses, reduction, rewards, return_rewards):
    reduction = reduction_of(reduction)
    loss = losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()
    return (loss, *(reward.detach() for reward in rewards)) if return_rewards else loss


def of_margin(margin, beta, loss_type, label_smoothing):
    """DPO's loss per pair. margin: by how much the policy prefers the chosen answer."""
    check("beta", "> 0", beta > 0, beta)
    check("loss_type", f"one of {PREFERENCES}", loss_type in PREFERENCES, loss_type)
    limit = 0.5 if loss_type == "sigmoid" else 0
    check(
        "label_smoothing",
        f"in [0, {limit}] where loss_type is {loss_type!r}",
        0 <= label_smoothing <= limit,
        label_smoothing,
    )
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)).square()
    margin = beta * margin
    if loss_type == "hinge":
        return torch.relu(1 - margin)
    losses = -logsigmoid(margin)
    return (1 - label_smoothing) * losses - label_smoothing * logsigmoid(-margin) if label_smoothing else losses


def supervised(nll, chosen):
    """The term that keeps the chosen answers likely, per sequence: as given, or -log π of them."""
    if nll is None:
        return -chosen
    if nll.dim() > 0:
        check_shape("nll", nll, "chosen_log_probs", chosen.shape)
    return widened("nll", nll)


def sequence_log_probs(token_log_probs: Tensor, mask: Tensor | None = None, average: bool = False) -> Tensor:
    """``Σ_t m_t log p_t``, or its mean over the tokens that count: log-probabilities of sequences from those of their
    tokens.

    token_log_probs: floating, (..., length). mask: the same shape, bool or numbers of which all but 0 count; None
    counts all. What a masked token holds, be it -inf or NaN, matters nowhere. Returns (...), summed in float32 (float64
    for float64). A sequence of which no token counts gives 0, averaged too, and no gradient. A mask of another shape
    raises ValueError.

    >>> sequence_log_probs(torch.tensor([[-1.0, -3.0, -5.0]]), torch.tensor([[1, 1, 0]]), average=True)
    tensor([-2.])
    """
    log_probs = widened("token_log_probs", token_log_probs)
    check("token_log_probs", "(..., length)", log_probs.dim() > 0, tuple(log_probs.shape))
    log_probs, mask = masked(log_probs, mask)
    total = log_probs.sum(-1)
    return total / mask.sum(-1).clamp(min=1) if average else total


def dpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    reference_chosen_log_probs: Tensor | None = None,
    reference_rejected_log_probs: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    reference_free: bool = False,
    reduction: str = "mean",
    return_rewards: bool = False,
) -> Any:
    """``-(1 - ε) log σ(β h) - ε log σ(-β h)``, with ``h = log π(y₊)/π_ref(y₊) - log π(y₋)/π_ref(y₋)``: direct
    preference optimisation.

    Log-probabilities: (batch,), summed over tokens. beta: > 0, how dearly the policy pays for leaving the reference.
    loss_type: "sigmoid"; "ipo" is ``(h - 1/(2β))²``, as a rule of log-probabilities averaged over tokens, so that β
    does not depend on length; "hinge" is ``max(0, 1 - β h)``. label_smoothing: ε in [0, ½], the chance that a pair is
    labelled the wrong way round ("sigmoid" alone). reference_free: the reference finds every answer equally likely;
    without it both reference log-probabilities are needed. reduction: "mean", "sum" or "none". return_rewards: (loss, β
    log π(y₊)/π_ref(y₊), β log π(y₋)/π_ref(y₋)). Other values and shapes raise ValueError. Rafailov et al. 2023,
    arXiv:2305.18290; IPO: Azar et al. 2023, arXiv:2310.12036; smoothing: Mitchell 2023, ericmitchell.ai/cdpo.pdf;
    hinge: Liu et al. 2023, arXiv:2309.06657.

    >>> dpo_loss(torch.tensor([-10.0]), torch.tensor([-12.0]), torch.tensor([-11.0]), torch.tensor([-11.0]), beta=0.5)
    tensor(0.3133)
    """
    chosen, rejected = per_sequence(chosen_log_probs=chosen_log_probs, rejected_log_probs=rejected_log_probs)
    if not reference_free:
        if reference_chosen_log_probs is None or reference_rejected_log_probs is None:
            raise ValueError(
                "dpo_loss needs both reference_chosen_log_probs and reference_rejected_log_probs, "
                "or reference_free=True"
            )
        chosen = chosen - constant(
            "reference_chosen_log_probs", reference_chosen_log_probs, "chosen_log_probs", chosen.shape
        )
        rejected = rejected - constant(
            "reference_rejected_log_probs", reference_rejected_log_probs, "chosen_log_probs", chosen.shape
        )
    losses = of_margin(chosen - rejected, beta, loss_type, label_smoothing)
    return answer(losses, reduction, (beta * chosen, beta * rejected), return_rewards)


def simpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    reduction: str = "mean",
    return_rewards: bool = False,
) -> Any:
    """``-log σ(β (log π(y₊)/|y₊| - log π(y₋)/|y₋|) - γ)``: simple preference optimisation, without a reference model.

    Log-probabilities: (batch,), averaged over tokens. beta: > 0. gamma: >= 0, the target margin between rewards (the
    paper tunes γ/β). reduction: "mean", "sum" or "none". return_rewards: (loss, β log π(y₊)/|y₊|, β log π(y₋)/|y₋|).
    Other values and shapes raise ValueError. Meng et al. 2024, arXiv:2405.14734.

    >>> simpo_loss(torch.tensor([-0.5]), torch.tensor([-0.75]), beta=2.0, gamma=0.5)
    tensor(0.6931)
    """
    check("beta", "> 0", beta > 0, beta)
    check("gamma", ">= 0", gamma >= 0, gamma)
    chosen, rejected = per_sequence(chosen_log_probs=chosen_log_probs, rejected_log_probs=rejected_log_probs)
    losses = -logsigmoid(beta * (chosen - rejected) - gamma)
    return answer(losses, reduction, (beta * chosen, beta * rejected), return_rewards)


def log_odds(log_p):
    """log p/(1 - p); p = 1 counts as 1 - 1e-37, so that value and slope stay finite."""
    return log_p - torch.log(-torch.expm1(log_p.clamp(max=-tiny)))  # 1 - exp would lose the digits of a p close to 1


def orpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    *,
    beta: float = 0.1,
    nll: Tensor | None = None,
    reduction: str = "mean",
    return_rewards: bool = False,
) -> Any:
    """``-log p₊ - λ log σ(log p₊/(1 - p₊) - log p₋/(1 - p₋))``, with ``log p = log π(y)/|y|``: odds ratio preference
    optimisation.

    Log-probabilities: (batch,), averaged over tokens. beta: λ >= 0. nll: (batch,) or a scalar tensor in place of -log
    p₊, for example the mean over all tokens of all chosen answers. p = 1 (by rounding, or where no token of a sequence
    counts) has log-odds of 85, and finite gradients. reduction: "mean", "sum" or "none". return_rewards: (loss, λ log
    p₊, λ log p₋). Other values and shapes raise ValueError. Hong et al. 2024, arXiv:2403.07691.

    >>> orpo_loss(torch.tensor([-0.5]), torch.tensor([-0.5]), beta=1.0)
    tensor(1.1931)
    """
    check("beta", ">= 0", beta >= 0, beta)
    chosen, rejected = per_sequence(chosen_log_probs=chosen_log_probs, rejected_log_probs=rejected_log_probs)
    losses = supervised(nll, chosen) - beta * logsigmoid(log_odds(chosen) - log_odds(rejected))
    return answer(losses, reduction, (beta * chosen, beta * rejected), return_rewards)


def cpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    nll: Tensor | None = None,
    reduction: str = "mean",
    return_rewards: bool = False,
) -> Any:
    """``-log σ(β (log π(y₊) - log π(y₋))) - α log π(y₊)``: contrastive preference optimisation, without a reference
    model.

    Log-probabilities: (batch,), summed over tokens. beta: > 0. alpha: >= 0, weight of the second term. nll: (batch,) or
    a scalar tensor in place of that term's -log π(y₊), often the mean over all tokens of all chosen answers, which does
    not grow with length. loss_type, label_smoothing: of the first term, as in ``dpo_loss``. reduction: "mean", "sum" or
    "none". return_rewards: (loss, β log π(y₊), β log π(y₋)). Other values and shapes raise ValueError. Xu et al. 2024,
    arXiv:2401.08417.

    >>> cpo_loss(torch.tensor([-3.0]), torch.tensor([-3.0]), nll=torch.tensor(0.5))
    tensor(1.1931)
    """
    check("alpha", ">= 0", alpha >= 0, alpha)
    chosen, rejected = per_sequence(chosen_log_probs=chosen_log_probs, rejected_log_probs=rejected_log_probs)
    losses = of_margin(chosen - rejected, beta, loss_type, label_smoothing) + alpha * supervised(nll, chosen)
    return answer(losses, reduction, (beta * chosen, beta * rejected), return_rewards)


def kto_loss(
    log_probs: Tensor,
    reference_log_probs: Tensor,
    labels: Tensor,
    kl: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
    return_rewards: bool = False,
) -> Any:
    """``λ₊ (1 - σ(β (r - z)))`` where an answer is good, ``λ₋ (1 - σ(β (z - r)))`` where not, ``r = log
    π(y)/π_ref(y)``: KTO.

    For answers that were judged one by one. Log-probabilities: (batch,), summed over tokens. labels: (batch,), bool,
    True for a good answer. kl: log π(y')/π_ref(y') of answers paired with the wrong prompts, a tensor of any shape, or
    a number (0.0 does without); z is its mean, at least 0, and a constant: average over ranks before. beta: > 0.
    desirable_weight (λ₊), undesirable_weight (λ₋): >= 0; the mean divides by batch all the same. reduction: "mean",
    "sum" or "none". return_rewards: (loss, β r). Other values and shapes raise ValueError. Ethayarajh et al. 2024,
    arXiv:2402.01306.

    >>> log_probs, desirable = torch.tensor([-9.0, -9.0]), torch.tensor([True, False])
    >>> kto_loss(log_probs, log_probs, desirable, kl=torch.tensor([0.5, -0.5]))
    tensor(0.5000)
    """
    check("beta", "> 0", beta > 0, beta)
    check("desirable_weight", ">= 0", desirable_weight >= 0, desirable_weight)
    check("undesirable_weight", ">= 0", undesirable_weight >= 0, undesirable_weight)
    (policy,) = per_sequence(log_probs=log_probs)
    if labels.dtype != torch.bool:
        raise ValueError(f"labels must be bool, True for a good answer, got {labels.dtype}")
    check_shape("labels", labels, "log_probs", policy.shape)
    rewards = beta * (policy - constant("reference_log_probs", reference_log_probs, "log_probs", policy.shape))
    z = widened("kl", kl).detach().mean().clamp(min=0) if isinstance(kl, torch.Tensor) else max(kl, 0.0)
    gain = rewards - beta * z
    losses = torch.where(labels, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))
    return answer(losses, reduction, (rewards,), return_rewards)


def grpo_loss(
    token_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    old_token_log_probs: Tensor | None = None,
    reference_token_log_probs: Tensor | None = None,
    *,
    beta: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
    loss_type: str = "grpo",
    importance_sampling_level: str = "token",
    max_completion_length: int | None = None,
    num_items_in_batch: int | float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``-min(ρ A, clip(ρ, 1 - ε₋, 1 + ε₊) A) + β (e^d - d - 1)``, ``ρ = π/π_old``, ``d = log π_ref/π``, per token:
    GRPO.

    token_log_probs, and those of the policy that sampled (old; None: this one, so ρ = 1) and of the reference: (batch,
    length). advantages: (batch,), or (batch, length). mask: (batch, length), bool or numbers of which all but 0 count;
    None counts all. What a masked token holds, be it -inf or NaN, matters nowhere. beta: >= 0; above 0 it needs the
    reference (the paper has 0.04). epsilon_low, epsilon_high: ε₋ in [0, 1] and ε₊ >= 0, which is ε₋ unless given (DAPO:
    0.28). importance_sampling_level: "token", or "sequence": ρ is then the geometric mean over the sequence's tokens,
    with far smaller ε (GSPO: 3e-4 and 4e-4). reduction: "none" gives (batch, length), 0 where masked; "sum" their sum;
    "mean" divides by what loss_type says. "grpo": by each sequence's own tokens, then by batch. "bnpo": by all tokens
    that count. "dapo": so too, or by num_items_in_batch (an int or a scalar tensor), their number in all the batches of
    one step. "dr_grpo": by batch · max_completion_length, a constant. A sequence of which no token counts gives 0 and
    no gradient, and so does a batch of such. Other values and shapes raise ValueError. Shao et al. 2024,
    arXiv:2402.03300; DAPO: Yu et al. 2025, arXiv:2503.14476; Dr. GRPO: Liu et al. 2025, arXiv:2503.20783; GSPO: Zheng
    et al. 2025, arXiv:2507.18071.

    >>> grpo_loss(torch.tensor([[-1.0, -2.0], [-1.0, -3.0]]), torch.tensor([1.0, -2.0]), torch.tensor([[1, 1], [1, 0]]))
    tensor(0.5000)
    """
    epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
    check("beta", ">= 0", beta >= 0, beta)
    check("epsilon_low", "in [0, 1]", 0 <= epsilon_low <= 1, epsilon_low)
    check("epsilon_high", ">= 0", epsilon_high >= 0, epsilon_high)
    check("loss_type", f"one of {NORMALISERS}", loss_type in NORMALISERS, loss_type)
    check(
        "importance_sampling_level", f"one of {LEVELS}", importance_sampling_level in LEVELS, importance_sampling_level
    )
    reduction = reduction_of(reduction)
    if loss_type == "dr_grpo":
        check(
            "max_completion_length",
            '> 0 for loss_type "dr_grpo"',
            (max_completion_length or 0) > 0,
            max_completion_length,
        )
    check("beta", "0 without reference_token_log_probs", beta == 0 or reference_token_log_probs is not None, beta)
    check("token_log_probs", "(batch, length)", token_log_probs.dim() == 2, tuple(token_log_probs.shape))

    def per_token(name, x):
        return masked(constant(name, x, "token_log_probs", token_log_probs.shape), mask)[0]

    log_probs, counted = masked(widened("token_log_probs", token_log_probs), mask)
    old = log_probs.detach() if old_token_log_probs is None else per_token("old_token_log_probs", old_token_log_probs)
    if advantages.dim() == 1:
        advantages = constant(
            "advantages", advantages, "a column of token_log_probs", token_log_probs.shape[:1]
        ).unsqueeze(-1)
    else:
        advantages = per_token("advantages", advantages)

    lengths = counted.sum(-1).clamp(min=1)
    log_ratio = log_probs - old
    if importance_sampling_level == "sequence":
        log_ratio = (log_ratio.sum(-1) / lengths).unsqueeze(-1)
    lower, upper = math.log1p(-epsilon_low) if epsilon_low < 1 else -math.inf, math.log1p(epsilon_high)
    # the minimum is taken of logarithms: a clipped ratio could overflow, and its gradient, 0 · inf, would be NaN
    log_ratio = torch.where(advantages >= 0, log_ratio.clamp(max=upper), log_ratio.clamp(min=lower))
    losses = -advantages * log_ratio.exp()
    if beta > 0:
        d = per_token("reference_token_log_probs", reference_token_log_probs) - log_probs
        losses = losses + beta * (torch.expm1(d) - d)  # exp(d) - 1 would lose the digits of a small d
    losses = losses.expand(log_probs.shape).masked_fill(~counted, 0.0)

    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if loss_type == "grpo":
        return (losses.sum(-1) / lengths).mean()
    if loss_type == "dr_grpo":
        return losses.sum() / (losses.shape[0] * max_completion_length)  # type: ignore[operator] # checked above
    tokens = counted.sum() if loss_type == "bnpo" or num_items_in_batch is None else num_items_in_batch
    return losses.sum() / (tokens.clamp(min=1) if isinstance(tokens, torch.Tensor) else max(tokens, 1))
