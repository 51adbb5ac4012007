"""Connectionist temporal classification: L_n = -log of the summed probability of all alignments of a target with T_n steps.

An alignment says at each step one of the states blank_0, label_0, blank_1, label_1, ... blank_L, from step to step staying in its
state, going on to the next, or past a blank to the next label if that is another. With e_t(s) the probability of the state's class,

    α_t(s) = e_t(s) Σ_{s' → s} α_{t-1}(s')        of all ways that lead to state s
    β_t(s) = e_t(s) Σ_{s → s'} β_{t+1}(s')        of all ways on from it: α of the reversed sequence and target
    exp -L = Σ_s α_t(s) β_t(s) / e_t(s)           for any t
    γ_t(c) = Σ_{s of class c} α_t(s) β_t(s) / (e_t(s) exp -L)        the class's occupancy

    ∂L/∂log p_t(c) = -γ_t(c), or p_t(c) - γ_t(c) by PyTorch's convention, which is ∂L/∂x_t(c) for p = softmax(x)

Each sample is walked from both ends at once; each walk goes on, past the middle, over what the other left behind.

    forward   logits are read once, for max x and log Σ exp(x - max x); the classes of the target are read twice. Of every step two
              numbers a state are kept until the walks have met, then γ of the target's own classes
    backward  reads the logits once and writes their gradient
"""

import math

import torch

from triton_losses.core.compiler import compute_dtype, runs_kernels, triton
from triton_losses.core.op import differentiated_again, is_plain, op, read_whole, shapes_only
from triton_losses.core.reduction import cast
from triton_losses.families.ctc_blocks import gradient_blocks, statistics_blocks, walk_by_aten

if triton is not None:
    from triton_losses.kernels.ctc import gradient_launch, occupancy_launch, of_rows, sizes_of, statistics_launch, walk_launch

WIDEST = 1 << 13  # labels and a blank: of more, a program's states would not fit its registers, and plain PyTorch walks
IMPOSSIBLE = -1e30  # a logarithm of 0 that has a derivative


def labels_of(targets, target_lengths, width):
    """(N, width - 1) labels of padded or concatenated targets; anything after a target's end."""
    if targets.dim() > 1:
        return targets[:, : width - 1].long().contiguous()
    if not targets.numel():
        return targets.new_zeros(target_lengths.shape[0], width - 1, dtype=torch.int64)
    starts = target_lengths.cumsum(0) - target_lengths
    places = starts[:, None] + torch.arange(width - 1, device=targets.device)
    return targets[places.clamp(0, targets.shape[0] - 1)].long()


def classes_of(labels, target_lengths, blank, classes, merged):
    """(N, width): blank (-1) and the target's labels, sorted by class, and where they stood, blank at 0.

    merged: a label that is blank's class, if there is such nonsense, counts as blank. What stands after a target's end does anyway.
    """
    within = torch.arange(labels.shape[1], device=labels.device) < target_lengths[:, None]
    labels = torch.where(within & (labels != blank) if merged else within, labels.clamp(0, classes - 1), -1)
    return torch.cat([labels.new_full((labels.shape[0], 1), -1), labels], 1).sort(dim=1, stable=True)


def slots_of(found):
    """(N, width): at each place, which of a sample's different classes stands there, counted from 0, which is blank."""
    return torch.nn.functional.pad((found[:, 1:] != found[:, :-1]).cumsum(1), (1, 0))


def classes_of_slots(found, slots, blank):
    """(N, width): the class of each slot; blank of those that are none."""
    return torch.full_like(found, blank).scatter_(1, slots, torch.where(found < 0, blank, found))


# PyTorch, whole: differentiable as often as one likes


def whole_losses(inputs, labels, input_lengths, target_lengths, blank, from_logits, exact, zero_infinity):
    log_p = cast(inputs, compute_dtype(inputs.dtype))
    log_p = log_p.log_softmax(-1) if from_logits else log_p
    steps, samples, classes = inputs.shape
    states = labels.new_full((samples, 2 * labels.shape[1] + 1), blank)
    states[:, 1::2] = labels.clamp(0, classes - 1)
    may_skip = torch.nn.functional.pad((states[:, 2:] != states[:, :-2]), (2, 0))
    where = torch.arange(states.shape[1], device=labels.device)
    emitted = log_p.gather(2, states.expand(steps, *states.shape)).clamp(min=IMPOSSIBLE)
    never = torch.full_like(emitted[:1, :, :2].sum(0), IMPOSSIBLE) if steps else log_p.new_full((samples, 2), IMPOSSIBLE)
    alpha = torch.where(where == 0, 0.0, IMPOSSIBLE).to(log_p.dtype).expand(states.shape)
    total = log_p.new_zeros(samples, 1)
    for t in range(steps):
        moved = torch.cat([never[:, : min(2, states.shape[1] + 1)], alpha], 1)
        ways = torch.stack([alpha, moved[:, 1:-1], torch.where(may_skip, moved[:, :-2], IMPOSSIBLE)])
        reached = ways.logsumexp(0) + emitted[t]
        highest = reached.amax(1, keepdim=True).detach()  # taken out at every step, so that what is left keeps its digits
        active = (t < input_lengths)[:, None]
        alpha, total = torch.where(active, reached - highest, alpha), torch.where(active, total + highest, total)
    last = (where == 2 * target_lengths[:, None]) | (where == 2 * target_lengths[:, None] - 1)
    losses = -(total[:, 0] + torch.where(last, alpha, IMPOSSIBLE).logsumexp(1))
    dead = losses > -0.1 * IMPOSSIBLE
    losses = torch.where(dead, 0, losses)
    active = (torch.arange(steps, device=labels.device)[:, None] < input_lengths)[..., None]
    p = torch.where(active, log_p.exp(), 0).sum((0, 2))
    if not zero_infinity:
        losses = losses - torch.where(dead, 0.0 * p, 1).log()  # inf, of derivative nan
    return losses if exact or from_logits else losses + torch.where(dead, 0, p - p.detach())


# Ops: kernels on a GPU and in the interpreter, blocks on a CPU


def readable(inputs):
    """Without gaps, and the classes of a step and sample side by side; the first two dimensions in either order."""
    return inputs if inputs.is_contiguous() or inputs.transpose(0, 1).is_contiguous() else inputs.contiguous()


def walk(inputs, highest, labels, input_lengths, target_lengths, blank, occupancies, order, slots):
    """Losses (N,) in float64, by kernels; fills the occupancies (N, T, width), where they are asked for."""
    steps, samples, _ = inputs.shape
    width, store = labels.shape[1] + 1, occupancies is not None
    mantissas, powers = inputs.new_empty(2, samples, steps if store else 0, 2, width, dtype=compute_dtype(inputs.dtype)).unbind(0)
    carried, carried_powers = mantissas.new_empty(2, 2, samples, 2, width).unbind(0)
    likelihood = mantissas.new_empty(2, samples)
    size = {"BLOCK": triton.next_power_of_2(max(width, 16))}
    for apart in (True, False):
        walk_launch(
            inputs=inputs, highest=highest, labels=labels, input_lengths=input_lengths, target_lengths=target_lengths,
            mantissas=mantissas, powers=powers, carried_mantissas=carried, carried_powers=carried_powers, likelihood=likelihood,
            width=width, blank=blank, APART=apart, STORE=store, FROM_LOGITS=highest is not None, **size, **sizes_of(inputs),
        )  # fmt: skip
    if store:
        occupancy_launch(
            states=mantissas, order=order.int(), slots=slots.int(), out=occupancies, input_lengths=input_lengths,
            target_lengths=target_lengths, steps=steps, width=width, **size,
        )  # fmt: skip
    mantissa, power = likelihood.double()
    return 0.0 - (power + mantissa.log2()) * math.log(2)


@op
def ctc_forward(
    inputs: torch.Tensor, targets: torch.Tensor, input_lengths: torch.Tensor, target_lengths: torch.Tensor, width: int, blank: int,
    from_logits: bool, store: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Losses (N,); what the backward needs: of each row max x and log Σ exp(x - max x), the occupancies, and whose they are."""
    steps, samples, classes = inputs.shape
    wide = compute_dtype(inputs.dtype)
    losses = inputs.new_empty(samples, dtype=wide)
    statistics = inputs.new_empty(2, steps if from_logits else 0, samples, dtype=wide)
    occupancies = inputs.new_empty(samples, steps if store else 0, width, dtype=wide)
    found = inputs.new_empty(samples, width, dtype=torch.int64)
    if shapes_only():
        return losses, statistics, occupancies, found
    inputs, labels = readable(inputs), labels_of(targets, target_lengths, width)
    highest, taken = statistics[0] if from_logits else None, occupancies if store else None
    kernels = runs_kernels(inputs)
    found, order = classes_of(labels, target_lengths, blank, classes, merged=kernels)
    slots = slots_of(found)
    if kernels:
        if from_logits:
            statistics_launch(logits=inputs, input_lengths=input_lengths, out=statistics, **of_rows(inputs))
        exact = walk(inputs, highest, labels, input_lengths, target_lengths, blank, taken, order, slots)
    else:
        if from_logits:
            statistics_blocks(inputs, input_lengths, statistics)
        places = torch.empty_like(slots).scatter_(1, order, slots)
        of_slot = classes_of_slots(found, slots, blank)
        exact = walk_by_aten(inputs, highest, input_lengths, target_lengths, places, of_slot, taken)
    return (exact + statistics[1].sum(0, dtype=torch.float64)).to(wide), statistics, occupancies, found


@op
def ctc_backward(
    inputs: torch.Tensor, statistics: torch.Tensor, occupancies: torch.Tensor, found: torch.Tensor, losses: torch.Tensor,
    input_lengths: torch.Tensor, dout: torch.Tensor, blank: int, from_logits: bool, exact: bool, zero_infinity: bool,
) -> torch.Tensor:  # fmt: skip
    if shapes_only():
        return inputs.new_empty(inputs.shape)
    inputs, slots = readable(inputs), slots_of(found)
    grad = torch.empty_like(inputs)
    probabilities = from_logits or not exact
    if not runs_kernels(inputs):
        of_slot, options = classes_of_slots(found, slots, blank), (from_logits, probabilities, zero_infinity)
        gradient_blocks(inputs, grad, statistics, occupancies, slots, of_slot, losses, dout, input_lengths, *options)
        return grad
    of_class = found.new_full((found.shape[0], inputs.shape[2]), -1, dtype=torch.int16)
    of_class.scatter_(1, torch.where(found < 0, blank, found), slots.to(torch.int16))  # twice the same number, or once
    gradient_launch(
        inputs=inputs, grad=grad, statistics=statistics, slots=of_class, occupancies=occupancies, losses=losses, upstream=dout,
        input_lengths=input_lengths, width=found.shape[1], upstream_stride=dout.stride(0), FROM_LOGITS=from_logits,
        PROBABILITIES=probabilities, ZERO_INFINITY=zero_infinity, **of_rows(inputs),
    )  # fmt: skip
    return grad


class CTC(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, targets, input_lengths, target_lengths, width, blank, from_logits, exact, zero_infinity, store):
        arguments = inputs, targets, input_lengths, target_lengths
        losses, statistics, occupancies, found = ctc_forward(*arguments, width, blank, from_logits, store)
        ctx.options, ctx.width, ctx.blank = (from_logits, exact, zero_infinity), width, blank
        ctx.save_for_backward(*arguments, losses, statistics, occupancies, found)
        return torch.where(losses == math.inf, 0, losses) if zero_infinity else losses

    @staticmethod
    def backward(ctx, dout):
        inputs, targets, input_lengths, target_lengths, losses, statistics, occupancies, found = ctx.saved_tensors
        again = differentiated_again()
        if again or read_whole(dout):
            with torch.enable_grad():
                labels = labels_of(targets, target_lengths, ctx.width)
                found = whole_losses(inputs, labels, input_lengths, target_lengths, ctx.blank, *ctx.options)
            grad = torch.autograd.grad(found, inputs, dout, create_graph=again)[0]
        else:
            grad = ctc_backward(inputs, statistics, occupancies, found, losses, input_lengths, dout, ctx.blank, *ctx.options)
        return grad, *[None] * 9


def ctc(inputs, targets, input_lengths, target_lengths, *, width, blank, from_logits, exact=False, zero_infinity=False):
    """The losses (N,), float32 or wider, of (T, N, C) logits or log-probabilities. width: labels that a target may have, and 1."""
    if is_plain(inputs) or width > WIDEST or not inputs.shape[2] or read_whole(inputs):
        labels = labels_of(targets, target_lengths, width)
        return whole_losses(inputs, labels, input_lengths, target_lengths, blank, from_logits, exact, zero_infinity)
    store = torch.is_grad_enabled() and inputs.requires_grad
    return CTC.apply(inputs, targets, input_lengths, target_lengths, width, blank, from_logits, exact, zero_infinity, store)
