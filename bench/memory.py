"""Memory: the peak that a piece of work adds, exact to the byte, and the free memory of the device."""

from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile, record_function

WORK = "bench: work"  # the event that marks where the work begins
MEMINFO = Path("/proc/meminfo")
ASSUMED = 8 << 30  # free bytes if the system does not tell


def peak_bytes(prepare, device):
    """The peak memory that calling `work = prepare()` adds to what was held before, with the gradients it creates."""
    if device.type == "cuda":
        work = prepare()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler sees only the calling thread, and triton_losses has threads of its own
    try:
        # prepare() runs while recording, because the profiler does not know the size of earlier allocations
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            work = prepare()
            with record_function(WORK):
                kept = work()  # keep the result until the recording has ended
    finally:
        torch.set_num_threads(threads)
    del kept
    return highest_sum(allocations(recorded))


def allocations(recorded):
    """Bytes allocated (positive) and freed (negative) since the work began, in order of time.

    The process's resident size is no measure: an allocator keeps freed pages, so it hardly moves after the first call.
    Nor is prof.events(), which folds allocations into the operators around them and loses their order.
    """
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
    """Free memory for a case, whose tensors are drawn where they are used."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not MEMINFO.exists():
        return ASSUMED
    lines = MEMINFO.read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def logits_of(case, shape):
    """The number of logits that an eager loss creates by a product; 0 for others, which need no larger tensor."""
    return case.logits(shape)


def shortage(case, shape, dtype, device):
    """Why the case is skipped, or "". The limit is a third of the free memory, as eager losses hold many copies."""
    with FakeTensorMode():
        tensors, options = case.arguments(shape, dtype)
    needed = sum(tensor.nbytes for tensor in (*tensors, *options.values()) if isinstance(tensor, torch.Tensor))
    needed, limit = needed + logits_of(case, shape) * dtype.itemsize, free_bytes(device) // 3
    if needed <= limit:
        return ""
    return (
        f"skipped: its tensors take about {needed / 1e9:.1f} GB, and a third of the free memory is {limit / 1e9:.1f} GB"
    )
