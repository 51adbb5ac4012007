"""Time: samples of several providers, taken in turns so that the machine's noise affects all of them equally."""

import math
import time
from dataclasses import dataclass

import torch

from bench.failures import noted

CACHE_FLUSH = 256 << 20  # bytes: several times a GPU's L2
SPIN = 6_000_000  # cycles for which a GPU waits while the host enqueues work
SMALL = 1 << 20  # bytes of tensors; with fewer, a call is microseconds of host work, so a sample has many calls
SAMPLE = 2e-3  # seconds that such a sample takes at least


@dataclass(frozen=True)
class Budget:
    """The repeats of one pass: they end at `most`, or after `seconds` per provider, but not before `least`."""

    seconds: float
    least: int
    most: int


def stopwatch(device, busy=False):
    """A function that runs a piece of work and returns its seconds; it frees the work's result afterwards.

    busy: a GPU first spins for some 3 ms, in which the host enqueues the work; then the seconds are the GPU's alone.
    """
    return gpu_stopwatch(device, SPIN if busy else 0) if device.type == "cuda" else cpu_seconds


def cpu_seconds(work):
    start = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - start
    del kept
    return seconds


def gpu_stopwatch(device, spin):
    flush = torch.empty(CACHE_FLUSH, dtype=torch.int8, device=device)

    def seconds(work):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()  # empties the L2 cache, so that inputs come from memory, as they do in training
        if spin:
            torch.cuda._sleep(spin)
        start.record()
        kept = work()
        end.record()
        end.synchronize()
        del kept
        return start.elapsed_time(end) / 1e3

    return seconds


def calls_per_sample(ready, seconds_of, small):
    """How many calls a sample has: one for large work, so that each starts from a cold cache. ready(n) runs n calls."""
    return math.ceil(SAMPLE / (seconds_of(ready(10)) / 10)) if small else 1


def take_turns(ready, times, seconds_of, budget, failures):
    """Samples, in seconds per call, by provider, as are `ready` and `times`. One that fails is noted and drops out."""
    samples = {name: [] for name in ready}
    start = time.perf_counter()
    for repeat in range(budget.most):
        if repeat >= budget.least and time.perf_counter() - start > budget.seconds * len(ready):
            break
        for name in ready:
            if name not in failures:
                with noted(failures, name):
                    samples[name].append(seconds_of(ready[name](times[name])) / times[name])
    return samples
