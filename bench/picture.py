"""The pictures of a report: the speed-up of every loss on one screen, and how near to the machine's rates they come."""

import textwrap

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

OVERVIEW, ROOFLINE = "speedup.png", "roofline.png"
COLOURS = ("#1f5fa8", "#b4bac4", "#86b3dc", "#c98b5a", "#7d9a6f", "#9b7fb0")
INK, FAINT, GRID = "#22262b", "#7a828c", "#e4e7eb"
ROW = 0.155  # inches per loss
KEYS = ["loss", "options", "shape", "dtype"]
OURS = "triton_losses"
COMPILED = "torch.compile"


def speed_ups(frame):
    """Rows of the full pass with `speed_up`, the eager median over theirs; without eager's, which would all be 1×."""
    full = frame[(frame["pass"] == "full") & frame["ms"].notna()]
    eager = full[full["provider"] == "eager"][[*KEYS, "ms"]]
    both = full[full["provider"] != "eager"].merge(eager, on=KEYS, suffixes=("", "_eager"))
    return both.assign(speed_up=both["ms_eager"] / both["ms"])


def largest(frame):
    """Of each loss with its options the last shape, which is its largest, in the dtype that was measured first.

    A loss of rows and the same loss of images are two.
    """
    first = frame[frame["dtype"] == frame["dtype"].iloc[0]]
    first = first.assign(images=first["shape"].str.count("×") > 1)
    last = first.drop_duplicates(["loss", "options", "images"], keep="last")[KEYS]
    return frame.merge(last, on=KEYS)


def save_overview(frame, lines, path):
    """Draw one row per loss, the fastest first; returns whether there was anything to draw."""
    points = speed_ups(frame)
    if points.empty or OURS not in set(points["provider"]):
        return False
    points = largest(points)
    ours = points[points["provider"] == OURS].sort_values("speed_up", ascending=False, kind="stable")
    place_of = {key: place for place, key in enumerate(map(tuple, ours[KEYS].to_numpy()))}
    figure = Figure(figsize=(8, 0.9 + ROW * len(place_of)), dpi=130, facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    for provider, colour, size in ((COMPILED, COLOURS[3], 22), (OURS, COLOURS[0], 34)):
        rows = points[points["provider"] == provider]
        places = [place_of.get(tuple(key)) for key in rows[KEYS].to_numpy()]
        shown = [(x, place) for x, place in zip(rows["speed_up"], places) if place is not None]
        if shown:
            axes.scatter(*zip(*shown), s=size, color=colour, label=provider, zorder=3, linewidth=0)
    axes.hlines(list(place_of.values()), 1, ours["speed_up"], color=COLOURS[2], linewidth=1.6, zorder=2)
    axes.axvline(1, color=INK, linewidth=1, zorder=1)
    names = [" ".join(filter(None, key[:3])) for key in place_of]
    axes.set_yticks(list(place_of.values()), names, fontsize=7, color=INK)
    axes.set_ylim(len(place_of) - 0.4, -0.6)
    axes.set_xlim(min(0.5, points["speed_up"].min() / 1.3), max(2, points["speed_up"].max() * 1.3))
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda times, _: f"{times:g}×" if times >= 1 else f"1/{1 / times:g}×"))
    finish(axes, lines, f"Speed-up over eager, forward and backward, {points['dtype'].iloc[0]}")
    figure.savefig(path)
    return True


def save_roofline(frame, lines, path):
    """Draw how fast every loss moves the bytes that it must, under the rate of a copy; returns whether there are any.

    Heads are left out: their products take the time, not the bytes.
    """
    full = frame[(frame["pass"] == "full") & frame["ms"].notna() & ~frame["loss"].str.startswith("linear_")]
    ours = full[full["provider"] == OURS]
    if ours.empty:
        return False
    copy = (ours["moved_mb"] / ours["floor_ms"]).median()  # MB per ms are GB per s
    figure = Figure(figsize=(8, 4.6), dpi=130, facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    for provider, colour in (("eager", COLOURS[1]), (COMPILED, COLOURS[3]), (OURS, COLOURS[0])):
        rows = full[full["provider"] == provider]
        axes.scatter(rows["moved_mb"], rows["gb_per_s"], s=26, color=colour, label=provider, linewidth=0, zorder=3)
    axes.axhline(copy, color=INK, linewidth=1)
    there = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(f"copy, {copy:.3g} GB/s", (0.01, copy), (0, 3), fontsize=8, color=INK, **there)
    axes.set_xlabel("MB that must move", fontsize=8, color=FAINT)
    axes.set_ylabel("GB/s", fontsize=8, color=FAINT)
    finish(axes, lines, "How fast the bytes that must move do move, forward and backward")
    figure.savefig(path)
    return True


def finish(axes, lines, title):
    """What both pictures share: faint axes, the title with the conditions under it, and the legend."""
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(length=0, which="both", labelsize=7.5, labelcolor=FAINT)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    above = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "left", "va": "bottom"}
    text = "\n".join(textwrap.fill(line, 100) for line in lines[:2])
    axes.set_title(title, fontsize=10.5, color=INK, weight="bold", loc="left", pad=10 + 9 * len(text.splitlines()))
    axes.annotate(text, (0, 1), (0, 5), fontsize=6.5, color=FAINT, **above)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
