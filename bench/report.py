"""The report of the results: the table on the terminal, results.csv, report.md and report.html."""

import base64

import jinja2
import pandas

from bench.picture import OVERVIEW, ROOFLINE, save_overview, save_roofline

RESULTS = "results.csv"
INDEX = ["loss", "shape", "dtype"]
SHOWN = ("ms", "peak_mb", "share", "error", "failed")
TEXTS = ("loss", "options", "shape", "dtype", "device", "provider", "pass", "failed")
EXPLANATION = """\
Times are medians, in milliseconds, of forward and backward together, the gradient set to None before each; the
providers took turns, repeat by repeat. The speed-up is that of triton_losses over eager, the plain PyTorch reference.
Share is that of the floor in our time (on a GPU, in its own part of it, `device_ms`): the time that the bytes which
must move (inputs read once, gradients written once) take at the rate of a copy or, for a head, its products at the
rate of bare products, both measured in this run; tensors that stay in a cache can exceed 1. Peak MB (10⁶ bytes) is
the most memory held above the inputs; the gradient counts. `results.csv` has the other passes and, for every
measurement: p20 and p80; the noise, which is by how much the median of every other sample differs from that of the
rest; on a GPU, of both passes together, the replay of a captured graph (`graph_ms`), the host's microseconds while
the GPU is busy, launches (of small tensors), synchronisations, and the memory that the allocator reserved on top
(`reserved_mb`); the bytes and the GB/s they make; the error, which is the larger of the value's and the gradient's
largest deviation from the float64 reference, each relative to the largest exact component (beyond 2²⁵ elements, that
of a smaller shape); and the seconds of the first call, with compilation and tuning, the caches on disk as they were
found.
"""
ALT = {OVERVIEW: "Speed-up over eager", ROOFLINE: "Bytes that must move, and how fast they do"}


def save(rows, directory):
    """Write results.csv; a run does so after each case, so that an interrupted one can go on."""
    directory.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(rows).to_csv(directory / RESULTS, index=False)


def saved(directory):
    """The rows of an earlier run in this directory, or none."""
    path = directory / RESULTS
    if not path.exists():
        return []
    frame = pandas.read_csv(path, dtype=dict.fromkeys(TEXTS, str))
    return frame.fillna(dict.fromkeys(TEXTS, "")).to_dict("records")


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
    for what, title, text in (
        ("share", "share", "{:.2f}".format),
        ("peak_mb", "peak MB", digits),
        ("error", "error", "{:.0e}".format),
    ):
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
    """Write results.csv, report.md, report.html and the pictures. `lines`: the conditions of the run."""
    directory.mkdir(parents=True, exist_ok=True)
    frame.to_csv(directory / RESULTS, index=False)
    table = table_of(frame)
    table.columns = [" ".join(filter(None, heading)) for heading in table.columns]
    table = table.reset_index()
    drawn = {OVERVIEW: save_overview(frame, lines, directory / OVERVIEW)}
    drawn[ROOFLINE] = save_roofline(frame, lines, directory / ROOFLINE)
    pictures = [name for name, is_drawn in drawn.items() if is_drawn]
    failed = failures_of(frame)
    parts = ["# Bench", "\n".join(f"- {line}" for line in lines)]
    parts += [f"![{ALT[name]}]({name})" for name in pictures]
    parts.append(table.to_markdown(index=False, disable_numparse=True, stralign="right"))
    if failed:
        parts.append("Failed or skipped:\n\n" + "\n".join(f"- {line}" for line in failed))
    (directory / "report.md").write_text("\n\n".join([*parts, EXPLANATION]))
    page(table, lines, failed, {ALT[name]: directory / name for name in pictures}, directory / "report.html")


def page(table, lines, failed, pictures, path):
    """One file that needs no other: the pictures are in it, the table can be sorted and filtered."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("bench", "."), autoescape=True)
    environment.globals["zip"] = zip
    images = {text: base64.b64encode(picture.read_bytes()).decode() for text, picture in pictures.items()}
    text = environment.get_template("report.html.jinja").render(
        lines=lines, failed=failed, images=images, explanation=EXPLANATION, table=table
    )
    path.write_text(text)
