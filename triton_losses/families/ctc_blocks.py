"""ctc on a CPU: torch's own recursion, in float64, over each target's own classes alone; the rest in blocks that stay in its cache.

Torch's loop over states has no match in PyTorch's operations. In float32 it drifts as sequences grow, and its backward takes two
exponentials a class, one at a time: so it gets float64, and no class that the target does not have.
"""

import math

import torch

from triton_losses.core.threads import share
from triton_losses.families.label_rows_blocks import row_blocks

IMPOSSIBLE = -1e30  # for -inf, whose difference to itself would be nan


def statistics_blocks(inputs, input_lengths, statistics):
    """Fills max x and log Σ exp(x - max x) (2, steps, samples); 0 after a sample's end."""
    steps, samples, classes = inputs.shape
    parts = row_blocks(steps, samples * classes, statistics.dtype)
    highest, log_total = statistics

    def read(i):
        x = inputs[parts[i]].to(statistics.dtype)
        top = torch.amax(x, 2, out=highest[parts[i]])
        torch.sum(torch.sub(x, top[..., None]).exp_(), 2, out=log_total[parts[i]])

    share(read, len(parts))
    log_total.log_()
    statistics.masked_fill_(torch.arange(steps)[:, None] >= input_lengths, 0)


def walk_by_aten(inputs, highest, input_lengths, target_lengths, places, of_slot, occupancies):
    """Losses (N,) in float64; fills the occupancies (N, T, width), where they are asked for.

    places: (N, width), the slots of blank and of the labels in their order; of_slot: (N, width), their classes. Blank's slot is 0.
    """
    steps, samples, _ = inputs.shape
    if not steps or not samples:  # which torch refuses
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
        taken.div_(taken.sum(2, keepdim=True))  # which is 1, but for what torch drifts
        occupancies[:, :, : of_slot.shape[1]].copy_(taken.transpose(0, 1))
    return losses + 0.0  # torch's loss of no steps is -0


def used(slots):
    """How many classes the target of most classes has."""
    return int(slots.max()) + 1 if slots.numel() else 1


def gradient_blocks(
    inputs, grad, statistics, occupancies, slots, of_slot, losses, dout, input_lengths, from_logits, probabilities, zero_infinity
):  # fmt: skip
    """Fills ``grad`` with (p - occupancy) · dout; zeros after a sample's end, nan for a sample without a finite loss."""
    steps, samples, classes = inputs.shape
    wide = losses.dtype
    parts = row_blocks(steps, samples * classes, wide)
    factor = torch.where(losses.isfinite(), dout.to(wide), math.nan)[:, None]
    ended = torch.arange(steps)[:, None] >= (torch.where(losses == math.inf, 0, input_lengths) if zero_infinity else input_lengths)
    highest, log_total = statistics[..., None]
    of_slot, occupancies = of_slot[:, : used(slots)], occupancies[:, :, : used(slots)]

    def write(i):
        part = parts[i]
        out = grad[part] if grad.dtype == wide else None
        if not probabilities:
            g = torch.zeros(inputs[part].shape, dtype=wide) if out is None else out.zero_()
        elif from_logits:
            g = torch.sub(inputs[part], highest[part], out=out).sub_(log_total[part]).exp_()
        else:
            g = torch.exp(inputs[part].to(wide), out=out)
        taken = occupancies[:, part].transpose(0, 1)
        g.scatter_add_(2, of_slot.expand(taken.shape), -taken)
        g.mul_(factor).masked_fill_(ended[part][..., None], 0)
        if out is None:
            grad[part] = g

    share(write, len(parts))
