"""Contrastive losses: which of all pairs of a batch belong together; their similarities are never all in memory."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_losses.core.collectives import Group
from triton_losses.core.compiler import compute_dtype
from triton_losses.core.devices import check_devices
from triton_losses.core.reduction import cast, mean_of, reduction_of
from triton_losses.core.similarities import ALL, POSITIVES
from triton_losses.families.similarity_ring import similarity_ring
from triton_losses.families.similarity_rows import similarity_rows
from triton_losses.process_rows import across
from triton_losses.similarity_losses import (
    IN_BATCH,
    STORED,
    against_negatives,
    check_features,
    check_ids,
    check_options,
    check_pairs,
    dots,
    log_of_hard_negatives,
    numbers_of_equals,
    of_ids,
    of_own_rows,
    of_paired,
    of_symmetric_rows,
    pairs,
    positives_of,
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
    process_group: Group | None = None,
    local_loss: bool = False,
    gather_with_grad: bool = False,
) -> Any:
    """``½ (CE(S, i) + CE(Sᵀ, i))``, ``S = s x yᵀ + b``: every image is to find its text among all, and every text its
    image.

    image_features, text_features: x and y, (N, D), floating; row i of one belongs to row i of the other. logit_scale,
    logit_bias: s and b, numbers or tensors of one, with gradient; s is no logarithm. normalize: divide features by
    their lengths, without a copy of them; as open_clip, the default leaves that to the model. label_smoothing: ε of
    both cross entropies. ids: (N,), integers: pairs of one id are positives of one another, and a cross entropy is the
    mean over a row's positives; pairs with ignore_index are left out on both sides, their features must be finite all
    the same. reduction: "mean" and "sum" over
    the pairs, or "none": (N,). return_stats: return the loss and ClipStats, from the same products (not beside ids).
    chunk_bytes: of similarities at a time; 0: 16 MB on a CPU, 128 MB on a GPU. Similarities and the result are float32,
    float64 for float64, for features of 16 bits too. Four products where plain PyTorch takes six; beside the gradients
    memory for a chunk of rows. Features that do not fit raise ValueError.
    process_group: every process has N rows of one batch. local_loss: the loss of its own rows among everyone's, from
    six products of N rows with all; else each has that of the whole batch, from four of all rows with all.
    gather_with_grad: gradients of what is gathered go back to its process, so that the mean of processes' gradients, as
    DDP takes it, is that of the whole batch; else only those of a process' own rows (beside local_loss only as rows).
    Names and values as open_clip's ``ClipLoss``; Radford et al. 2021, arXiv:2103.00020.

    >>> clip_loss(torch.eye(2), torch.eye(2), 2.0)
    tensor(0.1269)
    """
    reduction = reduction_of(reduction)
    tensors = pairs(image_features, text_features, logit_scale, logit_bias, ids)
    everyone = across(process_group)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing}")
    if return_stats and ids is not None:
        raise ValueError("return_stats compares each pair with all others: it cannot be combined with ids")
    options: dict[str, Any] = {"sets": (ALL,), "factors": (1.0,), "normalize": normalize}
    options |= {"ignore_index": ignore_index, "chunk_bytes": chunk_bytes}
    if everyone is not None and local_loss:
        return of_own_pairs(tensors, everyone, (reduction, label_smoothing, gather_with_grad, return_stats), options)
    if everyone is not None:
        images, texts = (everyone.gathered(t, gather_with_grad, own=True) for t in tensors[:2])
        ids = tensors[4] if ids is None else everyone.gathered(tensors[4])
        tensors = images, texts, *tensors[2:4], ids, None
    counts, positives = positives_of(tensors, ignore_index)
    options |= {"sums": True, "spread": label_smoothing > 0, "positives": "diagonal" if ids is None else "ids"}
    found = similarity_rows(tensors, columns=True, **options)
    number = tensors[0].shape[0] if counts is None else counts.sum()
    losses = []
    for log_total, top, of_positives, of_all in (found[0][:4], found[1]):
        wanted = of_positives if positives is None else of_positives / positives.clamp(min=1)
        large = top.detach() - wanted
        if label_smoothing:
            large = large + label_smoothing * (wanted - of_all / number)
        losses.append(log_total + large)
    loss = reduced(0.5 * (losses[0] + losses[1]), counts, reduction, image_features)
    return (loss, stats_of(losses, found, number)) if return_stats else loss


def stats_of(losses, found, number):
    """found: statistics, of which the second are the highest similarities, and the third the positives'."""
    right = [mean_of((side[2] >= side[1]).to(side.dtype).sum(), number) for side in found]
    return ClipStats(*(t.detach() for t in losses), *right)


def of_own_pairs(tensors, everyone, settings, options):
    """CLIP's loss of this process' images among all texts, and of its texts among all images."""
    reduction, smoothing, gather_with_grad, return_stats = settings
    *sides, scale, bias, ids, _ = tensors
    everyones = ids if ids is None else everyone.gathered(ids)
    counts, positives = positives_of(tensors, options["ignore_index"], everyones)
    number = sides[0].shape[0] if counts is None else everyone.share(everyones != options["ignore_index"])
    options |= {"offset": everyone.offset(sides[0])}
    losses, found = [], []
    for own, other in (sides, sides[::-1]):
        others = everyone.gathered(other, gather_with_grad)
        how = "none" if return_stats else reduction
        loss, statistics = row_losses((own, others, scale, bias, ids, everyones), positives, how, smoothing, **options)
        losses.append(loss)
        found.append(statistics)
    loss = 0.5 * (losses[0] + losses[1])
    if return_stats and reduction != "none":
        loss = loss.sum()
    loss = mean_of(loss, number) if reduction == "mean" else loss
    loss = cast(loss, compute_dtype(sides[0].dtype))
    return (loss, stats_of(losses, found, number)) if return_stats else loss


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
    process_group: Group | None = None,
    dist_impl: str = "shift",
) -> Tensor:
    """``1/N Σ_ij log(1 + exp(-z_ij S_ij))``, ``S = s x yᵀ + b``, z = 1 for a pair that belongs together, else -1.

    image_features, text_features: x and y, (N, D), floating. logit_scale, logit_bias: s and b, numbers or tensors of
    one, with gradient; training starts at s = 10 and b = -10. normalize: divide features by their lengths, without a
    copy. ids: (N,), integers: images and texts of one id belong together; those with ignore_index are left out.
    reduction: "mean": the sum over all pairs, divided by N; "sum": not divided; "none": (N,), the sum over each image's
    pairs. chunk_bytes: as in ``clip_loss``. The result is float32, float64 for float64. Three products where it is
    reduced, else four. process_group: every process has N rows of one batch, and the loss of its own images with
    everyone's texts; the mean of processes' gradients is that of the whole batch. dist_impl: "shift": texts go round
    the ring of processes, from neighbour to neighbour, in memory for those of two, from four products; "gather": all
    are gathered. Names and values as open_clip's ``SigLipLoss``; Zhai et al. 2023, arXiv:2303.15343.

    >>> siglip_loss(torch.eye(2), torch.eye(2), 10.0, -5.0)
    tensor(0.0134)
    """
    reduction = reduction_of(reduction)
    if dist_impl not in DIST_IMPL:
        raise ValueError(f"dist_impl must be one of {DIST_IMPL}, got {dist_impl!r}")
    tensors = pairs(image_features, text_features, logit_scale, logit_bias, ids)
    options: dict[str, Any] = {
        "signed": True,
        "positives": "diagonal" if ids is None else "ids",
        "normalize": normalize,
    }
    options |= {"ignore_index": ignore_index, "chunk_bytes": chunk_bytes}
    dtype, rows, ids = compute_dtype(image_features.dtype), image_features.shape[0], tensors[4]
    coefficients = None
    if reduction != "none":
        ones = torch.ones(rows, dtype=dtype, device=image_features.device)
        coefficients = torch.stack([0 * ones, 0 * ones, ones])
    number = rows if ids is None else (ids != ignore_index).sum()
    everyone = across(process_group)
    if everyone is not None and dist_impl == "shift":
        total = similarity_ring(tensors[:5], everyone, **options)
        total = total if reduction == "none" else total.sum()
    else:
        if everyone is not None:
            texts, column_ids = everyone.gathered(text_features), ids if ids is None else everyone.gathered(ids)
            options["offset"] = everyone.offset(image_features)
            tensors = image_features, texts, *tensors[2:4], ids, column_ids
        total = similarity_rows(tensors, coefficients, **options)[0]
        total = total[2] if reduction == "none" else total
    if everyone is not None and ids is not None:
        number = everyone.share(everyone.gathered(ids) != ignore_index)
    return cast(mean_of(total, number) if reduction == "mean" else total, dtype)


DIST_IMPL = ("shift", "gather")


def nt_xent_loss(
    input: Tensor,
    other: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    chunk_bytes: int = 0,
    process_group: Group | None = None,
) -> Tensor:
    """``-log(exp S_ip / Σ_{j≠i} exp S_ij)``, ``S = z zᵀ / T``: one view of a sample is to find the other, p, among 2N.

    input, other: two views, (N, D) each, floating, row i of one of the same sample as row i of the other; or input
    alone, (2N, D), the first views and after them the second. temperature: T > 0, a number or a tensor of one, with
    gradient. normalize: divide features by their lengths. reduction: "mean" and "sum" over the 2N views, or "none":
    (2N,), the views of input first. chunk_bytes: as in ``clip_loss``. The result is float32, float64 for float64. Three
    products: S is symmetric. process_group: every process has N samples of one batch, and the loss of its own views
    among everyone's; the mean of processes' gradients is that of the whole batch. Names and values as lightly's
    ``NTXentLoss``; SimCLR: Chen et al. 2020, arXiv:2002.05709.

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
    everyone = across(process_group)
    if everyone is None:
        losses = of_symmetric_rows(tensors, torch.ones_like(ids), normalize=normalize, chunk_bytes=chunk_bytes)
        return reduced(losses, None, reduction, input)
    options = {"normalize": normalize, "chunk_bytes": chunk_bytes, "ignore_index": -100}
    ids = ids + everyone.rank * (input.shape[0] // 2)
    total, _ = of_own_rows((*tensors[:4], ids, None), torch.ones_like(ids), everyone, reduction, options)
    return cast(mean_of(total, input.shape[0]) if reduction == "mean" else total, compute_dtype(input.dtype))


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
    process_group: Group | None = None,
) -> Tensor:
    """``-T/T₀ 1/|P_i| Σ_{p∈P_i} log(exp S_ip / Σ_{j≠i} exp S_ij)``, ``S = z zᵀ / T``, P_i the others of i's label.

    features: z, (N, D), or (N, views, D), floating. labels: (N,), integers; None: each sample is a label of its own,
    which needs views. Samples with the label ignore_index are left out. temperature: T > 0, a number or a tensor of
    one, with gradient. base_temperature: T₀ > 0. normalize: divide features by their lengths, without a copy.
    skip_alone: a feature without positives costs nothing; whether the mean does not count it, as
    pytorch-metric-learning's, or does, as the paper's code. reduction: "mean" and "sum" over features, or "none": (N,)
    or (N, views). chunk_bytes: as in ``clip_loss``. The result is float32, float64 for float64. Three products: S is
    symmetric. process_group: as in ``nt_xent_loss``. Khosla et al. 2020, arXiv:2004.11362.

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
    given = labels
    if labels is None:
        labels = torch.arange(where[0], device=z.device)
    check_ids("labels", labels, where[0])
    check_devices(z, labels)
    labels = labels.long()
    ids = labels if features.dim() == 2 else labels.repeat_interleave(where[1])
    everyone = across(process_group)
    if everyone is not None and given is None:  # each sample is a label of its own among everyone's
        ids = ids + everyone.rank * where[0]
    scale = scale_of(temperature, z)
    options = {"normalize": normalize, "ignore_index": ignore_index, "chunk_bytes": chunk_bytes}
    tensors = z, None, scale, None, ids, None
    factor = 1 / (base_temperature * scale)
    everyones = ids if everyone is None else everyone.gathered(ids)
    positives = (numbers_of_equals(ids, everyones, ignore_index) - 1).clamp(min=0)
    counts = positives > 0 if skip_alone else ids != ignore_index
    if everyone is None:
        losses = reduced(of_symmetric_rows(tensors, positives, **options) * factor, counts, reduction, z)
    else:
        losses, _ = of_own_rows(tensors, positives, everyone, reduction, options)
        losses = losses * factor
        if reduction == "mean":
            losses = mean_of(losses, everyone.share(everyone.gathered(counts.long()).sum()))
        losses = cast(losses, compute_dtype(z.dtype))
    return losses.view(where) if reduction == "none" else losses


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
    process_group: Group | None = None,
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
    hardness and debias; else four. process_group: without negatives; every process has N queries, and the loss of its
    own among everyone's keys; the mean of processes' gradients is that of the whole batch.
    Names and values as info-nce-pytorch's; van den Oord et al. 2018, arXiv:1807.03748; hard negatives: Robinson et al.
    2020, arXiv:2010.04592; debias: Chuang et al. 2020, arXiv:2007.00224; MIL-NCE: Miech et al. 2019, arXiv:1912.06430.

    >>> info_nce_loss(torch.eye(2), torch.eye(2), temperature=0.5)
    tensor(0.1269)
    """
    reduction = reduction_of(reduction)
    check_options(negative_mode, multi_positive, hardness, debias)
    paired = negatives is not None and negative_mode == "paired"
    check_features(query=query, positive=positive, negatives=None if paired else negatives)
    scale = scale_of(temperature, query)
    options: dict[str, Any] = {"normalize": normalize, "chunk_bytes": chunk_bytes}
    everyone = across(process_group)
    if everyone is not None and negatives is not None:
        raise ValueError("process_group gathers the keys of a batch: it cannot be combined with negatives")
    if (query_ids is None) != (positive_ids is None):
        raise TypeError("query_ids and positive_ids come together: got one of them")
    if query_ids is not None:
        if negatives is not None or hardness or debias:
            raise ValueError("ids name the positives among all keys: no negatives, hardness or debias beside them")
        options |= {"ignore_index": ignore_index, "sets": (ALL, POSITIVES) if multi_positive == "sum" else (ALL,)}
        return of_ids((query, positive, scale, None, query_ids, positive_ids), reduction, everyone, options)
    check_pairs(query, positive, of=("query", "positive"))
    keys = positive if negatives is None else negatives
    if everyone is not None:
        keys, options["offset"] = everyone.gathered(positive), everyone.offset(query)
    if negatives is None and not (hardness or debias):
        options |= {"sets": (ALL,), "factors": (1.0,)}
        total, _ = row_losses((query, keys, scale, None, None, None), None, reduction, **options)
        return cast(mean_of(total, query.shape[0]) if reduction == "mean" else total, compute_dtype(query.dtype))
    if paired:
        losses = of_paired(query, positive, negatives, scale, normalize, (hardness, debias))
        return reduced(losses, None, reduction, query)
    kind = IN_BATCH if negatives is None else STORED
    number = torch.full((), keys.shape[0] - (negatives is None), dtype=scale.dtype, device=query.device)
    tensors = query, keys, scale, None, None, None
    log_negatives = log_of_hard_negatives(tensors, hardness, number, **kind, **options)
    s = dots(query, positive, scale, normalize)
    return reduced(against_negatives(log_negatives, s, scale, number, debias), None, reduction, query)
