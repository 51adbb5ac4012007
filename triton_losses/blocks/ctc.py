"""Connectionist temporal classification on a CPU: the recursion by torch, the rest in blocks that stay in its cache.

No combination of PyTorch operations is as fast as torch's own loop over states. But in float32 its error grows with the
sequence, and its backward computes two exponentials per class, one at a time. So it gets float64, and only the classes
of the target. The distinct classes of a sample are its *slots*, numbered from 0, which is blank.
"""

import math

import torch

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.op import shapes_only
from triton_losses.core.targets import labels_of
from triton_losses.core.threads import row_blocks, share

IMPOSSIBLE = -1e30  # in place of -inf, because -inf - (-inf) is nan


def readable(inputs):
    """The inputs, copied unless they are dense with contiguous classes; steps and samples may be in either order."""
    return inputs if inputs.is_contiguous() or inputs.transpose(0, 1).is_contiguous() else inputs.contiguous()


def forward(tensors, problem):
    """saved: losses (N,), each row's max x and log Σ exp(x - max x), slots' occupancies (N, T, width), `classes_of`."""
    inputs, targets, input_lengths, target_lengths = tensors
    (steps, samples, classes), width, none = inputs.shape, problem.width, problem.reduction == "none"
    wide = compute_dtype(inputs.dtype)
    losses = inputs.new_empty(samples, dtype=wide)
    statistics = inputs.new_empty(2, steps if problem.from_logits else 0, samples, dtype=wide)
    occupancies = inputs.new_empty(samples, steps if problem.store else 0, width, dtype=wide)
    if shapes_only():
        out = inputs.new_empty(samples if none else (), dtype=problem.dtype)
        return [out], [losses, statistics, occupancies, inputs.new_empty(samples, width, dtype=torch.int64)]
    inputs = readable(inputs)
    found, order = classes_of(labels_of(targets, target_lengths, width - 1), target_lengths, classes)
    slots = slots_of(found)
    places, of_slot = torch.empty_like(slots).scatter_(1, order, slots), classes_of_slots(found, slots, problem.blank)
    if problem.from_logits:
        fill_statistics(inputs, input_lengths, statistics)
    highest, taken = statistics[0] if problem.from_logits else None, occupancies if problem.store else None
    exact = walk(inputs, highest, input_lengths, target_lengths, places, of_slot, taken)
    losses.copy_(exact + statistics[1].sum(0, dtype=torch.float64))
    out = torch.where(losses == math.inf, 0, losses) if problem.zero_infinity else losses
    if not none:
        out = (out / target_lengths.clamp(min=1)).mean() if problem.reduction == "mean" else out.sum()
    return [out.to(problem.dtype, copy=out is losses)], [losses, statistics, occupancies, found]


def classes_of(labels, target_lengths, classes):
    """Blank (-1) and the target's labels, sorted by class, and their indices before that (blank: 0); (N, width) each.

    Entries after a target's end count as blank.
    """
    within = torch.arange(labels.shape[1], device=labels.device) < target_lengths[:, None]
    labels = torch.where(within, labels.clamp(0, classes - 1), -1)
    return torch.cat([labels.new_full((labels.shape[0], 1), -1), labels], 1).sort(dim=1, stable=True)


def slots_of(found):
    """The slot of each sorted entry, (N, width)."""
    return torch.nn.functional.pad((found[:, 1:] != found[:, :-1]).cumsum(1), (1, 0))


def classes_of_slots(found, slots, blank):
    """The class of each slot, (N, width); blank for unused slots."""
    return torch.full_like(found, blank).scatter_(1, slots, torch.where(found < 0, blank, found))


def fill_statistics(inputs, input_lengths, statistics):
    """Fill (2, steps, samples) with max x and log Σ exp(x - max x), and with 0 after a sample's end."""
    steps, samples, classes = inputs.shape
    parts = row_blocks(steps, samples * classes, statistics.dtype)
    highest, log_total = statistics

    def read(i):
        x = inputs[parts[i]].to(statistics.dtype)
        top = torch.amax(x, 2, out=highest[parts[i]])
        torch.sum(torch.sub(x, top[..., None]).exp_(), 2, out=log_total[parts[i]])

    share(read, len(parts))
    log_total.log_()
    statistics.masked_fill_(torch.arange(steps, device=inputs.device)[:, None] >= input_lengths, 0)


def walk(inputs, highest, input_lengths, target_lengths, places, of_slot, occupancies):
    """Losses (N,) in float64; fills the occupancies (N, T, width) unless they are None.

    places: (N, width), the slots of blank and of the labels in their order; of_slot: (N, width), the slots' classes.
    """
    steps, samples, _ = inputs.shape
    if not steps or not samples:  # torch refuses empty inputs
        return torch.where(target_lengths > 0, math.inf, 0.0).double()
    of_slot = of_slot[:, : used(places)]
    log_p = inputs.gather(2, of_slot.expand(steps, *of_slot.shape)).double()
    if highest is not None:
        log_p.sub_(highest[..., None])
    log_p.clamp_(min=IMPOSSIBLE)
    arguments = places[:, 1:], input_lengths.tolist(), target_lengths.tolist()
    losses, log_alpha = torch._ctc_loss(log_p, *arguments, 0, False)
    losses.masked_fill_(losses > -0.1 * IMPOSSIBLE, math.inf)
    if occupancies is not None:
        grad = torch.ops.aten._ctc_loss_backward(torch.ones_like(losses), log_p, *arguments, losses, log_alpha, 0)
        taken = log_p.exp_().sub_(grad)
        taken.div_(taken.sum(2, keepdim=True))  # the sum is 1, except for torch's rounding errors
        occupancies[:, :, : of_slot.shape[1]].copy_(taken.transpose(0, 1))
    return losses + 0.0  # turns -0, torch's loss without steps, into 0


def used(slots):
    """The largest number of slots that a sample uses."""
    return int(slots.max()) + 1 if slots.numel() else 1


def backward(tensors, saved, upstream, problem, wanted):
    """(p - occupancy) · upstream; zeros after a sample's end, nan for a sample without a finite loss."""
    inputs, _, input_lengths, target_lengths = tensors
    if shapes_only():
        return [torch.empty_like(readable(inputs))]
    inputs, (losses, statistics, occupancies, found) = readable(inputs), saved
    (steps, samples, classes), wide, grad = inputs.shape, losses.dtype, torch.empty_like(inputs)
    parts, slots = row_blocks(steps, samples * classes, wide), slots_of(found)
    of_slot = classes_of_slots(found, slots, problem.blank)[:, : used(slots)]
    occupancies = occupancies[:, :, : of_slot.shape[1]]
    factor = upstream[0].to(wide)
    if problem.reduction == "mean":
        factor = factor / max(samples, 1) / target_lengths.clamp(min=1)
    factor = torch.where(losses.isfinite(), factor, math.nan)[:, None]
    ends = torch.where(losses == math.inf, 0, input_lengths) if problem.zero_infinity else input_lengths
    ended = torch.arange(steps, device=inputs.device)[:, None] >= ends
    highest, log_total = statistics[..., None]

    def write(i):
        part = parts[i]
        out = grad[part] if grad.dtype == wide else None
        if problem.from_logits:
            g = torch.sub(inputs[part], highest[part], out=out).sub_(log_total[part]).exp_()
        elif problem.exact:
            g = inputs.new_zeros(inputs[part].shape, dtype=wide) if out is None else out.zero_()
        else:
            g = torch.exp(inputs[part].to(wide), out=out)
        taken = occupancies[:, part].transpose(0, 1)
        g.scatter_add_(2, of_slot.expand(taken.shape), -taken)
        g.mul_(factor)
        if out is None:
            grad[part] = g

    share(write, len(parts))
    in_order = (grad, ended) if grad.is_contiguous() else (grad.transpose(0, 1), ended.t())
    rows, ended = in_order[0].view(-1, classes), in_order[1].flatten()
    rows.index_fill_(0, ended.nonzero()[:, 0], 0)  # masked_fill_ with a mask of rows takes five times as long
    return [grad]
