"""Imports Triton if it is installed, and tells which tensors its kernels run on.

Without Triton (macOS, Windows) every name below still exists, and the package runs the PyTorch readings.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is None:
    INTERPRET = False

    class tl:  # type: ignore[no-redef] # a placeholder: PyTorch runs formulas with `formula.Eager` as `tl`
        constexpr = staticmethod(lambda value: value)

    def jit(fn=None, **_):
        return fn if fn is not None else jit
else:
    INTERPRET = bool(triton.knobs.runtime.interpret)  # read only once, as triton.jit does
    jit = triton.jit

WARP = 64 if torch.version.hip else 32


# Kernels run on GPU tensors (ROCm devices are called cuda), and on CPU tensors in Triton's interpreter. For all others
# PyTorch runs the formula.
KERNEL_DEVICES = {"cuda", "xpu", "cpu"} if INTERPRET else set() if triton is None else {"cuda", "xpu"}


def runs_kernels(x):
    return x.device.type in KERNEL_DEVICES


def compute_dtype(dtype):
    """The type a formula computes in: float64 stays, everything narrower is widened to float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
