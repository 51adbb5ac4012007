"""The kernels of families/ctc.py, and how they are launched.

A number of the recursion is a pair: a mantissa, in [1, 2) or 0, and a power of 2 that a float holds exactly. Sums and products of
such pairs round by half a unit in the last place and never under- or overflow, so there is nothing to renormalise across states and
no logarithm to take: a program of one warp meets no barrier.
"""

import triton
import triton.language as tl

from triton_losses.core.compiler import WARP, compute_dtype
from triton_losses.core.device_math import LOG2E
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import triton_type
from triton_losses.kernels.rows import configs as row_configs
from triton_losses.kernels.rows import edge_of, row_statistics, span_of, write_zeros
from triton_losses.kernels.rows import rule as row_rule

NEVER = tl.constexpr(-1e30)  # the power of 2 of a 0; sums of a few stay finite, which -inf would not


@triton.jit
def power_of(x):
    """e^x as mantissa and power; 0 where x < -6e29, and nan of nan."""
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
    """The same number with its mantissa in [1, 2); 0 and nan stay what they are."""
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
    """What leads to each state: to blank k itself and label k - 1; to label k itself, blank k and, where it differs, label k - 1."""
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
def load_states(mantissas, powers, at, k, length, width, reverse):
    """Of one step: blanks and labels in the direction's own order, as mantissas and powers."""
    blank = at + tl.where(reverse, length - k, k)
    label = at + width + tl.where(reverse, length - 1 - k, k)
    return (
        tl.load(mantissas + blank, mask=k <= length, other=0.0),
        tl.load(powers + blank, mask=k <= length, other=NEVER),
        tl.load(mantissas + label, mask=k < length, other=0.0),
        tl.load(powers + label, mask=k < length, other=NEVER),
    )


@triton.jit
def store_states(pointer, at, blank, label, k, length, width, reverse):
    tl.store(pointer + at + tl.where(reverse, length - k, k), blank, mask=k <= length)
    tl.store(pointer + at + width + tl.where(reverse, length - 1 - k, k), label, mask=k < length)


@triton.jit
def likelihood_of(state, other, k, length):
    """Σ over the states of what has led to them times what follows from them on."""
    blank, blank_power, label, label_power = state
    blank = tl.where(k <= length, blank * other[0], 0.0).to(blank.dtype)
    label = tl.where(k < length, label * other[2], 0.0).to(blank.dtype)
    blank_power = tl.where(blank == 0, NEVER, blank_power + other[1]).to(blank.dtype)
    label_power = tl.where(label == 0, NEVER, label_power + other[3]).to(blank.dtype)
    top = tl.max(tl.maximum(blank_power, label_power), 0)
    return tl.sum(blank * tl.exp2(blank_power - top) + label * tl.exp2(label_power - top), 0), top


@triton.jit
def fetch(inputs, highest, t, samples, step_stride, blank, labels, k, length, left, FROM_LOGITS: tl.constexpr):
    """The numbers that a step needs, as they lie in memory: a conversion would wait for them."""
    at = inputs + t * step_stride
    active = left > 0
    top = 0.0
    if FROM_LOGITS:
        top = tl.load(highest + t * samples, mask=active, other=0.0)
    return (tl.load(at + labels, mask=k < tl.where(active, length, 0), other=0.0), tl.load(at + blank, mask=active, other=0.0), top)


def name_of_walk(spec):
    constants = spec.constants
    return "ctc_forward_" + ("apart" if constants["APART"] else "together")


@triton.jit(repr=name_of_walk, debug=True, do_not_specialize=["blank"])
def walk_kernel(
    inputs,  # (steps, samples, cols) logits or log-probabilities, at t * step_stride + n * sample_stride
    highest,  # (steps, samples) where FROM_LOGITS
    labels,  # (samples, width - 1)
    input_lengths,  # (samples,)
    target_lengths,  # (samples,)
    mantissas, powers,  # (samples, steps, 2, width) blanks, then labels, where STORE: states, then over mantissas how likely each is
    carried_mantissas, carried_powers,  # (2, samples, 2, width): each direction's state, before it meets the other
    likelihood,  # (2, samples): mantissa and power; written together
    steps, samples, cols, width, step_stride, sample_stride, blank,
    APART: tl.constexpr, STORE: tl.constexpr, FROM_LOGITS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Two programs a sample, from either end of it. Apart: up to the middle. Together: on to the other end, over the other's states."""
    program = tl.program_id(0)
    reverse = program >= samples
    n = (program % samples).to(tl.int64)
    last = tl.load(input_lengths + n).to(tl.int32)
    length = tl.load(target_lengths + n).to(tl.int32)
    tl.device_assert((last >= 0) & (last <= steps), "an input length is out of bounds: it must be in [0, T]")
    tl.device_assert((length >= 0) & (length < width), "a target length is out of bounds: it must be in [0, S]")
    last = tl.minimum(tl.maximum(last, 0), steps)
    length = tl.minimum(tl.maximum(length, 0), width - 1)
    k = tl.arange(0, BLOCK)
    row = labels + n * (width - 1)
    own = tl.load(row + tl.where(reverse, length - 1 - k, k), mask=k < length, other=0).to(tl.int64)
    previous = tl.load(row + tl.where(reverse, length - k, k - 1), mask=(k > 0) & (k < length), other=0).to(tl.int64)
    fits = (own >= 0) & (own < cols)
    tl.device_assert(fits, "a label is out of bounds: it is no class")
    skip = (own != previous) & (k > 0)
    own = tl.where(fits, own, 0)
    middle = tl.where(reverse, last - last // 2, last // 2)
    carried = (tl.where(reverse, samples, 0) + n) * 2 * width
    across = (tl.where(reverse, 0, samples) + n) * 2 * width
    if APART:  # before the first step all is as if a blank had been
        first = tl.where(k == 0, 1.0, 0.0).to(COMPUTE)
        nothing = tl.full((BLOCK,), NEVER, COMPUTE)
        state = (first, tl.where(k == 0, 0.0, NEVER).to(COMPUTE), tl.full((BLOCK,), 0.0, COMPUTE), nothing)
        begin = middle - middle
        end = middle
    else:
        state = load_states(carried_mantissas, carried_powers, carried, k, length, width, reverse)
        other = load_states(carried_mantissas, carried_powers, across, k, length, width, reverse)
        total, total_power = likelihood_of(transition(state, k, skip), other, k, length)
        tl.store(likelihood + n, total, mask=reverse == 0)
        tl.store(likelihood + samples + n, total_power, mask=reverse == 0)
        inverse = 1.0 / total
        begin = middle
        end = last
    if APART or STORE:
        inputs += n * sample_stride
        if FROM_LOGITS:
            highest += n
        queue = ()
        for d in tl.static_range(DEPTH):
            t = tl.where(reverse, last - 1 - begin - d, begin + d).to(tl.int64)
            queue += fetch(inputs, highest, t, samples, step_stride, blank, own, k, length, end - begin - d, FROM_LOGITS)
        for i in range(begin, end):
            t = tl.where(reverse, last - 1 - i, i).to(tl.int64)
            at = (n * steps + t) * 2 * width
            of_labels = queue[0].to(COMPUTE)
            of_blank = queue[1].to(COMPUTE)
            if FROM_LOGITS:  # over the likeliest class's
                of_labels -= queue[2]
                of_blank -= queue[2]
            blank_mantissa, blank_power = power_of(of_blank)
            label_mantissa, label_power = power_of(of_labels)
            ahead = tl.where(reverse, t - DEPTH, t + DEPTH)
            queue = queue[3:] + fetch(
                inputs, highest, ahead, samples, step_stride, blank, own, k, length, end - i - DEPTH, FROM_LOGITS
            )  # fmt: skip
            b, b_power, y, y_power = transition(state, k, skip)
            if not APART:
                other = load_states(mantissas, powers, at, k, length, width, reverse)
                through_blank = b * other[0] * tl.exp2(b_power + other[1] - total_power) * inverse
                through_label = y * other[2] * tl.exp2(y_power + other[3] - total_power) * inverse
                store_states(mantissas, at, through_blank, through_label, k, length, width, reverse)
            b, b_power = normal(b * blank_mantissa, b_power + blank_power)
            y, y_power = normal(y * label_mantissa, y_power + label_power)
            state = (b, b_power, y, y_power)
            if APART and STORE:
                store_states(mantissas, at, b, y, k, length, width, reverse)
                store_states(powers, at, b_power, y_power, k, length, width, reverse)
    if APART:
        store_states(carried_mantissas, carried, state[0], state[2], k, length, width, reverse)
        store_states(carried_powers, carried, state[1], state[3], k, length, width, reverse)


@triton.jit
def within_slot(value, slot, next_value, next_slot):
    """Folds values of sorted slots: of what is folded, the last slot's sum, and which that is."""
    return tl.where(slot == next_slot, value + next_value, next_value), next_slot


@triton.jit(repr=lambda spec: "ctc_forward_occupancy")
def occupancy_kernel(
    states,  # (samples, steps, 2, width): how likely each blank and each label is at each step
    order, slots,  # (samples, width): blank and labels sorted by class; at each place of that order, which of its classes it is
    out,  # (samples, steps, width): for each of its classes, the sum over the states
    input_lengths, target_lengths, steps, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a sample and step. The sums are taken in a fixed order, and over all classes they are 1."""
    program = tl.program_id(0).to(tl.int64)
    n = program // steps
    if program % steps < tl.load(input_lengths + n):
        length = tl.load(target_lengths + n).to(tl.int32)
        k = tl.arange(0, BLOCK)
        blank = tl.sum(tl.load(states + program * 2 * width + k, mask=k <= length, other=0.0), 0)
        place = tl.load(order + n * width + k, mask=k < width, other=0)
        counts = (place > 0) & (place <= length)
        values = tl.load(states + program * 2 * width + width + place - 1, mask=counts, other=0.0)
        values = tl.where((place == 0) & (k < width), blank, values).to(blank.dtype)
        slot = tl.load(slots + n * width + k, mask=k < width, other=BLOCK)
        following = tl.load(slots + n * width + k + 1, mask=k + 1 < width, other=BLOCK)
        sums, _ = tl.associative_scan((values / tl.sum(values, 0), slot), 0, within_slot)
        tl.store(out + program * width + slot, sums, mask=(k < width) & (slot != following))


@triton.jit(repr=lambda spec: "ctc_forward_statistics", do_not_specialize=["steps", "samples"])
def statistics_kernel(
    logits,  # (steps, samples, cols), at t * step_stride + n * sample_stride
    input_lengths,
    out,  # (2, steps, samples): max x and log Σ exp(x - max x); 0 after a sample's end
    steps, samples, cols, step_stride, sample_stride,
    EDGE: tl.constexpr, COMPUTE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    program = tl.program_id(0).to(tl.int64)
    t = program // samples
    n = program % samples
    highest = tl.full((), 0.0, COMPUTE)
    log_total = tl.full((), 0.0, COMPUTE)
    if t < tl.load(input_lengths + n):
        start = t * step_stride + n * sample_stride
        highest, log_total, _, _, _ = row_statistics(
            logits, start, cols, 0.0, None, None, False, False, False, False, False, False, "evict_first", EDGE, COMPUTE, VEC, LANES, UNROLL,
        )
    tl.store(out + program, highest)
    tl.store(out + tl.cast(steps, tl.int64) * samples + program, log_total)


@triton.jit
def load_inputs(pointers, mask, PROBABILITIES: tl.constexpr, COMPUTE: tl.constexpr):
    """Nothing is read of what is not needed."""
    if not PROBABILITIES:
        return tl.full(pointers.shape, 0.0, COMPUTE)
    elif mask is None:
        return tl.load(pointers, eviction_policy="evict_first").to(COMPUTE)
    else:
        return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first").to(COMPUTE)


@triton.jit
def gradient_at(x, slots, occupancies, mask, highest, log_total, factor, PROBABILITIES: tl.constexpr):
    if mask is None:
        slot = tl.load(slots).to(tl.int32)
    else:
        slot = tl.load(slots, mask=mask, other=-1).to(tl.int32)
    g = -tl.load(occupancies + tl.maximum(slot, 0), mask=slot >= 0, other=0.0)
    if PROBABILITIES:
        g += tl.exp2(((x - highest) - log_total) * LOG2E)
    return g * factor


@triton.jit
def write_gradient(
    inputs, grad, start, cols, slots, occupancies, highest, log_total, factor,
    PROBABILITIES: tl.constexpr, EDGE: tl.constexpr, COMPUTE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    head, vectors = span_of(start, cols, VEC, EDGE)
    first = (start + head) // VEC * VEC  # says that it is aligned
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):  # all loads first, so that they travel together
            at = (v + u * LANES) * VEC + tile
            tiles += (load_inputs(inputs + first + at, None, PROBABILITIES, COMPUTE),)
        for u in tl.static_range(UNROLL):
            at = (v + u * LANES) * VEC + tile
            g = gradient_at(tiles[u], slots + head + at, occupancies, None, highest, log_total, factor, PROBABILITIES)
            tl.store(grad + first + at, g.to(grad.dtype.element_ty), eviction_policy="evict_first")
    for v in range(unmasked, vectors, LANES):
        mask = (v + lanes < vectors)[:, None]
        at = v * VEC + tile
        x = load_inputs(inputs + first + at, mask, PROBABILITIES, COMPUTE)
        g = gradient_at(x, slots + head + at, occupancies, mask & (at >= 0), highest, log_total, factor, PROBABILITIES)
        tl.store(grad + first + at, g.to(grad.dtype.element_ty), mask=mask, eviction_policy="evict_first")
    if EDGE:
        columns, exists = edge_of(head, vectors, cols, VEC)
        x = load_inputs(inputs + start + columns, exists, PROBABILITIES, COMPUTE)
        g = gradient_at(x, slots + columns, occupancies, exists, highest, log_total, factor, PROBABILITIES)
        tl.store(grad + start + columns, g.to(grad.dtype.element_ty), mask=exists)


@triton.jit(repr=lambda spec: "ctc_backward_gradient", do_not_specialize=["steps", "samples", "upstream_stride"])
def gradient_kernel(
    inputs,  # (steps, samples, cols), at t * step_stride + n * sample_stride
    grad,  # the same
    statistics,  # (2, steps, samples) where FROM_LOGITS
    slots,  # (samples, cols): where the class stands among a sample's own, -1 where it does not
    occupancies,  # (samples, steps, width)
    losses,  # (samples,)
    upstream,  # (samples,), at n * upstream_stride
    input_lengths,
    steps, samples, cols, width, step_stride, sample_stride, upstream_stride,
    FROM_LOGITS: tl.constexpr, PROBABILITIES: tl.constexpr, ZERO_INFINITY: tl.constexpr, EDGE: tl.constexpr,
    COMPUTE: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One program a row: (p - occupancy) · upstream; zeros after a sample's end, nan for a sample without a finite loss."""
    program = tl.program_id(0).to(tl.int64)
    t = program // samples
    n = program % samples
    start = t * step_stride + n * sample_stride
    loss = tl.load(losses + n)
    active = t < tl.load(input_lengths + n)
    if ZERO_INFINITY:
        active = active & (loss != float("inf"))
    if active:
        factor = tl.load(upstream + n * upstream_stride).to(COMPUTE)
        factor = tl.where(tl.abs(loss) < float("inf"), factor, float("nan")).to(COMPUTE)
        highest = tl.full((), 0.0, COMPUTE)
        log_total = tl.full((), 0.0, COMPUTE)
        if FROM_LOGITS:
            highest += tl.load(statistics + program)
            log_total += tl.load(statistics + tl.cast(steps, tl.int64) * samples + program)
        write_gradient(
            inputs, grad, start, cols, slots + n * cols, occupancies + (n * steps + t) * width, highest, log_total, factor,
            PROBABILITIES, EDGE, COMPUTE, VEC, LANES, UNROLL,
        )  # fmt: skip
    else:
        write_zeros(grad, start, cols, EDGE, VEC, LANES)


def sizes_of(inputs):
    """What the kernels are told of (steps, samples, classes)."""
    steps, samples, classes = inputs.shape
    return {
        "steps": steps, "samples": samples, "cols": classes, "step_stride": inputs.stride(0), "sample_stride": inputs.stride(1),
        "COMPUTE": triton_type(compute_dtype(inputs.dtype)),
    }  # fmt: skip


def of_rows(inputs):
    """And those of a program a row."""
    vec = 16 // inputs.element_size()
    edge = any(size % vec for size in (inputs.shape[2], *inputs.stride()[:2]))
    return {**sizes_of(inputs), "EDGE": edge, "VEC": vec}


def configuration(warps, depth):
    return {"DEPTH": depth, "num_warps": warps}


def walk_rule(args):
    return configuration(max(1, min(args["BLOCK"] // (4 * WARP), 32)), 4)  # up to 4 states a lane in one warp, which knows no barrier


def walk_configs(args):
    warps = [w for w in (1, 2, 4, 8, 16, 32) if args["BLOCK"] // 8 <= w * WARP <= max(args["BLOCK"], WARP)]
    return [configuration(w, depth) for w in warps for depth in (2, 4, 8)]


def walk_key(args):
    return args["BLOCK"], str(args["inputs"].dtype), args["APART"], args["STORE"], args["FROM_LOGITS"]


def row_key(args):
    x = args["inputs"] if "inputs" in args else args["logits"]
    return args["cols"], str(x.dtype), args["EDGE"], args.get("PROBABILITIES"), x.data_ptr() % 16 == 0


def rows(args, config):
    return args["steps"] * args["samples"]


walk_launch = Tuned(
    walk_kernel, configs=walk_configs, rule=walk_rule, key=walk_key, written=("mantissas",),
    programs=lambda args, config: args["samples"] * (2 if args["APART"] or args["STORE"] else 1),
)  # fmt: skip
occupancy_launch = Tuned(
    occupancy_kernel, configs=[], rule=lambda args: {"num_warps": max(1, min(args["BLOCK"] // (4 * WARP), 16))},
    key=lambda args: (args["BLOCK"], str(args["states"].dtype)), programs=lambda args, config: args["order"].shape[0] * args["steps"],
)  # fmt: skip
statistics_launch = Tuned(statistics_kernel, configs=row_configs, rule=row_rule, key=row_key, programs=rows)
gradient_launch = Tuned(gradient_kernel, configs=row_configs, rule=row_rule, key=row_key, programs=rows)
