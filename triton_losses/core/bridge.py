"""Connects a family of losses to PyTorch: defines its ops, and decides how derivatives and transforms are computed.

A family has up to three implementations, called readings. A *reading* is a module with two functions:

    forward(tensors, problem)                            -> outputs, saved: two lists of tensors
    backward(tensors, saved, upstream, problem, wanted)  -> the gradients of the wanted tensors, a list

``tensors`` are the family's tensors, None where one is not given. ``problem`` is its options, a NamedTuple.
``upstream`` are the gradients of the outputs. ``saved`` is what a forward keeps for the backward of the same reading.

    kernels   Triton, on a GPU
    blocks    PyTorch on slices that fit in a CPU's cache
    whole     PyTorch on whole tensors, which autograd and torch.func can follow. It saves nothing: its forward returns
              only the outputs, and its backward takes no ``saved``. If it has no backward, autograd differentiates its
              forward

Blocks and kernels may define ``scratch(tensors, problem)``, which returns memory that the forward fills and the
backward may overwrite, or None. Both then take it as their last argument. A second backward gets None, or what
``scratch_again`` returns. Only plain calls use scratch memory, because an op must not modify a tensor that it has
returned. It may be the memory of the first tensor if the caller allows that; then there is no second backward.

The blocks may also define ``small(tensors, problem)``, for tensors so small that the overhead of a call dominates. It
returns a tuple of the outputs, computed by operations that autograd can differentiate, or None.
"""

import typing
from typing import NamedTuple

import torch

from triton_losses.core.compiler import runs_kernels
from triton_losses.core.dispatch import aten_serves, plain_torch_serves
from triton_losses.core.launch import on_device_of
from triton_losses.core.op import (
    define,
    differentiated_again,
    fields_of,
    is_watched,
    problem_of,
    read_whole,
)

BRIDGES: dict[type, "Bridge"] = {}  # by the type of the problem, because torch.compile can trace that lookup


class Bridge:
    """Called with a problem and the family's tensors; returns a tuple of outputs, or the output if there is only one.

    inputs, outputs: how many tensors the readings take and return; inputs that are not given are None.
    compiled_whole: whether torch.compile traces the whole reading, to fuse it with other operations; if not, it calls
    our ops.
    """

    def __init__(self, name, problem, inputs, outputs, whole, blocks, kernels, compiled_whole=False):
        self.problem, self.inputs, self.outputs = problem, inputs, outputs
        self.whole, self.blocks, self.kernels = whole, blocks, kernels
        self.compiled_whole = compiled_whole
        fields = fields_of(problem)
        self.forward_op = define(f"{name}_forward", f"(Tensor?[] tensors, {fields}) -> Tensor[]", self.flat_forward)
        gradients = "Tensor?[] tensors, Tensor[] saved, Tensor?[] upstream, bool[] wanted"
        self.backward_op = define(f"{name}_backward", f"({gradients}, {fields}) -> Tensor[]", self.flat_backward)
        BRIDGES[problem] = self

    def __call__(self, problem, *tensors):
        while tensors[-1] is None:
            tensors = tensors[:-1]
        compiling = torch.compiler.is_compiling()
        if plain_torch_serves(tensors[0], compiling) or compiling and self.compiled_whole:
            found = self.in_plain_torch(problem, tensors)
        elif compiling:
            found = BY_DEVICE[len(tensors)].apply(problem, *tensors)
        elif not runs_kernels(tensors[0]):
            found = self.on_a_cpu(problem, tensors)
        elif hasattr(self.kernels, "scratch") and problem.gradient_in_forward and backward_follows(tensors):
            found = APPLY[len(tensors)](Keeping(problem), *tensors)
        else:
            found = APPLY[len(tensors)](problem, *tensors)
        return found[0] if self.outputs == 1 else found

    def on_a_cpu(self, problem, tensors):
        if hasattr(self.blocks, "small") and aten_serves(tensors[0]) and not torch._C._len_torch_dispatch_stack():
            found = self.blocks.small(self.padded(tensors), problem)
            if found is not None:
                return found
        if hasattr(self.blocks, "scratch") and backward_follows(tensors):
            problem = Keeping(problem)
        return APPLY[len(tensors)](problem, *tensors)

    def in_plain_torch(self, problem, tensors):
        if hasattr(self.whole, "backward"):
            return WHOLE[len(tensors)].apply(problem, *tensors)
        return self.whole_forward(tensors, problem)

    def padded(self, tensors):
        return tensors if len(tensors) == self.inputs else (*tensors, *[None] * (self.inputs - len(tensors)))

    def forward(self, tensors, problem):
        """Return outputs + saved as one list."""
        if is_watched(*tensors):
            return self.forward_op(tensors, *problem)
        return on_device_of(tensors[0], self.read_forward, tensors, problem)

    def backward(self, tensors, saved, upstream, problem, wanted):
        if is_watched(*tensors, *upstream):
            return self.backward_op(tensors, saved, upstream, wanted, *problem)
        return on_device_of(tensors[0], self.read_backward, tensors, saved, upstream, problem, wanted)

    def read_forward(self, tensors, problem):
        reading = self.kernels if runs_kernels(tensors[0]) else self.blocks
        outputs, saved = reading.forward(self.padded(tensors), problem)
        return [*outputs, *saved]

    def read_backward(self, tensors, saved, upstream, problem, wanted):
        reading = self.kernels if runs_kernels(tensors[0]) else self.blocks
        return reading.backward(self.padded(tensors), saved, upstream, problem, wanted)

    # The same two functions as bodies of ops, which take the fields of the problem one by one

    def flat_forward(self, tensors, *fields):
        return self.read_forward(tensors, problem_of(self.problem, fields))

    def flat_backward(self, tensors, saved, upstream, wanted, *fields):
        return self.read_backward(tensors, saved, upstream, problem_of(self.problem, fields), tuple(wanted))

    # With the whole reading

    def whole_forward(self, tensors, problem):
        found = self.whole.forward(self.padded(tensors), problem)
        return found if isinstance(found, tuple) else (found,)

    def whole_backward(self, tensors, upstream, problem, wanted):
        if hasattr(self.whole, "backward"):
            return self.whole.backward(self.padded(tensors), upstream, problem, wanted)
        with torch.enable_grad():
            outputs = self.whole_forward(tensors, problem)
        leaves = [t for t, want in zip(tensors, wanted) if want]
        return torch.autograd.grad(outputs, leaves, upstream, create_graph=torch.is_grad_enabled())

    # In scratch memory that only the forward and its backward use

    def forward_keeping(self, tensors, problem):
        reading = self.kernels if runs_kernels(tensors[0]) else self.blocks
        tensors = self.padded(tensors)
        scratch = reading.scratch(tensors, problem)
        outputs, saved = reading.forward(tensors, problem, scratch)
        return scratch, [*outputs, *saved]

    def backward_keeping(self, tensors, saved, upstream, problem, wanted, scratch):
        reading = self.kernels if runs_kernels(tensors[0]) else self.blocks
        if scratch is None and hasattr(reading, "scratch_again"):
            scratch = reading.scratch_again(self.padded(tensors), problem)
        return reading.backward(self.padded(tensors), saved, upstream, problem, wanted, scratch)


# Autograd Functions. torch.compile needs a fixed number of parameters, so there is one Function per number of tensors.


class Keeping(NamedTuple):
    """Wraps a problem if its forward may keep scratch memory, which only the backward uses and may overwrite."""

    problem: typing.Any


def backward_follows(tensors):
    """Whether our own backward will follow the forward, so that it may overwrite what the forward keeps."""
    if not torch.is_grad_enabled() or is_watched(*tensors) or read_whole(*tensors):
        return False
    return any(t is not None and t.requires_grad and t.numel() for t in tensors)


def forward_of(ctx, problem, tensors):
    ctx.keeps = type(problem) is Keeping
    if ctx.keeps:
        problem = problem.problem
        bridge = BRIDGES[type(problem)]
        ctx.scratch, found = on_device_of(tensors[0], bridge.forward_keeping, tensors, problem)
        # whether the forward has overwritten its first tensor
        ctx.overwrote = isinstance(ctx.scratch, torch.Tensor) and ctx.scratch.data_ptr() == tensors[0].data_ptr()
    else:
        bridge = BRIDGES[type(problem)]
        found = bridge.forward(tensors, problem)
    ctx.problem, ctx.count = problem, len(tensors)
    ctx.save_for_backward(*tensors, *found[bridge.outputs :])
    return tuple(found[: bridge.outputs])


def backward_of(ctx, *upstream):
    again = differentiated_again() or read_whole(*upstream)
    if ctx.keeps and ctx.overwrote and (again or ctx.scratch is None):
        raise RuntimeError(
            "the loss was computed with overwrite=True, so its gradient has replaced its input: "
            "there can be only one backward, without create_graph or is_grads_batched"
        )
    problem, tensors, wanted = ctx.problem, ctx.saved_tensors, ctx.needs_input_grad[1:]
    bridge, saved, tensors = BRIDGES[type(problem)], tensors[ctx.count :], tensors[: ctx.count]
    if again:
        found = bridge.whole_backward(tensors, upstream, problem, wanted)
    elif ctx.keeps:
        scratch, ctx.scratch = ctx.scratch, None  # only the first backward may use it
        found = on_device_of(tensors[0], bridge.backward_keeping, tensors, saved, upstream, problem, wanted, scratch)
    else:
        found = bridge.backward(tensors, saved, upstream, problem, wanted)
    return places_of(found, wanted)


def places_of(found, wanted):
    """What backward returns: None for the problem, then a gradient for each wanted tensor and None for the others."""
    found = iter(found)
    return None, *[next(found) if want else None for want in wanted]


class ByDevice1(torch.autograd.Function):
    """Runs kernels or blocks. forward takes ctx, because with setup_context `apply` spends 25 µs on signatures."""

    @staticmethod
    def forward(ctx, problem, a):
        return forward_of(ctx, problem, (a,))

    backward = staticmethod(backward_of)


class ByDevice2(ByDevice1):
    @staticmethod
    def forward(ctx, problem, a, b):
        return forward_of(ctx, problem, (a, b))


class ByDevice3(ByDevice1):
    @staticmethod
    def forward(ctx, problem, a, b, c):
        return forward_of(ctx, problem, (a, b, c))


class ByDevice4(ByDevice1):
    @staticmethod
    def forward(ctx, problem, a, b, c, d):
        return forward_of(ctx, problem, (a, b, c, d))


def whole_forward_of(problem, *tensors):
    return BRIDGES[type(problem)].whole_forward(tensors, problem)


class Whole1(torch.autograd.Function):
    """Runs the whole reading: for torch.func, for devices without kernels, and where torch.compile should fuse it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(problem, a):
        return whole_forward_of(problem, a)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.problem, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *upstream):
        problem, wanted = ctx.problem, ctx.needs_input_grad[1:]
        return places_of(BRIDGES[type(problem)].whole_backward(ctx.saved_tensors, upstream, problem, wanted), wanted)


class Whole2(Whole1):
    @staticmethod
    def forward(problem, a, b):
        return whole_forward_of(problem, a, b)


class Whole3(Whole1):
    @staticmethod
    def forward(problem, a, b, c):
        return whole_forward_of(problem, a, b, c)


class Whole4(Whole1):
    @staticmethod
    def forward(problem, a, b, c, d):
        return whole_forward_of(problem, a, b, c, d)


BY_DEVICE = dict(enumerate((ByDevice1, ByDevice2, ByDevice3, ByDevice4), 1))
WHOLE = dict(enumerate((Whole1, Whole2, Whole3, Whole4), 1))
# `apply` of the base class of autograd.Function. It skips the check for torch.func's transforms, which
# `Bridge.__call__` has already made
APPLY = {count: super(torch.autograd.Function, function).apply for count, function in BY_DEVICE.items()}
