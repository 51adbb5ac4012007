"""label_rows in PyTorch: whole, differentiable as often as one likes; and in blocks of rows that stay in a CPU's cache."""

import functools

import torch

from triton_losses.compiler import compute_dtype

STATISTICS = ("picked", "log_p", "mean_log_p", "lse", "entropy")
LOWEST = -3.4028234663852886e38  # finite, for 0 · -inf is nan


@functools.cache
def slots_of(formula):
    """Where each statistic's partial stands in what the formula returns, 0 where it is not taken; last: takes the weight."""
    taken = [name for name in (*STATISTICS, "weight") if name in formula.parameters]
    if list(formula.parameters[: len(taken)]) != taken:
        raise ValueError(f"formula {formula.name}: statistics come first, in the order {(*STATISTICS, 'weight')}")
    return tuple(taken.index(name) + 1 if name in taken else 0 for name in (*STATISTICS, "weight"))


def arguments_of(formula, statistics, weight):
    """The statistics (in STATISTICS' order) and the weight, those alone that the formula takes."""
    return [s for s, slot in zip((*statistics, weight), slots_of(formula)) if slot]


def transform(x, softcap, scale):
    x = softcap * torch.tanh(x / softcap) if softcap else x
    return x if scale == 1 else x * scale


# Whole


def whole_losses(logits, labels, class_weights, formula, scalars, ignore_index, softcap, scale, operands=()):
    """Losses and weights of the rows, 0 where ignored."""
    wide, slots = compute_dtype(logits.dtype), slots_of(formula)
    kept = labels != ignore_index
    labels = torch.where(kept, labels, 0).long()
    weights = kept.to(wide) if class_weights is None else torch.where(kept, class_weights.to(wide)[labels], 0)
    x = transform(logits.to(wide), softcap, scale)
    picked = x.gather(1, labels[:, None])[:, 0]
    log_p = mean_log_p = lse = entropy = None
    if any(slots[1:5]):
        log_rows = x.log_softmax(1)
        log_p = log_rows.gather(1, labels[:, None])[:, 0]
        if slots[2]:
            mean_log_p = (log_rows if class_weights is None else log_rows * class_weights.to(wide)).mean(1)
        if slots[3]:
            lse = x.logsumexp(1)
        if slots[4]:
            entropy = -(log_rows.exp() * log_rows.clamp(min=LOWEST)).sum(1)
    losses = formula.value(*arguments_of(formula, (picked, log_p, mean_log_p, lse, entropy), weights), *operands, *scalars)
    return torch.where(kept, losses, 0), weights


# In blocks


def counted(labels, class_weights, cols, ignore_index, dtype):
    """Which rows count (None: all), labels (rows, 1) that can index, and the rows' weights (None: all 1)."""
    kept = None
    if labels.numel():
        low, high = torch.aminmax(labels)
        if low < 0 or high >= cols or low <= ignore_index <= high:
            kept = labels != ignore_index
            wrong = labels[kept & ((labels < 0) | (labels >= cols))]
            if wrong.numel():
                raise IndexError(f"Target {int(wrong[0])} is out of bounds: it must be in [0, {cols}), or ignore_index, {ignore_index}")
            labels = torch.where(kept, labels, 0)
    labels = labels.long()
    weights = None
    if class_weights is not None:
        weights = class_weights.to(dtype)[labels]
        weights = weights if kept is None else torch.where(kept, weights, 0)
    elif kept is not None:
        weights = kept.to(dtype)
    return kept, labels[:, None], weights


def row_blocks(rows, cols):
    """Runs of rows of at most 64k elements a thread; none where there are no columns."""
    step = max(1, 65536 * torch.get_num_threads() // max(cols, 1))
    return [slice(start, start + step) for start in range(0, rows if cols else 0, step)]


def read_block(x, label, class_weights, mean_weight, slots, out):
    """What a backward needs of a few rows of transformed logits, log_p, and exp(x - max) (in ``out`` if there is one)."""
    highest = x.amax(1, keepdim=True)
    shifted = torch.sub(x, highest, out=out)
    log_p = shifted.gather(1, label)[:, 0]
    if slots[2]:
        mean_log_p = shifted.mean(1) if class_weights is None else shifted.mv(class_weights).div_(x.shape[1])
    bounded = shifted.clamp(min=LOWEST) if slots[4] else None
    exponentials = shifted.exp_()
    total = exponentials.sum(1)
    log_total = total.log()
    log_p -= log_total
    mean_log_p = mean_log_p - log_total * mean_weight if slots[2] else log_total
    entropy = log_total - bounded.mul_(exponentials).sum(1) / total if slots[4] else log_total
    return (highest[:, 0], log_total, mean_log_p, entropy), log_p, exponentials


def gradient_of_block(exponentials, x, label, saved, partials, class_weights, mean_weight, slots, softcap, scale):
    """Turn exp(x - max) of a few rows into their gradient. x: the transformed logits, read where there is a softcap."""
    _, log_total, _, entropy = saved
    d_log_p, d_mean, d_lse, d_entropy = (d if scale == 1 else d * scale for d in partials)
    g, slope = exponentials, d_lse - d_log_p
    if slots[2]:
        slope = slope - d_mean * mean_weight
    if slots[4]:
        log_p = g.log().sub_(log_total[:, None]).clamp_(min=LOWEST)
        g.mul_(torch.exp(-log_total)[:, None]).mul_((slope - d_entropy * entropy)[:, None] - log_p.mul_(d_entropy[:, None]))
    else:
        g.mul_((slope * torch.exp(-log_total))[:, None])
    if slots[2]:
        uniform = (d_mean / g.shape[1]).expand(len(g))[:, None]
        g.add_(uniform if class_weights is None else uniform * class_weights)
    g.scatter_add_(1, label, d_log_p.expand(len(g))[:, None])
    if softcap:
        g.mul_(1 - (x / (softcap * scale)).square_())


def walk_blocks(
    logits, labels, class_weights, formula, scalars, ignore_index, softcap, scale,
    losses=None, saved=None, grad=None, upstream=None, denominator=None, operands=(),
):  # fmt: skip
    """label_rows_kernels.launch, in PyTorch; the formula takes more than `picked`."""
    rows, cols = logits.shape
    wide, slots = saved.dtype, slots_of(formula)
    kept, labels, weights = counted(labels, class_weights, cols, ignore_index, wide)
    mean_weight = 1.0
    if class_weights is not None:
        class_weights = class_weights.to(wide)
        mean_weight = class_weights.mean()
    if upstream is not None:
        upstream = upstream.to(wide) if denominator is None else upstream.to(wide) / denominator
        partials_of = formula.partials(tuple(True for slot in slots[:5] if slot))
    for block in row_blocks(rows, cols):
        x = transform(logits[block].to(wide), softcap, scale)
        label, weight, values = labels[block], 1.0 if weights is None else weights[block], [v[block] for v in operands]
        direct = grad is not None and grad.dtype == wide and not softcap
        out = grad[block] if direct else None
        if losses is None:
            highest, log_total, mean_log_p, entropy = found = saved[:, block]
            log_p = (x.gather(1, label)[:, 0] - highest) - log_total
            exponentials = None
        else:
            found, log_p, exponentials = read_block(x, label, class_weights, mean_weight, slots, out)
            highest, log_total, mean_log_p, entropy = found
            torch.stack(found, out=saved[:, block])
        statistics = (None, log_p, mean_log_p, highest + log_total if slots[3] else None, entropy)
        arguments = (*arguments_of(formula, statistics, weight), *values, *scalars)
        if losses is not None:
            losses[0, block] = formula.value(*arguments)
        if grad is not None:
            factor = upstream if upstream.dim() == 0 else upstream[block]
            partials = partials_of(*arguments)
            partials = [partials[slot - 1] * factor if slot else 0.0 for slot in slots[1:5]]
            if kept is not None:
                partials = [torch.where(kept[block], d, 0) for d in partials]
            if exponentials is None:
                exponentials = torch.sub(x, highest[:, None], out=out).exp_()
            gradient_of_block(exponentials, x, label, found, partials, class_weights, mean_weight, slots, softcap, scale)
            if not direct:
                grad[block] = exponentials
    if losses is not None:
        losses[1] = 1.0 if weights is None else weights
        if kept is not None or cols == 0:
            losses[0] = torch.where(kept, losses[0], 0) if cols else 0
    if grad is not None and kept is not None:  # whatever stood in those rows, nan too
        grad.index_fill_(0, (~kept).nonzero()[:, 0], 0)
