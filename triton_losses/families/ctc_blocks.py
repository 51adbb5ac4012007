"""ctc in PyTorch on a CPU: groups of samples whose states stay in its cache, both ends of each sample walked side by side.

Numbers of the recursion are pairs of a mantissa and a power of 2, as in ctc_kernels.py: additions, multiplications and exact powers
of 2, where logarithms of probabilities would take an exponential a term, and lose digits as sequences grow.
"""

import math

import torch
from torch.nn import functional as F

from triton_losses.blocks import share
from triton_losses.compiler import compute_dtype
from triton_losses.families.label_rows_blocks import row_blocks

NEVER = -1e30  # the power of 2 of a 0; sums of a few stay finite, which -inf would not
LN2_HEAD, LN2_TAIL = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # products of the first with a power are exact
STATES = 1 << 13  # of a group: enough for an operation to cost more than its call
RARELY = 16  # steps until mantissas are brought back: each multiplies them by less than 6


def statistics_blocks(inputs, input_lengths, statistics):
    """Fills max x and log Σ exp(x - max x) (2, steps, samples); 0 after a sample's end."""
    steps, samples, classes = inputs.shape
    parts = row_blocks(steps, samples * classes, statistics.dtype)
    highest, log_total = statistics

    def read(i):
        x = inputs[parts[i]].to(statistics.dtype)
        top = torch.amax(x, 2, out=highest[parts[i]])
        torch.sum((x - top[..., None]).exp_(), 2, out=log_total[parts[i]])

    share(read, len(parts))
    log_total.log_()
    statistics.masked_fill_(torch.arange(steps)[:, None] >= input_lengths, 0)


def power_of(x, dtype):
    """e^x as mantissa and power, 0 of what is no more than -6e29, nan of nan; x in float64."""
    never = x < -6e29
    x = x.masked_fill(never, 0.0)
    power = (x / math.log(2)).floor_()
    x.sub_(power * LN2_HEAD).sub_(power * LN2_TAIL)
    return x.exp_().masked_fill_(never, 0.0).to(dtype), power.masked_fill_(never, NEVER).to(dtype)


def side_by_side(values, input_lengths, lengths):
    """(steps, 2, samples, labels): as they are, and with each sample's steps and labels reversed."""
    both = values.new_zeros(values.shape[0], 2, *values.shape[1:])
    both[:, 0] = values
    for n, (steps, length) in enumerate(zip(input_lengths, lengths)):
        both[:steps, 1, n, :length] = values[:steps, n, :length].flip(0, 1)
    return both


def walk_blocks(inputs, highest, labels, input_lengths, target_lengths, blank, occupancies, order, found):
    """The likelihood (2, N), mantissa and power; fills the occupancies (N, T, width), where they are asked for."""
    samples, width = found.shape
    wide = compute_dtype(inputs.dtype)
    likelihood = torch.zeros(2, samples, dtype=wide)
    places = None
    if occupancies is not None:
        occupancies.zero_()
        segments = F.pad((found[:, 1:] != found[:, :-1]).cumsum(1), (1, 0))
        places = torch.empty_like(order).scatter_(1, order, segments)
    longest, lengths = input_lengths.tolist(), target_lengths.tolist()
    size = max(1, STATES // width)
    groups = [slice(start, min(start + size, samples)) for start in range(0, samples, size)]

    def work(i):
        group = groups[i]
        steps, most = max(longest[group]), max(lengths[group])
        x, chosen = inputs[:steps, group], labels[group, :most]
        of_labels = x.gather(2, chosen.clamp(0, inputs.shape[2] - 1).expand(steps, *chosen.shape)).double()
        of_blank = x[:, :, blank : blank + 1].double()
        if highest is not None:
            of_labels, of_blank = (v - highest[:steps, group, None] for v in (of_labels, of_blank))
        walked = Walk(power_of(of_blank, wide), power_of(of_labels, wide), chosen, longest[group], lengths[group], occupancies is not None)
        likelihood[:, group] = walked.run()
        if occupancies is not None:
            for n in range(group.start, group.stop):
                walked.occupancies(n - group.start, places[n], occupancies[n])

    share(work, len(groups))
    return likelihood


class Walk:
    """Of a group of samples: from the first step on and, where both, from the last step back, as further samples."""

    def __init__(self, of_blank, of_labels, labels, input_lengths, lengths, both):
        self.input_lengths, self.lengths, self.both = input_lengths, lengths, both
        samples, self.labels = labels.shape
        self.steps = len(of_blank[0])
        rows = samples * (2 if both else 1)
        if both:
            of_labels = [side_by_side(v, input_lengths, lengths).view(self.steps, rows, self.labels) for v in of_labels]
            of_blank = [side_by_side(v, input_lengths, [1] * samples).view(self.steps, rows, 1) for v in of_blank]
            labels = side_by_side(labels[None], [1] * samples, lengths).view(rows, self.labels)
        self.of_blank, self.of_labels, dtype = of_blank, of_labels, of_blank[0].dtype
        may_skip = F.pad(labels[:, 1:] != labels[:, :-1], (min(1, self.labels), 0))
        self.skip = torch.where(may_skip, 0.0, -math.inf).to(dtype)
        kept = self.steps + 1 if both else 1
        # what has led to each state before its step, as mantissa and power: blanks, then labels
        self.blanks = torch.empty(2, kept, rows, self.labels + 1, dtype=dtype)
        self.label_states = torch.empty(2, kept, rows, self.labels, dtype=dtype)

    def run(self):
        """The likelihood of each sample, mantissas and powers."""
        rows, labels, dtype = *self.skip.shape, self.skip.dtype
        (b, bp), (y, yp) = torch.zeros(2, rows, labels + 1, dtype=dtype), torch.zeros(2, rows, labels + 1, dtype=dtype)
        b[:, 0] = 1  # before the first step all is as if a blank had been
        bp[:, 1:], yp[:] = NEVER, NEVER
        ends = {}
        for n, steps in enumerate(self.input_lengths):
            ends.setdefault(steps, []).append(n)
        likelihood = torch.empty(2, len(self.lengths), dtype=dtype)
        at_end = torch.tensor(self.lengths)
        # y[:, k] is label k - 1, with one that is never first: what a blank and, shifted, a label is reached from
        y, yp = F.pad(y[:, :labels], (1, 0)), F.pad(yp[:, :labels], (1, 0), value=NEVER)
        below, below_power, own, own_power = y[:, :-1], yp[:, :-1], y[:, 1:], yp[:, 1:]
        f, g = torch.empty_like(b), torch.empty_like(own)
        skipped = torch.empty_like(own)
        for i in range(self.steps + 1):
            kept = i if self.both else 0
            to_blank, blank_top, to_label, label_top = (t[kept] for t in (*self.blanks, *self.label_states))
            torch.maximum(bp, yp, out=blank_top)
            torch.mul(b, torch.sub(bp, blank_top, out=f).exp2_(), out=to_blank)
            to_blank.addcmul_(y, torch.sub(yp, blank_top, out=f).exp2_())
            if i in ends:
                n = torch.tensor(ends[i])
                likelihood[0, n], likelihood[1, n] = to_blank[n, at_end[n]], blank_top[n, at_end[n]]
            if i == self.steps:
                return likelihood
            torch.add(below_power, self.skip, out=skipped)
            torch.maximum(own_power, blank_power := bp[:, :labels], out=label_top)
            torch.maximum(label_top, skipped, out=label_top)
            torch.mul(own, torch.sub(own_power, label_top, out=g).exp2_(), out=to_label)
            to_label.addcmul_(b[:, :labels], torch.sub(blank_power, label_top, out=g).exp2_())
            to_label.addcmul_(below, skipped.sub_(label_top).exp2_())
            torch.mul(to_blank, self.of_blank[0][i], out=b)
            torch.add(blank_top, self.of_blank[1][i], out=bp)
            torch.mul(to_label, self.of_labels[0][i], out=own)
            torch.add(label_top, self.of_labels[1][i], out=own_power)
            if i % RARELY == RARELY - 1:
                for mantissa, power in ((b, bp), (own, own_power)):
                    scaled, moved = torch.frexp(mantissa)
                    mantissa.copy_(scaled), power.add_(moved)

    def occupancies(self, n, places, out):
        """Of sample n into ``out`` (steps, width): for each of its classes, the sum over its states; over all classes 1."""
        steps, length, across = self.input_lengths[n], self.lengths[n], n + len(self.lengths)
        parts = []
        for states, (emitted, emitted_power), count in ((self.blanks, self.of_blank, length + 1), (self.label_states, self.of_labels, length)):
            mantissa, power = states[:, :steps, n, :count]
            onward, onward_power = states[:, :steps, across, :count].flip(1, 2)
            power = power + onward_power + emitted_power[:steps, n, :count]
            parts.append((mantissa * onward * emitted[:steps, n, :count], power))
        highest = torch.maximum(*(F.pad(power, (0, 1), value=NEVER).amax(1, keepdim=True) for _, power in parts))
        blanks, labels = (mantissa * torch.exp2(power - highest) for mantissa, power in parts)
        values = torch.cat([blanks.sum(1, keepdim=True), labels], 1)
        out[:steps].index_add_(1, places[: length + 1], values / values.sum(1, keepdim=True))


def gradient_blocks(
    inputs, grad, statistics, occupancies, found, segments, losses, dout, input_lengths, from_logits, probabilities, zero_infinity
):
    """Fills ``grad`` with (p - occupancy) · dout; zeros after a sample's end, nan for a sample without a finite loss."""
    steps, samples, classes = inputs.shape
    wide = losses.dtype
    parts = row_blocks(steps, samples * classes, wide)
    of_slot = found[:, :1].expand(found.shape).clone().fill_(0).scatter_(1, segments, found)  # unused ones hold occupancies of 0
    factor = torch.where(losses.isfinite(), dout.to(wide), math.nan)[:, None]
    ended = torch.arange(steps)[:, None] >= (torch.where(losses == math.inf, 0, input_lengths) if zero_infinity else input_lengths)
    highest, log_total = statistics[..., None]

    def write(i):
        part = parts[i]
        direct = grad.dtype == wide
        if not probabilities:
            g = grad[part].zero_() if direct else torch.zeros(grad[part].shape, dtype=wide)
        elif from_logits:
            g = torch.sub(inputs[part], highest[part], out=grad[part] if direct else None).sub_(log_total[part]).exp_()
        else:
            g = torch.exp(inputs[part].to(wide), out=grad[part] if direct else None)
        taken = occupancies[:, part].transpose(0, 1)
        g.scatter_add_(2, of_slot.expand(taken.shape), -taken)
        g.mul_(factor).masked_fill_(ended[part][..., None], 0)
        if not direct:
            grad[part] = g

    share(write, len(parts))
