"""What a call costs the host: ``python -m bench host``. No GPU is needed, and none is used.

Every loss runs as it does for a GPU's tensors, through Triton's own launch path, with a driver that launches nothing.
It is compared with eager PyTorch on the same small tensors. Eager's time includes the arithmetic, but ATen's kernels
take little time for so few numbers.
"""

import statistics
import time
import warnings

import pandas
import torch
from torch.profiler import ProfilerActivity, profile

import triton_losses
from bench.no_gpu import kernels_launch_nothing
from bench.providers import PROVIDERS

EXPLANATION = (
    "Forward and backward on the kernels' path, small tensors, a driver that launches nothing; one thread. "
    "Launches are those of kernels and of PyTorch's operations: forward, and in all. ratio: our time over eager's."
)
COLUMNS = ("loss", "options", "launches_forward", "launches", "us", "eager_us", "ratio")
ROWS, COLUMNS_OF_A_ROW, IMAGES, PIXELS = 64, 128, 2, 256
REPEATS, CALLS = 15, 10
# operations that launch nothing on a GPU: they allocate memory or return a view
FREE = set(
    "alias as_strided as_strided_ broadcast_tensors chunk contiguous detach empty empty_like empty_strided expand "
    "expand_as flatten is_nonzero item lift_fresh movedim narrow new_empty new_empty_strided permute promote_types "
    "reshape resize_ resolve_conj resolve_neg result_type select set_ slice split squeeze squeeze_ t to transpose "
    "unbind unflatten unsqueeze unsqueeze_ view view_as _local_scalar_dense _reshape_alias _unsafe_view".split()
)


def call_of(case, provider):
    """A function that runs the provider's forward, and one that runs its forward and backward."""
    function = PROVIDERS[provider].make(case)
    shape = case.shape(IMAGES, PIXELS) if case.classes else case.shape(ROWS, COLUMNS_OF_A_ROW)
    tensors, options = case.arguments(shape)
    leaves = [t.requires_grad_() for t in tensors[: case.differentiable]]
    one = torch.ones(())

    def forward():
        return function(*tensors, **options)

    def both():
        for leaf in leaves:
            leaf.grad = None
        found = forward()
        found.backward(one if found.dim() == 0 else torch.ones_like(found))

    return forward, both


def operations(work):
    """How many PyTorch operations in ``work`` would launch a kernel on a GPU."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    count = 0
    for event in profiler.events():
        name = event.name.removeprefix("aten::")
        inner = any(
            child.name.startswith("aten::") and child.name.removeprefix("aten::") not in FREE
            for child in event.cpu_children
        )
        count += event.name.startswith("aten::") and name not in FREE and not inner
    return count


def launches(launcher, work):
    before = launcher.launches
    work()
    return launcher.launches - before + operations(work)


def seconds(work):
    start = time.perf_counter()
    for _ in range(CALLS):
        work()
    return (time.perf_counter() - start) / CALLS


def measure(case):
    """One row of the table."""
    _, eager = call_of(case, "eager")
    with kernels_launch_nothing() as launcher:
        forward, both = call_of(case, "triton_losses")
        both()
        counted = launches(launcher, forward), launches(launcher, both)
    ours, theirs = [], []
    for _ in range(REPEATS):  # take turns, so that the machine's noise affects both equally
        with kernels_launch_nothing():
            both()
            ours.append(seconds(both))
        eager()
        theirs.append(seconds(eager))
    us, eager_us = (min(times) * 1e6 for times in (ours, theirs))
    return dict(zip(COLUMNS, (case.name, " ".join(case.option_words()), *counted, us, eager_us, us / eager_us)))


def table(cases):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a call's host path on a GPU uses one
    triton_losses.set_autotune(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pandas.DataFrame([measure(case) for case in cases], columns=COLUMNS)
    finally:
        triton_losses.set_autotune(True)
        torch.set_num_threads(threads)


def shown(frame):
    """The table as it is printed: rounded, with one row per case."""
    table = frame.assign(loss=(frame["loss"] + " " + frame["options"]).str.strip()).drop(columns="options")
    return table.set_index("loss").round({"us": 0, "eager_us": 0, "ratio": 2})


def summary(frame):
    return (
        f"Median ratio {statistics.median(frame['ratio']):.2f}, largest {frame['ratio'].max():.2f}; "
        f"at most {frame['launches_forward'].max()} launches forward, {frame['launches'].max()} in all."
    )


def write(frame, lines, directory):
    directory.mkdir(parents=True, exist_ok=True)
    frame.to_csv(directory / "host.csv", index=False)
    parts = ["# What a call costs the host", "\n".join(f"- {line}" for line in lines), EXPLANATION]
    (directory / "host.md").write_text("\n\n".join([*parts, shown(frame).to_markdown(), summary(frame)]) + "\n")
