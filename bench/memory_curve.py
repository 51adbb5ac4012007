"""Memory against vocabulary: the peak memory of language models' heads, forward and backward, by number of classes."""

import math

import pandas
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.failures import noted
from bench.memory import peak_bytes, shortage
from bench.passes import Call, learned_by
from bench.picture import COLOURS, FAINT, INK
from bench.providers import PROVIDERS

ROWS, FEATURES = 1024, 64
CLASSES = (4096, 32768, 65536, 98304, 131072)
COMPARED = ("triton_losses", "eager")
WEIGHT = "gradient of the weight"  # part of every peak, because every head returns it
COLUMNS = ("loss", "options", "rows", "features", "classes", "dtype", "device", "provider", "peak_mb", "failed")
RESULTS, PICTURE = "memory.csv", "memory.png"


def heads(timed):
    return [case for case in timed if case.features]


def peaks(timed, device, dtype=torch.float32):
    """A frame with COLUMNS: every head's peak by number of classes and provider, and its weight's gradient."""
    rows = []
    for case in heads(timed):
        for classes in CLASSES:
            common = (
                case.name,
                " ".join(case.option_words()),
                ROWS,
                FEATURES,
                classes,
                str(dtype).removeprefix("torch."),
                device.type,
            )
            for provider in COMPARED:
                rows.append((*common, provider, *peak_of(case, (ROWS, FEATURES, classes), dtype, device, provider)))
            rows.append((*common, WEIGHT, classes * FEATURES * dtype.itemsize / 1e6, ""))
    return pandas.DataFrame(rows, columns=COLUMNS)


def peak_of(case, shape, dtype, device, provider):
    """The peak in MB, nan if there is none, and the error's text or ""."""
    failures, peak = {}, math.nan
    if reason := shortage(case, shape, dtype, device):
        return peak, reason
    with noted(failures, provider):
        call = Call(PROVIDERS[provider].make(case), *case.arguments(shape, dtype, device), learned_by(case))
        call.value_and_gradients()
        peak = peak_bytes(lambda: call.ready("full", 1), device) / 1e6
    return peak, failures.get(provider, "")


def table_of(frame):
    return frame.pivot(index=["loss", "options", "classes"], columns="provider", values="peak_mb")[
        [*COMPARED, WEIGHT]
    ].round(0)


def draw(frame, lines, path):
    """One panel a case: ours, eager, and the gradient of the weight."""
    panels = list(frame.groupby(["loss", "options"], sort=False))
    colour_of = dict(zip((*COMPARED, WEIGHT), (COLOURS[0], COLOURS[1], COLOURS[3])))
    down, across = -(-len(panels) // 2), min(len(panels), 2)
    figure = Figure(figsize=(4.2 * across, 3.2 * down), dpi=150, facecolor="white", layout="constrained")
    for axes, ((loss, options), rows) in zip(figure.subplots(down, across, squeeze=False).flat, panels):
        for provider, points in rows.dropna(subset="peak_mb").groupby("provider", sort=False):
            style = "--" if provider == WEIGHT else "-"
            axes.plot(
                points["classes"],
                points["peak_mb"],
                style,
                marker=".",
                color=colour_of[provider],
                label=provider,
                linewidth=1.8,
            )
        axes.set_title("\n".join([loss, *options.split()]), fontsize=8.5, color=INK, loc="left")
        axes.set_xticks(CLASSES)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda classes, _: f"{classes / 1024:.0f}k"))
        axes.set_xlabel("classes", fontsize=8, color=FAINT)
        axes.tick_params(labelsize=8, labelcolor=FAINT, length=0)
        axes.grid(color="#e4e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_ylim(bottom=0)
        axes.spines[:].set_visible(False)
    figure.axes[0].set_ylabel("peak MB", fontsize=8, color=FAINT)
    for axes in figure.axes[len(panels) :]:  # the last place is empty if the number of panels is odd
        axes.remove()
    figure.axes[0].legend(frameon=False, fontsize=8, labelcolor=INK)
    title = f"Peak memory, forward and backward, {ROWS} rows of {FEATURES} features, {frame['dtype'].iloc[0]}"
    figure.suptitle("\n".join([title, *lines]), fontsize=8.5, color=INK)
    figure.savefig(path)


def write(frame, lines, directory):
    directory.mkdir(parents=True, exist_ok=True)
    frame.to_csv(directory / RESULTS, index=False)
    draw(frame, lines, directory / PICTURE)
