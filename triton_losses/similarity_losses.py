"""What the contrastive losses share: checks of features, and losses made of the statistics of similarities."""

import torch
from torch import Tensor

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.op import readable
from triton_losses.core.reduction import DTYPES, cast
from triton_losses.core.similarities import ALL, NEGATIVES
from triton_losses.families.similarity_rows import similarity_rows


def check_features(**given):
    """Check that tensors (rows, features) go together; errors name the caller's parameters."""
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    (first, x), *others = given.items()
    for name, tensor in given.items():
        if tensor.dtype not in DTYPES:
            raise NotImplementedError(f"{name} must be one of {DTYPES}, got {tensor.dtype}")
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have shape (rows, features), got {tuple(tensor.shape)}")
    for name, tensor in others:
        if tensor.shape[1] != x.shape[1]:
            raise ValueError(
                f"{first} and {name} must have the same number of features, got {x.shape[1]} and {tensor.shape[1]}"
            )
    check_devices(x, *given.values())


def check_devices(x, *tensors):
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.device != x.device:
            raise RuntimeError(
                f"expected all tensors to be on the same device, but found {x.device} and {tensor.device}"
            )


def check_pairs(first, second, **names):
    """Whether two sets of features are of the same rows. names: the parameters' names."""
    if first.shape[0] != second.shape[0]:
        one, other = names["of"]
        raise ValueError(
            f"{one} and {other} must have the same number of rows, got {first.shape[0]} and {second.shape[0]}"
        )


def check_ids(name, ids, rows):
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {ids.dtype}")
    if ids.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), got {tuple(ids.shape)}")


def number_of(name, value, x, positive=False):
    """A number, or a tensor of one, as a 0-dim tensor of x's device, float32 or wider."""
    if isinstance(value, Tensor):
        check_devices(x, value)
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{name} must be a number or a floating tensor of one, got {value.dtype} {tuple(value.shape)}"
            )
        if positive and readable(value) and not value.detach() > 0:
            raise ValueError(f"{name} must be > 0, got {value.item()}")
        return value.reshape(())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor of one, got {value!r}")
    if positive and not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")
    return torch.full((), float(value), dtype=compute_dtype(x.dtype), device=x.device)


def scale_of(temperature, x):
    return 1 / cast(number_of("temperature", temperature, x, positive=True), compute_dtype(x.dtype))


def numbers_of_equals(ids, others, ignore_index):
    """For each id the number of others equal to it; 0 for ignore_index."""
    if not others.numel():
        return torch.zeros_like(ids)
    others, ids = others.sort()[0], ids.contiguous()
    found = torch.searchsorted(others, ids, right=True) - torch.searchsorted(others, ids)
    return torch.where(ids == ignore_index, 0, found)


def mean_of(total, count):
    """total / count; nan if nothing counts, with gradients of 0."""
    if not isinstance(count, Tensor):
        return total / count if count else total.detach() / 0 + 0 * total
    nothing = count == 0
    return torch.where(nothing, torch.nan, total / torch.where(nothing, 1, count))


def reduced(losses, counts, reduction, x):
    """Losses of rows, where ``counts`` (None: all of them), in the dtype of losses of x."""
    dtype = compute_dtype(x.dtype)
    if counts is not None:
        losses = torch.where(counts, losses, 0)
    if reduction == "none":
        return cast(losses, dtype)
    total = losses.sum()
    if reduction == "mean":
        total = mean_of(total, losses.shape[0] if counts is None else counts.sum())
    return cast(total, dtype)


def row_losses(tensors, positives, reduction, **options):
    """-log of the share of a row's positives: the mean of their logarithms or, with two sets, the logarithm of the sum.

    tensors: as of the family. positives: (rows,) their numbers, or None: one each. The result is reduced, but "mean"
    as "sum". A sum takes one product less.
    """
    a, row_ids = tensors[0], tensors[4]
    sets, rows = len(options["sets"]), a.shape[0]
    counts = None if positives is None else positives > 0
    least = 2 * sets + 3
    wide = compute_dtype(a.dtype)
    each = torch.ones(rows, dtype=wide, device=a.device) if counts is None else counts.to(wide)
    if sets == 2:
        coefficients = [each, -each, each, -each, 0 * each]
    else:
        coefficients = [each, each, -each if positives is None else -each / positives.clamp(min=1)]
    coefficients = torch.stack([*coefficients, *[0 * each] * (least - len(coefficients))])
    options = {"sums": sets == 1, "positives": "diagonal" if row_ids is None else "ids", **options}
    if reduction != "none":
        return similarity_rows(tensors, coefficients, **options)[0]
    found, _ = similarity_rows(tensors, **options)
    found = torch.cat([found[:sets], found[sets : 2 * sets].detach(), found[2 * sets :]])
    large = coefficients[sets:] * found[sets:]
    found = large.sum(0) + (coefficients[:sets] * found[:sets]).sum(0)
    return found if counts is None else torch.where(counts, found, 0)


def of_symmetric_rows(tensors, positives, **options):
    """log Σ_{j≠i} exp S_ij less the mean of S over the positives of i; 0 of a row that has none. b is None."""
    found, _ = similarity_rows(tensors, sets=(ALL,), factors=(1.0,), apart=True, positives="ids", sums=True, **options)
    losses = found[0] + (found[1].detach() - found[2] / positives.clamp(min=1))
    return torch.where(positives > 0, losses, 0)


def log_of_hard_negatives(tensors, hardness, number, **options):
    """log of the number of negatives times the mean of exp S over them, weighted by exp(β S), for each row."""
    if not hardness:
        found, _ = similarity_rows(tensors, factors=(1.0,), **options)
        return found[0] + found[1].detach()
    options["sets"] = options["sets"] * 2
    found, _ = similarity_rows(tensors, factors=(1.0 + hardness, hardness), **options)
    log_total, top = found[:2], found[2:4].detach()
    return (top[0] - top[1]) + (log_total[0] - log_total[1]) + torch.log(number)


def against_negatives(log_negatives, positive, scale, number, debias):
    """``-log(e^s / (e^s + E))`` for s = positive and E = e^log_negatives, less the share of positives among them."""
    if debias:
        pivot = torch.maximum(log_negatives, positive).detach()
        rest = torch.exp(log_negatives - pivot) - debias * number * torch.exp(positive - pivot)
        least = torch.exp(torch.log(number) - scale - pivot)
        log_negatives = pivot + torch.log(torch.maximum(rest / (1 - debias), least))
    return torch.nn.functional.softplus(log_negatives - positive, threshold=50.0)


def dots(a, b, scale, normalize):
    """s a_i·b_i, or s a_i·b_i / (‖a_i‖ ‖b_i‖), float32 or wider."""
    wide = compute_dtype(a.dtype)
    a, b = a.to(wide), b.to(wide)
    if normalize:
        a, b = (torch.nn.functional.normalize(t, dim=-1) for t in (a, b))
    return scale.to(wide) * (a * b).sum(-1)


IN_BATCH = {"sets": (NEGATIVES,), "positives": "diagonal", "sums": True}
STORED = {"sets": (ALL,), "positives": "diagonal"}
