"""A first call compiles few kernels, and another one of its kind compiles none; no GPU is needed to see it.

Launches do nothing here, and the milliseconds that a measurement would take are all alike.
"""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton, which is not installed")

from bench.no_gpu import kernels_launch_nothing
from reference.cases import CASES
from triton_losses import functional
from triton_losses.core import plan, tuning
from triton_losses.core.launch import Launch
from triton_losses.core.tuning import Tuned

MOST_CONFIGURATIONS, MOST_KERNELS = 4, 6
KERNEL_CASES = [case for case in CASES if not case.note and "distance_function" not in case.options]
pytestmark = [
    pytest.mark.not_interpreted,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose driver is not to be replaced"),
]


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The name of each kernel that was to be measured, and how many configurations of it were compiled for that."""
    counts, measured = [], {}

    def build(tuned, args, candidates):
        counts.append((tuned.kernel.__name__, len(candidates)))
        measured[tuned.kernel] = args

    def launch(self, *varying):
        args = measured.pop(self.kernel, None)
        if args is not None:  # what was measured has the types of what is launched
            assert [type_of(args[name]) for name in self.kernel.arg_names[: len(varying)]] == [*map(type_of, varying)]

    monkeypatch.setenv("TRITON_LOSSES_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(Tuned, "build", build)
    monkeypatch.setattr(Tuned, "launch", lambda *_: None)
    monkeypatch.setattr(Launch, "__call__", launch)
    monkeypatch.setattr(tuning, "median_ms", lambda launch: 1.0)
    monkeypatch.setattr(tuning, "can_measure", lambda: True)
    monkeypatch.setattr(tuning, "device_name", lambda: "a GPU that is not there")
    monkeypatch.setattr(tuning, "autotune", True)
    forget_choices()
    with kernels_launch_nothing():
        yield counts
    forget_choices()


def type_of(value):
    if isinstance(value, tuple):
        return tuple(map(type_of, value))
    return value.dtype if isinstance(value, torch.Tensor) else type(value)


def forget_choices():
    for tuned in tuning.made:
        tuned.chosen.clear()


def call(case, shape, dtype=torch.float32):
    tensors, options = case.arguments(shape, dtype)
    leaves = [t.requires_grad_(i < case.differentiable and t.is_floating_point()) for i, t in enumerate(tensors)]
    getattr(functional, case.name)(*leaves, **options).sum().backward()


def shape_of(case, rows, columns):
    return case.shape(2, columns) if case.classes else case.shape(rows, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [100, 5000])
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_a_first_call_compiles_at_most_four_configurations_of_a_kernel(case, columns, dtype, compiled):
    call(case, shape_of(case, 60, columns), dtype)
    assert len(compiled) <= MOST_KERNELS and all(count <= MOST_CONFIGURATIONS for _, count in compiled), compiled


@pytest.mark.parametrize("case", [case for case in KERNEL_CASES if not case.steps], ids=str)
def test_another_number_of_rows_and_a_width_alike_compile_nothing(case, compiled):
    call(case, shape_of(case, 60, 40000))
    before = list(compiled)
    call(case, shape_of(case, 64, 40000))
    call(case, shape_of(case, 60, 50304))
    assert compiled == before


def test_what_was_chosen_is_read_from_disk(compiled):
    case = next(case for case in CASES if case.name == "cross_entropy")
    call(case, (3, 5000))
    before = list(compiled)
    assert before
    forget_choices()
    plan.forget()
    call(case, (3, 5000))
    assert compiled == before


@pytest.mark.parametrize(
    "columns, options, measured",
    [(50257, {}, ["forward"]), (262144, {}, ["backward"]), (128256, {"label_smoothing": 0.1}, ["backward"])],
    ids=str,
)
def test_a_known_gpu_measures_only_what_its_choices_lack(columns, options, measured, compiled, monkeypatch):
    monkeypatch.setattr(tuning, "device_name", lambda: "NVIDIA H200")
    logits = torch.zeros(2, columns, dtype=torch.bfloat16, requires_grad=True)
    directions = {"forward": [], "backward": []}
    loss = functional.cross_entropy(logits, torch.zeros(2, dtype=torch.int64), **options)
    directions["forward"], before = list(compiled), len(compiled)
    loss.backward()
    directions["backward"] = compiled[before:]
    assert [direction for direction, found in directions.items() if found] == measured
