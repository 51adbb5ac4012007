"""A launch configuration is measured once, remembered, and never trusted blindly; no GPU is needed to see it.

A stand-in timer reads the milliseconds off the configuration, and a stand-in kernel writes down its launches.
"""

import json
import logging
import threading
import time

import pytest
import torch

pytest.importorskip("triton")

from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.errors import OutOfResources, PTXASError

from triton_losses.core import launch, tuning
from triton_losses.core.op import STATE

SLOW, FAST, MIDDLE = {"BLOCK": 1, "num_warps": 1}, {"BLOCK": 2, "num_warps": 2}, {"BLOCK": 3, "num_warps": 4}
MS = {1: 3.0, 2: 1.0, 3: 2.0}


class Kernel:
    """Looks like a JITFunction, and adds 1 to the argument named ``x``."""

    __name__ = "kernel"
    arg_names = ("x", "rows", "columns", "formula", "BLOCK")

    def __init__(self, cache_key="source"):
        self.cache_key, self.launches, self.compiled = cache_key, [], []

    def warmup(self, **args):
        self.compiled.append(args["BLOCK"])

    def __getitem__(self, grid):
        def launch(*values, **args):
            args |= dict(zip(self.arg_names, values))
            self.launches.append((grid, args))
            args["x"] += 1

        return launch


def arguments(rows=4, columns=8, dtype=torch.float32, formula="mse"):
    return {"x": torch.zeros(rows, columns, dtype=dtype), "rows": rows, "columns": columns, "formula": formula}


def make(kernel=None, **changes):
    """What a new process has: the kernel, nothing remembered."""
    options = {
        "configs": [FAST, MIDDLE],
        "rule": lambda args: SLOW,
        "key": lambda args: (args["formula"], args["columns"], str(args["x"].dtype)),
        "programs": lambda rows, fixed: rows,
        "size": "rows",
    }
    return tuning.Tuned(kernel or Kernel(), **{**options, **changes})


def run(tuned, **args):
    tuned.bind(**args)(args["x"], args["rows"])


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """As if one GPU were there; returns the configurations' BLOCKs in the order they were measured."""
    measured = []

    def timer(launch):
        launch()
        measured.append(launch.args[-1]["BLOCK"])
        return MS[measured[-1]]

    monkeypatch.setenv("TRITON_LOSSES_CACHE_DIR", str(tmp_path / "choices"))
    monkeypatch.setattr(tuning, "INTERPRET", False)
    monkeypatch.setattr(launch, "DIRECT", False)
    monkeypatch.setattr(tuning, "autotune", True)
    monkeypatch.setattr(tuning, "can_measure", lambda: True)
    monkeypatch.setattr(tuning, "capturing", lambda: False)
    monkeypatch.setattr(tuning, "device_name", lambda: "GPU A")
    monkeypatch.setattr(tuning, "median_ms", timer)
    return measured


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def files(tmp_path):
    return sorted((tmp_path / "choices").iterdir()) if (tmp_path / "choices").exists() else []


def the_file(tmp_path):
    (path,) = files(tmp_path)
    return path


def raises(error):
    def timer(launch):
        raise error

    return timer


def test_the_fastest_configuration_wins_and_is_launched(gpu):
    kernel = Kernel()
    run(make(kernel), **arguments(rows=5))
    assert gpu == [1, 2, 3]
    grid, args = kernel.launches[-1]
    assert grid == (5,) and args["BLOCK"] == 2 and args["num_warps"] == 2 and args["enable_fp_fusion"] is True


def test_all_configurations_are_compiled_before_the_first_is_timed(gpu, monkeypatch):
    kernel, seen, timer = Kernel(), [], tuning.median_ms
    monkeypatch.setattr(tuning, "median_ms", lambda launch: seen.append(sorted(kernel.compiled)) or timer(launch))
    make(kernel).config(arguments())
    assert seen == [[1, 2, 3]] * 3


def test_what_is_known_of_a_gpu_is_not_measured(gpu, monkeypatch):
    choices = {"GPU A": {"kernel": {("mse", 8, "torch.float32"): MIDDLE, ("mse", 16, "torch.float32"): {"BLOCK": 99}}}}
    monkeypatch.setattr(tuning, "CHOICES", choices)
    assert make().config(arguments()) == MIDDLE and gpu == []
    assert make().config(arguments(columns=16)) == FAST and gpu == [1, 2, 3]  # no configuration of this kernel
    assert make().config(arguments(columns=32)) == FAST


def test_what_was_chosen_has_the_form_of_what_is_known(gpu, monkeypatch, tmp_path):
    tuned = make()
    tuned.config(arguments())
    monkeypatch.setattr(tuning, "CHOICES", tuning.chosen())
    monkeypatch.setenv("TRITON_LOSSES_CACHE_DIR", str(tmp_path / "another"))
    gpu.clear()
    assert make().config(arguments()) == FAST and gpu == []


def test_a_kernel_with_one_configuration_is_not_measured(gpu, tmp_path):
    assert make(configs=[]).config(arguments()) == SLOW and gpu == [] and files(tmp_path) == []


def test_the_rule_wins_a_tie(gpu, monkeypatch):
    monkeypatch.setattr(tuning, "median_ms", lambda launch: 1.0)
    assert make().config(arguments()) == SLOW


def test_it_measures_once_for_any_row_count(gpu):
    tuned = make()
    for rows in (4, 1, 4096, 4):
        run(tuned, **arguments(rows=rows))
    assert gpu == [1, 2, 3]


@pytest.mark.parametrize("change", [{"formula": "huber"}, {"columns": 16}, {"dtype": torch.float64}], ids=str)
def test_it_measures_once_per_formula_columns_and_dtype(gpu, change):
    tuned = make()
    for _ in range(2):
        run(tuned, **arguments())
        run(tuned, **arguments(**change))
    assert gpu == [1, 2, 3] * 2


def test_configurations_may_depend_on_the_arguments(gpu):
    tuned = make(configs=lambda args: [FAST] if args["x"].dtype == torch.float32 else [MIDDLE])
    assert tuned.config(arguments()) == FAST
    assert tuned.config(arguments(dtype=torch.float64)) == MIDDLE


def test_a_new_process_reads_the_choice_from_disk(gpu):
    make().config(arguments())
    gpu.clear()
    assert make().config(arguments(rows=7)) == FAST and gpu == []


def test_a_different_gpu_is_measured_again(gpu, monkeypatch):
    tuned = make()
    tuned.config(arguments())
    monkeypatch.setattr(tuning, "device_name", lambda: "GPU B")
    assert tuned.config(arguments()) == FAST and gpu == [1, 2, 3] * 2
    gpu.clear()
    assert make().config(arguments()) == FAST and gpu == []  # each has its own file


def test_a_changed_kernel_is_measured_again(gpu):
    make(Kernel("source")).config(arguments())
    make(Kernel("other source")).config(arguments())
    assert gpu == [1, 2, 3] * 2


def test_a_changed_formula_is_measured_again(gpu):
    for source in ("x * y", "x - y"):
        make().config({**arguments(), "FORMULA": Kernel(source)})
    assert gpu == [1, 2, 3] * 2


def test_another_triton_is_measured_again(gpu, monkeypatch):
    make().config(arguments())
    monkeypatch.setattr(tuning.triton, "__version__", "0.0.0")
    make().config(arguments())
    assert gpu == [1, 2, 3] * 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"7",
        b"null",
        b"{}",
        b"[" * 100_000,
        b'{"config": null}',
        b'{"config": {"BLOCK": 99, "num_warps": 2}}',
        b'{"config": {"BLOCK": 2}}',
    ],
    ids=lambda content: repr(content[:40]),
)
def test_nonsense_in_the_file_is_tuned_again(gpu, tmp_path, content):
    make().config(arguments())
    the_file(tmp_path).write_bytes(content)
    gpu.clear()
    assert make().config(arguments()) == FAST and gpu == [1, 2, 3]
    assert json.loads(the_file(tmp_path).read_text())["config"] == FAST


def test_the_file_is_believed_over_the_timer(gpu, tmp_path):
    make().config(arguments())
    path = the_file(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "config": MIDDLE}))
    assert make().config(arguments()) == MIDDLE


def test_the_cache_lies_in_tritons_own_unless_told_otherwise(gpu, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_LOSSES_CACHE_DIR")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    make().config(arguments())
    assert len(list((tmp_path / "triton_losses").glob("kernel-*.json"))) == 1


def test_nothing_is_measured_under_capture_and_the_rule_is_not_remembered(gpu, monkeypatch):
    tuned = make()
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    assert tuned.config(arguments()) == SLOW and gpu == []
    monkeypatch.setattr(tuning, "capturing", lambda: False)
    assert tuned.config(arguments()) == FAST and gpu == [1, 2, 3]


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_remembered_choice_is_used_under_capture(gpu, monkeypatch, where):
    tuned = make()
    tuned.config(arguments())
    gpu.clear()
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    assert (tuned if where == "memory" else make()).config(arguments()) == FAST and gpu == []


def test_the_rule_decides_when_tuning_is_off_whatever_is_remembered(gpu):
    tuned = make()
    assert tuned.config(arguments()) == FAST
    gpu.clear()
    tuning.set_autotune(False)
    assert tuned.config(arguments()) == SLOW and make().config(arguments(columns=16)) == SLOW and gpu == []
    tuning.set_autotune(True)
    assert tuned.config(arguments()) == FAST and gpu == []


def test_the_rule_decides_under_deterministic_algorithms(gpu, deterministic):
    assert make().config(arguments()) == SLOW and gpu == []


def test_the_rule_decides_where_nothing_can_be_measured(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "can_measure", lambda: False)
    assert make().config(arguments()) == SLOW and gpu == [] and files(tmp_path) == []


def test_the_interpreter_follows_the_rule_and_is_told_no_launch_options(gpu, monkeypatch):
    monkeypatch.setattr(tuning, "INTERPRET", True)
    kernel = Kernel()
    run(make(kernel), **arguments())
    ((_, args),) = kernel.launches
    assert gpu == [] and args["BLOCK"] == 1 and set(args) == set(Kernel.arg_names)


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(2, 1, "shared memory"),
        PTXASError("no"),
        CompileTimeAssertionFailure("", None),
        torch.OutOfMemoryError("full"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_configuration_that_does_not_launch_is_skipped(gpu, monkeypatch, error, caplog):
    timer = tuning.median_ms
    monkeypatch.setattr(
        tuning, "median_ms", lambda launch: raises(error)(launch) if launch.args[-1] == FAST else timer(launch)
    )
    with caplog.at_level(logging.INFO, "triton_losses"):
        assert make().config(arguments()) == MIDDLE
    assert any("does not launch" in record.getMessage() for record in caplog.records)


def test_an_error_of_another_kind_is_the_callers_to_see(gpu, monkeypatch):
    monkeypatch.setattr(tuning, "median_ms", raises(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        make().config(arguments())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), OutOfResources(2, 1, "shared memory")], ids=["memory", "launch"]
)
def test_when_nothing_launches_the_rule_decides_and_nothing_is_remembered(gpu, monkeypatch, tmp_path, error):
    tuned, timer = make(), tuning.median_ms
    monkeypatch.setattr(tuning, "median_ms", raises(error))
    assert tuned.config(arguments()) == SLOW and files(tmp_path) == []
    monkeypatch.setattr(tuning, "median_ms", timer)
    assert tuned.config(arguments()) == FAST


def test_no_memory_for_a_copy_is_survived_and_not_remembered(gpu, monkeypatch, tmp_path):
    tuned = make(written=("x",))
    with monkeypatch.context() as full:
        full.setattr(tuning, "scratch", raises(torch.OutOfMemoryError("full")))
        assert tuned.config(arguments()) == SLOW and files(tmp_path) == []
    assert tuned.config(arguments()) == FAST


def test_some_rows_are_measured_and_all_are_launched(gpu):
    kernel = Kernel()
    run(make(kernel, bytes_each=lambda args: tuning.SAMPLE_BYTES // 2), **arguments(rows=9))
    assert [grid for grid, _ in kernel.launches] == [(2,), (2,), (2,), (9,)]


def test_what_a_kernel_updates_in_place_is_measured_on_copies(gpu):
    kernel, args = Kernel(), arguments()
    tuned = make(kernel, written=("x",))
    tuned.config(args)
    assert len(kernel.launches) == 3 and (args["x"] == 0).all()
    run(tuned, **args)
    assert (args["x"] == 1).all()


def test_the_copies_keep_their_strides(gpu):
    kernel, storage = Kernel(), torch.zeros(4, 16)
    make(kernel, written=("x",)).config({**arguments(), "x": storage[:, :8]})
    assert all(args["x"].stride() == (16, 1) and args["x"].shape == (4, 8) for _, args in kernel.launches)
    assert (storage == 0).all()


def test_an_in_place_argument_may_be_absent(gpu):
    assert make(written=("x", "extra")).config({**arguments(), "extra": None}) == FAST


def test_racing_writers_leave_a_whole_file(gpu, tmp_path):
    path, believed = tmp_path / "choices" / "kernel.json", []
    tuning.remember(path, {"config": FAST, "ms": 1.0})

    def write(config):
        for _ in range(50):
            tuning.remember(path, {"config": config, "padding": "x" * 100_000})
            believed.append(tuning.recall(path, [SLOW, FAST, MIDDLE]) is not None)

    threads = [threading.Thread(target=write, args=(config,)) for config in (SLOW, FAST, MIDDLE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(believed) == 150 and all(believed)
    assert files(tmp_path) == [path]  # no draft is left behind


def test_threads_share_one_measurement(gpu, monkeypatch):
    tuned, start, choices, timer = make(), threading.Barrier(4), [], tuning.median_ms
    monkeypatch.setattr(tuning, "median_ms", lambda launch: time.sleep(0.01) or timer(launch))

    def ask():
        start.wait()
        choices.append(tuned.config(arguments()))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert choices == [FAST] * 4 and gpu == [1, 2, 3]


def test_a_disk_that_cannot_be_written_is_logged_and_survived(gpu, tmp_path, caplog):
    (tmp_path / "choices").write_text("a file where the folder should be")
    tuned = make()
    with caplog.at_level(logging.WARNING, "triton_losses"):
        assert tuned.config(arguments()) == FAST
    assert "this process only" in caplog.text
    gpu.clear()
    assert tuned.config(arguments()) == FAST and gpu == []


def test_the_log_says_what_is_tuned_and_what_won(gpu, caplog):
    with caplog.at_level(logging.INFO, "triton_losses"):
        make().config(arguments())
    first, last = (record.getMessage() for record in caplog.records)
    assert "kernel" in first and "('mse', 8, 'torch.float32')" in first and "3 configurations" in first
    assert str(FAST) in last and "1.0000 ms" in last


def test_shapes_only_launches_and_measures_nothing(gpu, monkeypatch):
    kernel = Kernel()
    tuned = make(kernel)
    monkeypatch.setattr(STATE, "shapes_only", True, raising=False)
    tuned.bind(**arguments())
    assert tuned.config(arguments()) == SLOW
    assert kernel.launches == [] and gpu == []


def test_zero_programs_launch_and_measure_nothing(gpu):
    kernel = Kernel()
    tuned = make(kernel)
    run(tuned, **arguments(rows=0))
    assert kernel.launches == [] and gpu == []
    run(tuned, **arguments())
    run(tuned, **arguments(rows=0))
    assert gpu == [1, 2, 3] and len(kernel.launches) == 4
