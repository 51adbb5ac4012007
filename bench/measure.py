"""Measures one case at one shape and dtype; each provider and pass is one row of the results."""

import gc
import math
import statistics
import time
from dataclasses import dataclass
from functools import partial

import numpy
import torch

from bench import accuracy, on_gpu
from bench.failures import noted
from bench.memory import peak_bytes, shortage
from bench.passes import PASSES, Call, bytes_moved_at_least, learned_by
from bench.providers import PROVIDERS
from bench.timing import SMALL, Budget, calls_per_sample, stopwatch, take_turns

COLUMNS = (
    *("loss", "options", "shape", "dtype", "device", "provider", "pass", "ms", "p20_ms", "p80_ms", "samples"),
    *("noise", "device_ms", "graph_ms", "host_us", "launches", "syncs", "moved_mb", "gb_per_s", "floor_ms", "share"),
    *("peak_mb", "reserved_mb", "error", "first_call_s", "failed"),
)


@dataclass(frozen=True)
class Preset:
    passes: tuple
    budget: Budget


PRESETS = {
    "quick": Preset(("full", "forward"), Budget(seconds=0.25, least=3, most=50)),
    "peers": Preset(("full",), Budget(seconds=6.0, least=7, most=60)),
    "full": Preset(tuple(PASSES), Budget(seconds=4.0, least=5, most=200)),
}
ON_DEVICE = Budget(seconds=0.5, least=5, most=15)  # of the GPU's part alone
WHOLE_CASE = None  # the key of a failure that concerns no single provider


def measure(case, shape, dtype, device, preset, names):
    """Rows of the named providers: dicts with COLUMNS as keys."""
    passes = preset.passes
    rows = {(name, which): blank_row(case, shape, dtype, device, name, which) for name in names for which in passes}
    failures = {}
    torch._dynamo.reset()  # forget what an earlier case compiled
    with noted(failures, WHOLE_CASE):
        if reason := shortage(case, shape, dtype, device):
            failures[WHOLE_CASE] = reason
        else:
            fill(rows, failures, case, shape, dtype, device, preset, names)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for (name, _), row in rows.items():
        if math.isnan(row["ms"]):
            row["failed"] = failures.get(name) or failures.get(WHOLE_CASE, "")
    return list(rows.values())


def words_of(shape, dtype):
    return "×".join(map(str, shape)), str(dtype).removeprefix("torch.")


def blank_row(case, shape, dtype, device, name, which):
    return dict.fromkeys(COLUMNS, math.nan) | {
        "loss": case.name,
        "options": " ".join(case.option_words()),
        **dict(zip(("shape", "dtype"), words_of(shape, dtype))),
        "device": device.type,
        "provider": name,
        "pass": which,
        "failed": "",
    }


def fill(rows, failures, case, shape, dtype, device, preset, names):
    tensors, options = case.arguments(shape, dtype, device, drawn_there=True)
    calls = first_calls(rows, failures, case, shape, tensors, options, device, preset.passes, names)
    inputs = [tensor for tensor in (*tensors, *options.values()) if isinstance(tensor, torch.Tensor)]
    for which in preset.passes:
        fitting = {name: call for name, call in calls.items() if name not in failures}
        samples, on_device, replays = time_and_weigh(rows, failures, which, fitting, inputs, device, preset.budget)
        for name in samples.keys() - failures.keys():
            low, median, high = numpy.percentile(samples[name], (20, 50, 80)) * 1e3
            moved = bytes_moved_at_least(which, inputs, learned_by(case)) / 1e6
            rows[name, which] |= {"ms": median, "p20_ms": low, "p80_ms": high, "samples": len(samples[name])}
            rows[name, which]["noise"] = noise_of(samples[name])
            for column, found in (("device_ms", on_device), ("graph_ms", replays)):
                if found.get(name):
                    rows[name, which][column] = statistics.median(found[name]) * 1e3
            rows[name, which] |= {"moved_mb": moved, "gb_per_s": moved / median}


def noise_of(samples):
    """By how much the median of every other sample differs from that of the rest: the same work, measured twice."""
    halves = [statistics.median(samples[i::2]) for i in (0, 1) if samples[i::2]]
    return abs(halves[0] / halves[1] - 1) if len(halves) == 2 else math.nan


def first_calls(rows, failures, case, shape, tensors, options, device, passes, names):
    """Call each provider once, forward and backward, which compiles and tunes it. Returns the calls by provider."""
    calls, unjudged = {}, {}
    with noted(unjudged, WHOLE_CASE):  # if the float64 reference does not fit in memory, the error stays blank
        truth = accuracy.exact(case, shape, tensors, options)
    for name in names:
        with noted(failures, name):
            function = PROVIDERS[name].make(case)
            if function is None:
                for which in passes:
                    del rows[name, which]
                continue
            own = [t.detach().clone() for t in tensors] if PROVIDERS[name].overwrites else tensors
            call = Call(function, own, options, learned_by(case))
            start = time.perf_counter()
            found = call.value_and_gradients()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
            error = math.nan if unjudged or truth is None else accuracy.error(found, truth)
            for which in passes:
                rows[name, which] |= {"first_call_s": seconds, "error": error}
            calls[name] = call
    return calls


def time_and_weigh(rows, failures, which, calls, inputs, device, budget):
    """Write what one pass takes besides time to the rows. Return samples of its time by provider, of the GPU's part of
    it, and of a captured graph's replay.
    """
    seconds_of = stopwatch(device)
    small = sum(tensor.nbytes for tensor in inputs) < SMALL
    ready, times = {}, {}
    for name, call in calls.items():
        with noted(failures, name):
            prepare = partial(call.ready, which)
            if PROVIDERS[name].compiles and which == "no-grad":
                prepare(1)()  # torch.compile compiles again without gradients, before the measurements
            call.forget()  # memory allocated before the recording must not be freed during it
            # this call is also each provider's warm-up
            rows[name, which]["peak_mb"] = peak_bytes(partial(prepare, 1), device) / 1e6
            times[name] = calls_per_sample(prepare, seconds_of, small)
            ready[name] = prepare
    samples = take_turns(ready, times, seconds_of, budget, failures)
    if device.type != "cuda":
        return samples, {}, {}
    one_each = dict.fromkeys(times, 1)  # several calls would take the host longer than the GPU spins
    on_device = take_turns(ready, one_each, stopwatch(device, busy=True), ON_DEVICE, failures)
    graphs, replays = {}, {}
    if which == "full":
        for name in ready.keys() - failures.keys():
            rows[name, which] |= on_gpu.shown(partial(ready[name], 1), device, small)
            with noted({}, name):  # a provider that cannot be captured has no replay
                graphs[name] = on_gpu.replayed(partial(ready[name], 1), device)
        replays = take_turns(graphs, dict.fromkeys(graphs, 1), seconds_of, ON_DEVICE, {})
    return samples, on_device, replays
