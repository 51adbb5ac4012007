"""Which of the ways to compute a loss serves a call: a reading of ours, or ATen's own function.

    kernels      GPU tensors; CPU tensors in Triton's interpreter
    ATen         few numbers on a CPU, where ATen has the same loss: a call of ours is all overhead there
    blocks       other CPU tensors
    plain torch  torch.func's transforms, other devices, and compiled graphs of losses that a graph can fuse

A theme declares ATen's function where it calls its family (``aten=...``); `Bridge` asks the rest.
"""

import torch

from triton_losses.core.compiler import runs_kernels

DEVICES = ("cpu", "cuda", "xpu")  # with blocks or kernels
SMALL = 1 << 15  # elements up to which a call is all overhead
ATEN = True  # whether ATen's functions are called at all: tests say no
WIDE = (torch.float32, torch.float64)  # in which ATen computes without rounding in between


def aten_serves(*tensors, most=SMALL):
    """True for up to ``most`` elements on a CPU, of tensors of one shape and wide type."""
    x = tensors[0]
    if not ATEN or torch.compiler.is_compiling():  # a graph is for any size
        return False
    if x.device.type != "cpu" or runs_kernels(x) or x.numel() > most or x.dtype not in WIDE:
        return False
    for t in tensors[1:]:
        if t.dtype != x.dtype or t.shape != x.shape:
            return False
    return True


def transformed():
    """Whether one of torch.func's transforms is at work: it wants operations that it can follow."""
    return torch._C._are_functorch_transforms_active()


def plain_torch_serves(x, compiling):
    """Whether neither kernels nor blocks may: they are Functions and ops of ours, which a transform cannot follow."""
    return x.device.type not in DEVICES or not compiling and transformed()
