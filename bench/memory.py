"""Memory: the peak that a piece of work adds, exact to the byte, and what a machine has free."""

from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile, record_function

WORK = "bench: work"  # marks its beginning among the recorded events
MEMINFO = Path("/proc/meminfo")
ASSUMED = 8 << 30  # free bytes where the system does not tell


def peak_bytes(prepare, device):
    """The most memory that `work = prepare()`, called, holds above what was held before; a gradient it makes counts."""
    if device.type == "cuda":
        work = prepare()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler sees the calling thread alone, and triton_losses has threads of its own
    try:
        # prepared while recording: the profiler cannot tell the size of what was allocated before it came
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            work = prepare()
            with record_function(WORK):
                kept = work()  # freed after the recording, like everything that outlives the work
    finally:
        torch.set_num_threads(threads)
    del kept
    return highest_sum(allocations(recorded))


def allocations(recorded):
    """Bytes allocated (positive) and freed (negative) since the work began, in order of time.

    The process's resident size would not do: an allocator keeps freed pages, so it hardly moves after the first call.
    Nor would prof.events(), which folds allocations into the operators around them and loses their order."""
    events = recorded.profiler.kineto_results.events()
    began = next(event.start_ns() for event in events if event.name() == WORK)
    changes = [event for event in events if event.name() == "[memory]" and event.start_ns() >= began]
    return [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]


def highest_sum(changes):
    held = highest = 0
    for change in changes:
        held += change
        highest = max(highest, held)
    return highest


def free_bytes(device):
    """Free memory for a case: tensors are drawn on the host, then moved."""
    host = ASSUMED
    if MEMINFO.exists():
        host = next(
            int(line.split()[1]) << 10 for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable")
        )
    return min(host, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host


def logits_of(case, shape):
    """How many logits a head's eager loss makes on the way; no other makes more than it is given."""
    return shape[0] * shape[-1] if case.features else 0


def shortage(case, shape, dtype, device):
    """Why the case is skipped, or nothing. The limit is a third of the free memory: eager losses hold many copies."""
    with FakeTensorMode():
        tensors, options = case.arguments(shape, dtype)
    needed = sum(tensor.nbytes for tensor in (*tensors, *options.values()) if isinstance(tensor, torch.Tensor))
    needed, limit = needed + logits_of(case, shape) * dtype.itemsize, free_bytes(device) // 3
    if needed <= limit:
        return ""
    return (
        f"skipped: its tensors take about {needed / 1e9:.1f} GB, and a third of the free memory is {limit / 1e9:.1f} GB"
    )
