"""What only a GPU shows of a pass, besides its time: how the host drives it, and what a captured graph takes."""

import time
import warnings

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.failures import noted
from bench.timing import SPIN

WARM_UPS = 3  # before a capture, as torch.cuda.graph asks for


def shown(prepare, device, small):
    """Columns of the results for the pass that ``prepare()`` readies; what cannot be found out is left out.

    Launches are counted of small tensors alone: larger ones have as many, and the profiler takes its time.
    """
    finders = {"host_us": host_us, "syncs": syncs, "reserved_mb": reserved_mb}
    if small:
        finders["launches"] = launches
    found, ignored = {}, {}
    for name, finder in finders.items():
        with noted(ignored, name):
            found[name] = finder(prepare, device)
    return found


def host_us(prepare, device):
    """Microseconds until the call returns while the GPU is busy, so that nothing waits for it but a synchronisation."""
    work = prepare()
    torch.cuda.synchronize(device)
    torch.cuda._sleep(SPIN)
    start = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize(device)
    del kept
    return seconds * 1e6


def launches(prepare, device):
    """Kernels, copies and fills that the work puts on the GPU."""
    work = prepare()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize(device)
    return sum(event.device_type == DeviceType.CUDA for event in recorded.events())


def syncs(prepare, device):
    """How often the host waits for the GPU."""
    work = prepare()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in said)


def reserved_mb(prepare, device):
    """What the allocator must hold more of than before, in blocks that it does not give back."""
    work = prepare()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    work()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_reserved(device) - before) / 1e6


def replayed(prepare, device):
    """A function like ``prepare`` that readies a captured graph's replay; raises if the pass cannot be captured."""
    work, side = prepare(), torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()

    def replay():
        graph.replay()
        return kept

    return lambda times: replay
