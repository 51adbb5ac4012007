"""A Triton driver that launches nothing, so that the host's cost of a call can be measured without a GPU."""

import contextlib
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import ty_to_cpp
from triton.runtime import driver

from triton_losses.core import compiler, plan


class Utils:
    """The properties that a driver reports of a GPU; here those of an H100 that is not there."""

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, name, kernel, shared, device):
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module):
        pass


class Launcher:
    """Replaces the launcher that puts a compiled kernel on a stream; it only counts launches."""

    launches = 0
    launch_cooperative_grid, num_ctas, global_scratch_size, profile_scratch_size = False, 1, 0, 0

    def __init__(self, source, metadata):
        pass

    def __call__(self, *arguments):
        Launcher.launches += 1


class NoGPU:
    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self):
        return 999  # not that of a target that kernels are built for, or these would be taken for such builds

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def map_python_to_cpp_type(self, kind):
        return ty_to_cpp(kind)


@contextlib.contextmanager
def kernels_launch_nothing():
    """CPU tensors take the path of a GPU's up to the launch. No kernel runs, so results are uninitialised memory."""
    plan.forget()
    with (
        mock.patch.object(driver, "_active", NoGPU()),
        mock.patch.object(compiler, "KERNEL_DEVICES", {"cpu"}),
    ):
        yield Launcher
    plan.forget()
