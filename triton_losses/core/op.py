"""Defines ops: functions of ours that PyTorch treats as single operations.

An op is a function that allocates its outputs and computes them. torch.compile, export and FakeTensor do not trace its
body. While `shapes_only()` is True, the same body only allocates the outputs.
"""

import functools
import threading
import typing

import torch

from triton_losses.core.compiler import INTERPRET, runs_kernels
from triton_losses.core.dispatch import DEVICES
from triton_losses.core.launch import on_device_of

is_legacy_batchedtensor = torch._C._functorch.is_legacy_batchedtensor
LIBRARY = torch.library.Library("triton_losses", "DEF")
STATE = threading.local()
SCHEMA = {
    str: "str",
    int: "int",
    float: "float",
    bool: "bool",
    torch.SymInt: "SymInt",  # an integer that may differ between calls of a compiled graph
    torch.dtype: "ScalarType",
    int | None: "int?",
    tuple[float, ...]: "float[]",
    tuple[int, ...]: "int[]",
    tuple[bool, ...]: "bool[]",
}


def shapes_only():
    return getattr(STATE, "shapes_only", False)


PLAIN = (torch.Tensor, torch.nn.Parameter)
GIVEN = (torch.Tensor, torch.nn.Parameter, type(None))


def define(name, schema, body):
    """Define the op ``triton_losses::name``. Its first argument, a tensor or a list of tensors, decides the device."""

    def run(first, *args):
        return on_device_of(first[0] if isinstance(first, list) else first, body, first, *args)

    def fake(*args):
        before, STATE.shapes_only = shapes_only(), True
        try:
            return body(*args)
        finally:
            STATE.shapes_only = before

    LIBRARY.define(name + schema)
    for key in ("CUDA", "XPU", "CPU"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"triton_losses::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.triton_losses, name).default


def op(fn):
    """Define ``triton_losses::<fn>``, which runs on the device of its first argument, a tensor.

    The returned function calls ``fn`` itself if no op is needed, because the dispatcher takes microseconds, which is
    a lot for a small loss. Its attribute `.overload` is the op.
    """
    overload = define(fn.__name__, torch.library.infer_schema(fn, mutates_args=()), fn)

    @functools.wraps(fn)
    def call(x, *args):
        return overload(x, *args) if is_watched(x) else on_device_of(x, fn, x, *args)

    call.overload = overload
    return call


def fields_of(problem):
    """The fields of a NamedTuple as arguments in the schema of an op."""
    return ", ".join(f"{SCHEMA[kind]} {field}" for field, kind in typing.get_type_hints(problem).items())


def problem_of(problem, fields):
    """The problem with these fields, as an op receives them: tuples arrive as lists."""
    return problem(*[tuple(field) if isinstance(field, list) else field for field in fields])


def problem_op(arguments, problem):
    """Define ``triton_losses::<fn>`` for a function that takes a problem as its last argument.

    arguments: the schema of the other arguments. The first one is a list of tensors, and so is the result. As with
    `op`, the returned function calls the op only if it is needed.
    """
    count = len(problem._fields)

    def decorate(fn):
        def flat(*args):
            return fn(*args[:-count], problem_of(problem, args[-count:]))

        overload = define(fn.__name__, f"({arguments}, {fields_of(problem)}) -> Tensor[]", flat)

        @functools.wraps(fn)
        def call(tensors, *args):
            if is_watched(*tensors):
                return overload(tensors, *args[:-1], *args[-1])
            return on_device_of(tensors[0], fn, tensors, *args)

        call.overload = overload
        return call

    return decorate


def is_watched(*tensors):
    """Whether an op is needed: a graph is being traced, a dispatch mode is active, or a tensor is of a subclass."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    for tensor in tensors:
        if type(tensor) not in GIVEN:
            return True
    return False


def readable(*tensors):
    """True if a loss may read values of these tensors in Python: real CPU tensors, no tracing and no transform."""
    if torch.compiler.is_compiling() or not all(t.device.type == "cpu" and type(t) in PLAIN for t in tensors):
        return False
    if runs_kernels(tensors[0]) and not INTERPRET:  # the benchmark runs the GPU's code path with CPU tensors
        return False
    return not torch._C._len_torch_dispatch_stack() and not read_whole(*tensors)


def differentiated_again():
    """In a backward: whether it may itself be differentiated, and so has to use operations that autograd can follow."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def is_plain(x):
    """True if a loss of x must be plain PyTorch throughout: on other devices, and inside torch.func's transforms."""
    return x.device.type not in DEVICES or read_whole()


def read_whole(*tensors):
    """True if a loss must be plain PyTorch throughout: in torch.func's transforms, or for batched gradients."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    for tensor in tensors:
        if tensor is not None and is_legacy_batchedtensor(tensor):
            return True
    return False
