"""Losses of a row of logits x and of the top-k classes K of another distribution, given by ids and log-probabilities.

distribution_rows compares two short rows. They have a bin for each class in K and, with a *tail*, one for all others:

    of the logits    x_j                  log Σ_{j∉K} exp x_j          (the softmax of x, with the others added up)
    of the other     log p_j              log (1 - Σ_K p_j)

With g the gradient of the loss by the bins of the logits,

    ∂L/∂x_j = g_j for j in K,    g_tail · exp x_j / Σ_{i∉K} exp x_i for the others (0 without a tail)

    forward   reads x_K and overwrites it with a number close to -inf; then label_rows reads the row once, for the tail.
              The tail is not computed as 1 - Σ q, which would cancel
    backward  label_rows overwrites the row with the tail's gradient, in place; then g_K is written to the columns of K

An entry with the log-probability -inf does not exist, whatever its id is, so rows can be padded to one length.
"""

import torch

from triton_losses.core.rows import Pass
from triton_losses.families import distribution_rows, label_rows

IGNORED = -1  # the mark of a row that does not count; that of others is 0
MOST = 1.05  # the largest sum of probabilities accepted: bfloat16 rounds their logarithms


def marks_of(rows, labels, ignore_index, like):
    return like.new_zeros(rows, dtype=torch.int64) if labels is None else -(labels == ignore_index).long()


def entries_of(ids, log_p, marks, classes):
    """Which entries exist, the place of each entry, and the id at that place, clamped to valid ids.

    The place of an entry that does not exist is that of one in the same row that does.
    """
    exists = (log_p != -float("inf")) & (marks == 0)[:, None]
    own = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    place = torch.where(exists, own, exists.to(torch.int8).argmax(1, keepdim=True))
    return exists, place, ids.long().gather(1, place).clamp(0, classes - 1)


def check(ids, log_p, exists, classes):
    """Refuse ids that are no class or occur twice in a row, and probabilities with a sum far above 1.

    For CPU tensors it raises; for others the device asserts, so that the host need not wait.
    """
    low, high = (torch.where(exists, ids, 0).amin(), torch.where(exists, ids, 0).amax()) if ids.numel() else (0, 0)
    nothing = -1 - torch.arange(ids.shape[1], device=ids.device)  # all different
    ordered = torch.where(exists, ids.long(), nothing).sort(1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    total = torch.where(exists, log_p.float(), -float("inf")).exp().sum(1)
    if ids.device.type != "cpu":
        if ids.numel():
            torch._assert_async((low >= 0) & (high < classes) & ~twice.any() & ~(total > MOST).any())
        return
    if low < 0 or high >= classes:
        raise IndexError(f"teacher_ids must be in [0, {classes}), got {int(low if low < 0 else high)}")
    if twice.any():
        raise ValueError(f"teacher_ids must name a class once a row, got {int(ordered[:, 1:][twice][0])} twice")
    if (total > MOST).any():
        raise ValueError(
            f"teacher_log_probs must be log-probabilities, whose exponentials sum to at most 1, got {total.max():.4g}"
        )


def lowest_of(dtype, scale):
    """Close to -inf, but finite even when scaled: a row may have no other class, and -inf - (-inf) is nan."""
    return torch.finfo(dtype).min / (2 * max(scale, 1.0))


def with_tails(bins, highest, log_rest, lowest, log_p):
    """Both rows of bins with the tail's; from ours the tail's maximum is subtracted, to lose no digits in rounding."""
    nothing = highest < lowest
    ours = torch.cat([bins - torch.where(nothing, 0, highest), torch.where(nothing, -float("inf"), log_rest)], 1)
    # at least eps: with a tail of exactly 0, the reverse divergence of a confident teacher would be infinite
    rest = (1 - log_p.exp().sum(1, keepdim=True)).clamp(min=torch.finfo(log_p.dtype).eps)
    # but log 0 if there is no other class: with a tail of eps, the forward divergence would be infinite
    none = nothing & (rest < MOST - 1)
    return ours, torch.cat([log_p, torch.where(none, -float("inf"), rest.log())], 1)


def walk(logits, ids, log_p, labels, problem, student_first, tail, upstream=None):
    """The losses of the rows, as in distribution_rows.walk. It overwrites the logits.

    With ``upstream``, the logits become the gradient of Σ upstream · losses. student_first: whether the logits are the
    formula's p; if not, its q.
    """
    rows, classes = logits.shape
    wide, scale, count = problem.dtype, problem.scale, ids.shape[1]
    marks = marks_of(rows, labels, problem.ignore_index, ids)
    exists, place, columns = entries_of(ids, log_p, marks, classes)
    check(ids, log_p, exists, classes)
    taken, written = logits.gather(1, columns), exists.gather(1, place)  # not written where a row has no entry at all
    bins, theirs = torch.where(exists, taken.to(wide) * scale, -float("inf")), log_p.to(wide).contiguous()
    if tail:
        lowest = lowest_of(logits.dtype, scale)
        logits.scatter_(1, columns, torch.where(written, lowest, taken))
        rest, of_rest = bins.new_empty(4, rows), label_rows.Problem("log_total", (), IGNORED, 0.0, scale, "none", wide)
        label_rows.walk((logits, marks, None), of_rest, Pass(rest, forward=True))
        bins, theirs = with_tails(bins, *rest[:2, :, None], 0.5 * lowest * scale, theirs)
    g = None if upstream is None else torch.empty_like(bins)
    pair, grads = ((bins, theirs), (g, None)) if student_first else ((theirs, bins), (None, g))
    of_bins, task = problem._replace(scale=1.0, ignore_index=IGNORED), distribution_rows.Pass(grads, upstream)
    losses = distribution_rows.walk((*pair, None, marks), of_bins, task)
    if upstream is None:
        return losses
    if tail:
        # the bins' gradients sum to 0. If the tail has most of the mass, its own gradient would lose digits by
        # cancellation, so it is computed from the others
        most = bins[:, count] > bins[:, :count].logsumexp(1)
        of_tail = torch.where(most, -g[:, :count].sum(1), g[:, count])
        label_rows.walk((logits, marks, None), of_rest, Pass(rest, grad=logits, upstream=of_tail))
    else:
        logits.zero_()
    of_entries = (g[:, :count] * scale).to(logits.dtype).gather(1, place)
    logits.scatter_(1, columns, torch.where(written, of_entries, logits.gather(1, columns)))
    return losses


def whole_bins(logits, ids, log_p, labels, ignore_index, tail, scale, wide):
    """Both rows of bins, in plain torch."""
    marks = marks_of(len(ids), labels, ignore_index, ids)
    exists, place, columns = entries_of(ids, log_p, marks, logits.shape[1])
    x = logits.to(wide) * scale
    bins, theirs = torch.where(exists, x.gather(1, columns), -float("inf")), log_p.to(wide)
    if tail:
        lowest = lowest_of(wide, 1.0)
        named = torch.zeros_like(x, dtype=torch.bool).scatter(1, columns, exists.gather(1, place))
        others = torch.where(named, lowest, x)
        highest = others.detach().amax(1, keepdim=True)
        bins, theirs = with_tails(
            bins, highest, (others - highest).exp().sum(1, keepdim=True).log(), 0.5 * lowest, theirs
        )
    return bins, theirs
