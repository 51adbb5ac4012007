"""The language model's head: losses of hidden states and the weight they are multiplied with, whose logits are never whole."""

from typing import NamedTuple

import torch

from triton_losses.compiler import compute_dtype
from triton_losses.families.label_rows import label_rows, row_statistics
from triton_losses.families.linear_rows import linear_rows
from triton_losses.families.reduction import reduction_of
from triton_losses.row_formulas import check_shape_of_logits, chosen_log_p, cross_entropy_formula, log_p_beside_entropy


def check_head(hidden, weight, target, bias, names=("input", "linear_weight", "linear_bias")):
    """Shapes and dtypes, in the words of the caller's parameters."""
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise NotImplementedError(f"{names[0]} and {names[1]} must be floating-point, got {hidden.dtype} and {weight.dtype}")
    if weight.dim() != 2:
        raise NotImplementedError(f"{names[1]} must have shape (classes, features), got {tuple(weight.shape)}")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{names[0]} must end in the {weight.shape[1]} features of {names[1]}, got shape {tuple(hidden.shape)}")
    if target.dtype not in (torch.int64, torch.uint8):
        raise NotImplementedError(f"target must hold class indices, int64 or uint8, got {target.dtype}: no class probabilities here")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"target must have {names[0]}'s shape without features, {tuple(hidden.shape[:-1])}, got {tuple(target.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{names[2]} must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for tensor in (weight, target, bias):
        if tensor is not None and tensor.device != hidden.device:
            raise RuntimeError(f"expected all tensors to be on the same device, but found {hidden.device} and {tensor.device}")


def next_tokens(target, ignore_index):
    """Each position's label is the next position's target; the last position has none."""
    if target.dim() == 0:
        raise ValueError("shift needs a sequence: target must have at least one dimension")
    target = target.long()  # a byte has no room for -100
    return torch.cat([target[..., 1:], torch.full_like(target[..., :1], ignore_index)], -1)


def mean_of(total, weight):
    """total / weight; where no row counts nan, whose gradients are 0 and not 0 · inf."""
    nothing = weight == 0
    return torch.where(nothing, (total / weight).detach(), total / torch.where(nothing, 1, weight))


def linear_cross_entropy(
    input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean", ignore_index=None, label_smoothing=0.0,
    options=None, softcap=0.0, temperature=1.0, z_loss=0.0, token_weights=None, shift=False, chunk_bytes=0, kept_tokens=0,
    out_dtype=None, return_stats=False,
):  # fmt: skip
    """``cross_entropy(softcap · tanh((x Wᵀ + b) / softcap) / T, target)``, whose logits and their gradient are never whole.

    input: hidden states x, (..., features), floating. linear_weight: W, (classes, features). linear_bias: b, (classes,).
    target: (...), class indices, int64 or uint8; those equal to ignore_index (None: -100) cost nothing and are left out of
    the products. weight, label_smoothing, z_loss, reduction: as in ``cross_entropy``. softcap: 0 for none. temperature: T.
    token_weights: (...), factors of the tokens' losses; the mean divides by Σ weight · token weight. shift: position i
    predicts target i + 1, in the last dimension, without a copy of the hidden states. chunk_bytes: of the logits that exist
    at a time; 0: 64 MB on a CPU, 1 GB on a GPU. kept_tokens: an upper bound, known on the host, of how many targets are not
    ignore_index: a GPU, which does not ask how many there are, then leaves the others out too. out_dtype: of the result; None:
    float32, float64 for float64. return_stats: return the loss and TokenStats, of each token, from the same products.
    options: torch's, for its chunked path; only None.
    As ``torch.nn.functional.linear_cross_entropy``. The weight's gradient is summed in float32. Three products where the loss
    is reduced, four where it is not. Bad options raise ValueError, class probabilities NotImplementedError, labels outside
    [0, classes) IndexError (a device assertion on a GPU).

    >>> linear_cross_entropy(torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    tensor(1.1269)
    """
    reduction = reduction_of(reduction)
    ignore_index = -100 if ignore_index is None else ignore_index
    if options is not None:
        raise TypeError(f"options must be None: torch's chunking does not apply here, chunk_bytes does; got {options!r}")
    check_head(input, linear_weight, target, linear_bias)
    check_shape_of_logits(temperature, softcap)
    formula, scalars = cross_entropy_formula(label_smoothing, z_loss)
    if weight is not None and (weight.shape != linear_weight.shape[:1] or weight.requires_grad):
        raise RuntimeError(f"weight must have shape ({linear_weight.shape[0]},) and no gradient, got {tuple(weight.shape)}")
    if token_weights is not None and token_weights.shape != target.shape:
        raise ValueError(f"token_weights must have target's shape, {tuple(target.shape)}, got {tuple(token_weights.shape)}")
    if shift:
        target = next_tokens(target, ignore_index)
    dtype = out_dtype or compute_dtype(input.dtype)
    factors = None if token_weights is None else token_weights.reshape(-1).to(compute_dtype(input.dtype))
    given = {"bias": linear_bias, "class_weights": weight, "scalars": scalars, "ignore_index": ignore_index, "softcap": softcap}
    given |= {"temperature": temperature, "chunk_bytes": chunk_bytes, "kept_tokens": kept_tokens}
    rows = input.reshape(-1, input.shape[-1]), linear_weight, target.reshape(-1)
    found = linear_rows(formula, *rows, upstream=factors, total=reduction != "none", stats=return_stats, **given)
    if reduction == "none":
        loss = (found.losses if factors is None else found.losses * factors).to(dtype).view(target.shape)
    elif reduction == "sum":
        loss = found.total.to(dtype)
    else:
        loss = mean_of(found.total, (found.weights if factors is None else found.weights * factors).sum()).to(dtype)
    return (loss, stats_of(found, target)) if return_stats else loss


class TokenStats(NamedTuple):
    """Of each token, without gradient: what training logs. All 0, and predicted -1, where the target is ignored.

    loss: before token weights. log_sum_exp and entropy: of the logits after softcap and temperature. predicted: the likeliest
    class. correct: whether that is the target.
    """

    loss: torch.Tensor
    log_sum_exp: torch.Tensor
    entropy: torch.Tensor
    predicted: torch.Tensor
    correct: torch.Tensor


def stats_of(found, target):
    counts = found.likeliest >= 0
    log_sum_exp, entropy = torch.where(counts, found.saved[0] + found.saved[1], 0), torch.where(counts, found.saved[3], 0)
    stats = found.losses.detach(), log_sum_exp, entropy, found.likeliest, found.likeliest == target.reshape(-1)
    return TokenStats(*(value.view(target.shape) for value in stats))


def linear_log_probs(
    input, linear_weight, target, *, linear_bias=None, temperature=1.0, softcap=0.0, return_entropy=False, ignore_index=-100,
    chunk_bytes=0, kept_tokens=0,
):  # fmt: skip
    """``log softmax(softcap · tanh((x Wᵀ + b) / softcap) / T)[target]`` of each token, whose logits are never whole.

    input: hidden states x, (..., features). linear_weight: W, (classes, features). linear_bias: b, (classes,). target: (...),
    class indices; 0 comes back where it equals ignore_index. temperature: T > 0. softcap: 0 for none. chunk_bytes,
    kept_tokens: as in ``linear_cross_entropy``. Returns float32 (float64 for float64), target's shape, for any upstream
    gradient: what preference and policy losses are made of; with return_entropy a pair, the second the entropy of each
    token's distribution, differentiable too, from the same products.

    >>> linear_log_probs(torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    tensor([-0.1269, -2.1269])
    """
    check_head(input, linear_weight, target, linear_bias)
    check_shape_of_logits(temperature, softcap)
    found = linear_rows(
        log_p_beside_entropy if return_entropy else chosen_log_p, input.reshape(-1, input.shape[-1]), linear_weight, target.reshape(-1),
        bias=linear_bias, ignore_index=ignore_index, softcap=softcap, temperature=temperature, chunk_bytes=chunk_bytes,
        kept_tokens=kept_tokens,
    )  # fmt: skip
    log_p = found.losses.view(target.shape)
    return (log_p, found.entropy.view(target.shape)) if return_entropy else log_p


def log_probs(logits, target, *, temperature=1.0, softcap=0.0, return_entropy=False, ignore_index=-100):
    """``log softmax(softcap · tanh(x / softcap) / T)[target]`` of each token, straight from logits.

    logits: x, (..., classes), floating. target: (...), class indices; 0 comes back where it equals ignore_index. temperature:
    T > 0. softcap: 0 for none. Returns float32 (float64 for float64), target's shape; with return_entropy a pair, the second
    the entropy of each token's distribution, differentiable too.

    >>> log_probs(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    tensor([-0.1269, -2.1269])
    """
    check_shape_of_logits(temperature, softcap)
    if not logits.is_floating_point():
        raise NotImplementedError(f"logits must be floating-point, got {logits.dtype}")
    if logits.dim() == 0 or target.shape != logits.shape[:-1]:
        raise ValueError(f"target must have logits' shape without classes, {tuple(logits.shape[:-1])}, got {tuple(target.shape)}")
    if target.dtype not in (torch.int64, torch.uint8):
        raise NotImplementedError(f"target must hold class indices, int64 or uint8, got {target.dtype}")
    rows = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    options = {"ignore_index": ignore_index, "softcap": softcap, "temperature": temperature}
    if return_entropy:
        log_p, entropy = row_statistics(*rows, **options)
        return log_p.view(target.shape), entropy.view(target.shape)
    dtype = compute_dtype(logits.dtype)
    return label_rows(chosen_log_p, *rows, reduction="none", out_dtype=dtype, **options).view(target.shape)
