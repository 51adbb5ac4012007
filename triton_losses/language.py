"""The language model's head: losses of hidden states and a weight, without memory for all of their logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_losses.core.collectives import Group
from triton_losses.core.compiler import compute_dtype
from triton_losses.core.dtensors import for_dtensors
from triton_losses.core.reduction import check_divisor, mean_of, reduction_of
from triton_losses.families.label_rows import label_rows, row_statistics
from triton_losses.families.linear_rows import linear_rows
from triton_losses.families.sharded_rows import shard_of, sharded_rows
from triton_losses.head_checks import check_head, upper_bound
from triton_losses.row_formulas import (
    check_shape_of_logits,
    chosen_log_p,
    cross_entropy_formula,
    log_p_beside_entropy,
)


def next_tokens(target, ignore_index):
    """The targets shifted: a position's label is the next position's target, and the last one's is ignore_index."""
    if target.dim() == 0:
        raise ValueError("shift needs a sequence: target must have at least one dimension")
    target = target.long()  # uint8 cannot hold -100
    return torch.cat([target[..., 1:], torch.full_like(target[..., :1], ignore_index)], -1)


def weight_of_tokens(given):
    """The sum of the tokens' weights, from the arguments of linear_cross_entropy."""
    target, weight, ignore_index = (given.get(name) for name in ("target", "weight", "ignore_index"))
    ignore_index = -100 if ignore_index is None else ignore_index
    labels = next_tokens(target, ignore_index) if given.get("shift") else target.long()
    kept, dtype = labels != ignore_index, compute_dtype(given["input"].dtype)
    weights = kept.to(dtype) if weight is None else torch.where(kept, weight.to(dtype)[torch.where(kept, labels, 0)], 0)
    factors = given.get("token_weights")
    return (weights if factors is None else weights * factors).sum()


@for_dtensors(
    weight_of_tokens,
    hidden=("input",),
    rows=("target", "token_weights"),
    heads=("linear_weight", "linear_bias"),
    shared=("weight",),
)
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    softcap: float = 0.0,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    shift: bool = False,
    chunk_bytes: int = 0,
    kept_tokens: int | str = "count",
    out_dtype: torch.dtype | None = None,
    return_stats: bool = False,
    num_items: float | Tensor | None = None,
    process_group: Group | None = None,
    group: Group | None = None,
    vocab_start: int | None = None,
) -> Any:
    """``cross_entropy(softcap · tanh((x Wᵀ + b) / softcap) / T, target)``, whose logits and their gradient are never
    whole.

    input: hidden states x, (..., features), floating. linear_weight: W, (classes, features). linear_bias: b,
    (classes,). target: (...), class indices, int64 or uint8; those equal to ignore_index (None: -100) cost nothing and
    are left out of the products. weight, label_smoothing, z_loss, reduction: as in ``cross_entropy``. softcap: 0 for
    none. temperature: T. token_weights: (...), factors of the tokens' losses; the mean divides by Σ weight · token
    weight. shift: position i predicts target i + 1, in the last dimension, without a copy of the hidden states.
    chunk_bytes: of the logits that exist at a time; 0: 64 MB on a CPU, 1 GB on a GPU. kept_tokens: how a GPU learns
    how many targets are not ignore_index, so that it can leave the others out of the products. "count": it counts them
    where the products take milliseconds, and the host waits some 20 µs for the count; never under torch.compile or in
    a CUDA graph. A number: an upper bound that the host knows, without waiting. 0: it does not, and multiplies all
    rows. A CPU always leaves them out. out_dtype: of the result; None: float32, float64 for float64. return_stats:
    return the loss and TokenStats, of each token, from the same products. options: torch's, for its chunked path; only
    None.
    num_items, process_group: as in ``cross_entropy``. group: each of its processes holds linear_weight and linear_bias
    of consecutive classes, in the order of the ranks, and all have the same input, target, weight (of all classes) and
    result; vocab_start: the first class held, None: all hold as many. One all-gather of a few numbers per token in the
    forward; in the backward the sum of the input's gradient. Four products.
    As ``torch.nn.functional.linear_cross_entropy``. The weight's gradient is summed in float32. Three products where
    the loss is reduced, four where it is not. Features or a bias that do not fit raise RuntimeError, bad options
    ValueError, class probabilities NotImplementedError, labels outside [0, classes) IndexError (a device assertion on a
    GPU).

    >>> linear_cross_entropy(torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    tensor(1.1269)
    """
    reduction = reduction_of(reduction)
    ignore_index = -100 if ignore_index is None else ignore_index
    if options is not None:
        raise TypeError(
            f"options must be None: torch's chunking does not apply here, chunk_bytes does; got {options!r}"
        )
    check_head(input, linear_weight, target, linear_bias)
    check_shape_of_logits(temperature, softcap)
    formula, scalars = cross_entropy_formula(label_smoothing, z_loss)
    check_divisor(reduction, num_items, process_group)
    if weight is not None and (group is None and weight.shape != linear_weight.shape[:1] or weight.requires_grad):
        raise RuntimeError(
            f"weight must have shape ({linear_weight.shape[0]},) and no gradient, got {tuple(weight.shape)}"
        )
    if token_weights is not None and token_weights.shape != target.shape:
        raise ValueError(
            f"token_weights must have target's shape, {tuple(target.shape)}, got {tuple(token_weights.shape)}"
        )
    if shift:
        target = next_tokens(target, ignore_index)
    dtype = out_dtype or compute_dtype(input.dtype)
    factors = None if token_weights is None else token_weights.reshape(-1).to(compute_dtype(input.dtype))
    labels = target.reshape(-1).long()  # uint8 cannot hold -100
    tensors = input.reshape(-1, input.shape[-1]), linear_weight, linear_bias, labels, weight
    given = {
        "scalars": scalars,
        "ignore_index": ignore_index,
        "softcap": float(softcap),
        "scale": 1.0 / temperature,
        "chunk_bytes": chunk_bytes,
        "kept_tokens": upper_bound(kept_tokens),
        "stats": return_stats,
    }
    if group is not None:
        shard = shard_of(group, vocab_start, linear_weight.shape[0])
        found = sharded_rows(formula, tensors, shard, **given)
        total = (found.losses if factors is None else found.losses * factors).sum()
    else:
        found = linear_rows(formula, tensors, factors, total=reduction != "none", **given)
        total = found.total
    if reduction == "none":
        loss = (found.losses if factors is None else found.losses * factors).to(dtype).view(target.shape)
    elif reduction == "sum":
        loss = total.to(dtype)
    else:
        weights = (found.weights if factors is None else found.weights * factors).sum()
        loss = mean_of(total, weights, num_items, process_group).to(dtype)
    return (loss, stats_of(found, target)) if return_stats else loss


class TokenStats(NamedTuple):
    """Of each token, without gradient: what training logs. All 0, and predicted -1, where the target is ignored.

    loss: before token weights. log_sum_exp and entropy: of the logits after softcap and temperature. predicted: the
    likeliest class. correct: whether that is the target.
    """

    loss: torch.Tensor
    log_sum_exp: torch.Tensor
    entropy: torch.Tensor
    predicted: torch.Tensor
    correct: torch.Tensor


def stats_of(found, target):
    counts = found.likeliest >= 0
    log_sum_exp, entropy = (
        torch.where(counts, found.saved[0] + found.saved[1], 0),
        torch.where(counts, found.saved[3], 0),
    )
    stats = found.losses.detach(), log_sum_exp, entropy, found.likeliest, found.likeliest == target.reshape(-1)
    return TokenStats(*(value.view(target.shape) for value in stats))


@for_dtensors(None, hidden=("input",), rows=("target",), heads=("linear_weight", "linear_bias"))
def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    chunk_bytes: int = 0,
    kept_tokens: int | str = "count",
    group: Group | None = None,
    vocab_start: int | None = None,
) -> Any:
    """``log softmax(softcap · tanh((x Wᵀ + b) / softcap) / T)[target]`` of each token, whose logits are never whole.

    input: hidden states x, (..., features). linear_weight: W, (classes, features). linear_bias: b, (classes,). target:
    (...), class indices; 0 comes back where it equals ignore_index. temperature: T > 0. softcap: 0 for none.
    chunk_bytes, kept_tokens, group, vocab_start: as in ``linear_cross_entropy``. Returns float32 (float64 for float64),
    target's shape, for any upstream gradient: what preference and policy losses are made of; with return_entropy a
    pair, the second the entropy of each token's distribution, differentiable too, from the same products.

    >>> linear_log_probs(torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    tensor([-0.1269, -2.1269])
    """
    check_head(input, linear_weight, target, linear_bias)
    check_shape_of_logits(temperature, softcap)
    formula = log_p_beside_entropy if return_entropy else chosen_log_p
    tensors = input.reshape(-1, input.shape[-1]), linear_weight, linear_bias, target.reshape(-1).long(), None
    given = {
        "ignore_index": ignore_index,
        "softcap": float(softcap),
        "scale": 1.0 / temperature,
        "chunk_bytes": chunk_bytes,
        "kept_tokens": upper_bound(kept_tokens),
    }
    if group is not None:
        shard = shard_of(group, vocab_start, linear_weight.shape[0])
        found = sharded_rows(formula, tensors, shard, **given)
    else:
        found = linear_rows(formula, tensors, **given)
    log_p = found.losses.view(target.shape)
    return (log_p, found.entropy.view(target.shape)) if return_entropy else log_p


def log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
) -> Any:
    """``log softmax(softcap · tanh(x / softcap) / T)[target]`` of each token, straight from logits.

    logits: x, (..., classes), floating. target: (...), class indices; 0 comes back where it equals ignore_index.
    temperature: T > 0. softcap: 0 for none. Returns float32 (float64 for float64), target's shape; with return_entropy
    a pair, the second the entropy of each token's distribution, differentiable too.

    >>> log_probs(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    tensor([-0.1269, -2.1269])
    """
    check_shape_of_logits(temperature, softcap)
    if not logits.is_floating_point():
        raise NotImplementedError(f"logits must be floating-point, got {logits.dtype}")
    if logits.dim() == 0 or target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target must have logits' shape without classes, {tuple(logits.shape[:-1])}, got {tuple(target.shape)}"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise NotImplementedError(f"target must hold class indices, int64 or uint8, got {target.dtype}")
    rows = logits.reshape(-1, logits.shape[-1]), target.reshape(-1).long()
    options = {"ignore_index": ignore_index, "softcap": float(softcap), "scale": 1.0 / temperature}
    if return_entropy:
        log_p, entropy = row_statistics(*rows, **options)
        return log_p.view(target.shape), entropy.view(target.shape)
    dtype = compute_dtype(logits.dtype)
    return label_rows(chosen_log_p, *rows, reduction="none", out_dtype=dtype, **options).view(target.shape)
