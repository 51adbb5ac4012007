"""What the compiler says of the kernels: ``python -m bench build``. No GPU is needed.

Every timed loss is compiled for one target. Of each kernel, only the part that loads most is read: an innermost loop
or, if none loads anything, the instructions between two jumps. Four rates of a GPU limit the speed of that part. Each
limit is given as a share of the rate at which the GPU copies memory:

    issue       a scheduler starts one instruction of a warp per cycle; a multiprocessor has four schedulers
    special     exp2, log2, reciprocal: 16 lanes per cycle and multiprocessor
    in flight   bytes that a multiprocessor's programs have requested and wait for: memory's latency needs 40 kB of them
    memory      the rate of a copy itself: 1

The smallest is an upper bound: it omits the time before and after the loop, and waits of one instruction for another.
"""

import re
from dataclasses import dataclass

import pandas
import torch

import triton_losses
from bench.machine_code import machine_jumps, machine_loops
from bench.measure import words_of
from bench.offline_build import TARGETS, building
from triton_losses import functional

EXPLANATION = (
    "One row a kernel. registers: of a thread. programs: at a time on a multiprocessor. in_flight: kB that they have "
    "asked for. Of the kernel's main loop: bytes (loaded and stored by a thread in a round), instructions and special "
    "functions per 16 of those bytes, barriers and shuffles. share: of the rate at which an H200 copies memory, at "
    "most, by what limits it: memory itself, bytes in flight, instructions issued or special functions."
)
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class GPU:
    """What a GPU offers a kernel; the defaults are those of an H200."""

    copy: float = 4.25e12  # bytes a second, read and written
    clock: float = 1.755e9
    multiprocessors: int = 132
    schedulers: int = 4
    special_lanes: int = 16
    registers: int = 65536
    threads: int = 2048
    programs: int = 32
    shared: int = 227 << 10
    in_flight: int = 40_000  # bytes per multiprocessor


H200 = GPU()
SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def bytes_of(code):
    """(loaded, stored) bytes of global memory per thread."""
    found = {"LDG": 0, "STG": 0}
    for text in code:
        if match := re.search(r"\b(LDG|STG)\.E((?:\.\w+)*)", text):
            widths = [SIZES[part] for part in match[2].split(".") if part in SIZES]
            found[match[1]] += max(widths, default=4)
    return found["LDG"], found["STG"]


def main_part(build):
    """The instructions of the innermost loop that loads most or, if none loads, of such a run between jumps."""
    texts, jumps = machine_jumps(build)
    ends = sorted({0, len(texts), *(i + 1 for i, _ in jumps), *(target for _, target in jumps)})
    runs = [texts[a:b] for a, b in zip(ends, ends[1:])]
    return max([loop for loop in machine_loops(build) if bytes_of(loop)[0]] or runs, key=bytes_of)


def programs_at_a_time(build, gpu):
    warps, shared = build.kernel.metadata.num_warps, build.kernel.metadata.shared
    of_warp = -(-build.registers * 32 // 256) * 256  # registers are allocated in units of 256
    fit = gpu.registers // (of_warp * warps), gpu.threads // build.threads, gpu.programs
    return min(*fit, gpu.shared // (shared + 1024))


def count(part, pattern):
    return sum(bool(re.search(rf"\b{pattern}\b", text)) for text in part)


def figures(build, gpu=H200):
    """One row of the table."""
    part = main_part(build)
    loaded, stored = bytes_of(part)
    moved, programs = loaded + stored, programs_at_a_time(build, gpu)
    special, cycles = count(part, "MUFU"), gpu.multiprocessors * gpu.clock / gpu.copy
    shares = {"memory": 1.0, "in flight": programs * build.threads * loaded / gpu.in_flight}
    shares["issue"] = cycles * gpu.schedulers * 32 * moved / len(part)
    shares["special"] = cycles * gpu.special_lanes * moved / special if special else 1.0
    limit = min(shares, key=shares.get)
    return {
        "kernel": build.kernel.name,
        "config": " ".join(f"{name}={value}" for name, value in build.config.items()),
        "registers": build.registers,
        "spills": build.spills,
        "programs": programs,
        "in_flight": programs * build.threads * loaded / 1000,
        "bytes": moved,
        "instructions": len(part) * 16 / moved if moved else 0.0,
        "special": special * 16 / moved if moved else 0.0,
        "barriers": count(part, "BAR"),
        "shuffles": count(part, "SHFL"),
        "limit": limit,
        "share": min(shares[limit], 1.0),
    }


def small(case, shape):
    """The shape with few rows, images or steps, because a build depends only on the other sizes."""
    if case.steps:
        return (8, 2, shape[-1])
    if case.features:
        return (2, 8, shape[-1])
    return (min(shape[0], 1 << 16),) if len(shape) == 1 else (min(shape[0], 2), *shape[1:])


def rows_of(case, shape, dtype, target):
    tensors, options = case.arguments(small(case, shape), dtype)
    leaves = [t.requires_grad_(i < case.differentiable and t.is_floating_point()) for i, t in enumerate(tensors)]
    with building(target) as builds:
        getattr(functional, case.name)(*leaves, **options).sum().backward()
    words = " ".join([case.name, *case.option_words()])
    what = {"loss": words, **dict(zip(("shape", "dtype"), words_of(shape, dtype)))}
    return [what | figures(build) for build in builds if build.kernel.name != "finish"]


def table(cases, target="sm_90", dtypes=DTYPES):
    """One row per kernel, for each case's largest shape and each dtype."""
    assert TARGETS[target].backend == "cuda", "the figures are read from NVIDIA's machine code"
    triton_losses.set_autotune(False)
    try:
        rows = [row for case in cases for dtype in dtypes for row in rows_of(case, case.largest("full"), dtype, target)]
    finally:
        triton_losses.set_autotune(True)
    return pandas.DataFrame(rows)


def shown(frame):
    """The table as it is printed: rounded, with loss, shape and dtype in one column."""
    text = frame["loss"] + " " + frame["shape"] + " " + frame["dtype"]
    rounded = {"in_flight": 0, "instructions": 1, "special": 1, "share": 2}
    return frame.assign(loss=text).drop(columns=["shape", "dtype", "config"]).set_index("loss").round(rounded)


def summary(frame):
    reached = (frame["share"] >= 0.9).sum()
    return f"{len(frame)} kernels: {reached} may reach 90 % of a copy's rate, {(frame['spills'] > 0).sum()} spill."


def write(frame, lines, directory):
    directory.mkdir(parents=True, exist_ok=True)
    frame.to_csv(directory / "build.csv", index=False)
    parts = ["# What the compiler says of the kernels", "\n".join(f"- {line}" for line in lines), EXPLANATION]
    (directory / "build.md").write_text("\n\n".join([*parts, shown(frame).to_markdown()]) + "\n")
