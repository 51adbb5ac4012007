"""Kernels compiled for GPUs that are not here, and figures read from such a build.

A loss is called as usual, on CPU tensors. Triton's own launch path specialises the arguments and compiles the kernels,
and stops before the launch. So a build here is the one that the same call would get on such a GPU.
"""

import contextlib
import io
import re
import sys
import tempfile
from dataclasses import dataclass
from unittest import mock

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from triton_losses.core import compiler, plan
from triton_losses.core.launch import Launch
from triton_losses.core.tuning import Tuned

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
OWN_CACHE = tempfile.TemporaryDirectory()  # a kernel from Triton's usual cache has no report of the assembler
# the assembler's report by kernel hash: it is printed once, although a kernel may be requested several times
REPORTS = {}


class NoGPU:
    """The driver methods that Triton calls before a launch.

    Each target has its own device index, because Triton caches builds by device index: with a shared one, every target
    would get the first target's build.
    """

    def __init__(self, name):
        self.index, self.target = 1000 + list(TARGETS).index(name), TARGETS[name]

    def get_current_device(self):
        return self.index

    def get_current_stream(self, index):
        return 0

    def get_current_target(self):
        return self.target


@dataclass(frozen=True)
class Build:
    kernel: CompiledKernel
    launch: Tuned
    arguments: dict  # without the configuration
    config: dict

    def __str__(self):
        return f"{self.kernel.name} {self.config} for {self.kernel.metadata.target}"

    @property
    def lines(self):
        """The kernel's own lines of PTX or AMD assembly, without the printing library that assertions add on AMD."""
        text = self.kernel.asm.get("ptx") or self.kernel.asm["amdgcn"]
        name = self.kernel.name
        return re.search(rf"(\.entry {name}\(|^{name}:).*?(^}}|^\.Lfunc_end)", text, re.MULTILINE | re.DOTALL)[
            0
        ].splitlines()

    @property
    def threads(self):
        return self.kernel.metadata.num_warps * self.kernel.metadata.target.warp_size

    @property
    def registers(self):
        return reported(self, r"Used (\d+) registers", r"\.vgpr_count:\s+(\d+)")

    @property
    def spills(self):
        """Spilled bytes, stored and loaded, on NVIDIA; spilled registers on AMD."""
        return reported(self, r"(\d+) bytes spill (?:stores|loads)", r"\.[sv]gpr_spill_count:\s+(\d+)")


def reported(build, by_ptxas, by_amd):
    on_amd = build.kernel.asm.get("amdgcn")
    report, pattern = (on_amd, by_amd) if on_amd else (REPORTS[build.kernel.hash], by_ptxas)
    figures = re.findall(pattern, report)
    assert figures, f"{build}: the assembler's report does not say {pattern}"
    return sum(map(int, figures))


@contextlib.contextmanager
def building(name):
    """A context in which launches only compile for this target. Yields the list of builds; undoes all at exit."""
    builds, launches = [], []

    def build(kernel, grid):
        def run(*args, **kwargs):
            with contextlib.redirect_stdout(io.StringIO()) as report:
                compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            REPORTS.setdefault(compiled.hash, report.getvalue())
            builds.append(Build(compiled, *launches[-1]))

        return run

    def launch(tuned, args, config):
        launches.append((tuned, args, config))
        launch_as_ever(tuned, args, config)

    def bind(tuned, **args):
        made = bind_as_ever(tuned, **args)
        args = {name: value for name, value in args.items() if name in tuned.kernel.arg_names}
        config, varying = (
            tuned.config(args),
            [name for name in tuned.kernel.arg_names if name in args and name not in made.fixed],
        )

        def call(*values):
            launches.append((tuned, {**args, **dict(zip(varying, values, strict=True))}, config))
            made(*values)

        return call

    launch_as_ever, bind_as_ever = Tuned.launch, Tuned.bind
    plan.forget()
    replaced = [
        (driver, "_active", NoGPU(name)),  # Triton asks the driver for the target
        (JITFunction, "__getitem__", build),
        (Tuned, "launch", launch),
        (Tuned, "bind", bind),
        (Launch, "remember", lambda *_: None),  # a build must not be kept to be run by later calls
        (compiler, "KERNEL_DEVICES", {"cpu"}),
    ]
    for module in [module for name, module in sys.modules.items() if name.startswith("triton_losses.")]:
        if hasattr(module, "WARP"):
            replaced.append((module, "WARP", TARGETS[name].warp_size))
    with contextlib.ExitStack() as stack:
        stack.enter_context(knobs.cache.scope())
        stack.enter_context(knobs.nvidia.scope())
        knobs.cache.dir = OWN_CACHE.name
        knobs.nvidia.dump_ptxas_log = True  # it counts registers and spills
        for owner, attribute, value in replaced:
            stack.enter_context(mock.patch.object(owner, attribute, value))
        yield builds
    plan.forget()
