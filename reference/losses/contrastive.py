"""The contrastive losses in plain PyTorch, with all similarities at once."""

import torch

from reference.losses.shared import wider


def unit(x, normalize):
    return torch.nn.functional.normalize(x, dim=-1) if normalize else x


def similarities(a, b, scale, bias=None, normalize=False):
    logits = scale * unit(a, normalize) @ unit(b, normalize).transpose(-1, -2)
    return logits if bias is None else logits + bias


def log_shares(logits, counts):
    """log softmax of each row over the columns that count."""
    some = counts.any(1, keepdim=True)
    return torch.where(some, logits.masked_fill(~counts & some, -torch.inf), 0).log_softmax(1)


def losses_of(logits, match, counts, label_smoothing=0.0):
    """Of each row: minus the mean log share of its positives; 0 without any."""
    log_p, match = log_shares(logits, counts), match & counts
    loss = -torch.where(match, log_p, 0).sum(1) / match.sum(1).clamp(min=1)
    if label_smoothing:
        rest = -torch.where(counts, log_p, 0).sum(1) / counts.sum(1).clamp(min=1)
        loss = (1 - label_smoothing) * loss + label_smoothing * rest
    return torch.where(match.any(1), loss, 0)


def matches(rows, ids, ignore_index, device):
    """Which pairs are positives, and which count."""
    if ids is None:
        match = torch.eye(rows, dtype=torch.bool, device=device)
        return match, torch.ones_like(match)
    kept = ids != ignore_index
    return ids[:, None] == ids, kept[:, None] & kept


def reduced(losses, number, reduction, x):
    losses = losses.to(wider(x))
    return losses if reduction == "none" else losses.sum() / (number if reduction == "mean" else 1)


def clip_loss(
    image_features,
    text_features,
    logit_scale,
    logit_bias=None,
    *,
    label_smoothing=0.0,
    normalize=False,
    ids=None,
    ignore_index=-100,
    reduction="mean",
    return_stats=False,
    chunk_bytes=0,
    process_group=None,
    local_loss=False,
    gather_with_grad=False,
):
    logits = similarities(image_features, text_features, logit_scale, logit_bias, normalize)
    match, counts = matches(len(logits), ids, ignore_index, logits.device)
    sides = [losses_of(x, match, counts, label_smoothing) for x in (logits, logits.T)]
    loss = reduced((sides[0] + sides[1]) / 2, counts.any(1).sum(), reduction, image_features)
    if not return_stats:
        return loss
    right = [(x.diagonal() >= x.amax(1)).to(loss.dtype).mean() for x in (logits, logits.T)]
    return loss, [*(x.detach().to(loss.dtype) for x in sides), *right]


def siglip_loss(
    image_features,
    text_features,
    logit_scale,
    logit_bias=None,
    *,
    normalize=False,
    ids=None,
    ignore_index=-100,
    reduction="mean",
    chunk_bytes=0,
    process_group=None,
    dist_impl="shift",
):
    logits = similarities(image_features, text_features, logit_scale, logit_bias, normalize)
    match, counts = matches(len(logits), ids, ignore_index, logits.device)
    losses = -torch.nn.functional.logsigmoid(torch.where(match, logits, -logits))
    return reduced(torch.where(counts, losses, 0).sum(1), counts.any(1).sum(), reduction, image_features)


def nt_xent_loss(
    input, other=None, temperature=0.5, *, normalize=True, reduction="mean", chunk_bytes=0, process_group=None
):
    z = input if other is None else torch.cat([input, other])
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = similarities(z, z, 1 / temperature, normalize=normalize)
    losses = losses_of(logits, itself.roll(len(z) // 2, 0), ~itself)
    return reduced(losses, len(z), reduction, z)


def supervised_contrastive_loss(
    features,
    labels=None,
    temperature=0.07,
    base_temperature=0.07,
    *,
    normalize=True,
    ignore_index=-100,
    skip_alone=False,
    reduction="mean",
    chunk_bytes=0,
    process_group=None,
):
    labels = torch.arange(len(features), device=features.device) if labels is None else labels
    z = features.flatten(0, -2)
    ids = labels.repeat_interleave(len(z) // max(len(labels), 1))
    match, counts = matches(len(z), ids, ignore_index, z.device)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    counts, kept = counts & ~itself, ids != ignore_index
    losses = losses_of(similarities(z, z, 1 / temperature, normalize=normalize), match, counts)
    losses = temperature / base_temperature * losses
    number = (match & counts).any(1).sum() if skip_alone else kept.sum()
    return reduced(losses.view(features.shape[:-1]) if reduction == "none" else losses, number, reduction, z)


def info_nce_loss(
    query,
    positive,
    negatives=None,
    temperature=0.1,
    *,
    negative_mode="unpaired",
    normalize=True,
    query_ids=None,
    positive_ids=None,
    multi_positive="mean",
    ignore_index=-100,
    hardness=0.0,
    debias=0.0,
    reduction="mean",
    chunk_bytes=0,
    process_group=None,
):
    logits = similarities(query, positive, 1 / temperature, normalize=normalize)
    if query_ids is not None:
        counts = (query_ids != ignore_index)[:, None] & (positive_ids != ignore_index)
        match = (query_ids[:, None] == positive_ids) & counts
        losses, number = losses_of(logits, match, counts), match.any(1).sum()
        if multi_positive == "sum":
            log_p = log_shares(logits, counts)
            some = match.any(1, keepdim=True)
            losses = -torch.where(some, log_p.masked_fill(~match & some, -torch.inf), 0).logsumexp(1)
            losses = torch.where(some[:, 0], losses, 0)
        return reduced(losses, number, reduction, query)
    own = logits.diagonal()
    if negatives is None:
        others = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        found = logits[others].view(len(logits), max(len(logits) - 1, 0))
    elif negative_mode == "unpaired":
        found = similarities(query, negatives, 1 / temperature, normalize=normalize)
    else:
        found = similarities(query[:, None], negatives, 1 / temperature, normalize=normalize)[:, 0]
    if not (hardness or debias):
        return reduced(-torch.cat([own[:, None], found], 1).log_softmax(1)[:, 0], len(query), reduction, query)
    weights = torch.exp(hardness * found)
    hard = (weights * torch.exp(found)).sum(1) / weights.mean(1)
    if debias:
        number = found.shape[1]
        hard = (hard - debias * number * torch.exp(own)) / (1 - debias)
        hard = torch.maximum(hard, torch.as_tensor(number * (-1 / torch.as_tensor(temperature)).exp()).to(hard))
    return reduced(-torch.log(torch.exp(own) / (torch.exp(own) + hard)), len(query), reduction, query)
