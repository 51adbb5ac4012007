"""label_rows in PyTorch: whole, differentiable as often as one likes; and in blocks of rows that stay in a CPU's cache."""

import functools
import threading

import torch

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.reduction import cast
from triton_losses.core.threads import elements, share

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
    """Losses and weights of the rows, 0 where ignored; of either layout."""
    wide, slots = compute_dtype(logits.dtype), slots_of(formula)
    labels = labels.long()  # a byte would be compared with -100 as with 156
    kept = labels != ignore_index
    labels = torch.where(kept, labels, 0)
    weights = kept.to(wide) if class_weights is None else torch.where(kept, cast(class_weights, wide)[labels], 0)
    x = transform(cast(logits, wide), softcap, scale)
    picked = x.gather(1, labels[:, None])[:, 0]
    log_p = mean_log_p = lse = entropy = None
    if any(slots[1:5]):
        log_rows = x.log_softmax(1)
        log_p = log_rows.gather(1, labels[:, None])[:, 0]
        if slots[2]:
            spread = None if class_weights is None else cast(class_weights, wide).view(-1, *[1] * (x.dim() - 2))
            mean_log_p = (log_rows if spread is None else log_rows * spread).mean(1)
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
        low, high = (int(v) for v in torch.aminmax(labels))
        if low < 0 or high >= cols or low <= ignore_index <= high:
            kept = labels != ignore_index
            if low < 0 or high >= cols:
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


def row_blocks(rows, cols, dtype):
    """Runs of rows, small enough for a cache where a row is; none where there are no columns."""
    step = max(1, elements(dtype) // max(cols, 1))
    return [slice(start, start + step) for start in range(0, rows if cols else 0, step)]


def walk_blocks(
    logits, labels, class_weights, formula, scalars, ignore_index, softcap, scale,
    saved, forward=False, grad=None, upstream=None, denominator=None, operands=(), entropy=False, likeliest=None, room=None, exponentials=None,
):  # fmt: skip
    """label_rows.walk, in PyTorch; the formula takes more than `picked`.

    Blocks hold what is of the size of the logits; what is of the size of the rows, the formula itself, is done once.
    exponentials: to be filled with exp(x - max x) by the forward; in the backward they are where the gradient is to lie.
    """
    rows, cols = logits.shape
    wide, slots = saved.dtype, slots_of(formula)
    kept, labels, weights = counted(labels, class_weights, cols, ignore_index, wide)
    if slots[2]:
        class_weights = class_weights if class_weights is None else class_weights.to(wide)
        mean_weight = 1.0 if class_weights is None else class_weights.mean()
    parts = row_blocks(rows, cols, wide)
    transformed = softcap or scale != 1
    direct = grad is not None and grad.dtype == wide and not softcap  # then blocks can be computed where they are to lie
    highest, log_total, mean_log_p, entropies = saved
    entropy = entropy or slots[4] > 0
    buffers = {}  # a thread's own, for a row may be larger than what the allocator keeps
    in_room = room is not None and forward and grad is not None and direct and not (transformed or slots[2] or entropy or likeliest is not None)

    def part(i):
        x = logits[parts[i]].to(wide)
        return transform(x, softcap, scale) if transformed else x

    def read(i):
        x, out = part(i), None
        if exponentials is not None or direct:
            out = (grad if exponentials is None else exponentials)[parts[i]]
        elif len(parts) > 1:
            out = buffers.setdefault(threading.get_ident(), x.new_empty(0)).resize_(x.shape)
        top = highest[parts[i]]
        if likeliest is None:
            torch.amax(x, 1, out=top)
        else:
            torch.max(x, 1, out=(top, likeliest[parts[i]]))
        shifted = torch.sub(x, top[:, None], out=out)
        if slots[2]:
            mean_log_p[parts[i]] = shifted.mean(1) if class_weights is None else shifted.mv(class_weights).div_(cols)
        if entropy:
            bounded = shifted.clamp(min=LOWEST)
        raised = shifted.exp_()
        total = torch.sum(raised, 1, out=log_total[parts[i]])
        if entropy:
            entropies[parts[i]] = bounded.mul_(raised).sum(1) / total

    wanted, picked = tuple(True for slot in slots[:5] if slot), None
    if forward or "log_p" in formula.needs[wanted]:  # before the gradient, which may lie where the logits do
        picked = logits.gather(1, labels)[:, 0].to(wide) if cols else saved.new_zeros(rows)
        picked = transform(picked, softcap, scale) if transformed else picked
    if in_room:
        make_probabilities(room, cols, highest, log_total)
    elif forward:
        share(read, len(parts))
        log_total.log_()
        if slots[2]:
            mean_log_p.sub_(log_total * mean_weight)
        if entropy:
            torch.sub(log_total, entropies, out=entropies)
    if likeliest is not None and kept is not None:
        likeliest.masked_fill_(~kept, -1)
    log_p = None if picked is None else picked - highest - log_total
    statistics = (None, log_p, mean_log_p, highest + log_total if slots[3] else None, entropies)
    arguments = (*arguments_of(formula, statistics, 1.0 if weights is None else weights), *operands, *scalars)
    losses = None
    if forward:
        losses = formula.value(*arguments)
        losses = losses if kept is None else torch.where(kept, losses, 0)
    if grad is None:
        return losses, weights
    factor = upstream.to(wide) if denominator is None else upstream.to(wide) / denominator
    factor = factor if scale == 1 else factor * scale
    found = formula.partials(wanted)(*arguments)
    partials = [found[slot - 1] * factor if slot else 0.0 for slot in slots[1:5]]
    if kept is not None:
        partials = [torch.where(kept, d, 0) if slot else 0.0 for slot, d in zip(slots[1:5], partials)]
    d_log_p, d_mean, d_lse, d_entropy = partials
    slope = d_lse - d_log_p
    if slots[2]:
        slope = slope - d_mean * mean_weight
        uniform = (d_mean / cols).expand(rows)[:, None]
    if slots[4]:
        slope = slope - d_entropy * entropies
    at_label = d_log_p.expand(rows)[:, None] if slots[1] else None
    if in_room:
        scale_rows(grad, slope, labels, at_label, kept)
        return losses, weights
    slope, holds = (slope * torch.exp(-log_total))[:, None], forward and direct or exponentials is not None

    def write(i):
        block = parts[i]
        x = part(i) if softcap or not holds else None
        if holds:
            g = grad[block]  # exp(x - max)
        else:
            g = torch.sub(x, highest[block][:, None], out=grad[block] if direct else None).exp_()
        if slots[4]:
            log_p = g.log().sub_(log_total[block][:, None]).clamp_(min=LOWEST)
            log_p.mul_((d_entropy[block] * torch.exp(-log_total[block]))[:, None])
            g.mul_(slope[block] - log_p)
        else:
            g.mul_(slope[block])
        if slots[2]:
            g.add_(uniform[block] if class_weights is None else uniform[block] * class_weights)
        if slots[1]:
            g.scatter_add_(1, labels[block], at_label[block])
        if softcap:
            g.mul_(1 - (x / (softcap * scale)).square_())
        if not (direct or holds):
            grad[block] = g

    share(write, len(parts))
    clear_ignored(grad, kept)
    return losses, weights


def make_probabilities(room, cols, highest, log_total):
    """Logits become probabilities in place, by torch's softmax: a third of the time of its parts, for an exponential that is
    off by a few roundings, no more than logits which are a matrix product. It wants its rows contiguous, so padding joins in."""
    room[:, cols:] = -torch.inf
    torch.amax(room, 1, out=highest)
    torch.softmax(room, 1, out=room)
    torch.amax(room, 1, out=log_total).log_().neg_()  # the likeliest class's is 1 / Σ exp(x - max)


def scale_rows(grad, slope, labels, at_label, kept):
    """Probabilities become their rows' gradient."""
    if (slope != 1).any():
        grad.mul_(slope[:, None])
    if at_label is not None:
        grad.scatter_add_(1, labels, at_label)
    clear_ignored(grad, kept)


def clear_ignored(grad, kept):
    if kept is not None:  # whatever stood in those rows, nan too
        grad.index_fill_(0, (~kept).nonzero()[:, 0], 0)

