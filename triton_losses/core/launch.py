"""Launches kernels; the only file that uses Triton's private API.

Triton's public API, ``kernel[grid](...)``, inspects every argument at every call: with thirty arguments that takes the
host longer than a small loss takes the device. A `Launch` serves all calls of one kind. Its first call uses the public
API, which compiles and returns the compiled kernel; later calls run that compiled kernel directly.

This is correct only if the public API would choose the same compiled kernel again. It chooses by the types of the
arguments, by which pointers are multiples of 16 bytes, and by which integers are 1 or multiples of 16. So the arguments
of a kernel come in two groups:

    those that differ from call to call          first: pointers, then integers declared ``tl.int64``, not specialised
    those that all calls of one kind share       the rest: other integers, scalars, constants, launch options

The types and the alignment of the pointers are part of the kind (core/plan.py).
"""

import torch

from triton_losses.core.compiler import INTERPRET, triton

TESTED = ("3.6", "3.7", "3.9")  # with other versions of Triton every launch uses the public API
DIRECT = triton is not None and not INTERPRET and ".".join(triton.__version__.split(".")[:2]) in TESTED

if DIRECT:
    from triton.runtime import driver

    # the knobs that a program has set; usually empty
    RUNTIME, COMPILATION = vars(triton.knobs.runtime), vars(triton.knobs.compilation)
    ENTER, EXIT = (vars(type(triton.knobs.runtime))[name] for name in ("launch_enter_hook", "launch_exit_hook"))


def is_observed():
    """Whether a hook, a profiler or a debugging option observes launches; then all of them use the public API."""
    return bool(RUNTIME or COMPILATION or ENTER.calls or EXIT.calls)


class Launch:
    """A kernel and the arguments that all calls of one kind share; called with those that differ."""

    def __init__(self, kernel, fixed, options, programs):
        self.kernel, self.fixed, self.options, self.programs = kernel, fixed, options, programs
        self.compiled = None
        self.direct = DIRECT and not triton.knobs.runtime.debug and not triton.knobs.compilation.instrumentation_mode

    def __call__(self, *varying):
        """The last argument is the number of rows (or elements, or images); it determines the number of programs."""
        programs = self.programs(varying[-1])
        if not programs:
            return
        if self.compiled is None or is_observed():
            compiled = self.kernel[(programs,)](*varying, **self.fixed, **self.options)
            if self.direct:
                self.remember(compiled, len(varying))
        else:
            self.run(
                programs,
                1,
                1,
                self.stream(self.device),
                self.function,
                self.metadata,
                None,
                None,
                None,
                *varying,
                *self.rest,
            )

    def remember(self, compiled, varying):
        self.device, self.stream = driver.active.get_current_device(), driver.active.get_current_stream
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata
        self.rest = tuple(self.fixed[name] for name in self.kernel.arg_names[varying:])
        self.compiled = compiled


def on_device_of(x, run, *args):
    """``run(*args)`` with x's device as the current one, and without autocast."""
    device = x.device
    kind = device.type
    if torch.is_autocast_enabled(kind):  # a compiled graph runs ops without autocast, so eager mode must too
        with torch.autocast(kind, enabled=False):
            return on_device_of(x, run, *args)
    if kind == "cpu" or device.index == torch.accelerator.current_device_index():
        return run(*args)
    with torch.get_device_module(kind).device(device):
        return run(*args)
