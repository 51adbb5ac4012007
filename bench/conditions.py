"""What a run was made on: hardware, versions, and what exactly was timed."""

import math
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

import triton_losses
from reference import peers

ON_A_CPU = (
    "On a CPU, triton_losses runs the PyTorch reading of its formulas in cache-sized blocks. That was timed here: "
    "no Triton kernel ran."
)
BUSY = "Other programs were running beside this one: the times are theirs too. Run it again on a quiet machine."


def triton_version():
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def processor():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else ()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def load():
    """The mean number of processes that want to run, over the last minute; nan if the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan


def conditions(device, load_before, kernels=False):
    """Lines to print above every table. Call it at the end of a run; the load then includes the run's own threads.

    kernels: whether, on a CPU, the losses took the kernels' path, with a driver that launches nothing.
    """
    threads, load_after = torch.get_num_threads(), load()
    loads = f"load {load_before:.1f} before and {load_after:.1f} after"
    hardware = f"{processor()}, {os.cpu_count()} cores, {threads} threads, {loads}"
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)} (host: {hardware})"
    versions = f"torch {torch.__version__}, triton {triton_version()}, Python {platform.python_version()}"
    versions = ", ".join([versions, *(f"{name} {version}" for name, version in peers.versions().items())])
    lines = [hardware, f"triton_losses {triton_losses.__version__}, {versions}"]
    if device.type == "cpu" and not kernels:
        lines.append(ON_A_CPU)
    if load_before > 0.5 or load_after > threads + 0.5:
        lines.append(BUSY)
    return lines
