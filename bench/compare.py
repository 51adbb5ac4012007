"""What got faster or slower from one results.csv to another: ``python -m bench compare BEFORE.csv AFTER.csv``."""

import pandas

from bench.measure import COLUMNS

KEYS = ["loss", "options", "shape", "dtype", "device", "pass", "provider"]
EXPLANATION = (
    "Medians in ms. speed_up: before over after. A change is beyond noise where the middle 60 % of the two samples "
    "(p20 to p80) do not overlap; other rows are left out."
)
FASTER, SLOWER = "faster", "slower"


def read(path):
    frame = pandas.read_csv(path, keep_default_na=False, na_values={name: [""] for name in ("ms", "p20_ms", "p80_ms")})
    missing = [name for name in (*KEYS, "ms", "p20_ms", "p80_ms") if name not in frame]
    if missing:
        raise ValueError(
            f"{path} is no results.csv of the bench: it has no column {', '.join(missing)}; all: {COLUMNS}"
        )
    return frame.dropna(subset="ms")


def compared(before, after, provider="triton_losses"):
    """One row for each measurement that both frames have: medians, their ratio, and whether it exceeds the noise."""
    both = before[before["provider"] == provider].merge(after, on=KEYS, suffixes=("_before", "_after"))
    changes = pandas.Series("", index=both.index)
    changes[both["p20_ms_before"] > both["p80_ms_after"]] = FASTER
    changes[both["p80_ms_before"] < both["p20_ms_after"]] = SLOWER
    both = both.assign(speed_up=both["ms_before"] / both["ms_after"], change=changes)
    return both[[*KEYS[:4], "pass", "ms_before", "ms_after", "speed_up", "change"]]


def shown(frame):
    """The rows beyond noise, those that got slowest first."""
    beyond = frame[frame["change"] != ""].sort_values("speed_up")
    rounded = {"ms_before": 4, "ms_after": 4, "speed_up": 2}
    return beyond.set_index("loss").round(rounded) if len(beyond) else beyond


def summary(frame):
    counts = frame["change"].value_counts()
    return (
        f"{len(frame)} measurements in both: {counts.get(FASTER, 0)} faster, {counts.get(SLOWER, 0)} slower, "
        f"{counts.get('', 0)} within noise."
    )
