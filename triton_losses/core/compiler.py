"""Triton where it is installed, and which tensors its kernels serve.

Without Triton (macOS, Windows) every name below still exists, and the package serves the PyTorch readings.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is None:
    INTERPRET = False

    class tl:  # type: ignore[no-redef] # a formula's `tl` is only ever called in its PyTorch reading, which binds the name anew
        constexpr = staticmethod(lambda value: value)

    def jit(fn=None, **_):
        return fn if fn is not None else jit
else:
    INTERPRET = bool(triton.knobs.runtime.interpret)  # read once, as triton.jit itself reads it
    jit = triton.jit

WARP = 64 if torch.version.hip else 32


# Kernels serve GPU tensors (ROCm calls itself cuda), and CPU tensors in Triton's interpreter; PyTorch reads the formula
# for all others.
KERNEL_DEVICES = {"cuda", "xpu", "cpu"} if INTERPRET else set() if triton is None else {"cuda", "xpu"}


def runs_kernels(x):
    return x.device.type in KERNEL_DEVICES


def compute_dtype(dtype):
    """The type a formula computes in: float64 stays, everything narrower is widened to float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
