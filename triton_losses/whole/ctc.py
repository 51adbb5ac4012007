"""Connectionist temporal classification on whole tensors, which autograd and torch.func follow."""

import torch

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.reduction import cast, reduced
from triton_losses.core.targets import labels_of

IMPOSSIBLE = -1e30  # in place of log 0, so that it has a derivative


def forward(tensors, problem):
    inputs, targets, input_lengths, target_lengths = tensors
    input_lengths, target_lengths = input_lengths.long(), target_lengths.long()  # twice a uint8 may overflow
    labels = labels_of(targets, target_lengths, problem.width - 1)
    losses = losses_of(inputs, labels, input_lengths, target_lengths, problem)
    if problem.reduction == "mean":
        losses = losses / target_lengths.clamp(min=1)
    return reduced(losses, problem.reduction, problem.dtype)


def losses_of(inputs, labels, input_lengths, target_lengths, problem):
    log_p = cast(inputs, compute_dtype(inputs.dtype))
    log_p = log_p.log_softmax(-1) if problem.from_logits else log_p
    steps, samples, classes = inputs.shape
    states = labels.new_full((samples, 2 * labels.shape[1] + 1), problem.blank)
    states[:, 1::2] = labels.clamp(0, classes - 1)
    may_skip = torch.nn.functional.pad((states[:, 2:] != states[:, :-2]), (2, 0))
    where = torch.arange(states.shape[1], device=labels.device)
    emitted = log_p.gather(2, states.expand(steps, *states.shape)).clamp(min=IMPOSSIBLE)
    never = emitted[:1, :, :2].sum(0) if steps else log_p.new_empty(samples, 2)
    never = torch.full_like(never, IMPOSSIBLE)
    alpha = torch.where(where == 0, 0.0, IMPOSSIBLE).to(log_p.dtype).expand(states.shape)
    total = log_p.new_zeros(samples, 1)
    for t in range(steps):
        moved = torch.cat([never[:, : min(2, states.shape[1] + 1)], alpha], 1)
        ways = torch.stack([alpha, moved[:, 1:-1], torch.where(may_skip, moved[:, :-2], IMPOSSIBLE)])
        reached = ways.logsumexp(0) + emitted[t]
        highest = reached.amax(1, keepdim=True).detach()  # subtracted at every step, so that alpha keeps its digits
        active = (t < input_lengths)[:, None]
        alpha, total = torch.where(active, reached - highest, alpha), torch.where(active, total + highest, total)
    last = (where == 2 * target_lengths[:, None]) | (where == 2 * target_lengths[:, None] - 1)
    losses = -(total[:, 0] + torch.where(last, alpha, IMPOSSIBLE).logsumexp(1))
    dead = losses > -0.1 * IMPOSSIBLE
    losses = torch.where(dead, 0, losses)
    active = (torch.arange(steps, device=labels.device)[:, None] < input_lengths)[..., None]
    p = torch.where(active, log_p.exp(), 0).sum((0, 2))
    if not problem.zero_infinity:
        losses = losses - torch.where(dead, 0.0 * p, 1).log()  # inf, with derivative nan
    if problem.exact or problem.from_logits:
        return losses
    return losses + torch.where(dead, 0, p - p.detach())  # adds 0, and p to the derivative: PyTorch's convention
