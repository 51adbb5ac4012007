"""Chooses what computes a call: one of our readings (core/bridge.py), or ATen's own function.

    kernels      GPU tensors; CPU tensors in Triton's interpreter
    ATen         small tensors on a CPU if ATen has the same loss, because the overhead of our call would dominate; on a
                 GPU a gather of few rows
    blocks       other CPU tensors
    plain torch  torch.func's transforms, other devices, and compiled graphs of losses that a graph can fuse

A theme passes ATen's function when it calls its family (``aten=...``); `Bridge` decides the rest.
"""

import torch

from triton_losses.core.compiler import INTERPRET, runs_kernels

DEVICES = ("cpu", "cuda", "xpu")  # with blocks or kernels
SMALL = 1 << 15  # up to so many elements, the overhead of a call dominates
FEW_ROWS = 1024
ATEN = True  # whether ATen's functions may be called; tests set it to False
WIDE = (torch.float32, torch.float64)  # dtypes in which ATen does not round intermediate results


def aten_serves(*tensors, most=SMALL):
    """True for CPU tensors of one shape and one dtype of WIDE, with at most ``most`` elements."""
    x = tensors[0]
    if not ATEN or torch.compiler.is_compiling():  # a graph may run with any size
        return False
    if x.device.type != "cpu" or runs_kernels(x) or x.numel() > most or x.dtype not in WIDE:
        return False
    for t in tensors[1:]:
        if t.dtype != x.dtype or t.shape != x.shape:
            return False
    return True


def aten_gathers(x):
    """True for up to FEW_ROWS rows x of WIDE on a GPU, of which a loss reads one number each, as nll_loss does.

    ATen adds such numbers up in one block of 32 threads. So few take it less than our call takes the host.
    """
    if not ATEN or INTERPRET or torch.compiler.is_compiling() or not runs_kernels(x):
        return False
    return x.dtype in WIDE and (x.dim() == 1 or x.dim() == 2 and x.shape[0] <= FEW_ROWS)


def transformed():
    """Whether a transform of torch.func is active, which can only follow PyTorch's own operations."""
    return torch._C._are_functorch_transforms_active()


def plain_torch_serves(x, compiling):
    """Whether a call needs plain PyTorch: its device has no kernels or blocks, or a transform cannot follow our ops."""
    return x.device.type not in DEVICES or not compiling and transformed()
