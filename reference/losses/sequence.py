"""The sequence losses in plain PyTorch."""

import torch

from reference.losses.shared import reduced, wider


def padded(targets, target_lengths, blank):
    """Labels (N, S) of padded or concatenated targets, blank where a target has ended."""
    lengths = target_lengths.tolist()
    labels = targets.new_full((len(lengths), max([*lengths, 0])), blank, dtype=torch.int64)
    ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()
    for n, length in enumerate(lengths):
        labels[n, :length] = targets[n, :length] if targets.dim() > 1 else targets[ends[n] - length : ends[n]]
    return labels


def alignments(log_probs, labels, input_lengths, target_lengths, blank):
    """-log Σ over all alignments of their probability (N,), inf where there is none; of log_probs (T, N, C) and labels
    (N, S).

    The states of sample n are blank, label, blank, label, ... blank, 2 L_n + 1 of them; log α_t(s), the log-probability
    of all ways to be in state s after step t, follows from that of s, s - 1 and, past a blank between two different
    labels, s - 2.
    """
    steps, samples, _ = log_probs.shape
    states = torch.full((samples, 2 * labels.shape[1] + 1), blank, dtype=torch.int64, device=labels.device)
    states[:, 1::2] = labels
    nothing = log_probs.new_full((samples, 2), -float("inf"))
    may_skip = torch.zeros_like(states, dtype=torch.bool)
    may_skip[:, 3::2] = labels[:, 1:] != labels[:, :-1]
    where = torch.arange(states.shape[1], device=labels.device)
    # before the first step
    alpha = torch.where(where == 0, 0.0, -float("inf")).to(log_probs.dtype).expand(states.shape)
    total = torch.zeros_like(log_probs[:1, :, :1].sum(0))
    for t in range(steps):
        moved = torch.cat([nothing, alpha], 1)
        ways = torch.stack([alpha, moved[:, 1:-1], torch.where(may_skip, moved[:, :-2], -float("inf"))])
        highest = ways.amax(0).detach().clamp(min=-1e300 if alpha.dtype == torch.float64 else -1e38)
        likelihood = (ways - highest).exp().sum(0)
        sums = torch.where(likelihood == 0, -float("inf"), highest + likelihood.clamp(min=1e-37).log())
        reached = sums + log_probs[t].gather(1, states)
        # taken out, so that what is left keeps its digits
        highest = reached.amax(1, keepdim=True).detach().clamp(min=-1e30)
        active = (t < input_lengths)[:, None]
        alpha, total = torch.where(active, reached - highest, alpha), torch.where(active, total + highest, total)
    last = (where == 2 * target_lengths[:, None]) | (where == 2 * target_lengths[:, None] - 1)
    return -(total[:, 0] + torch.where(last, alpha, -float("inf")).logsumexp(1))


class CTC(torch.autograd.Function):
    """(N,) losses, whose gradient is p - posterior, or -posterior where it is to be exact; nan of a loss that is no
    number.
    """

    @staticmethod
    def forward(ctx, log_probs, labels, input_lengths, target_lengths, blank, zero_infinity, exact_gradient):
        log_p = log_probs.detach().clamp(min=-1e30).requires_grad_()  # what -inf is used for has a derivative, 0, too
        with torch.enable_grad():
            losses = alignments(log_p, labels, input_lengths, target_lengths, blank)
            losses = torch.where(losses > 1e29, float("inf"), losses)
            (derivative,) = torch.autograd.grad(losses[~losses.isinf()].sum(), log_p, allow_unused=True)
        derivative = torch.zeros_like(log_p) if derivative is None else derivative
        gradient = derivative if exact_gradient else derivative + log_probs.exp()
        gradient = torch.where(losses.isfinite()[:, None], gradient, float("nan"))
        gradient = torch.where(losses.isinf()[:, None] & zero_infinity, 0, gradient)
        active = torch.arange(len(log_probs), device=log_probs.device)[:, None] < input_lengths
        ctx.save_for_backward(torch.where(active[..., None], gradient, 0))
        return torch.where(losses.isinf() & zero_infinity, 0, losses).detach()

    @staticmethod
    def backward(ctx, upstream):
        return upstream[:, None] * ctx.saved_tensors[0], *[None] * 6


def ctc_loss(
    log_probs,
    targets,
    input_lengths,
    target_lengths,
    blank=0,
    reduction="mean",
    zero_infinity=False,
    *,
    exact_gradient=False,
):
    lengths = (torch.as_tensor(v, device=log_probs.device) for v in (input_lengths, target_lengths))
    input_lengths, target_lengths = (v.long().reshape(-1) for v in lengths)
    batch = log_probs if log_probs.dim() == 3 else log_probs[:, None]
    labels = padded(targets, target_lengths, blank)
    losses = CTC.apply(
        batch.to(wider(batch)), labels, input_lengths, target_lengths, blank, zero_infinity, exact_gradient
    )
    if reduction == "mean":
        losses = losses / target_lengths.clamp(min=1)
    return reduced(losses if log_probs.dim() == 3 else losses[0], reduction).to(log_probs.dtype)


def ctc_loss_with_logits(
    logits, targets, input_lengths, target_lengths, blank=0, reduction="mean", zero_infinity=False
):
    log_probs = logits.to(wider(logits)).log_softmax(-1)
    loss = ctc_loss(
        log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity, exact_gradient=True
    )
    return loss.to(logits.dtype)
