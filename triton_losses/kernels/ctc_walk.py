"""The kernel of CTC's recursion: each program walks one sample from one of its two ends.

Each number of the recursion is a pair: a mantissa, in [1, 2) or 0, and a power of 2 that a float holds exactly. Sums
and products of such pairs round by half a unit in the last place and never under- or overflow. So the states need no
renormalisation, which would be a reduction over threads, and no logarithm; a program of one warp has no barrier.

Each sample is walked from both ends at once. The first launch walks to the middle. The second launch goes on past the
middle, over the states that the other direction has stored, and replaces them by each state's posterior probability.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from triton_losses.core.compiler import WARP
from triton_losses.core.device_math import LN2, LOG2E, division
from triton_losses.core.tuning import Tuned

NEVER = tl.constexpr(-1e30)  # the power of 2 of a 0; finite, even if a few are added, so that no difference is nan
STRIDES, LENGTHS = ("step_stride", "sample_stride"), ("input_lengths", "target_lengths")  # arguments of these kernels


class Kind(NamedTuple):
    """Compile-time parameters of the kernel."""

    compute: tl.dtype  # the type of the recursion
    block: int  # a power of 2, no less than 1 (blank) + the number of labels of a target
    padded: bool  # the targets are (samples, most labels); otherwise concatenated
    from_logits: bool  # the inputs are logits; otherwise log-probabilities
    store: bool  # store each state's posterior probability, which the backward needs
    zero_infinity: bool
    mean: bool  # each sample's loss is divided by its number of labels
    apart: bool  # the launch from the ends to the middle; otherwise the one from there on


@triton.jit
def power_of(x):
    """e^x as a mantissa and a power of 2; 0 if x < -6e29, nan if x is nan."""
    never = x < -6e29
    x = tl.where(never, 0.0, x).to(x.dtype)
    power = tl.floor(x * LOG2E)
    if x.dtype == tl.float64:
        x = (x - power * 6.93147180369123816490e-01) - power * 1.90821492927058770002e-10
        mantissa = tl.exp(x)
    else:
        x = (x - power * 0.693359375) + power * 2.12194440e-4  # log 2 in two parts: products with the first are exact
        mantissa = tl.exp2(x * LOG2E)
    return tl.where(never, 0.0, mantissa).to(x.dtype), tl.where(never, NEVER, power).to(x.dtype)


@triton.jit
def normal(mantissa, power):
    """The same number with its mantissa in [1, 2); a mantissa of 0 or nan is kept."""
    if mantissa.dtype == tl.float64:
        bits = mantissa.to(tl.int64, bitcast=True)
        shift = (bits >> 52) - 1023
        scaled = ((bits & 0xFFFFFFFFFFFFF) | (1023 << 52)).to(tl.float64, bitcast=True)
    else:
        bits = mantissa.to(tl.int32, bitcast=True)
        shift = (bits >> 23) - 127
        scaled = ((bits & 0x7FFFFF) | (127 << 23)).to(tl.float32, bitcast=True)
    positive = mantissa > 0
    moved = tl.where(mantissa == 0, NEVER, power + shift.to(power.dtype)).to(power.dtype)
    return tl.where(positive, scaled, mantissa), moved


@triton.jit
def transition(state, k, skip):
    """For each state, the sum of the states that lead to it.

    To blank k lead itself and label k - 1. To label k lead itself, blank k and, if it differs, label k - 1.
    """
    blank, blank_power, label, label_power = state
    below = tl.maximum(k - 1, 0)
    before = tl.where(k > 0, tl.gather(label, below, 0), 0.0).to(blank.dtype)
    before_power = tl.where(k > 0, tl.gather(label_power, below, 0), NEVER).to(blank.dtype)
    top = tl.maximum(blank_power, before_power)
    to_blank = blank * tl.exp2(blank_power - top) + before * tl.exp2(before_power - top)
    before = tl.where(skip, before, 0.0).to(blank.dtype)
    before_power = tl.where(skip, before_power, NEVER).to(blank.dtype)
    label_top = tl.maximum(tl.maximum(label_power, blank_power), before_power)
    to_label = label * tl.exp2(label_power - label_top) + blank * tl.exp2(blank_power - label_top)
    to_label += before * tl.exp2(before_power - label_top)
    return to_blank, top, to_label, label_top


@triton.jit
def load_states(mantissas, powers, at, target):
    """Load one step's blanks and labels, as mantissas and powers, in the order in which this direction walks."""
    k, length, width, reverse = target
    blank = at + tl.where(reverse, length - k, k)
    label = at + width + tl.where(reverse, length - 1 - k, k)
    return (
        tl.load(mantissas + blank, mask=k <= length, other=0.0),
        tl.load(powers + blank, mask=k <= length, other=NEVER),
        tl.load(mantissas + label, mask=k < length, other=0.0),
        tl.load(powers + label, mask=k < length, other=NEVER),
    )


@triton.jit
def store_states(pointer, at, blank, label, target):
    k, length, width, reverse = target
    tl.store(pointer + at + tl.where(reverse, length - k, k), blank, mask=k <= length)
    tl.store(pointer + at + width + tl.where(reverse, length - 1 - k, k), label, mask=k < length)


@triton.jit
def likelihood_of(state, other, k, length):
    """Σ over the states of the forward times the backward probability, as a mantissa and a power."""
    blank, blank_power, label, label_power = state
    blank = tl.where(k <= length, blank * other[0], 0.0).to(blank.dtype)
    label = tl.where(k < length, label * other[2], 0.0).to(blank.dtype)
    blank_power = tl.where(blank == 0, NEVER, blank_power + other[1]).to(blank.dtype)
    label_power = tl.where(label == 0, NEVER, label_power + other[3]).to(blank.dtype)
    top = tl.max(tl.maximum(blank_power, label_power), 0)
    return tl.sum(blank * tl.exp2(blank_power - top) + label * tl.exp2(label_power - top), 0), top


# Targets


@triton.jit
def sum_of(numbers, count, DTYPE: tl.constexpr):
    """The sum of ``count`` adjacent numbers, always in the same order."""
    lanes = tl.arange(0, 256)
    sums = tl.zeros((256,), DTYPE)
    for start in range(0, count, 256):
        sums += tl.load(numbers + start + lanes, mask=start + lanes < count, other=0).to(DTYPE)
    return tl.sum(sums, 0)


@triton.jit
def load_labels(labels, place, KIND: tl.constexpr):
    """Load the labels at these places of a target; 0 where it has none."""
    targets, first, length, room = labels
    mask = (place >= 0) & (place < length)
    if not KIND.padded:  # nothing has checked that the lengths add up
        mask = mask & (first + place < room)
    return tl.load(targets + first + place, mask=mask, other=0).to(tl.int64)


@triton.jit
def class_at(labels, place, blank, cols, KIND: tl.constexpr):
    """The class of the label at a place, from 1 on; -1 for blank (place 0) and for a label that wrongly is blank."""
    label = load_labels(labels, place - 1, KIND)
    label = tl.minimum(tl.maximum(label, 0), cols - 1).to(tl.int32)
    return tl.where((place == 0) | (label == blank), -1, label)


@triton.jit
def sort_by_class(labels, places, width, blank, cols, KIND: tl.constexpr):
    """Write the places of blank and of the labels in the order of their classes, then those classes.

    Each counts how many come before it. Other programs walk at the same time and take longer.
    """
    length = labels[2]
    place = tl.arange(0, KIND.block)
    own = class_at(labels, place, blank, cols, KIND)
    rank = tl.full((KIND.block,), 0, tl.int32)
    for i in range(0, length + 1):
        other = class_at(labels, i, blank, cols, KIND)
        rank += ((other < own) | ((other == own) & (i < place))).to(tl.int32)
    tl.store(places + rank, place, mask=place <= length)
    tl.store(places + width + rank, tl.where(own < 0, blank, own), mask=place <= length)


# Walking


@triton.jit
def fetch(sample, t, left, k, length, KIND: tl.constexpr):
    """Load the numbers that a step needs, without conversion: a conversion would wait for the loads."""
    inputs, step_stride, blank, own, highest = sample
    at = inputs + t * step_stride
    active = left > 0
    top = 0.0
    if KIND.from_logits:
        top = tl.load(highest + t, mask=active, other=0.0)
    of_labels = tl.load(at + own, mask=k < tl.where(active, length, 0), other=0.0)
    return (of_labels, tl.load(at + blank, mask=active, other=0.0), top)


@triton.jit
def write_loss(likelihood, kept, out, log_totals, last, length, KIND: tl.constexpr):
    """Write the loss of one sample twice: to ``kept`` for the backward, and to ``out`` for the result."""
    mantissa, power = likelihood
    exact = 0.0 - (power.to(tl.float64) + tl.log2(mantissa.to(tl.float64))) * LN2
    if KIND.from_logits:  # the walk divided each probability by the step's largest one
        exact += sum_of(log_totals, last, tl.float64)
    loss = exact.to(KIND.compute)
    tl.store(kept, loss)
    if KIND.zero_infinity:
        loss = tl.where(loss == float("inf"), 0.0, loss).to(KIND.compute)
    if KIND.mean:
        loss = division(loss, tl.maximum(length, 1).to(KIND.compute))
    tl.store(out, loss.to(out.dtype.element_ty))


def name_of_walk(spec):
    return "ctc_forward_" + ("apart" if spec.constants["KIND"].apart else "together")


@triton.jit(
    repr=name_of_walk,
    debug=True,
    do_not_specialize=[*STRIDES, "target_stride", "steps", "width", "samples", "blank"],
    do_not_specialize_on_alignment=[*LENGTHS, "targets", "out", "state", "places", "mantissas", "scratch"],
)
def walk_kernel(
    inputs,  # (steps, samples, cols) logits or log-probabilities, at t * step_stride + n * sample_stride
    targets,  # (samples, most labels), at n * target_stride; if not padded (target_stride,), all labels concatenated
    input_lengths,  # (samples,)
    target_lengths,  # (samples,)
    out,  # (samples,) losses: the result, or what its reduction adds up; written if not apart
    state,  # (2, samples): unused, losses (written if not apart); then if from_logits (2, samples, steps) statistics
    places,  # (samples, 2, width) if store, as sort_by_class writes them; written if apart
    mantissas,  # (samples, steps, 2, width) if store: of blanks, then of labels; replaced by posterior probabilities
    scratch,  # (2, 2, samples, 2, width): what each direction carries to the middle; if store, followed by all powers
    step_stride: tl.int64,
    sample_stride: tl.int64,
    target_stride: tl.int64,
    steps: tl.int64,
    width: tl.int64,
    samples: tl.int64,
    cols,
    blank,
    KIND: tl.constexpr,
    DEPTH: tl.constexpr,  # how many steps ahead the inputs are loaded
):
    """Two programs per sample, one from either end; if apart and store, a third program sorts the labels."""
    program = tl.program_id(0)
    reverse = program >= samples
    n = (program % samples).to(tl.int64)
    last = tl.load(input_lengths + n).to(tl.int32)
    length = tl.load(target_lengths + n).to(tl.int32)
    tl.device_assert((last >= 0) & (last <= steps), "an input length is out of bounds: it must be in [0, T]")
    tl.device_assert((length >= 0) & (length < width), "a target length is out of bounds: it must be in [0, S]")
    last = tl.minimum(tl.maximum(last, 0), steps.to(tl.int32))
    length = tl.minimum(tl.maximum(length, 0), width.to(tl.int32) - 1)
    first = n * target_stride
    if not KIND.padded:
        first = tl.maximum(sum_of(target_lengths, n, tl.int64), 0)
    labels = (targets, first, length, target_stride)
    if KIND.apart and KIND.store:
        if program >= 2 * samples:
            sort_by_class(labels, places + n * 2 * width, width, blank, cols, KIND)
            return
    k = tl.arange(0, KIND.block)
    target = (k, length, width, reverse)
    own = load_labels(labels, tl.where(reverse, length - 1 - k, k), KIND)
    previous = load_labels(labels, tl.where(reverse, length - k, k - 1), KIND)
    fits = (own >= 0) & (own < cols)
    tl.device_assert(fits, "a label is out of bounds: it is no class")
    skip = (own != previous) & (k > 0)
    own = tl.where(fits, own, 0)
    middle = tl.where(reverse, last - last // 2, last // 2)
    carried_powers = scratch + 4 * samples * width
    powers = scratch + 8 * samples * width
    here = (tl.where(reverse, samples, 0) + n) * 2 * width
    across = (tl.where(reverse, 0, samples) + n) * 2 * width
    if KIND.apart:  # the state before the first step is that after a blank
        begun = tl.where(k == 0, 1.0, 0.0).to(KIND.compute)
        nothing = tl.full((KIND.block,), NEVER, KIND.compute)
        begun_power = tl.where(k == 0, 0.0, NEVER).to(KIND.compute)
        states = (begun, begun_power, tl.full((KIND.block,), 0.0, KIND.compute), nothing)
        begin = middle - middle
        end = middle
    else:
        states = load_states(scratch, carried_powers, here, target)
        other = load_states(scratch, carried_powers, across, target)
        likelihood = likelihood_of(transition(states, k, skip), other, k, length)
        if reverse == 0:
            log_totals = state + (2 + steps) * samples + n * steps
            write_loss(likelihood, state + samples + n, out + n, log_totals, last, length, KIND)
        inverse = 1.0 / likelihood[0]
        begin = middle
        end = last
    if KIND.apart or KIND.store:
        sample = (inputs + n * sample_stride, step_stride, blank, own, state + 2 * samples + n * steps)
        queue = ()
        for d in tl.static_range(DEPTH):
            t = tl.where(reverse, last - 1 - begin - d, begin + d).to(tl.int64)
            queue += fetch(sample, t, end - begin - d, k, length, KIND)
        for i in range(begin, end):
            t = tl.where(reverse, last - 1 - i, i).to(tl.int64)
            at = (n * steps + t) * 2 * width
            of_labels = queue[0].to(KIND.compute)
            of_blank = queue[1].to(KIND.compute)
            if KIND.from_logits:  # divide by the largest probability
                of_labels -= queue[2]
                of_blank -= queue[2]
            blank_mantissa, blank_power = power_of(of_blank)
            label_mantissa, label_power = power_of(of_labels)
            ahead = tl.where(reverse, t - DEPTH, t + DEPTH)
            queue = queue[3:] + fetch(sample, ahead, end - i - DEPTH, k, length, KIND)
            b, b_power, y, y_power = transition(states, k, skip)
            if not KIND.apart:
                other = load_states(mantissas, powers, at, target)
                through_blank = b * other[0] * tl.exp2(b_power + other[1] - likelihood[1]) * inverse
                through_label = y * other[2] * tl.exp2(y_power + other[3] - likelihood[1]) * inverse
                store_states(mantissas, at, through_blank, through_label, target)
            b, b_power = normal(b * blank_mantissa, b_power + blank_power)
            y, y_power = normal(y * label_mantissa, y_power + label_power)
            states = (b, b_power, y, y_power)
            if KIND.apart and KIND.store:
                store_states(mantissas, at, b, y, target)
                store_states(powers, at, b_power, y_power, target)
    if KIND.apart:
        store_states(scratch, here, states[0], states[2], target)
        store_states(carried_powers, here, states[1], states[3], target)


def configuration(warps, depth):
    return {"DEPTH": depth, "num_warps": warps}


def rule(args):
    """One warp, which needs no barrier, while a lane has at most 4 pairs of blank and label; more warps beyond that."""
    return configuration(max(1, min(args["KIND"].block // (4 * WARP), 32)), 4)


def configs(args):
    """The rule's configuration, half and twice as many warps, and inputs loaded twice as many steps ahead."""
    best, block = rule(args)["num_warps"], args["KIND"].block
    near = [(best, 4), (best, 8), (best * 2, 4), (best // 2, 4)]
    return [configuration(w, d) for w, d in near if 1 <= w <= 32 and block <= 8 * w * WARP <= max(8 * block, 8 * WARP)]


walk_launch = Tuned(
    walk_kernel,
    configs=configs,
    rule=rule,
    key=lambda args: (str(args["inputs"].dtype), *args["KIND"][1:]),  # the dtype determines `compute`
    programs=lambda samples, fixed: samples * (1 + fixed["KIND"].apart + fixed["KIND"].store),
    size="samples",
)
