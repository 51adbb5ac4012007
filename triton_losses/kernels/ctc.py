"""Connectionist temporal classification by kernels.

    forward   the rows' statistics, where the inputs are logits; two launches that walk (ctc_walk.py), the second of
              which writes the losses; and what adds them up
    backward  one program a row: it writes the gradient of p, then writes over it at the target's own classes, of each
              of which it has summed how likely the states are

Neither the number of steps nor that of samples, nor the length of targets up to the next power of 2, makes a new plan.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import WARP, compute_dtype
from triton_losses.core.device_math import LOG2E
from triton_losses.core.launch import Launch
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import flat_kind_of, planned
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.ctc_walk import walk_launch
from triton_losses.kernels.elementwise import triton_type
from triton_losses.kernels.finish import finish
from triton_losses.kernels.rows import configs as row_configs
from triton_losses.kernels.rows import edge_of, row_statistics, span_of, write_zeros
from triton_losses.kernels.rows import rule as row_rule

STRIDES = ["step_stride", "sample_stride"]


@triton.jit(
    repr=lambda spec: "ctc_forward_statistics",
    do_not_specialize=[*STRIDES, "steps", "samples", "rows"],
    do_not_specialize_on_alignment=["input_lengths", "state"],
)
def statistics_kernel(
    inputs,  # (steps, samples, cols), at t * step_stride + n * sample_stride
    input_lengths,
    state,  # (2, samples) of other things, then (2, samples, steps): max x and log Σ exp(x - max x), 0 after the end
    step_stride: tl.int64,
    sample_stride: tl.int64,
    steps: tl.int64,
    samples: tl.int64,
    rows: tl.int64,  # steps * samples
    cols,
    EDGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program a row."""
    program = tl.program_id(0).to(tl.int64)
    t = program // samples
    n = program % samples
    highest = tl.full((), 0.0, COMPUTE)
    log_total = tl.full((), 0.0, COMPUTE)
    if t < tl.load(input_lengths + n).to(tl.int64):
        start = t * step_stride + n * sample_stride
        highest, log_total, _, _, _ = row_statistics(
            inputs,
            start,
            cols,
            0.0,
            None,
            None,
            False,
            False,
            False,
            False,
            False,
            False,
            "evict_first",
            EDGE,
            COMPUTE,
            VEC,
            LANES,
            UNROLL,
        )
    tl.store(state + 2 * samples + n * steps + t, highest)
    tl.store(state + 2 * samples + rows + n * steps + t, log_total)


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
def probability(x, highest, log_total, PROBABILITIES: tl.constexpr):
    if PROBABILITIES:
        return tl.exp2(((x - highest) - log_total) * LOG2E)
    else:
        return x


@triton.jit
def write_probabilities(
    inputs,
    grad,
    start,
    cols,
    highest,
    log_total,
    factor,
    PROBABILITIES: tl.constexpr,
    EDGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The gradient of one row, as if the target had none of its classes."""
    head, vectors = span_of(start, cols, VEC, EDGE)
    first = (start + head) // VEC * VEC  # says that it is aligned
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):  # all loads first, so that they travel together
            tiles += (load_inputs(inputs + first + (v + u * LANES) * VEC + tile, None, PROBABILITIES, COMPUTE),)
        for u in tl.static_range(UNROLL):
            at = grad + first + (v + u * LANES) * VEC + tile
            g = probability(tiles[u], highest, log_total, PROBABILITIES) * factor
            tl.store(at, g.to(grad.dtype.element_ty), eviction_policy="evict_first")
    for v in range(unmasked, vectors, LANES):
        mask = (v + lanes < vectors)[:, None]
        x = load_inputs(inputs + first + v * VEC + tile, mask, PROBABILITIES, COMPUTE)
        g = probability(x, highest, log_total, PROBABILITIES) * factor
        tl.store(grad + first + v * VEC + tile, g.to(grad.dtype.element_ty), mask=mask, eviction_policy="evict_first")
    if EDGE:
        columns, exists = edge_of(head, vectors, cols, VEC)
        x = load_inputs(inputs + start + columns, exists, PROBABILITIES, COMPUTE)
        g = probability(x, highest, log_total, PROBABILITIES) * factor
        tl.store(grad + start + columns, g.to(grad.dtype.element_ty), mask=exists)


@triton.jit
def within_class(value, this, next_value, following):
    """Folds values that are sorted by class: of what is folded, the last class's sum, and which class that is."""
    return tl.where(this == following, value + next_value, next_value), following


@triton.jit
def write_own_classes(
    inputs,
    grad,
    start,
    places,
    likely,
    width,
    length,
    highest,
    log_total,
    factor,
    PROBABILITIES: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of one row at blank and at the target's classes: p less their occupancies, which sum to 1."""
    k = tl.arange(0, BLOCK)
    exists = k <= length
    place = tl.load(places + k, mask=exists, other=0)
    this = tl.load(places + width + k, mask=exists, other=-1)
    following = tl.load(places + width + k + 1, mask=k < length, other=-1)
    blank = tl.sum(tl.load(likely + k, mask=exists, other=0.0), 0)
    values = tl.load(likely + width + place - 1, mask=exists & (place > 0), other=0.0)
    values = tl.where(exists & (place == 0), blank, values).to(COMPUTE)
    occupancies, _ = tl.associative_scan((values / tl.sum(values, 0), this), 0, within_class)
    is_last = exists & (this != following)
    x = load_inputs(inputs + start + this, is_last, PROBABILITIES, COMPUTE)
    g = (probability(x, highest, log_total, PROBABILITIES) - occupancies) * factor
    tl.store(grad + start + this, g.to(grad.dtype.element_ty), mask=is_last)


@triton.jit(
    repr=lambda spec: "ctc_backward_gradient",
    do_not_specialize=[*STRIDES, "upstream_stride", "steps", "width", "samples", "rows"],
    do_not_specialize_on_alignment=["input_lengths", "target_lengths", "state", "places", "likely", "upstream"],
)
def gradient_kernel(
    inputs,  # (steps, samples, cols), at t * step_stride + n * sample_stride
    grad,  # the same
    input_lengths,
    target_lengths,
    state,  # (samples,) of other things, (samples,) losses, then where FROM_LOGITS (2, samples, steps) statistics
    places,  # (samples, 2, width): the places of blank and of the labels, sorted by class, and their classes
    likely,  # (samples, steps, 2, width): how likely each blank and each label is
    upstream,  # at n * upstream_stride
    step_stride: tl.int64,
    sample_stride: tl.int64,
    upstream_stride: tl.int64,
    steps: tl.int64,
    width: tl.int64,
    samples: tl.int64,
    rows: tl.int64,  # steps * samples
    cols,
    FROM_LOGITS: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    ZERO_INFINITY: tl.constexpr,
    MEAN: tl.constexpr,
    EDGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program a row: (p - occupancy) · upstream; zeros after a sample's end, nan where its loss is not finite."""
    program = tl.program_id(0).to(tl.int64)
    t = program // samples
    n = program % samples
    start = t * step_stride + n * sample_stride
    loss = tl.load(state + samples + n)
    active = t < tl.load(input_lengths + n).to(tl.int64)
    if ZERO_INFINITY:
        active = active & (loss != float("inf"))
    if active:
        length = tl.load(target_lengths + n).to(tl.int32)
        factor = tl.load(upstream + n * upstream_stride).to(COMPUTE)
        if MEAN:
            factor = factor / tl.cast(samples, COMPUTE) / tl.maximum(length, 1).to(COMPUTE)
        factor = tl.where(tl.abs(loss) < float("inf"), factor, float("nan")).to(COMPUTE)
        highest = tl.full((), 0.0, COMPUTE)
        log_total = tl.full((), 0.0, COMPUTE)
        if FROM_LOGITS:
            highest += tl.load(state + 2 * samples + n * steps + t)
            log_total += tl.load(state + 2 * samples + rows + n * steps + t)
        write_probabilities(
            inputs, grad, start, cols, highest, log_total, factor, PROBABILITIES, EDGE, COMPUTE, VEC, LANES, UNROLL
        )
        tl.debug_barrier()  # what follows writes over some of what other threads have written
        write_own_classes(
            inputs,
            grad,
            start,
            places + n * 2 * width,
            likely + (n * steps + t) * 2 * width,
            width,
            length,
            highest,
            log_total,
            factor,
            PROBABILITIES,
            COMPUTE,
            BLOCK,
        )
    else:
        write_zeros(grad, start, cols, EDGE, VEC, LANES)


def wide_enough(config, block):
    """With warps for so many states, at most 16 a lane."""
    warps = max(config["num_warps"], min(block // (8 * WARP), 16))
    return {**config, "LANES": warps * WARP, "num_warps": warps}


def gradient_configs(args):
    found = [wide_enough(config, args["BLOCK"]) for config in row_configs(args)]
    return [config for i, config in enumerate(found) if config not in found[:i]]


def row_key(args):
    x, flags = args["inputs"], [args.get(name) for name in ("EDGE", "PROBABILITIES", "BLOCK")]
    return triton.next_power_of_2(args["cols"]), str(x.dtype), *flags, x.data_ptr() % 16 == 0


options = {"key": row_key, "programs": lambda rows, fixed: rows, "size": "rows"}
statistics_launch = Tuned(statistics_kernel, configs=row_configs, rule=row_rule, **options)
gradient_launch = Tuned(
    gradient_kernel,
    configs=gradient_configs,
    rule=lambda args: wide_enough(row_rule(args), args["BLOCK"]),
    **options,
)


def readable(inputs):
    """Without gaps, and the classes of a step and sample side by side; the first two dimensions in either order."""
    return inputs if inputs.is_contiguous() or inputs.transpose(0, 1).is_contiguous() else inputs.contiguous()


class Shape(NamedTuple):
    """What of a call's sizes its kernels are built for."""

    cols: int
    edge: bool  # whether a row may start or end within a vector of 16 bytes
    block: int  # a power of 2 that holds blank and the labels of a target
    padded: bool


def shape_of(inputs, targets, width):
    (step, sample, _), cols, vec = inputs.stride(), inputs.shape[2], 16 // inputs.element_size()
    edge = cols % vec != 0 or step % vec != 0 or sample % vec != 0
    return Shape(cols, edge, 1 << (max(width, 16) - 1).bit_length(), targets.dim() == 2)


def sizes_of(inputs):
    """Arguments of all kernels."""
    steps, samples, cols = inputs.shape
    return {
        "inputs": inputs,
        "step_stride": inputs.stride(0),
        "sample_stride": inputs.stride(1),
        "steps": steps,
        "samples": samples,
        "cols": cols,
        "COMPUTE": triton_type(compute_dtype(inputs.dtype)),
    }


def of_rows(inputs, shape):
    """Arguments of those with a program a row."""
    return {"rows": inputs.shape[0] * inputs.shape[1], "EDGE": shape.edge, "VEC": 16 // inputs.element_size()}


class ForwardPlan(NamedTuple):
    statistics: Launch | None
    apart: Launch
    together: Launch


@planned(kind=flat_kind_of)
def forward_plan(tensors, shape, options):
    inputs, targets, input_lengths, target_lengths, out, state, scratch, likely, places = tensors
    blank, from_logits, _, zero_infinity, reduction, _, store = options
    sizes = sizes_of(inputs)
    statistics = None
    if from_logits:
        statistics = statistics_launch.bind(input_lengths=input_lengths, state=state, **sizes, **of_rows(inputs, shape))
    arguments = {
        "targets": targets,
        "input_lengths": input_lengths,
        "target_lengths": target_lengths,
        "out": out,
        "state": state,
        "places": places,
        "mantissas": likely,
        "scratch": scratch,
        "target_stride": targets.stride(0) if shape.padded else targets.shape[0],
        "width": scratch.shape[1],
        "blank": blank,
        "PADDED": shape.padded,
        "STORE": store,
        "FROM_LOGITS": from_logits,
        "ZERO_INFINITY": zero_infinity,
        "MEAN": reduction == "mean",
        "BLOCK": shape.block,
        **sizes,
    }
    return ForwardPlan(statistics, *[walk_launch.bind(APART=apart, **arguments) for apart in (True, False)])


def forward(tensors, problem):
    """saved: state, places and likely, as the kernels describe them."""
    inputs, targets, input_lengths, target_lengths = tensors
    (steps, samples, _), width, wide = inputs.shape, problem.width, compute_dtype(inputs.dtype)
    none, stored = problem.reduction == "none", steps if problem.store else 0
    out = inputs.new_empty(samples if none else (), dtype=problem.dtype)
    state = inputs.new_empty((2 + 2 * steps * problem.from_logits) * samples, dtype=wide)
    likely = inputs.new_empty(samples, stored, 2, width, dtype=wide)
    places = inputs.new_empty(samples if problem.store else 0, 2, width, dtype=torch.int32)
    if shapes_only():
        return [out], [state, places, likely]
    inputs = readable(inputs)
    if targets.is_floating_point():
        targets = targets.long()
    if targets.stride(-1) != 1:
        targets = targets.contiguous()
    scratch = state.new_empty((8 + 2 * stored) * samples, width)
    losses = out if none or samples == 1 else state
    shape = shape_of(inputs, targets, width)
    pointers = inputs, targets, input_lengths, target_lengths, losses, state, scratch, likely, places
    found = forward_plan(pointers, shape, problem[1:])
    step_stride, sample_stride, _ = inputs.stride()
    if problem.from_logits:
        found.statistics(inputs, input_lengths, state, step_stride, sample_stride, steps, samples, steps * samples)
    target_stride = targets.stride(0) if shape.padded else targets.shape[0]
    walking = (
        inputs,
        targets,
        input_lengths,
        target_lengths,
        losses,
        state,
        places,
        likely,
        scratch,
        step_stride,
        sample_stride,
        target_stride,
        steps,
        width,
        samples,
    )
    found.apart(*walking)
    found.together(*walking)
    if losses is state:
        finish(state, out, samples, mean=problem.reduction == "mean", divisor=samples)
    return [out], [state, places, likely]


@planned(kind=flat_kind_of)
def backward_plan(tensors, shape, options):
    inputs, grad, input_lengths, target_lengths, state, places, likely, upstream = tensors
    _, from_logits, exact, zero_infinity, reduction, _, _ = options
    return gradient_launch.bind(
        grad=grad,
        input_lengths=input_lengths,
        target_lengths=target_lengths,
        state=state,
        places=places,
        likely=likely,
        upstream=upstream,
        upstream_stride=upstream.stride(0) if upstream.dim() else 0,
        width=likely.shape[3],
        FROM_LOGITS=from_logits,
        PROBABILITIES=from_logits or not exact,
        ZERO_INFINITY=zero_infinity,
        MEAN=reduction == "mean",
        BLOCK=shape.block,
        **sizes_of(inputs),
        **of_rows(inputs, shape),
    )


def backward(tensors, saved, upstream, problem, wanted):
    inputs, targets, input_lengths, target_lengths = tensors
    if shapes_only():
        return [torch.empty_like(readable(inputs))]
    inputs, (state, places, likely), (dout,) = readable(inputs), saved, upstream
    steps, samples, _ = inputs.shape
    step_stride, sample_stride, _ = inputs.stride()
    grad = torch.empty_like(inputs)
    pointers = inputs, grad, input_lengths, target_lengths, state, places, likely, dout
    launch = backward_plan(pointers, shape_of(inputs, targets, problem.width), problem[1:])
    dout_stride = dout.stride(0) if dout.dim() else 0
    launch(*pointers, step_stride, sample_stride, dout_stride, steps, problem.width, samples, steps * samples)
    return [grad]
