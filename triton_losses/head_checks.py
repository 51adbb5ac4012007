"""What losses of hidden states and a weight check: shapes, dtypes, devices, and how many tokens are said to count."""

import torch

from triton_losses.core.devices import check_devices
from triton_losses.families.linear_rows import COUNT


def check_head(hidden, weight, target, bias, names=("input", "linear_weight", "linear_bias")):
    """Check shapes and dtypes; errors use the names of the caller's parameters."""
    check_product(hidden, weight, bias, names)
    if target.dtype not in (torch.int64, torch.uint8):
        raise NotImplementedError(
            f"target must hold class indices, int64 or uint8, got {target.dtype}: no class probabilities here"
        )
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target must have {names[0]}'s shape without features, "
            f"{tuple(hidden.shape[:-1])}, got {tuple(target.shape)}"
        )
    check_devices(hidden, target)


def check_product(hidden, weight, bias, names):
    """Check hidden states, weight and bias. names: the caller's. A misfit raises a RuntimeError, as in torch."""
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise NotImplementedError(
            f"{names[0]} and {names[1]} must be floating-point, got {hidden.dtype} and {weight.dtype}"
        )
    if weight.dim() < 2:
        raise RuntimeError(f"expected {names[1]} with dimensionality at least 2, got {weight.dim()}")
    if weight.dim() != 2:
        raise NotImplementedError(f"{names[1]} must have shape (classes, features), got {tuple(weight.shape)}")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        features = f"{hidden.shape[-1] if hidden.dim() else 'no dimension'} and {weight.shape[1]}"
        raise RuntimeError(
            f"expected equal {names[0]} and {names[1]} last dimensions (in_features), got {features}, respectively"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(f"expected {names[2]} shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    check_devices(hidden, weight, bias)


def upper_bound(kept_tokens):
    """``kept_tokens`` as an integer; 0 for "count" in a compiled graph, which may not wait for a count."""
    if kept_tokens == "count":
        return 0 if torch.compiler.is_compiling() else COUNT
    if isinstance(kept_tokens, str) or kept_tokens < 0:
        raise ValueError(f'kept_tokens must be "count" or a number >= 0, got {kept_tokens!r}')
    return int(kept_tokens)
