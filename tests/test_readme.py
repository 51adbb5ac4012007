"""The README says what is true: its table of losses, its numbers, its commands, its example."""

import csv
import inspect
import pathlib
import re
import statistics
import subprocess
import sys

import pytest
import torch

import triton_losses
from triton_losses import functional

pytestmark = pytest.mark.not_interpreted
ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


ORDER = [
    "language",
    "linear_distillation",
    "distillation",
    "classification",
    "margin",
    "categorical",
    "segmentation",
    "compound",
    "lovasz",
    "regression",
    "binary",
    "divergence",
    "contrastive",
    "metric",
    "sequence",
    "preference",
]


def section(name):
    return README.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip()


def table_of_losses():
    """A heading for each theme, and a line for each of its functions: name, modules, first docstring line."""
    modules, themes = {}, {}
    for name, value in vars(triton_losses).items():
        if inspect.isclass(value) and issubclass(value, torch.nn.Module) and hasattr(value, "function"):
            modules.setdefault(value.function.__name__, []).append(f"`{name}`")
    preference = [
        f for f in vars(triton_losses).values() if inspect.isfunction(f) and f.__module__ == "triton_losses.preference"
    ]
    for f in [*vars(functional).values(), *preference]:
        if inspect.isfunction(f):
            themes.setdefault(f.__module__, []).append(f)
    lines = ["| function | module | |", "|---|---|---|"]
    for theme, functions in sorted(themes.items(), key=lambda item: (ORDER.index(item[0].rsplit(".")[-1]), item[0])):
        heading, words = first_paragraph(sys.modules[theme]).split(": ", 1)
        lines.append(f"| **{heading}** | | {words} |")
        for f in sorted(functions, key=lambda f: f.__name__):
            formula = first_paragraph(f).replace("|", "\\|")
            lines.append(f"| `{f.__name__}` | {', '.join(modules.get(f.__name__, []))} | {formula} |")
    return "\n".join(lines)


def first_paragraph(documented):
    return " ".join(inspect.getdoc(documented).split("\n\n")[0].split())


def test_the_table_of_losses_is_what_the_package_has():
    assert section("losses") == table_of_losses(), f"between its markers README.md should have:\n{table_of_losses()}"


REPORTS = {"speed": "bench/results/cpu/report.md", "peers": "bench/results/cpu/peers/report.md"}


@pytest.mark.parametrize("part", REPORTS)
def test_every_time_in_the_readme_stands_in_the_committed_report(part):
    report = (ROOT / REPORTS[part]).read_text().splitlines()
    rows = [line for line in section(part).splitlines() if line.startswith("|")]
    assert len(rows) > 5 and all(row in report for row in rows)


@pytest.mark.parametrize("part", REPORTS)
def test_the_conditions_in_the_readme_are_those_of_the_report(part):
    report = (ROOT / REPORTS[part]).read_text()
    conditions = re.search(r"^- (.* cores, .*)$", report, re.M)[1].split(", load")[0]
    assert conditions in section("speed") and f"]({REPORTS[part]})" in section(part)


def test_the_peaks_of_preference_training_are_those_of_the_committed_runs():
    with (ROOT / "bench/results/cpu/train.csv").open() as file:
        peaks = {(row["task"], row["provider"]): float(row["peak_mb"]) for row in csv.DictReader(file)}
    said = re.search(r"DPO or GRPO peaks at ([\d.]+) MB with ours\s+and at ([\d.]+) MB the plain way", README).groups()
    for task in ("dpo", "grpo"):
        assert said == tuple(f"{peaks[task, provider]:.3g}" for provider in ("triton_losses", "eager"))


H200 = "bench/results/nvidia_h200/2026-11-27"
SHOWN_OF_H200 = [
    ("cross_entropy", "8192×128256", "bfloat16"),
    ("cross_entropy", "8192×32000", "bfloat16"),
    ("linear_cross_entropy", "8192×4096×128256", "bfloat16"),
    ("distillation_loss direction=jsd", "4096×128256", "bfloat16"),
    ("binary_cross_entropy_with_logits", "134217728", "bfloat16"),
    ("sigmoid_focal_loss reduction=mean", "134217728", "bfloat16"),
    ("cross_entropy", "8×19×512×1024", "float32"),
    ("dice_ce_loss softmax=True", "8×19×512×1024", "float32"),
    ("triplet_margin_loss", "65536×1024", "bfloat16"),
    ("ctc_loss_with_logits", "1000×64×5000", "float32"),
]


def table_of_h200():
    with (ROOT / f"{H200}.csv").open() as file:
        rows = {(*(row[k] for k in ("loss", "shape", "dtype")), row["provider"]): row for row in csv.DictReader(file)}
    lines = [
        "| loss | shape | dtype | ours | eager | others (and their peak) | peak MB ours | eager |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in SHOWN_OF_H200:
        found = {provider: row for (*of, provider), row in rows.items() if tuple(of) == key}
        ours, eager = found.pop("triton_losses"), found.pop("eager", {})
        others = [f"{provider}: {three(row['device_ms'])}{in_mb(row['peak_mb'])}" for provider, row in found.items()]
        times = three(ours["device_ms"]), three(eager.get("device_ms")), "; ".join(others)
        lines.append(f"| {' | '.join((*key, *times, three(ours['peak_mb']), three(eager.get('peak_mb'))))} |")
    return "\n".join(lines)


def in_mb(number):
    return f" ({three(number)} MB)" if number else ""


def three(number):
    """Three digits of it; nothing if there is none."""
    return "" if not number else f"{float(number):.0f}" if float(number) >= 100 else f"{float(number):.3g}"


def test_the_table_of_an_h200_is_that_of_the_committed_file():
    assert table_of_h200() in section("h200"), f"between its markers README.md should have:\n{table_of_h200()}"
    conditions = (ROOT / f"{H200}.md").read_text()
    assert f"]({H200}.md)" in section("h200")
    assert all(words in conditions for words in re.findall(r"`([^`]+)`", section("h200").partition("|")[0]))


def test_what_a_call_costs_the_host_is_what_the_committed_table_says():
    with (ROOT / "bench/results/cpu/host.csv").open() as file:
        ratios = sorted(float(row["ratio"]) for row in csv.DictReader(file))
    said = re.search(r"at most ([\d.]+) times eager's microseconds, none more than ([\d.]+) times", README).groups()
    assert said == (f"{statistics.median(ratios):.2f}", f"{max(ratios):.1f}")


def test_pictures_and_files_that_the_readme_names_exist():
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name


def test_two_lines_do_all_the_set_up():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert [line.rpartition(" -m ")[2].split()[0] for line in lines] == ["bench", "pytest"]


def test_the_examples_run_one_after_another():
    examples = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
    assert len(examples) == 8  # one more, indented, shows how a loss is written
    # fenced as "py": test_transformers.py and test_segmentation_libraries.py run those, where they can
    subprocess.run([sys.executable, "-c", "\n".join(examples)], cwd=ROOT, check=True)
