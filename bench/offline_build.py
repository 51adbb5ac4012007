"""Kernels compiled for GPUs that are not here, and figures read from such a build.

A loss is called as usual, on CPU tensors. Triton's own launch path specialises the arguments and compiles the kernels,
and stops before the launch. So a build here is the one that the same call would get on such a GPU.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from unittest import mock

import triton
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
    own = {
        "TRITON_CACHE_DIR": OWN_CACHE.name,
        "TRITON_DUMP_PTXAS_LOG": "1",
    }  # its log counts registers and spills
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
        stack.enter_context(mock.patch.dict(os.environ, own))
        for owner, attribute, value in replaced:
            stack.enter_context(mock.patch.object(owner, attribute, value))
        yield builds
    plan.forget()


# Reading a build


def loops_of(lines):
    """The lines of each innermost loop: from a label to a branch back to it."""
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"([$.]L\w+):", line))}
    branch = re.compile(r"\b(?:bra(?:\.uni)?|s_c?branch\w*)\s+([$.]L\w+)")
    branches = [(i, match[1]) for i, line in enumerate(lines) if (match := branch.search(line))]
    return innermost([range(labels[label], i + 1) for i, label in branches], lines)


def innermost(spans, lines):
    """The lines of each span that contains no other. Code moved out of line branches back too, over much more."""
    spans = [span for span in spans if span]
    return [
        [lines[i] for i in span]
        for span in spans
        if not any(other != span and set(other) <= set(span) for other in spans)
    ]


def accesses(lines):
    """("load" or "store", bits) for each instruction that reads or writes global memory."""
    found = []
    for line in lines:
        if match := re.search(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\s", line):
            found.append(("load" if match[1] == "ld" else "store", int(match[2] or 1) * int(match[3])))
        elif match := re.search(r"\b(?:global|buffer)_(load|store)_(\w+)", line):
            words = re.fullmatch(r"dword(?:x(\d))?", match[2])
            found.append((match[1], 32 * int(words[1] or 1) if words else 8 if "byte" in match[2] else 16))
    return found


def machine_code(build):
    """(address, instruction) pairs of an NVIDIA kernel's machine code."""
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(build.kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([cuobjdump, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return [
        (int(address, 16), code.strip())
        for address, code in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.MULTILINE)
    ]


def machine_jumps(build):
    """The instructions of an NVIDIA kernel, and (place, target) of each jump among them."""
    code = machine_code(build)
    place_of, texts = {address: i for i, (address, _) in enumerate(code)}, [text for _, text in code]
    found = [(i, re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)) for i, text in enumerate(texts)]
    return texts, [(i, place_of[int(match[1], 16)]) for i, match in found if match]


def machine_loops(build):
    """The instructions of each innermost loop."""
    texts, jumps = machine_jumps(build)
    return innermost([range(target, i + 1) for i, target in jumps], texts)


def spills_in_loops(build):
    """The instructions in innermost loops that store or load spilled registers."""
    loops = loops_of(build.lines) if build.kernel.asm.get("amdgcn") else machine_loops(build)
    return [
        code
        for loop in loops
        for code in loop
        if re.search(r"\b(?:STL|LDL|scratch_\w+|v_(?:read|write)lane\w*)\b", code)
    ]
