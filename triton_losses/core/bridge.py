"""The bridge from a family to PyTorch: its ops, and its autograd Function. Derivatives and transforms are decided here,
once.

A family is read in up to three ways. A *reading* is a module with two functions:

    forward(tensors, problem)                            -> outputs, saved: two lists of tensors
    backward(tensors, saved, upstream, problem, wanted)  -> the gradients of the wanted tensors, a list

tensors are the family's, None where one is not given; problem is its options, a NamedTuple; upstream are the gradients
of the outputs; saved is what a reading leaves for its own backward, and nobody else looks at it.

    kernels   Triton, on a GPU
    blocks    PyTorch on slices that stay in a CPU's cache
    whole     PyTorch on whole tensors, which autograd and torch.func follow. It saves nothing, so it returns the
              outputs alone, and its backward takes no ``saved``; without a backward of its own autograd differentiates
              its forward

The blocks may have ``scratch(tensors, problem)``: memory in which the forward leaves what the backward will change, or
None. Both then take it as a last argument. A second backward has none, or what ``scratch_again`` makes. It is for plain
calls: an op may not change what it has handed out. And they may have ``small(tensors, problem)``: the outputs, in a
tuple, of so few numbers that a call is all overhead, by operations that autograd differentiates by itself; or None.
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
    keeps_for_backward,
    problem_of,
    read_whole,
)

BRIDGES: dict[type, "Bridge"] = {}  # by the type of the problem: torch.compile follows a type to what it stands for


class Bridge:
    """Callable with a problem and the family's tensors; returns the outputs, or the output where there is one.

    inputs, outputs: how many tensors the readings take and return; those not given are None.
    compiled_whole: torch.compile sees the whole reading, and fuses it with what is around it; else it sees ops.
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
        elif runs_kernels(tensors[0]):
            found = APPLY[len(tensors)](problem, *tensors)
        else:
            found = self.on_a_cpu(problem, tensors)
        return found[0] if self.outputs == 1 else found

    def on_a_cpu(self, problem, tensors):
        if hasattr(self.blocks, "small") and aten_serves(tensors[0]) and not torch._C._len_torch_dispatch_stack():
            found = self.blocks.small(self.padded(tensors), problem)
            if found is not None:
                return found
        if hasattr(self.blocks, "scratch") and any(t is not None and keeps_for_backward(t) for t in tensors):
            problem = Keeping(problem)
        return APPLY[len(tensors)](problem, *tensors)

    def in_plain_torch(self, problem, tensors):
        if hasattr(self.whole, "backward"):
            return WHOLE[len(tensors)].apply(problem, *tensors)
        return self.whole_forward(tensors, problem)

    def padded(self, tensors):
        return tensors if len(tensors) == self.inputs else (*tensors, *[None] * (self.inputs - len(tensors)))

    def forward(self, tensors, problem):
        """outputs + saved, as one list."""
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

    # The same as ops, whose arguments are flat

    def flat_forward(self, tensors, *fields):
        return self.read_forward(tensors, problem_of(self.problem, fields))

    def flat_backward(self, tensors, saved, upstream, wanted, *fields):
        return self.read_backward(tensors, saved, upstream, problem_of(self.problem, fields), tuple(wanted))

    # By the whole reading

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

    # In blocks, in what a forward leaves for its backward alone

    def forward_keeping(self, tensors, problem):
        tensors = self.padded(tensors)
        scratch = self.blocks.scratch(tensors, problem)
        outputs, saved = self.blocks.forward(tensors, problem, scratch)
        return scratch, [*outputs, *saved]

    def backward_keeping(self, tensors, saved, upstream, problem, wanted, scratch):
        if scratch is None and hasattr(self.blocks, "scratch_again"):
            scratch = self.blocks.scratch_again(self.padded(tensors), problem)
        return self.blocks.backward(self.padded(tensors), saved, upstream, problem, wanted, scratch)


# Autograd Functions. torch.compile wants a fixed number of parameters, so each number of tensors has its own.


class Keeping(NamedTuple):
    """A problem whose forward may leave scratch memory for the backward, which may change it: nobody else sees it."""

    problem: typing.Any


def forward_of(ctx, problem, tensors):
    ctx.keeps = type(problem) is Keeping
    if ctx.keeps:
        problem = problem.problem
        bridge = BRIDGES[type(problem)]
        ctx.scratch, found = on_device_of(tensors[0], bridge.forward_keeping, tensors, problem)
    else:
        bridge = BRIDGES[type(problem)]
        found = bridge.forward(tensors, problem)
    ctx.problem, ctx.count = problem, len(tensors)
    ctx.save_for_backward(*tensors, *found[bridge.outputs :])
    return tuple(found[: bridge.outputs])


def backward_of(ctx, *upstream):
    problem, tensors, wanted = ctx.problem, ctx.saved_tensors, ctx.needs_input_grad[1:]
    bridge, saved, tensors = BRIDGES[type(problem)], tensors[ctx.count :], tensors[: ctx.count]
    if differentiated_again() or read_whole(*upstream):
        found = bridge.whole_backward(tensors, upstream, problem, wanted)
    elif ctx.keeps:
        scratch, ctx.scratch = ctx.scratch, None  # the first backward uses it up
        found = on_device_of(tensors[0], bridge.backward_keeping, tensors, saved, upstream, problem, wanted, scratch)
    else:
        found = bridge.backward(tensors, saved, upstream, problem, wanted)
    return places_of(found, wanted)


def places_of(found, wanted):
    """What backward returns: nothing for the problem, each wanted tensor's gradient in its place."""
    found = iter(found)
    return None, *[next(found) if want else None for want in wanted]


class ByDevice1(torch.autograd.Function):
    """By kernels, or in blocks. (forward takes ctx: with setup_context, apply would look at signatures, which takes 25
    µs.)
    """

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
    """By plain torch: for torch.func's transforms, for devices without kernels, and where a compiled graph is to see
    inside.
    """

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
# torch's own apply below the one that looks after torch.func, of which `Bridge.__call__` has made sure that it is not
# at work
APPLY = {count: super(torch.autograd.Function, function).apply for count, function in BY_DEVICE.items()}
