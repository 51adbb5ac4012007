"""Contrastive losses: which of all pairs of a batch belong together; their similarities are never all in memory."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.reduction import cast, reduction_of
from triton_losses.core.similarities import ALL, POSITIVES
from triton_losses.families.similarity_rows import similarity_rows
from triton_losses.similarity_losses import (
    IN_BATCH,
    STORED,
    against_negatives,
    check_devices,
    check_features,
    check_ids,
    check_pairs,
    dots,
    log_of_hard_negatives,
    mean_of,
    number_of,
    numbers_of_equals,
    of_symmetric_rows,
    reduced,
    row_losses,
    scale_of,
)


class ClipStats(NamedTuple):
    """Of each pair, without gradient, and shares of the batch: what training logs.

    image_loss, text_loss: of an image among texts, and of a text among images. image_to_text, text_to_image: how often
    no other is more similar than one that belongs to it (top-1), of all pairs that count.
    """

    image_loss: Tensor
    text_loss: Tensor
    image_to_text: Tensor
    text_to_image: Tensor


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    normalize: bool = False,
    ids: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_stats: bool = False,
    chunk_bytes: int = 0,
) -> Any:
    """``½ (CE(S, i) + CE(Sᵀ, i))``, ``S = s x yᵀ + b``: every image is to find its text among all, and every text its
    image.

    image_features, text_features: x and y, (N, D), floating; row i of one belongs to row i of the other. logit_scale,
    logit_bias: s and b, numbers or tensors of one, with gradient; s is no logarithm. normalize: divide features by
    their lengths, without a copy of them; as open_clip, the default leaves that to the model. label_smoothing: ε of
    both cross entropies. ids: (N,), integers: pairs of one id are positives of one another, and a cross entropy is the
    mean over a row's positives; pairs with ignore_index are left out on both sides. reduction: "mean" and "sum" over
    the pairs, or "none": (N,). return_stats: return the loss and ClipStats, from the same products (not beside ids).
    chunk_bytes: of similarities at a time; 0: 16 MB on a CPU, 128 MB on a GPU. Similarities and the result are float32,
    float64 for float64, for features of 16 bits too. Four products where plain PyTorch takes six; beside the gradients
    memory for a chunk of rows. Features that do not fit raise ValueError. Names and values as open_clip's ``ClipLoss``;
    Radford et al. 2021, arXiv:2103.00020.

    >>> clip_loss(torch.eye(2), torch.eye(2), 2.0)
    tensor(0.1269)
    """
    reduction = reduction_of(reduction)
    tensors, counts, positives = pairs(image_features, text_features, logit_scale, logit_bias, ids, ignore_index)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing}")
    if return_stats and ids is not None:
        raise ValueError("return_stats compares each pair with all others: it cannot be combined with ids")
    found = similarity_rows(
        tensors,
        sets=(ALL,),
        factors=(1.0,),
        columns=True,
        positives="diagonal" if ids is None else "ids",
        sums=True,
        spread=label_smoothing > 0,
        normalize=normalize,
        ignore_index=ignore_index,
        chunk_bytes=chunk_bytes,
    )
    number = image_features.shape[0] if counts is None else counts.sum()
    losses = []
    for log_total, top, of_positives, of_all in (found[0][:4], found[1]):
        wanted = of_positives if positives is None else of_positives / positives.clamp(min=1)
        large = top.detach() - wanted
        if label_smoothing:
            large = large + label_smoothing * (wanted - of_all / number)
        losses.append(log_total + large)
    loss = reduced(0.5 * (losses[0] + losses[1]), counts, reduction, image_features)
    if not return_stats:
        return loss
    right = [mean_of((side[2] >= side[1]).to(loss.dtype).sum(), number) for side in found]
    return loss, ClipStats(*(cast(t.detach(), compute_dtype(image_features.dtype)) for t in losses), *right)


def pairs(image_features, text_features, logit_scale, logit_bias, ids, ignore_index):
    """The family's tensors, which pairs count (None: all), and the number of each one's positives (None: one)."""
    check_features(image_features=image_features, text_features=text_features)
    check_pairs(image_features, text_features, of=("image_features", "text_features"))
    scale = number_of("logit_scale", logit_scale, image_features)
    bias = None if logit_bias is None else number_of("logit_bias", logit_bias, image_features)
    counts = positives = None
    if ids is not None:
        check_ids("ids", ids, image_features.shape[0])
        check_devices(image_features, ids)
        ids = ids.long()  # -100 is no byte
        counts, positives = ids != ignore_index, numbers_of_equals(ids, ids, ignore_index)
    return (image_features, text_features, scale, bias, ids, None), counts, positives


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    normalize: bool = False,
    ids: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_bytes: int = 0,
) -> Tensor:
    """``1/N Σ_ij log(1 + exp(-z_ij S_ij))``, ``S = s x yᵀ + b``, z = 1 for a pair that belongs together, else -1.

    image_features, text_features: x and y, (N, D), floating. logit_scale, logit_bias: s and b, numbers or tensors of
    one, with gradient; training starts at s = 10 and b = -10. normalize: divide features by their lengths, without a
    copy. ids: (N,), integers: images and texts of one id belong together; those with ignore_index are left out.
    reduction: "mean": the sum over all pairs, divided by N; "sum": not divided; "none": (N,), the sum over each image's
    pairs. chunk_bytes: as in ``clip_loss``. The result is float32, float64 for float64. Three products where it is
    reduced, else four. Names and values as open_clip's ``SigLipLoss``; Zhai et al. 2023, arXiv:2303.15343.

    >>> siglip_loss(torch.eye(2), torch.eye(2), 10.0, -5.0)
    tensor(0.0134)
    """
    reduction = reduction_of(reduction)
    tensors, counts, _ = pairs(image_features, text_features, logit_scale, logit_bias, ids, ignore_index)
    options = {"signed": True, "positives": "diagonal" if ids is None else "ids", "normalize": normalize}
    options |= {"ignore_index": ignore_index, "chunk_bytes": chunk_bytes}
    dtype, rows = compute_dtype(image_features.dtype), image_features.shape[0]
    if reduction == "none":
        return cast(similarity_rows(tensors, **options)[0][2], dtype)
    coefficients = torch.zeros(3, rows, dtype=dtype, device=image_features.device)
    coefficients[2] = 1
    total = similarity_rows(tensors, coefficients, **options)[0]
    if reduction == "mean":
        total = mean_of(total, rows if counts is None else counts.sum())
    return cast(total, dtype)


def nt_xent_loss(
    input: Tensor,
    other: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    chunk_bytes: int = 0,
) -> Tensor:
    """``-log(exp S_ip / Σ_{j≠i} exp S_ij)``, ``S = z zᵀ / T``: one view of a sample is to find the other, p, among 2N.

    input, other: two views, (N, D) each, floating, row i of one of the same sample as row i of the other; or input
    alone, (2N, D), the first views and after them the second. temperature: T > 0, a number or a tensor of one, with
    gradient. normalize: divide features by their lengths. reduction: "mean" and "sum" over the 2N views, or "none":
    (2N,), the views of input first. chunk_bytes: as in ``clip_loss``. The result is float32, float64 for float64. Three
    products: S is symmetric. Names and values as lightly's ``NTXentLoss``; SimCLR: Chen et al. 2020, arXiv:2002.05709.

    >>> nt_xent_loss(torch.eye(2), torch.eye(2))
    tensor(0.2395)
    """
    reduction = reduction_of(reduction)
    check_features(input=input, other=other)
    if other is not None:
        check_pairs(input, other, of=("input", "other"))
        input = torch.cat([input, other])
    elif input.shape[0] % 2:
        raise ValueError(f"input must hold two views of each sample, an even number of rows, got {input.shape[0]}")
    ids = torch.arange(input.shape[0] // 2, device=input.device).repeat(2)
    tensors = input, None, scale_of(temperature, input), None, ids, None
    losses = of_symmetric_rows(tensors, torch.ones_like(ids), normalize=normalize, chunk_bytes=chunk_bytes)
    return reduced(losses, None, reduction, input)


def supervised_contrastive_loss(
    features: Tensor,
    labels: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    base_temperature: float = 0.07,
    *,
    normalize: bool = True,
    ignore_index: int = -100,
    skip_alone: bool = False,
    reduction: str = "mean",
    chunk_bytes: int = 0,
) -> Tensor:
    """``-T/T₀ 1/|P_i| Σ_{p∈P_i} log(exp S_ip / Σ_{j≠i} exp S_ij)``, ``S = z zᵀ / T``, P_i the others of i's label.

    features: z, (N, D), or (N, views, D), floating. labels: (N,), integers; None: each sample is a label of its own,
    which needs views. Samples with the label ignore_index are left out. temperature: T > 0, a number or a tensor of
    one, with gradient. base_temperature: T₀ > 0. normalize: divide features by their lengths, without a copy.
    skip_alone: a feature without positives costs nothing; whether the mean does not count it, as
    pytorch-metric-learning's, or does, as the paper's code. reduction: "mean" and "sum" over features, or "none": (N,)
    or (N, views). chunk_bytes: as in ``clip_loss``. The result is float32, float64 for float64. Three products: S is
    symmetric. Khosla et al. 2020, arXiv:2004.11362.

    >>> supervised_contrastive_loss(torch.eye(3), torch.tensor([0, 0, 1]), temperature=0.1, base_temperature=0.1)
    tensor(0.4621)
    """
    reduction = reduction_of(reduction)
    if not base_temperature > 0:
        raise ValueError(f"base_temperature must be > 0, got {base_temperature}")
    if features.dim() not in (2, 3):
        shapes = "(rows, features) or (rows, views, features)"
        raise ValueError(f"features must have shape {shapes}, got {tuple(features.shape)}")
    where, z = features.shape[:-1], features.reshape(-1, features.shape[-1])
    check_features(features=z)
    if labels is None:
        labels = torch.arange(where[0], device=z.device)
    check_ids("labels", labels, where[0])
    check_devices(z, labels)
    labels = labels.long()
    ids = labels if features.dim() == 2 else labels.repeat_interleave(where[1])
    counts = ids != ignore_index
    positives = (numbers_of_equals(ids, ids, ignore_index) - 1).clamp(min=0)
    scale = scale_of(temperature, z)
    options = {"normalize": normalize, "ignore_index": ignore_index, "chunk_bytes": chunk_bytes}
    losses = of_symmetric_rows((z, None, scale, None, ids, None), positives, **options) / (base_temperature * scale)
    losses = reduced(losses, positives > 0 if skip_alone else counts, reduction, z)
    return losses.view(where) if reduction == "none" else losses


NEGATIVE_MODES = ("unpaired", "paired")
MULTI_POSITIVE = ("mean", "sum")


def info_nce_loss(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    negative_mode: str = "unpaired",
    normalize: bool = True,
    query_ids: Tensor | None = None,
    positive_ids: Tensor | None = None,
    multi_positive: str = "mean",
    ignore_index: int = -100,
    hardness: float = 0.0,
    debias: float = 0.0,
    reduction: str = "mean",
    chunk_bytes: int = 0,
) -> Tensor:
    """``-log(exp S_ip / (exp S_ip + Σ_n exp S_in))``, ``S = q kᵀ / T``: a query is to find its key p among negatives n.

    query: q, (N, D), floating. positive: (N, D), row i of them query i's. negatives: None: all other rows of positive;
    (M, D): those, for every query (negative_mode "unpaired"); or (N, M, D): M for each query ("paired"). temperature:
    T > 0, a number or a tensor of one, with gradient. normalize: divide features by their lengths.
    query_ids (N,), positive_ids (M,): integers, without negatives: keys of a query's id are its positives, of any
    number M of them, and a query may have several: multi_positive "mean": the mean of -log p over them; "sum": -log of
    the sum of their p (MIL-NCE). A query without any, or with ignore_index, costs nothing and is not counted; a key
    with ignore_index is left out.
    hardness: β >= 0: a negative weighs exp(β S), in the mean 1. debias: τ in [0, 1), the chance that a negative is a
    positive in truth, whose share is subtracted; both for one positive a query.
    reduction: "mean" and "sum" over the queries that count, or "none": (N,). chunk_bytes: as in ``clip_loss``. The
    result is float32, float64 for float64. Three products where it is reduced over the positives of a batch, without
    hardness and debias; else four. Names and values as info-nce-pytorch's; van den Oord et al. 2018, arXiv:1807.03748;
    hard negatives: Robinson et al. 2020, arXiv:2010.04592; debias: Chuang et al. 2020, arXiv:2007.00224; MIL-NCE: Miech
    et al. 2019, arXiv:1912.06430.

    >>> info_nce_loss(torch.eye(2), torch.eye(2), temperature=0.5)
    tensor(0.1269)
    """
    reduction = reduction_of(reduction)
    check_options(negative_mode, multi_positive, hardness, debias)
    paired = negatives is not None and negative_mode == "paired"
    check_features(query=query, positive=positive, negatives=None if paired else negatives)
    scale = scale_of(temperature, query)
    options = {"normalize": normalize, "chunk_bytes": chunk_bytes}
    if (query_ids is None) != (positive_ids is None):
        raise TypeError("query_ids and positive_ids come together: got one of them")
    if query_ids is not None:
        if negatives is not None or hardness or debias:
            raise ValueError("ids name the positives among all keys: no negatives, hardness or debias beside them")
        options |= {"ignore_index": ignore_index, "sets": (ALL, POSITIVES) if multi_positive == "sum" else (ALL,)}
        return of_ids((query, positive, scale, None, query_ids, positive_ids), reduction, options)
    check_pairs(query, positive, of=("query", "positive"))
    if negatives is None and not (hardness or debias):
        options |= {"sets": (ALL,), "factors": (1.0,)}
        total = row_losses((query, positive, scale, None, None, None), None, reduction, **options)
        return cast(mean_of(total, query.shape[0]) if reduction == "mean" else total, compute_dtype(query.dtype))
    if paired:
        return reduced(
            of_paired(query, positive, negatives, scale, normalize, (hardness, debias)), None, reduction, query
        )
    number = query.shape[0] - 1 if negatives is None else negatives.shape[0]
    number = torch.full((), number, dtype=compute_dtype(query.dtype), device=query.device)
    keys, kind = (positive, IN_BATCH) if negatives is None else (negatives, STORED)
    tensors = query, keys, scale, None, None, None
    log_negatives = log_of_hard_negatives(tensors, hardness, number, **kind, **options)
    s = dots(query, positive, scale, normalize)
    return reduced(against_negatives(log_negatives, s, scale, number, debias), None, reduction, query)


def check_options(negative_mode, multi_positive, hardness, debias):
    if negative_mode not in NEGATIVE_MODES:
        raise ValueError(f"negative_mode must be one of {NEGATIVE_MODES}, got {negative_mode!r}")
    if multi_positive not in MULTI_POSITIVE:
        raise ValueError(f"multi_positive must be one of {MULTI_POSITIVE}, got {multi_positive!r}")
    if not hardness >= 0:
        raise ValueError(f"hardness must be >= 0, got {hardness}")
    if not 0 <= debias < 1:
        raise ValueError(f"debias must be in [0, 1), got {debias}")


def of_ids(tensors, reduction, options):
    query, positive, *_, query_ids, positive_ids = tensors
    check_ids("query_ids", query_ids, query.shape[0])
    check_ids("positive_ids", positive_ids, positive.shape[0])
    check_devices(query, query_ids, positive_ids)
    query_ids, positive_ids = query_ids.long(), positive_ids.long()
    positives = numbers_of_equals(query_ids, positive_ids, options["ignore_index"])
    options["factors"] = (1.0,) * len(options["sets"])
    tensors = *tensors[:4], query_ids, positive_ids
    total = row_losses(tensors, positives, reduction, **options)
    if reduction == "mean":
        total = mean_of(total, (positives > 0).sum())
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
