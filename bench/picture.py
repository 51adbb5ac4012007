"""The speed-up picture: one bar per case, shape, dtype and provider."""

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

SPEED_UP = "speedup.png"
COLOURS = ("#1f5fa8", "#b4bac4", "#86b3dc", "#c98b5a", "#7d9a6f", "#9b7fb0")
INK, FAINT = "#22262b", "#7a828c"
BAR = 0.17  # inches per bar
KEYS = ["loss", "options", "shape", "dtype"]


def speed_ups(frame):
    """Rows of the full pass with `speed_up`, the eager median over theirs; without eager's, which would all be 1×."""
    full = frame[(frame["pass"] == "full") & frame["ms"].notna()]
    eager = full[full["provider"] == "eager"][[*KEYS, "ms"]]
    both = full[full["provider"] != "eager"].merge(eager, on=KEYS, suffixes=("", "_eager"))
    return both.assign(speed_up=both["ms_eager"] / both["ms"])


def save_speed_up(frame, lines, path):
    """Draw and write the picture; returns whether there was anything to draw."""
    bars = speed_ups(frame)
    if bars.empty:
        return False
    providers = list(dict.fromkeys(bars["provider"]))
    colour_of = dict(zip(providers, COLOURS * len(providers)))
    several_dtypes = bars["dtype"].nunique() > 1

    groups = [list(group.itertuples()) for _, group in bars.groupby(KEYS, sort=False)]
    figure = Figure(figsize=(8, 1), dpi=150, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xscale("log", base=2)
    place, ticks, labels = 0.0, [], []
    for before, group in zip([None, *groups], groups):
        if before:
            place += 0.5 if (before[0].loss, before[0].options) == (group[0].loss, group[0].options) else 1.7
        ticks.append(place + (len(group) - 1) / 2)
        labels.append(
            "   ".join(
                filter(
                    None, (group[0].loss, group[0].options, group[0].shape, group[0].dtype if several_dtypes else "")
                )
            )
        )
        for bar in group:
            draw_bar(axes, place, bar, colour_of[bar.provider])
            place += 1
    figure.set_figheight(BAR * (place + 1))
    axes.set_ylim(place, -1)
    axes.set_yticks(ticks, labels, fontsize=8.5, color=INK)
    finish(figure, axes, bars, colour_of, lines)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.25)
    return True


def draw_bar(axes, place, bar, colour):
    axes.barh(place, bar.speed_up - 1, left=1, height=0.86, color=colour, zorder=2)
    faster = bar.speed_up >= 1
    axes.annotate(
        f"{bar.speed_up:.2f}×" if bar.speed_up < 10 else f"{bar.speed_up:.0f}×",
        (bar.speed_up, place),
        xytext=(4 if faster else -4, 0),
        textcoords="offset points",
        ha="left" if faster else "right",
        va="center",
        fontsize=7.5,
        color=INK if bar.provider == "triton_losses" else FAINT,
    )


def finish(figure, axes, bars, colour_of, lines):
    axes.axvline(1, color=INK, linewidth=1, zorder=3)
    axes.set_xlim(min(0.5, bars["speed_up"].min() / 1.7), max(2, bars["speed_up"].max() * 1.4))
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda times, _: f"{times:g}×" if times >= 1 else f"1/{1 / times:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8.5, labelcolor=FAINT, length=0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    handles = [Patch(color=colour, label=provider) for provider, colour in colour_of.items()]
    above = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "left", "va": "bottom"}
    axes.annotate(
        "Speed-up over eager PyTorch, forward and backward",
        (0, 1),
        (0, 58),
        **above,
        fontsize=13,
        color=INK,
        weight="bold",
    )
    axes.annotate("\n".join(lines[:2]), (0, 1), (0, 30), **above, fontsize=7.5, color=FAINT)
    key = {
        "loc": "lower left",
        "bbox_to_anchor": (0, 1),
        "borderpad": 0.5,
        "borderaxespad": 0,
        "handlelength": 1.2,
        "columnspacing": 1.6,
    }
    axes.legend(handles=handles, ncols=4, frameon=False, fontsize=8.5, labelcolor=INK, **key)
