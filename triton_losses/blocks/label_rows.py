"""Rows and their labels in blocks of rows that stay in a CPU's cache; images go to label_planes.py."""

import threading

import torch

from triton_losses.blocks import label_planes
from triton_losses.core.compiler import compute_dtype
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import shapes_only
from triton_losses.core.reduction import cast
from triton_losses.core.rows import (
    LOWEST,
    Pass,
    arguments_of,
    counted,
    empty_with_strides,
    readable,
    slots_of,
    transform,
    wanted_of,
)
from triton_losses.core.threads import row_blocks, share


def forward(tensors, problem, exponentials=None):
    """saved: what the backward needs of each row, and the sum of the rows' weights where the mean needs it."""
    logits, labels, _ = tensors
    if logits.dim() == 3:
        return label_planes.forward(tensors, problem, exponentials)
    rows, reduction, dtype = logits.shape[0], problem.reduction, problem.dtype
    saved = logits.new_empty(4, rows, dtype=compute_dtype(logits.dtype))
    if shapes_only():
        out = logits.new_empty(rows if reduction == "none" else (), dtype=dtype)
        return [out], [saved, saved.new_empty(() if reduction == "mean" else (0,))]
    losses, weights = walk(tensors, problem, Pass(saved, forward=True), exponentials)
    if reduction == "none":
        return [losses.to(dtype, copy=True)], [saved, saved.new_empty(0)]
    total = losses.sum()
    if reduction == "sum":
        return [total.to(dtype, copy=True)], [saved, saved.new_empty(0)]
    weight = saved.new_full((), rows) if weights is None else weights.sum()
    return [(total / weight).to(dtype)], [saved, weight]


def backward(tensors, saved, upstream, problem, wanted, exponentials=None):
    logits = tensors[0]
    if logits.dim() == 3:
        return label_planes.backward(tensors, saved, upstream, problem, exponentials)
    if shapes_only():
        return [logits.new_empty(logits.shape)]
    (saved, weight), (dout,) = saved, upstream
    grad = empty_with_strides(readable(logits)) if exponentials is None else exponentials
    factor = dout.to(saved.dtype)
    factor = factor / weight if problem.reduction == "mean" else factor
    walk(tensors, problem, Pass(saved, grad=grad, upstream=factor), exponentials)
    return [grad]


def small(tensors, problem):
    """(loss,) of a few rows, by ATen's log_softmax."""
    logits, labels, class_weights = tensors
    formula = FORMULAS[problem.formula]
    picked, log_p, mean_log_p, lse, entropy = slots_of(formula)[:5]
    if logits.dim() == 3 or not logits.shape[1] or picked or mean_log_p or entropy:
        return None
    x, at = transform(logits, problem.softcap, problem.scale), labels.long()
    kept = at != problem.ignore_index  # not of bytes, for which 156 would be -100
    all_count = bool(kept.all())
    if not all_count:
        # an ignored row may hold nan: its gradient is 0 all the same
        x, at = torch.where(kept[:, None], x, 0), torch.where(kept, at, 0)
    at = at[:, None]
    log_rows = x.log_softmax(1)
    try:
        chosen = log_rows.gather(1, at)[:, 0] if log_p else None
    except RuntimeError:
        # its error names the label that is no class
        counted(labels, None, logits.shape[1], problem.ignore_index, logits.dtype)
        raise
    weight = 1.0 if class_weights is None else class_weights.to(logits.dtype)[at[:, 0]]
    if not all_count:
        weight = torch.where(kept, weight, 0)  # a product would keep a weight that is nan or infinite
    statistics = (None, chosen, None, x.logsumexp(1) if lse else None, None)
    losses = formula.value(*arguments_of(formula, statistics, weight), *problem.scalars)
    if not all_count:
        losses = torch.where(kept, losses, 0)
    if problem.reduction == "mean":
        losses = losses.mean() if all_count and class_weights is None else losses.sum() / weight.sum()
    elif problem.reduction == "sum":
        losses = losses.sum()
    return (cast(losses, problem.dtype),)


def scratch(tensors, problem):
    """The gradient's memory, where the forward may keep its exponentials; None if the backward cannot use them."""
    logits, formula = tensors[0], FORMULAS[problem.formula]
    if logits.dim() == 3:
        return label_planes.scratch(tensors, problem)
    if not any(slots_of(formula)[1:5]) or logits.dtype != compute_dtype(logits.dtype):
        return None
    reads_logits_again = problem.softcap or "log_p" in formula.needs[wanted_of(formula)]
    if problem.overwrite and not reads_logits_again and readable(logits) is logits:
        return logits.detach()
    return empty_with_strides(readable(logits))


def scratch_again(tensors, problem):
    """The same for a second backward, because the first has overwritten what the forward had kept."""
    return label_planes.scratch_again(tensors, problem) if tensors[0].dim() == 3 else None


def statistics_forward(tensors, problem):
    logits, labels = tensors
    saved = logits.new_empty(4, logits.shape[0], dtype=compute_dtype(logits.dtype))
    if shapes_only():
        return [torch.empty_like(saved[0]), torch.empty_like(saved[0])], [saved]
    log_p, _ = walk((*tensors, None), problem, Pass(saved, forward=True))
    return [log_p, torch.where(labels != problem.ignore_index, saved[3], 0)], [saved]


def statistics_backward(tensors, saved, upstream, problem, wanted):
    logits = tensors[0]
    grad = empty_with_strides(readable(logits))
    if not shapes_only():
        ones = torch.ones_like(upstream[0])
        walk(
            (*tensors, None),
            problem._replace(formula="along"),
            Pass(saved[0], grad=grad, upstream=ones, operands=upstream),
        )
    return [grad]


def walk(tensors, problem, task, exponentials=None):
    """Run one Pass, for a formula that takes more than `picked`.

    Operations on logits run block by block. Those on one number per row, such as the formula, run once for all rows.
    exponentials: the forward fills them with exp(x - max x); the backward gets them as the memory of the gradient.
    """
    logits, labels, class_weights = tensors
    saved, forward, entropy, likeliest, grad, upstream, operands, room = task
    ignore_index, softcap, scale, scalars = problem.ignore_index, problem.softcap, problem.scale, problem.scalars
    logits = readable(logits)
    rows, cols = logits.shape
    formula, wide = FORMULAS[problem.formula], saved.dtype
    slots = slots_of(formula)
    kept, labels, weights = counted(labels, class_weights, cols, ignore_index, wide)
    if slots[2]:
        class_weights = class_weights if class_weights is None else class_weights.to(wide)
        mean_weight = 1.0 if class_weights is None else class_weights.mean()
    parts = row_blocks(rows, cols, wide)
    transformed = softcap or scale != 1
    # then blocks can be computed directly in the gradient
    direct = grad is not None and grad.dtype == wide and not softcap
    highest, log_total, mean_log_p, entropies = saved
    entropy = entropy or slots[4] > 0
    buffers = {}  # one per thread, because a row may be larger than what the allocator keeps
    in_room = (
        room is not None
        and forward
        and grad is not None
        and direct
        and not (transformed or slots[2] or entropy or likeliest is not None)
    )

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

    wanted, picked = wanted_of(formula), None
    if forward or "log_p" in formula.needs[wanted]:  # before the gradient, which may overwrite the logits
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
    factor = upstream.to(wide) if scale == 1 else upstream.to(wide) * scale
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
    """Turn logits into probabilities in place with torch.softmax, in a third of the time of separate operations.

    The error of its exponential is a few roundings, no more than the error of logits that come from a matrix product.
    It needs contiguous rows, so the padding takes part.
    """
    room[:, cols:] = -torch.inf
    torch.amax(room, 1, out=highest)
    torch.softmax(room, 1, out=room)
    torch.amax(room, 1, out=log_total).log_().neg_()  # the largest probability is 1 / Σ exp(x - max)


def scale_rows(grad, slope, labels, at_label, kept):
    """Turn probabilities into the gradient of their rows, in place."""
    if (slope != 1).any():
        grad.mul_(slope[:, None])
    if at_label is not None:
        grad.scatter_add_(1, labels, at_label)
    clear_ignored(grad, kept)


def clear_ignored(grad, kept):
    if kept is not None:  # overwrites everything in those rows, also nan
        grad.index_fill_(0, (~kept).nonzero()[:, 0], 0)
