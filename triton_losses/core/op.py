"""One decorator between PyTorch and a kernel launch.

An op is a function that allocates its outputs and computes them. PyTorch sees it whole, so torch.compile, export and
FakeTensor never look inside. Run with `shapes_only()` true, the same body allocates and stops there.
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
    torch.SymInt: "SymInt",  # an integer that a compiled graph does not fix
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
    """The op ``triton_losses::name``. Its first argument is a tensor, or a list of them, on the device to run on."""

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
    """Define ``triton_losses::<fn>``; the first argument is a tensor on the device to run on.

    Where no op is needed, the result runs the body itself: the dispatcher costs microseconds that small losses feel.
    `.overload` is the op.
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
    """The NamedTuple of what an op was given for its fields: lists for tuples."""
    return problem(*[tuple(field) if isinstance(field, list) else field for field in fields])


def problem_op(arguments, problem):
    """Define ``triton_losses::<fn>``, of the function's ``arguments`` and of a problem, which is its last one.

    Its first argument is a list of tensors, its result another. As for `op`, no op is called where none is needed.
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
    """Whether a call of ours has to be an op: a graph is being recorded, a dispatch mode is on, or a tensor is a
    subclass.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    for tensor in tensors:
        if type(tensor) not in GIVEN:
            return True
    return False


def keeps_for_backward(x):
    """True where a backward in PyTorch will follow a forward in PyTorch, and what is kept for it can be changed, for
    nobody else sees it.
    """
    return x.requires_grad and torch.is_grad_enabled() and x.numel() > 0 and readable(x) and not runs_kernels(x)


def readable(*tensors):
    """True where values may be looked at before a loss is computed: real tensors on a CPU, and nobody traces or
    transforms.
    """
    if torch.compiler.is_compiling() or not all(t.device.type == "cpu" and type(t) in PLAIN for t in tensors):
        return False
    if runs_kernels(tensors[0]) and not INTERPRET:  # the bench measures a GPU's path on a CPU's tensors
        return False
    return not torch._C._len_torch_dispatch_stack() and not read_whole(*tensors)


def differentiated_again():
    """Inside a backward: whether it may be differentiated itself, and so has to be of what autograd sees."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def is_plain(x):
    """True where a loss of x is plain PyTorch from end to end: on other devices, and inside torch.func's transforms."""
    return x.device.type not in DEVICES or read_whole()


def read_whole(*tensors):
    """True where a loss should be plain PyTorch from end to end: inside torch.func's transforms and autograd's batched
    ones.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    for tensor in tensors:
        if tensor is not None and is_legacy_batchedtensor(tensor):
            return True
    return False
