"""The report of the results: the table on the terminal, results.csv and report.md."""

import pandas

from bench.picture import SPEED_UP, save_speed_up

INDEX = ["loss", "shape", "dtype"]
SHOWN = ("ms", "peak_mb", "error", "failed")
EXPLANATION = """\
Times are medians, in milliseconds, of forward and backward together, the gradient set to None before each; the
providers took turns, repeat by repeat. The speed-up is that of triton_losses over eager, the plain PyTorch reference.
Peak MB (10⁶ bytes) is the most memory held above the inputs; the gradient counts. `results.csv` has the other passes
and, for every measurement: p20 and p80; the bytes moved at least (inputs read once, gradient written) and the GB/s
they make; the error, which is the larger of the value's and the gradient's largest deviation from the float64
reference, each relative to the largest exact component (beyond 2²⁵ elements, that of a smaller shape); and the
seconds of the first call, with compilation and tuning, the caches on disk as they were found.
"""


def frame_of(rows, columns):
    frame = pandas.DataFrame(rows, columns=columns)
    # shapes go from small to large: one too large for the float64 reference takes the error of the one before
    frame["error"] = frame.groupby(["loss", "options", "dtype", "provider"], sort=False)["error"].ffill()
    return frame


def table_of(frame):
    """A table of text, one row per loss, shape and dtype: all providers' times, then our and eager's other figures."""
    full = frame[frame["pass"] == "full"]
    full = full.assign(loss=(full["loss"] + " " + full["options"]).str.strip())
    rows = pandas.MultiIndex.from_frame(full[INDEX].drop_duplicates())
    of = {what: full.pivot(index=INDEX, columns="provider", values=what).reindex(rows) for what in SHOWN}
    table = pandas.DataFrame(index=rows)
    for provider in full["provider"].unique():
        failed = of["failed"][provider].fillna("") != ""
        table[heading(provider)] = of["ms"][provider].map(digits).mask(failed, "failed")
    if {"triton_losses", "eager"} <= set(full["provider"]):
        speed_up = of["ms"]["eager"] / of["ms"]["triton_losses"]
        table["speed-up", ""] = speed_up.map("{:.2f}×".format, na_action="ignore").fillna("")
    for what, title, text in (("peak_mb", "peak MB", digits), ("error", "error", "{:.0e}".format)):
        for provider, short in (("triton_losses", "ours"), ("eager", "eager")):
            if provider in of[what]:
                table[title, short] = of[what][provider].map(text, na_action="ignore").fillna("")
    table.columns = pandas.MultiIndex.from_tuples(table.columns)
    return table.droplevel("dtype") if full["dtype"].nunique() == 1 else table


def heading(provider):
    """The provider's name on two lines, because a long name would widen every row."""
    name, bracket, rest = provider.partition("(")
    return name, bracket + rest


def digits(number):
    if pandas.isna(number):
        return ""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def failures_of(frame):
    failed = frame[frame["failed"] != ""].drop_duplicates(["options", *INDEX, "provider"])
    return [
        " ".join(filter(None, (row.loss, row.options, row.shape, row.dtype, f"{row.provider}: {row.failed}")))
        for row in failed.itertuples()
    ]


def write(frame, lines, directory):
    """Write results.csv, report.md and the picture. `lines`: the conditions of the run."""
    directory.mkdir(parents=True, exist_ok=True)
    frame.to_csv(directory / "results.csv", index=False)
    table = table_of(frame)
    table.columns = [" ".join(filter(None, heading)) for heading in table.columns]
    parts = ["# Bench", "\n".join(f"- {line}" for line in lines)]
    parts.append(table.reset_index().to_markdown(index=False, disable_numparse=True, stralign="right"))
    if failed := failures_of(frame):
        parts.append("Failed or skipped:\n\n" + "\n".join(f"- {line}" for line in failed))
    if save_speed_up(frame, lines, directory / SPEED_UP):
        parts.append(f"![Speed-up over eager]({SPEED_UP})")
    (directory / "report.md").write_text("\n\n".join([*parts, EXPLANATION]))
