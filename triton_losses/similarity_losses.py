"""What the contrastive losses share: checks of features, and losses made of the statistics of similarities."""

import torch
from torch import Tensor

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.devices import check_devices
from triton_losses.core.op import readable
from triton_losses.core.reduction import DTYPES, cast, mean_of
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


def row_losses(tensors, positives, reduction, smoothing=0.0, **options):
    """-log of the share of a row's positives: the mean of their logarithms or, with two sets, the logarithm of the sum.

    tensors: as of the family. positives: (rows,) their numbers, or None: one each. smoothing: the share of the mean
    over all columns. The result is reduced, but "mean" as "sum"; beside it come the rows' statistics. A sum takes one
    product less.
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
        coefficients = [each, each, (smoothing - 1) * (each if positives is None else each / positives.clamp(min=1))]
    if smoothing:
        columns, column_ids = tensors[1].shape[0], tensors[5]
        number = columns if column_ids is None else (column_ids != options["ignore_index"]).sum()
        coefficients.append(-smoothing / number * each)
    coefficients = torch.stack([*coefficients, *[0 * each] * (least - len(coefficients))])
    options = {"sums": sets == 1, "positives": "diagonal" if row_ids is None else "ids", **options}
    options["spread"] = smoothing > 0
    if reduction != "none":
        return similarity_rows(tensors, coefficients, **options)
    found, _ = similarity_rows(tensors, **options)
    found = torch.cat([found[:sets], found[sets : 2 * sets].detach(), found[2 * sets :]])
    terms = torch.where(coefficients == 0, 0, coefficients * found)
    losses = terms[sets:].sum(0) + terms[:sets].sum(0)
    return losses if counts is None else torch.where(counts, losses, 0), found


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
NEGATIVE_MODES = ("unpaired", "paired")
MULTI_POSITIVE = ("mean", "sum")


def pairs(image_features, text_features, logit_scale, logit_bias, ids):
    """The family's tensors."""
    check_features(image_features=image_features, text_features=text_features)
    check_pairs(image_features, text_features, of=("image_features", "text_features"))
    scale = number_of("logit_scale", logit_scale, image_features)
    bias = None if logit_bias is None else number_of("logit_bias", logit_bias, image_features)
    if ids is not None:
        check_ids("ids", ids, image_features.shape[0])
        check_devices(image_features, ids)
        ids = ids.long()  # -100 is no byte
    return image_features, text_features, scale, bias, ids, None


def positives_of(tensors, ignore_index, everyones=None):
    """Which rows count (None: all), and the number of each one's positives (None: one), among everyone's ids."""
    ids = tensors[4]
    if ids is None:
        return None, None
    return ids != ignore_index, numbers_of_equals(ids, ids if everyones is None else everyones, ignore_index)


def of_own_rows(tensors, positives, everyone, reduction, options):
    """`row_losses` of this process' rows among those of all, without themselves."""
    z, _, scale, bias, ids, _ = tensors
    tensors = z, everyone.gathered(z), scale, bias, ids, everyone.gathered(ids)
    options |= {"sets": (ALL,), "factors": (1.0,), "apart": True, "offset": everyone.offset(z)}
    return row_losses(tensors, positives, reduction, **options)


def check_options(negative_mode, multi_positive, hardness, debias):
    if negative_mode not in NEGATIVE_MODES:
        raise ValueError(f"negative_mode must be one of {NEGATIVE_MODES}, got {negative_mode!r}")
    if multi_positive not in MULTI_POSITIVE:
        raise ValueError(f"multi_positive must be one of {MULTI_POSITIVE}, got {multi_positive!r}")
    if not hardness >= 0:
        raise ValueError(f"hardness must be >= 0, got {hardness}")
    if not 0 <= debias < 1:
        raise ValueError(f"debias must be in [0, 1), got {debias}")


def of_ids(tensors, reduction, everyone, options):
    query, positive, *_, query_ids, positive_ids = tensors
    check_ids("query_ids", query_ids, query.shape[0])
    check_ids("positive_ids", positive_ids, positive.shape[0])
    check_devices(query, query_ids, positive_ids)
    query_ids, positive_ids = query_ids.long(), positive_ids.long()
    if everyone is not None:
        positive, positive_ids = everyone.gathered(positive), everyone.gathered(positive_ids)
    positives = numbers_of_equals(query_ids, positive_ids, options["ignore_index"])
    options["factors"] = (1.0,) * len(options["sets"])
    tensors = query, positive, *tensors[2:4], query_ids, positive_ids
    total, _ = row_losses(tensors, positives, reduction, **options)
    if reduction == "mean":
        number = (positives > 0).sum()
        total = mean_of(total, number if everyone is None else everyone.share(everyone.gathered(number[None])))
    return cast(total, compute_dtype(query.dtype))


def of_paired(query, positive, negatives, scale, normalize, weights):
    """Losses of queries with negatives of their own (N, M, D), in plain PyTorch: no more products than features."""
    if negatives.dim() != 3 or negatives.shape[::2] != query.shape:
        shape = f"({query.shape[0]}, negatives, {query.shape[1]})"
        raise ValueError(f"paired negatives must have shape {shape}, got {tuple(negatives.shape)}")
    check_devices(query, negatives)
    hardness, debias = weights
    s = dots(query, positive, scale, normalize)
    found = dots(query[:, None], negatives, scale, normalize)
    number = torch.full((), negatives.shape[1], dtype=found.dtype, device=found.device)
    log_negatives = found.logsumexp(1)
    if hardness:
        log_negatives = ((1 + hardness) * found).logsumexp(1) - (hardness * found).logsumexp(1) + torch.log(number)
    return against_negatives(log_negatives, s, scale, number, debias)
