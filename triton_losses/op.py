"""One decorator between PyTorch and a kernel launch.

An op is a function that allocates its outputs and computes them. PyTorch sees it whole, so torch.compile, export and
FakeTensor never look inside. Run with `shapes_only()` true, the same body allocates and stops there.
"""

import functools
import threading

import torch

LIBRARY = torch.library.Library("triton_losses", "DEF")
STATE = threading.local()


def shapes_only():
    return getattr(STATE, "shapes_only", False)


def tensor_in(args):
    return next(a[0] if isinstance(a, (list, tuple)) else a for a in args if isinstance(a, torch.Tensor) or (isinstance(a, (list, tuple)) and a))


def op(fn):
    """Define ``triton_losses::<fn>``; the first argument is a tensor, or a list of them, on the device to run on."""

    @functools.wraps(fn)
    def run(*args):
        x = tensor_in(args)
        if x.is_cuda:
            with torch.cuda.device(x.device), torch.autocast("cuda", enabled=False):
                return fn(*args)
        if torch.is_autocast_enabled(x.device.type):  # a compiled graph runs op bodies without autocast: eager must too
            with torch.autocast(x.device.type, enabled=False):
                return fn(*args)
        return fn(*args)

    @functools.wraps(fn)
    def fake(*args):
        before, STATE.shapes_only = shapes_only(), True
        try:
            return fn(*args)
        finally:
            STATE.shapes_only = before

    LIBRARY.define(fn.__name__ + torch.library.infer_schema(fn, mutates_args=()))
    for key in ("CUDA", "XPU", "CPU"):
        LIBRARY.impl(fn.__name__, run, key)
    torch.library.register_fake(f"triton_losses::{fn.__name__}", fake, lib=LIBRARY)
    return getattr(torch.ops.triton_losses, fn.__name__).default


def read_whole():
    """True where a loss should be plain PyTorch from end to end: inside torch.func's transforms."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
