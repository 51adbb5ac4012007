"""The bench: what it counts is right, and nothing that a provider does ends the run."""

import itertools
import math
from dataclasses import replace

import pandas
import pytest
import torch

from bench import ceilings, curves, measure, memory, memory_curve, run, timing, train
from bench.__main__ import main
from bench.accuracy import error
from bench.measure import COLUMNS, PRESETS
from bench.passes import Call
from bench.providers import PROVIDERS, Provider, providers_of
from bench.report import frame_of
from bench.timing import Budget, take_turns
from reference import cases
from reference.cases.case import Case
from reference.cases.draws import logits_and_labels, numbers

pytestmark = pytest.mark.not_interpreted
CPU = torch.device("cpu")
TINY = Case("mse_loss", numbers, bench={"quick": ((6, 5),)})
TINY_ROWS = Case("cross_entropy", logits_and_labels, {"label_smoothing": 0.1}, bench={"quick": ((6, 5), (8, 16))})


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setitem(PRESETS, "quick", replace(PRESETS["quick"], budget=Budget(seconds=0.01, least=1, most=2)))


def kept(*tensors):
    return tensors


def test_peak_memory_is_exact_to_the_byte():
    def work():
        first = torch.empty(1000)
        second = torch.empty(300)
        del first
        return kept(second, torch.empty(500), torch.empty(100))

    assert memory.peak_bytes(lambda: work, CPU) == 4 * (1000 + 300)


@pytest.mark.parametrize(
    "which, floats",
    [
        ("no-grad", 1000 + 1),  # exp x, its sum
        ("forward", 1000 + 1),  # the same, and exp x is saved
        ("backward", 1 + 1000),  # the upstream 1, the gradient; exp x was there before
        ("full", 1000 + 1 + 1 + 1000),
    ],
)
def test_the_peak_of_each_pass_is_what_one_computes_by_hand(which, floats):
    call = Call(lambda x: x.exp().sum(), (torch.randn(1000),), {})
    call.value_and_gradients()
    assert memory.peak_bytes(lambda: call.ready(which, 1), CPU) == 4 * floats


def test_the_gradient_of_earlier_work_is_gone_before_the_next():
    call = Call(lambda x: x.exp().sum(), (torch.randn(1000),), {})
    call.ready("full", 1)()
    call.ready("forward", 1)
    assert call.tensors[0].grad is None


def test_memory_freed_by_the_work_makes_room():
    def prepare():
        held = [torch.empty(1000)]

        def work():
            held.clear()
            return torch.empty(1200)

        return work

    assert memory.peak_bytes(prepare, CPU) == 4 * 200


def test_the_error_is_relative_to_the_largest_exact_component():
    truth = torch.tensor(4.0).double(), torch.tensor([2.0, 0.0]).double()
    assert error((torch.tensor(4.0), torch.tensor([2.0, 0.5])), truth) == 0.25
    assert error((torch.tensor(1.0), torch.tensor([2.0, 0.5])), truth) == 0.75


def test_providers_take_turns_and_one_that_fails_drops_out():
    order, failures = [], {}

    def seconds_of(work):
        order.append(work)
        if work == "b" and order.count("b") == 2:
            raise RuntimeError("out of registers")
        return 6.0

    ready = {name: lambda times, name=name: name for name in "abc"}
    samples = take_turns(ready, {"a": 1, "b": 1, "c": 2}, seconds_of, Budget(seconds=60, least=1, most=3), failures)
    assert "".join(order) == "abcabcac"
    assert samples["a"] == [6.0] * 3 and samples["c"] == [3.0] * 3
    assert failures == {"b": "RuntimeError: out of registers"}


def test_a_gpus_own_part_of_the_time_is_measured_while_it_is_busy(monkeypatch):
    """With a GPU that is not there: what is timed is the work between two events, after the spinning."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            order.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("spin"))
    monkeypatch.setattr(timing, "CACHE_FLUSH", 8)
    for spin, before in ((0, []), (100, ["spin"])):
        order.clear()
        assert timing.gpu_stopwatch(CPU, spin)(lambda: order.append("work")) == 2e-3
        assert order == [*before, "event", "work", "event"]


def test_a_failing_provider_becomes_a_row_that_says_so(monkeypatch):
    def make(case):
        raise OSError("no C compiler\nwas found")

    monkeypatch.setitem(PROVIDERS, "broken", Provider(make))
    rows = measure.measure(TINY, (6, 5), torch.float32, CPU, PRESETS["quick"], ["eager", "broken"])
    said = {row["provider"]: (row["failed"], math.isnan(row["ms"])) for row in rows if row["pass"] == "full"}
    assert said == {"eager": ("", False), "broken": ("OSError: no C compiler was found", True)}


def test_a_provider_without_the_loss_has_no_row(monkeypatch):
    monkeypatch.setitem(PROVIDERS, "peer", Provider(lambda case: None))
    rows = measure.measure(TINY, (6, 5), torch.float32, CPU, PRESETS["quick"], ["eager", "peer"])
    assert {row["provider"] for row in rows} == {"eager"}


def test_a_case_that_does_not_fit_is_skipped_in_so_many_words(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3_000_000)
    rows = measure.measure(TINY, (1 << 20,), torch.float32, CPU, PRESETS["quick"], ["eager"])
    assert [row["failed"].partition(":")[0] for row in rows] == ["skipped"] * len(PRESETS["quick"].passes)


def test_the_quick_preset_compiles_headlines_alone_at_their_largest_shape():
    shapes = {"quick": ((2, 3), (40, 3)), "full": ((2, 3),)}
    plain, headline = (Case("mse_loss", numbers, bench=shapes, headline=is_headline) for is_headline in (False, True))
    compiled = {name for name, provider in PROVIDERS.items() if provider.compiles}

    def compiles(*arguments):
        return compiled <= set(providers_of(*arguments, wanted=tuple(PROVIDERS)))

    assert compiles(headline, (40, 3), "quick") and not compiles(headline, (2, 3), "quick")
    assert compiles(plain, (2, 3), "full") and not compiles(plain, (40, 3), "quick")


def test_a_shape_too_large_to_be_judged_takes_the_error_of_a_smaller_one():
    common = dict.fromkeys(COLUMNS, "") | {"loss": "mse_loss", "provider": "eager"}
    frame = frame_of([common | {"shape": "2", "error": 1e-7}, common | {"shape": "99", "error": math.nan}], COLUMNS)
    assert list(frame["error"]) == [1e-7, 1e-7]


def test_the_list_names_every_timed_case_and_provider(capsys):
    main(["--list"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for case in cases.CASES:
        assert not case.bench or " ".join([case.name, *case.option_words()]) in lines
    assert set(PROVIDERS) <= set(lines)


def test_an_unknown_loss_is_refused_with_the_known_names(capsys):
    with pytest.raises(SystemExit):
        main(["mse", "no_such_loss"])
    said = capsys.readouterr().err
    assert "'no_such_loss'" in said
    assert all(case.name in said for case in cases.CASES if case.bench)


def test_a_run_writes_the_results_the_report_and_the_picture(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cases, "CASES", [TINY, TINY_ROWS])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    main(["--device", "cpu", "--out", str(tmp_path), "--providers", "triton_losses", "eager"])

    results = pandas.read_csv(tmp_path / "results.csv")
    assert list(results.columns) == list(COLUMNS)
    assert len(results) == 3 * 2 * len(PRESETS["quick"].passes)  # shapes, providers, passes
    assert results["failed"].isna().all() and (results["ms"] > 0).all() and (results["error"] < 1e-5).all()

    printed, report = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    for text in (printed, report):
        assert "no Triton kernel ran" in text and "cross_entropy label_smoothing=0.1" in text and "8×16" in text
    assert "(speedup.png)" in report and "(roofline.png)" in report and "Ceilings: copy" in report
    for picture in ("speedup.png", "roofline.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert (results["share"] > 0).all() and (results["noise"].dropna() >= 0).all()


def test_an_interrupted_run_keeps_its_rows_and_resumes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cases, "CASES", [TINY, TINY_ROWS])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    measured, command = [], ["--device", "cpu", "--out", str(tmp_path), "--providers", "triton_losses", "eager"]

    def measure_until_interrupted(case, shape, *arguments):
        measured.append((case.name, shape))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure.measure(case, shape, *arguments)

    monkeypatch.setattr(run, "measure", measure_until_interrupted)
    main(command)
    assert "Interrupted: 2 of 3 cases were not measured" in capsys.readouterr().out
    first = pandas.read_csv(tmp_path / "results.csv")
    assert set(first["loss"]) == {"mse_loss"}

    main([*command, "--resume"])
    assert "Interrupted" not in (tmp_path / "report.md").read_text()
    assert measured == [("mse_loss", (6, 5)), *[("cross_entropy", (6, 5))] * 2, ("cross_entropy", (8, 16))]
    both = pandas.read_csv(tmp_path / "results.csv")
    pandas.testing.assert_frame_equal(both[: len(first)], first, check_dtype=False)
    assert len(both) == 3 * len(first)


def test_the_floor_is_that_of_the_bytes_or_of_a_heads_products():
    rates = ceilings.Ceilings(copy=1e9, read=1e9, products={torch.float32: 1e9})
    head = next(case for case in cases.CASES if case.features)
    row = {"moved_mb": 3.0, "pass": "full"}
    assert ceilings.floor_ms(row, TINY, (6, 5), torch.float32, rates) == pytest.approx(3.0)
    assert ceilings.floor_ms(row, head, (100, 10, 1000), torch.float32, rates) == pytest.approx(3 * 2 * 1e6 / 1e9 * 1e3)
    for case in cases.CASES:
        for shape in itertools.chain(*case.bench.values()):
            assert ceilings.floor_ms(row, case, shape, torch.float32, rates) >= 3.0


def test_the_machines_rates_are_measured():
    rates = ceilings.measured(CPU, (torch.float32,))
    assert rates.copy > 0 and rates.read > 0 and rates.products[torch.float32] > 0
    assert "GB/s" in rates.line()


def test_the_memory_curve_shows_heads_alone_and_that_ours_grows_by_the_weight(monkeypatch, tmp_path, capsys):
    head = next(case for case in cases.CASES if case.name == "linear_cross_entropy")
    monkeypatch.setattr(cases, "CASES", [TINY, head])
    monkeypatch.setattr(memory_curve, "CLASSES", (1024, 4096))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    main(["memory", "--device", "cpu", "--out", str(tmp_path)])
    frame = pandas.read_csv(tmp_path / "memory.csv")
    assert set(frame["loss"]) == {head.name} and frame["failed"].isna().all() and len(frame) == 2 * 3
    peak = frame.pivot(index="classes", columns="provider", values="peak_mb")
    assert (peak["triton_losses"] < peak["eager"]).all() and (peak[memory_curve.WEIGHT] < peak["triton_losses"]).all()
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG") and "4096" in capsys.readouterr().out
    monkeypatch.setattr(cases, "CASES", [TINY])
    with pytest.raises(SystemExit):
        main(["memory"])


@pytest.mark.builds
def test_a_build_is_read_and_its_limits_are_those_of_the_machine(tmp_path):
    build = pytest.importorskip("bench.build", reason="it builds kernels, which needs Triton")
    frame = build.table([case for case in cases.CASES if case.name == "kl_div" and case.bench], dtypes=[torch.float32])
    assert len(frame) == 2 and (frame["registers"] > 0).all() and (frame["spills"] == 0).all()
    assert frame["share"].between(0, 1).all() and (frame["programs"] * frame["registers"] > 0).all()
    assert frame["instructions"].between(1, 200).all()
    build.write(frame, ["here"], tmp_path)
    assert "kl_div" in (tmp_path / "build.md").read_text() and (tmp_path / "build.csv").exists()


@pytest.mark.parametrize(
    "code, bytes_",
    [
        ("LDG.E.128.CONSTANT R4, [R2.64]", (16, 0)),
        ("@P0 LDG.E.EF.U16 R4, [R2.64]", (2, 0)),
        ("STG.E [R2.64], R5", (0, 4)),
        ("LDS.128 R4, [R2]", (0, 0)),
    ],
)
def test_bytes_are_read_off_the_machine_code(code, bytes_):
    assert pytest.importorskip("bench.build").bytes_of([code]) == bytes_


def results(path, **ms):
    """A results.csv in which the named losses took so many milliseconds, give or take a tenth."""
    rows = [
        {"loss": loss, "provider": "triton_losses", "pass": "full", "ms": t, "p20_ms": 0.9 * t, "p80_ms": 1.1 * t}
        for loss, t in ms.items()
    ]
    frame_of([dict.fromkeys(COLUMNS, "") | row for row in rows], COLUMNS).to_csv(path, index=False)
    return str(path)


def test_compare_names_what_changed_beyond_noise(tmp_path, capsys):
    before = results(tmp_path / "before.csv", faster=2.0, slower=1.0, alike=1.0, gone=1.0)
    after = results(tmp_path / "after.csv", faster=1.0, slower=1.5, alike=1.05, new=1.0)
    main(["compare", before, after])
    said = capsys.readouterr().out
    assert "3 measurements in both: 1 faster, 1 slower, 1 within noise." in said
    assert said.index("slower  ") < said.rindex("faster") and "alike" not in said and "new" not in said


@pytest.mark.parametrize("files, message", [(1, "two results.csv, got 1"), (2, "No such file")])
def test_compare_refuses_what_is_not_two_results(files, message, capsys):
    with pytest.raises(SystemExit):
        main(["compare", *["nowhere.csv"] * files])
    assert message in capsys.readouterr().err


def test_compare_refuses_another_table(tmp_path, capsys):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        main(["compare", *[str(tmp_path / "other.csv")] * 2])
    assert "is no results.csv of the bench" in capsys.readouterr().err


@pytest.mark.parametrize("name", train.TASKS)
def test_training_goes_the_same_way_with_our_losses(name, tmp_path):
    """Three steps: each rounds the gradients anew, and Adam's first steps depend on little but their signs."""
    frame = train.table([name], CPU, steps=3)
    ours, plain = (frame[frame["provider"] == provider]["loss"].to_numpy() for provider in train.LOSSES)
    assert len(ours) == 3 and abs(ours - plain).max() < 1e-5 and ours[0] != ours[-1]
    train.write(frame, ["here", "with this"], tmp_path)
    assert (tmp_path / train.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_train_refuses_what_it_does_not_know(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        main(["train", "vision"])
    assert "train takes lm, seg, dpo, grpo, got vision" in capsys.readouterr().err


def test_curves_are_the_losses_own_values_and_gradients(tmp_path):
    main(["curves", "--out", str(tmp_path)])
    assert (tmp_path / curves.PICTURE).read_bytes().startswith(b"\x89PNG")
    x, values, gradients = curves.curve(curves.PANELS[0], "mse_loss", {})
    torch.testing.assert_close(values, x * x)
    torch.testing.assert_close(gradients, 2 * x)
    drawn = {name for panel in curves.PANELS for _, name, _ in panel.losses}
    assert drawn <= {case.name for case in cases.CASES}
