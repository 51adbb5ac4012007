"""A function of device_math run as a kernel where kernels run; its PyTorch twin elsewhere."""

from triton_losses.core.compiler import runs_kernels, triton

if triton is not None:
    import triton.language as tl

    @triton.jit
    def apply_kernel(x, out, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(out + i, FUNCTION(tl.load(x + i, mask=i < n)), mask=i < n)


def evaluate(function, x):
    if not runs_kernels(x):
        return function.eager(x)
    out = x.new_empty(x.shape)
    apply_kernel[(1,)](x, out, x.numel(), FUNCTION=function, BLOCK=triton.next_power_of_2(x.numel()))
    return out
