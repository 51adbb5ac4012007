"""What several themes share."""

import torch


def reduced(losses, reduction):
    return losses if reduction == "none" else getattr(losses, reduction)()


def power(miss, gamma):
    """(1 - p)^γ, whose derivative at 1 - p = 0 autograd would make inf · 0 of."""
    return miss.clamp(min=1e-37) ** gamma


def shaped(logits, softcap, temperature):
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return logits if temperature == 1 else logits / temperature


def wider(x):
    """float32 for anything narrower."""
    return torch.promote_types(x.dtype, torch.float32)
