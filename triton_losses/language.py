"""The language model's head: losses of hidden states and a weight, without memory for all of their logits."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.reduction import DTYPES, reduction_of
from triton_losses.families.label_rows import label_rows, row_statistics
from triton_losses.families.linear_distribution_rows import linear_distribution_rows
from triton_losses.families.linear_rows import COUNT, linear_rows
from triton_losses.row_formulas import (
    check_counting,
    check_shape_of_logits,
    chosen_log_p,
    cross_entropy_formula,
    divergence_formula,
    log_p_beside_entropy,
)


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


def check_devices(hidden, *tensors):
    for tensor in tensors:
        if tensor is not None and tensor.device != hidden.device:
            raise RuntimeError(
                f"expected all tensors to be on the same device, but found {hidden.device} and {tensor.device}"
            )


def next_tokens(target, ignore_index):
    """The targets shifted: a position's label is the next position's target, and the last one's is ignore_index."""
    if target.dim() == 0:
        raise ValueError("shift needs a sequence: target must have at least one dimension")
    target = target.long()  # uint8 cannot hold -100
    return torch.cat([target[..., 1:], torch.full_like(target[..., :1], ignore_index)], -1)


def mean_of(total, weight):
    """total / weight; nan if no row counts, with gradients of 0 and not 0 · inf."""
    nothing = weight == 0
    return torch.where(nothing, (total / weight).detach(), total / torch.where(nothing, 1, weight))


def upper_bound(kept_tokens):
    """``kept_tokens`` as an integer; 0 for "count" in a compiled graph, which may not wait for a count."""
    if kept_tokens == "count":
        return 0 if torch.compiler.is_compiling() else COUNT
    if isinstance(kept_tokens, str) or kept_tokens < 0:
        raise ValueError(f'kept_tokens must be "count" or a number >= 0, got {kept_tokens!r}')
    return int(kept_tokens)


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
    if weight is not None and (weight.shape != linear_weight.shape[:1] or weight.requires_grad):
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
    found = linear_rows(
        formula,
        tensors,
        factors,
        total=reduction != "none",
        scalars=scalars,
        ignore_index=ignore_index,
        softcap=float(softcap),
        scale=1.0 / temperature,
        chunk_bytes=chunk_bytes,
        kept_tokens=upper_bound(kept_tokens),
        stats=return_stats,
    )
    if reduction == "none":
        loss = (found.losses if factors is None else found.losses * factors).to(dtype).view(target.shape)
    elif reduction == "sum":
        loss = found.total.to(dtype)
    else:
        loss = mean_of(found.total, (found.weights if factors is None else found.weights * factors).sum()).to(dtype)
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
) -> Any:
    """``log softmax(softcap · tanh((x Wᵀ + b) / softcap) / T)[target]`` of each token, whose logits are never whole.

    input: hidden states x, (..., features). linear_weight: W, (classes, features). linear_bias: b, (classes,). target:
    (...), class indices; 0 comes back where it equals ignore_index. temperature: T > 0. softcap: 0 for none.
    chunk_bytes, kept_tokens: as in ``linear_cross_entropy``. Returns float32 (float64 for float64), target's shape, for
    any upstream gradient: what preference and policy losses are made of; with return_entropy a pair, the second the
    entropy of each token's distribution, differentiable too, from the same products.

    >>> linear_log_probs(torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    tensor([-0.1269, -2.1269])
    """
    check_head(input, linear_weight, target, linear_bias)
    check_shape_of_logits(temperature, softcap)
    found = linear_rows(
        log_p_beside_entropy if return_entropy else chosen_log_p,
        (input.reshape(-1, input.shape[-1]), linear_weight, linear_bias, target.reshape(-1).long(), None),
        ignore_index=ignore_index,
        softcap=float(softcap),
        scale=1.0 / temperature,
        chunk_bytes=chunk_bytes,
        kept_tokens=upper_bound(kept_tokens),
    )
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


TEACHERS = {  # the ways to give a teacher, and the tensors of each
    "products": ("teacher_hidden", "teacher_weight", "teacher_bias"),
    "logits": ("teacher_logits",),
    "top_k": ("teacher_ids", "teacher_log_probs"),
}


def teacher_of(where, classes, device_of, **given):
    """The way in which the teacher is given, and its tensors with rows flattened; logits are not: a copy is large."""
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    kind = next(
        (kind for kind, names in TEACHERS.items() if given.keys() - {"teacher_bias"} == set(names) - {"teacher_bias"}),
        None,
    )
    if kind is None or not given.keys() <= set(TEACHERS[kind]):
        ways = (
            "teacher_hidden and teacher_weight (and teacher_bias), teacher_logits, or teacher_ids and teacher_log_probs"
        )
        raise TypeError(f"the teacher is given by {ways}; got {', '.join(given) or 'none of them'}")
    for name, tensor in given.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"the teacher takes no gradient, but {name} requires it: pass {name}.detach()")
        if name == "teacher_ids" and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
            raise TypeError(f"teacher_ids must be integers, got {tensor.dtype}")
        if name != "teacher_ids" and tensor.dtype not in DTYPES:
            raise NotImplementedError(f"{name} must be one of {DTYPES}, got {tensor.dtype}")
        if name not in ("teacher_weight", "teacher_bias") and (not tensor.dim() or tensor.shape[:-1] != where):
            raise ValueError(f"{name} must have shape ({', '.join(map(str, where))}, ...), got {tuple(tensor.shape)}")
    tensors = [given[name] for name in TEACHERS[kind] if name in given]
    check_devices(device_of, *tensors)
    if kind == "products":
        hidden, weight, *bias = tensors
        check_product(hidden, weight, bias[0] if bias else None, TEACHERS[kind])
        check_classes(classes, weight.shape[0])
        return kind, [hidden.reshape(-1, hidden.shape[-1]), weight, *bias]
    if kind == "logits":
        check_classes(classes, tensors[0].shape[-1])
        return kind, tensors
    ids, log_p = tensors
    if ids.shape != log_p.shape or not 1 <= ids.shape[-1] <= classes:
        rule = f"the same shape and 1 to {classes} entries a token"
        raise ValueError(
            f"teacher_ids and teacher_log_probs must have {rule}, got {tuple(ids.shape)} and {tuple(log_p.shape)}"
        )
    return kind, [t.reshape(-1, t.shape[-1]) for t in tensors]


def check_classes(students, teachers):
    if students != teachers:
        raise ValueError(
            f"student and teacher must have the same classes, got {students} and {teachers}: pass those they share"
        )


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    beta: float = 0.5,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    teacher_log_probs: Tensor | None = None,
    tail: bool = True,
    reduction: str = "mean",
    temperature_squared: bool = False,
    chunk_bytes: int = 0,
    kept_tokens: int | str = "count",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``Σ_j p_j log(p_j / q_j)``, ``p = softmax(y / T)``, ``q = softmax((x Wᵀ + b) / T)``: distillation without
    either's logits whole.

    student_hidden: x, (..., features), floating. student_weight: W, (classes, features). student_bias: b, (classes,).
    The teacher, which takes no gradient (a tensor of its that requires one is refused), comes in one of three ways:
    teacher_hidden (..., any features), teacher_weight (classes, those), teacher_bias: y is their product, a chunk at a
    time. teacher_logits: y, (..., classes), stored; read where they lie, a chunk at a time.
    teacher_ids, teacher_log_probs: (..., k), log p of the teacher's likeliest classes, at the temperature of the loss,
    in any order, each class at most once; an entry of log p = -inf does not exist, whatever its id. tail: compare k + 1
    bins, the last with all the mass that the others leave, of teacher and student alike: never more than the divergence
    of the whole distributions, and 0 when they agree. Where log p of the k sum to 1, "forward" is their Σ p log(p / q).
    False: compare both as if there were no other class, each renormalised over the k: the student's other logits get no
    gradient. direction, beta, temperature T, temperature_squared, labels (...), ignore_index, reduction: as in
    ``distillation_loss``. Rows with ignore_index are left out of the products. chunk_bytes: of the student's logits
    that exist at a time, and as much again where the teacher's are made; 0: 64 MB on a CPU, 1 GB on a GPU. kept_tokens:
    as in ``linear_cross_entropy``. out_dtype: of the result; None: float32, float64 for float64. The weight's gradient
    is summed in float32. Three products of the student's where the loss is reduced, four where it is not. Bad options
    and repeated ids raise ValueError, ids outside [0, classes) IndexError (device assertions on a GPU).
    Hinton et al. 2015, arXiv:1503.02531; GKD: Agarwal et al. 2023, arXiv:2306.13649.

    >>> linear_distillation_loss(torch.zeros(1, 2), torch.eye(2), torch.tensor([[2.0, 0.0]]), torch.eye(2))
    tensor(0.3278)
    """
    reduction = reduction_of(reduction)
    check_product(student_hidden, student_weight, student_bias, ("student_hidden", "student_weight", "student_bias"))
    formula, scalars, one_read = divergence_formula(direction, beta)
    check_shape_of_logits(temperature, 0.0)
    where = student_hidden.shape[:-1]
    kind, teacher = teacher_of(
        where,
        student_weight.shape[0],
        student_hidden,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        teacher_logits=teacher_logits,
        teacher_ids=teacher_ids,
        teacher_log_probs=teacher_log_probs,
    )
    check_counting(labels, where, ignore_index, out_dtype)
    if labels is not None:
        check_devices(student_hidden, labels)
        labels = labels.reshape(-1).long()
    found = linear_distribution_rows(
        formula,
        (student_hidden.reshape(-1, student_hidden.shape[-1]), student_weight, student_bias, labels),
        kind,
        teacher,
        total=reduction != "none",
        scalars=scalars,
        scale=1.0 / temperature,
        student_first=direction == "reverse",
        one_read=one_read,
        tail=tail,
        ignore_index=int(ignore_index),
        chunk_bytes=chunk_bytes,
        kept_tokens=upper_bound(kept_tokens),
    )
    if reduction == "mean":
        counted = (
            found.new_full((), math.prod(where)) if labels is None else (labels != ignore_index).sum().to(found.dtype)
        )
        found = mean_of(found, counted)
    if temperature_squared:
        found = found * temperature**2
    found = found.to(out_dtype or compute_dtype(student_hidden.dtype))
    return found.view(where) if reduction == "none" else found
