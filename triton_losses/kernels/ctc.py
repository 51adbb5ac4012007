"""Kernels of connectionist temporal classification (CTC).

    forward   if the inputs are logits, a kernel computes the rows' statistics; two launches of ctc_walk.py's kernel run
              the recursion, and the second one writes the losses; `finish` reduces them
    backward  one program per row writes p · upstream, then overwrites blank and the target's classes with
              (p - occupancy) · upstream; the occupancy of a class is the sum of the probabilities of its states

A plan serves any number of steps and of samples, and all target lengths that have the same next power of 2.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import WARP, compute_dtype
from triton_losses.core.device_math import LOG2E
from triton_losses.core.launch import Launch
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import flat_kinds_of, planned
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.ctc_walk import LENGTHS, STRIDES, walk_launch
from triton_losses.kernels.ctc_walk import Kind as WalkKind
from triton_losses.kernels.elementwise import triton_type
from triton_losses.kernels.finish import finish
from triton_losses.kernels.rows import Kind as RowKind
from triton_losses.kernels.rows import configs as row_configs
from triton_losses.kernels.rows import edge_of, row_statistics, span_of, write_zeros
from triton_losses.kernels.rows import rule as row_rule


class Kind(NamedTuple):
    """Compile-time parameters of the backward's kernel."""

    compute: tl.dtype  # the type that the gradient is computed in
    vec: int  # classes in 16 bytes
    edge: bool  # whether a row may start or end within such a vector
    block: int  # a power of 2, no less than 1 (blank) + the number of labels of a target
    from_logits: bool  # the inputs are logits; otherwise log-probabilities
    probabilities: bool  # the gradient contains p; the exact derivative by log-probabilities does not
    zero_infinity: bool
    mean: bool  # each loss is divided by its target's length, then averaged over the samples


@triton.jit(
    repr=lambda spec: "ctc_forward_statistics",
    do_not_specialize=[*STRIDES, "steps", "samples", "rows"],
    do_not_specialize_on_alignment=["input_lengths", "state"],
)
def statistics_kernel(
    inputs,  # (steps, samples, cols), at t * step_stride + n * sample_stride
    input_lengths,
    state,  # (2, samples) unused here, then (2, samples, steps): max x and log Σ exp(x - max x), 0 after the end
    step_stride: tl.int64,
    sample_stride: tl.int64,
    steps: tl.int64,
    samples: tl.int64,
    rows: tl.int64,  # steps * samples
    cols,
    KIND: tl.constexpr,  # the Kind of kernels/rows.py
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program per row."""
    program = tl.program_id(0).to(tl.int64)
    t = program // samples
    n = program % samples
    highest = tl.full((), 0.0, KIND.compute)
    log_total = tl.full((), 0.0, KIND.compute)
    if t < tl.load(input_lengths + n).to(tl.int64):
        row = (t * step_stride + n * sample_stride, cols)
        highest, log_total, _, _, _ = row_statistics(inputs, row, 0.0, None, None, KIND, LANES, UNROLL)
    tl.store(state + 2 * samples + n * steps + t, highest)
    tl.store(state + 2 * samples + rows + n * steps + t, log_total)


@triton.jit
def load_inputs(pointers, mask, KIND: tl.constexpr):
    """Inputs in the compute type; zeros, without a load, if the gradient does not contain p."""
    if not KIND.probabilities:
        return tl.full(pointers.shape, 0.0, KIND.compute)
    elif mask is None:
        return tl.load(pointers, eviction_policy="evict_first").to(KIND.compute)
    else:
        return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first").to(KIND.compute)


@triton.jit
def probability(x, of_row, KIND: tl.constexpr):
    highest, log_total, _ = of_row
    if KIND.probabilities:
        return tl.exp2(((x - highest) - log_total) * LOG2E)
    else:
        return x


@triton.jit
def write_tile(x, grad, mask, of_row, KIND: tl.constexpr, EVICT: tl.constexpr):
    g = probability(x, of_row, KIND) * of_row[2]
    tl.store(grad, g.to(grad.dtype.element_ty), mask=mask, eviction_policy=EVICT)


@triton.jit
def write_probabilities(
    inputs, grad, start, cols, of_row, KIND: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr
):
    """Write p · upstream to one row of the gradient, as if the target had none of its classes."""
    head, vectors = span_of(start, cols, KIND.vec, KIND.edge)
    first = (start + head) // KIND.vec * KIND.vec  # tells the compiler that it is aligned
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * KIND.vec + tl.arange(0, KIND.vec)[None, :]
    unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
    for v in range(0, unmasked, LANES * UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):  # all loads are issued first, so that they overlap
            tiles += (load_inputs(inputs + first + (v + u * LANES) * KIND.vec + tile, None, KIND),)
        for u in tl.static_range(UNROLL):
            write_tile(tiles[u], grad + first + (v + u * LANES) * KIND.vec + tile, None, of_row, KIND, "evict_first")
    for v in range(unmasked, vectors, LANES):
        mask = (v + lanes < vectors)[:, None]
        x = load_inputs(inputs + first + v * KIND.vec + tile, mask, KIND)
        write_tile(x, grad + first + v * KIND.vec + tile, mask, of_row, KIND, "evict_first")
    if KIND.edge:
        columns, exists = edge_of(head, vectors, cols, KIND.vec)
        write_tile(
            load_inputs(inputs + start + columns, exists, KIND), grad + start + columns, exists, of_row, KIND, ""
        )


@triton.jit
def within_class(value, this, next_value, following):
    """Combine two parts of a scan over values sorted by class: the sum of the last class so far, and that class."""
    return tl.where(this == following, value + next_value, next_value), following


@triton.jit
def write_own_classes(inputs, grad, places, likely, width, length, of_row, KIND: tl.constexpr):
    """Write (p - occupancy) · upstream at blank and the target's classes of one row; the occupancies sum to 1."""
    k = tl.arange(0, KIND.block)
    exists = k <= length
    place = tl.load(places + k, mask=exists, other=0)
    this = tl.load(places + width + k, mask=exists, other=-1)
    following = tl.load(places + width + k + 1, mask=k < length, other=-1)
    blank = tl.sum(tl.load(likely + k, mask=exists, other=0.0), 0)
    values = tl.load(likely + width + place - 1, mask=exists & (place > 0), other=0.0)
    values = tl.where(exists & (place == 0), blank, values).to(KIND.compute)
    occupancies, _ = tl.associative_scan((values / tl.sum(values, 0), this), 0, within_class)
    is_last = exists & (this != following)
    x = load_inputs(inputs + this, is_last, KIND)
    g = (probability(x, of_row, KIND) - occupancies) * of_row[2]
    tl.store(grad + this, g.to(grad.dtype.element_ty), mask=is_last)


@triton.jit(
    repr=lambda spec: "ctc_backward_gradient",
    do_not_specialize=[*STRIDES, "upstream_stride", "steps", "width", "samples", "rows"],
    do_not_specialize_on_alignment=[*LENGTHS, "state", "places", "likely", "upstream"],
)
def gradient_kernel(
    inputs,  # (steps, samples, cols), at t * step_stride + n * sample_stride
    grad,  # the same shape and strides
    input_lengths,
    target_lengths,
    state,  # (samples,) unused here, (samples,) losses, then if from_logits (2, samples, steps) statistics
    places,  # (samples, 2, width): the places of blank and of the labels, sorted by class, and their classes
    likely,  # (samples, steps, 2, width): the posterior probability of each blank and each label
    upstream,  # at n * upstream_stride
    step_stride: tl.int64,
    sample_stride: tl.int64,
    upstream_stride: tl.int64,
    steps: tl.int64,
    width: tl.int64,
    samples: tl.int64,
    rows: tl.int64,  # steps * samples
    cols,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program per row: (p - occupancy) · upstream; zeros after a sample's end, nan if its loss is not finite."""
    program = tl.program_id(0).to(tl.int64)
    t = program // samples
    n = program % samples
    start = t * step_stride + n * sample_stride
    loss = tl.load(state + samples + n)
    active = t < tl.load(input_lengths + n).to(tl.int64)
    if KIND.zero_infinity:
        active = active & (loss != float("inf"))
    if active:
        length = tl.load(target_lengths + n).to(tl.int32)
        factor = tl.load(upstream + n * upstream_stride).to(KIND.compute)
        if KIND.mean:
            factor = factor / tl.cast(samples, KIND.compute) / tl.maximum(length, 1).to(KIND.compute)
        factor = tl.where(tl.abs(loss) < float("inf"), factor, float("nan")).to(KIND.compute)
        highest = tl.full((), 0.0, KIND.compute)
        log_total = tl.full((), 0.0, KIND.compute)
        if KIND.from_logits:
            highest += tl.load(state + 2 * samples + n * steps + t)
            log_total += tl.load(state + 2 * samples + rows + n * steps + t)
        of_row = (highest, log_total, factor)
        write_probabilities(inputs, grad, start, cols, of_row, KIND, LANES, UNROLL)
        tl.debug_barrier()  # the next call overwrites values that other threads have written
        of_sample = places + n * 2 * width
        of_step = likely + (n * steps + t) * 2 * width
        write_own_classes(inputs + start, grad + start, of_sample, of_step, width, length, of_row, KIND)
    else:
        write_zeros(grad, start, cols, KIND.edge, KIND.vec, LANES)


def wide_enough(config, block):
    """The configuration with enough warps that a lane has at most 16 states; the increase stops at 16 warps."""
    warps = max(config["num_warps"], min(block // (8 * WARP), 16))
    return {**config, "LANES": warps * WARP, "num_warps": warps}


def gradient_configs(args):
    found = [wide_enough(config, args["KIND"].block) for config in row_configs(args)]
    return [config for i, config in enumerate(found) if config not in found[:i]]


def row_key(args):
    x = args["inputs"]
    return triton.next_power_of_2(args["cols"]), str(x.dtype), x.data_ptr() % 16 == 0, *args["KIND"][1:]


options = {"key": row_key, "programs": lambda rows, fixed: rows, "size": "rows"}
statistics_launch = Tuned(statistics_kernel, configs=row_configs, rule=row_rule, **options)
gradient_launch = Tuned(
    gradient_kernel,
    configs=gradient_configs,
    rule=lambda args: wide_enough(row_rule(args), args["KIND"].block),
    **options,
)


def readable(inputs):
    """The inputs, contiguous as (steps, samples, classes) or (samples, steps, classes); copied if they are neither."""
    return inputs if inputs.is_contiguous() or inputs.transpose(0, 1).is_contiguous() else inputs.contiguous()


def target_stride_of(targets):
    """The stride from one target to the next; for concatenated targets the total number of labels."""
    return targets.stride(0) if targets.dim() == 2 else targets.shape[0]


class Shape(NamedTuple):
    """The sizes of a call that its kernels are compiled for."""

    cols: int
    vec: int
    edge: bool
    block: int
    padded: bool


def shape_of(inputs, targets, width):
    (step, sample, _), cols, vec = inputs.stride(), inputs.shape[2], 16 // inputs.element_size()
    edge = cols % vec != 0 or step % vec != 0 or sample % vec != 0
    return Shape(cols, vec, edge, 1 << (max(width, 16) - 1).bit_length(), targets.dim() == 2)


def sizes_of(inputs):
    """The inputs, their sizes and strides: arguments of all kernels."""
    (steps, samples, cols), (step_stride, sample_stride, _) = inputs.shape, inputs.stride()
    strides = {"step_stride": step_stride, "sample_stride": sample_stride}
    return {"inputs": inputs, "steps": steps, "samples": samples, "rows": steps * samples, "cols": cols, **strides}


class ForwardPlan(NamedTuple):
    statistics: Launch | None
    apart: Launch
    together: Launch


@planned(kinds=flat_kinds_of)
def forward_plan(tensors, shape, options):
    inputs, targets, input_lengths, target_lengths, out, state, places, likely, scratch = tensors
    blank, from_logits, _, zero_infinity, reduction, _, store = options
    compute = triton_type(compute_dtype(inputs.dtype))
    arguments = {
        "targets": targets,
        "input_lengths": input_lengths,
        "target_lengths": target_lengths,
        "out": out,
        "state": state,
        "places": places,
        "mantissas": likely,
        "scratch": scratch,
        "target_stride": target_stride_of(targets),
        "width": scratch.shape[1],
        "blank": blank,
        **sizes_of(inputs),
    }
    statistics = None
    if from_logits:
        statistics = statistics_launch.bind(KIND=RowKind(compute, shape.vec, shape.edge), **arguments)
    mean = reduction == "mean"
    kind = WalkKind(compute, shape.block, shape.padded, from_logits, store, zero_infinity, mean, apart=True)
    apart = walk_launch.bind(KIND=kind, **arguments)
    return ForwardPlan(statistics, apart, walk_launch.bind(KIND=kind._replace(apart=False), **arguments))


def forward(tensors, problem):
    """Saves state, places and likely for the backward; the kernels' arguments describe them."""
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
    pointers = inputs, targets, input_lengths, target_lengths, losses, state, places, likely, scratch
    found = forward_plan(pointers, shape_of(inputs, targets, width), problem[1:])
    strides = inputs.stride()[:2]
    if problem.from_logits:
        found.statistics(inputs, input_lengths, state, *strides, steps, samples, steps * samples)
    walking = *pointers, *strides, target_stride_of(targets), steps, width, samples
    found.apart(*walking)
    found.together(*walking)
    if losses is state:
        finish(state, out, samples, mean=problem.reduction == "mean", divisor=samples)
    return [out], [state, places, likely]


@planned(kinds=flat_kinds_of)
def backward_plan(tensors, shape, options):
    inputs, grad, input_lengths, target_lengths, state, places, likely, upstream = tensors
    _, from_logits, exact, zero_infinity, reduction, _, _ = options
    compute, probabilities = triton_type(compute_dtype(inputs.dtype)), from_logits or not exact
    flags = from_logits, probabilities, zero_infinity, reduction == "mean"
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
        KIND=Kind(compute, shape.vec, shape.edge, shape.block, *flags),
        **sizes_of(inputs),
    )


def backward(tensors, saved, upstream, problem, wanted):
    inputs, targets, *lengths = tensors
    if shapes_only():
        return [torch.empty_like(readable(inputs))]
    inputs, (state, places, likely), (dout,) = readable(inputs), saved, upstream
    steps, samples, _ = inputs.shape
    grad = torch.empty_like(inputs)
    pointers = inputs, grad, *lengths, state, places, likely, dout
    launch = backward_plan(pointers, shape_of(inputs, targets, problem.width), problem[1:])
    strides = *inputs.stride()[:2], dout.stride(0) if dout.dim() else 0
    launch(*pointers, *strides, steps, problem.width, samples, steps * samples)
    return [grad]
