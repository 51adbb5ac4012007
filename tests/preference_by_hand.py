"""Preference and policy losses as their papers have them, one number at a time, and batches to compare by."""

import math

import torch

from triton_losses.preference import cpo_loss, dpo_loss, grpo_loss, kto_loss, orpo_loss, simpo_loss

LOSSES = [dpo_loss, simpo_loss, orpo_loss, cpo_loss, kto_loss, grpo_loss]
PAIRED = [dpo_loss, simpo_loss, orpo_loss, cpo_loss]
NAN, INF = float("nan"), float("inf")


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_odds(log_p):
    return math.log(math.exp(log_p) / (1 - math.exp(log_p)))


def dpo_by_hand(w, l, ref_w, ref_l, beta=0.1, loss_type="sigmoid", label_smoothing=0.0):
    ratio = math.exp(w - ref_w) / math.exp(l - ref_l)
    if loss_type == "ipo":
        return (math.log(ratio) - 1 / (2 * beta)) ** 2
    if loss_type == "hinge":
        return max(0.0, 1 - beta * math.log(ratio))
    prefers = ratio**beta / (1 + ratio**beta)
    return -(1 - label_smoothing) * math.log(prefers) - label_smoothing * math.log(1 - prefers)


def simpo_by_hand(w, l, beta=2.0, gamma=0.5):
    return -math.log(sigmoid(beta * w - beta * l - gamma))


def orpo_by_hand(w, l, beta=0.1):
    odds_ratio = math.exp(log_odds(w)) / math.exp(log_odds(l))
    return -w - beta * math.log(odds_ratio / (1 + odds_ratio))


def cpo_by_hand(w, l, beta=0.1, alpha=1.0, **options):
    return dpo_by_hand(w, l, 0.0, 0.0, beta, **options) - alpha * w


def kto_by_hand(policy, reference, good, z, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    r = policy - reference
    if good:
        return desirable_weight - desirable_weight * sigmoid(beta * (r - z))
    return undesirable_weight - undesirable_weight * sigmoid(beta * (z - r))


def grpo_by_hand(policy, old, reference, advantages, mask, beta, low, high, level):
    """The per-token losses, a list of a list a sequence."""
    rows = []
    for p, o, q, a, m in zip(policy, old, reference, advantages, mask, strict=True):
        tokens = [t for t in range(len(p)) if m[t]]
        ratios = [math.exp(p[t]) / math.exp(o[t]) for t in range(len(p))]
        if level == "sequence":
            ratios = [math.prod(ratios[t] for t in tokens) ** (1 / len(tokens))] * len(p) if tokens else ratios
        row = [0.0] * len(p)
        for t in tokens:
            clipped = min(max(ratios[t], 1 - low), 1 + high)
            divergence = math.exp(q[t]) / math.exp(p[t]) - math.log(math.exp(q[t]) / math.exp(p[t])) - 1
            row[t] = -min(ratios[t] * a, clipped * a) + beta * divergence
        rows.append(row)
    return rows


def grpo_mean_by_hand(rows, mask, loss_type, longest):
    counts = [sum(m) for m in mask]
    sums = [sum(row) for row in rows]
    if loss_type == "grpo":
        return sum(s / c for s, c in zip(sums, counts, strict=True) if c) / len(rows)
    if loss_type == "dr_grpo":
        return sum(s / longest for s in sums) / len(rows)
    return sum(sums) / sum(counts)


def log_probs(*shape, scale=1.0, dtype=torch.float64):
    return -torch.rand(*shape, dtype=dtype) * scale - 0.05


def a_batch(dtype=torch.float64):
    """Policy, old policy, reference, advantages and a mask with a sequence of which nothing counts; ratios on both
    sides of every clip.
    """
    policy = log_probs(5, 7, dtype=dtype)
    old, reference = (policy + 0.4 * torch.randn(5, 7, dtype=dtype) for _ in range(2))
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [0], [6]])
    mask[0, 0] = False
    return policy, torch.tensor([1.5, -0.5, 0.0, 2.0, -3.0], dtype=dtype), mask, old, reference


def reduced(values, reduction):
    values = torch.tensor(values, dtype=torch.float64)
    return {"none": values, "sum": values.sum(), "mean": values.mean()}[reduction]


def pairs(tensors):
    """The tensors' numbers, a tuple a sequence."""
    return zip(*(t.tolist() for t in tensors), strict=True)


def exactly(ours, by_hand):
    torch.testing.assert_close(ours, by_hand, rtol=1e-10, atol=1e-12)
