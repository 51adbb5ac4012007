"""The bench's figures of a GPU, with a GPU that is not there, and of first calls in new processes."""

import contextlib
import subprocess
import types
import warnings

import pandas
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType

from bench import first_call, measure, on_gpu, timing
from bench.__main__ import main
from bench.measure import PRESETS
from reference import cases
from reference.cases.case import Case
from reference.cases.draws import numbers

pytestmark = pytest.mark.not_interpreted
CPU = torch.device("cpu")
TINY = Case("mse_loss", numbers, bench={"quick": ((6, 5),)})


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda's functions, which write down what happens to a GPU in ``order``."""
    order, mode = [], ["default"]

    class Graph:
        def replay(self):
            order.append("replay")

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def capture(graph):
        order.append("capture")
        yield
        order.append("captured")

    stand_ins = {
        "synchronize": lambda device=None: order.append("wait"),
        "_sleep": lambda cycles: order.append("spin"),
        "get_sync_debug_mode": lambda: mode[0],
        "set_sync_debug_mode": lambda wanted: mode.__setitem__(0, wanted),
        "empty_cache": lambda: order.append("empty"),
        "reset_peak_memory_stats": lambda device: None,
        "memory_reserved": lambda device: 3_000_000,
        "max_memory_reserved": lambda device: 5_000_000 if "work" in order else 3_000_000,
        "CUDAGraph": Graph,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: Stream(),
        "graph": capture,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return types.SimpleNamespace(order=order, mode=mode)


def test_synchronisations_are_counted_and_the_mode_is_as_it_was(gpu):
    def work():
        assert gpu.mode == ["warn"]
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)")
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)")
        warnings.warn("something else")

    assert on_gpu.syncs(lambda: work, CPU) == 2
    assert gpu.mode == ["default"]


def test_the_hosts_time_is_taken_while_the_gpu_is_busy(gpu):
    assert on_gpu.host_us(lambda: lambda: gpu.order.append("work"), CPU) > 0
    assert gpu.order == ["wait", "spin", "work", "wait"]


def test_reserved_memory_is_what_the_work_adds(gpu):
    assert on_gpu.reserved_mb(lambda: lambda: gpu.order.append("work"), CPU) == 2.0


def test_what_is_on_the_gpu_is_counted_as_launches(gpu, monkeypatch):
    events = [types.SimpleNamespace(device_type=kind) for kind in (DeviceType.CPU, DeviceType.CUDA, DeviceType.CUDA)]
    recorded = types.SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(on_gpu, "profile", lambda activities: contextlib.nullcontext(recorded))
    assert on_gpu.launches(lambda: lambda: None, CPU) == 2


def test_a_graph_is_captured_after_warm_ups_and_replayed(gpu):
    ready = on_gpu.replayed(lambda: lambda: gpu.order.append("work"), CPU)
    ready(1)()
    assert gpu.order == [*["work"] * on_gpu.WARM_UPS, "capture", "work", "captured", "replay"]


def test_a_run_on_a_gpu_has_all_columns(gpu, monkeypatch):
    """A measurement that fails leaves its column empty, and the others stay."""

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 2.0

    def fails(prepare, device):
        raise RuntimeError("no counters here")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing, "CACHE_FLUSH", 8)
    monkeypatch.setattr(timing, "stopwatch", lambda device, busy=False: timing.gpu_stopwatch(CPU, int(busy)))
    monkeypatch.setattr(measure, "stopwatch", timing.stopwatch)
    monkeypatch.setattr(measure, "peak_bytes", lambda prepare, device: 7_000_000)
    monkeypatch.setattr(on_gpu, "launches", fails)
    monkeypatch.setattr(measure, "shortage", lambda *_: "")
    monkeypatch.setattr(Case, "arguments", lambda case, shape, dtype, *_, **__: (case.draw(shape, dtype), {}))
    rows = measure.measure(TINY, (6, 5), torch.float32, torch.device("cuda"), PRESETS["quick"], ["eager"])
    found = {row["pass"]: row for row in rows}["full"]
    assert found["failed"] == "" and found["device_ms"] == found["graph_ms"] == 2.0 and found["peak_mb"] == 7.0
    assert found["syncs"] == 0 and found["host_us"] > 0 and found["reserved_mb"] >= 0
    assert found["launches"] != found["launches"]  # nan


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA, not even for tensors without memory")
def test_every_timed_case_is_drawn_where_it_is_used():
    for case in cases.CASES:
        for shapes in list(case.bench.values())[:1]:
            with FakeTensorMode():
                tensors, options = case.arguments(shapes[0], device="cuda", drawn_there=True)
            drawn = [t for t in (*tensors, *options.values()) if isinstance(t, torch.Tensor)]
            assert {t.device.type for t in drawn} == {"cuda"}, case


def test_first_calls_are_timed_in_processes_of_their_own(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(first_call, "COMPARED", ("triton_losses",))
    monkeypatch.setattr(Case, "largest", lambda case, preset: (64, 10))
    main(["first", "huber_loss", "--device", "cpu", "--out", str(tmp_path)])
    frame = pandas.read_csv(tmp_path / "first.csv")
    assert list(frame.columns) == list(first_call.COLUMNS) and set(frame["loss"]) == {"huber_loss"}
    assert (frame[["cold_s", "disk_s"]] > 0).all(axis=None) and "huber_loss" in capsys.readouterr().out
    assert "cold" in (tmp_path / "first.md").read_text()


def test_a_process_that_fails_says_why(monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "Traceback ...\nMemoryError: no memory left\n")

    monkeypatch.setattr(subprocess, "run", run)
    found = first_call.in_a_new_process([case for case in cases.CASES if case.headline], "eager", CPU, ".")
    assert {error for _, error in found} == {"MemoryError: no memory left"}
