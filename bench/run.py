"""A run over the timed cases: it writes its rows as it goes, and can go on where an earlier one was interrupted."""

import gc
import math

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench.ceilings import floor_ms
from bench.measure import PRESETS, measure, words_of
from bench.providers import providers_of
from bench.report import save


def dtypes_of(preset, device):
    return (torch.float32,) if preset != "full" and device.type == "cpu" else (torch.float32, torch.bfloat16)


def planned(timed, device, preset):
    return [
        (case, shape, dtype)
        for case in timed
        for dtype in dtypes_of(preset, device)
        for shape in case.bench.get(preset, ())
    ]


def run(plan, device, options, ceilings, rows):
    """Add the rows of every case, shape and dtype of the plan that ``rows`` lacks, and write each as it is measured.

    Returns how many of the plan are left: an interrupted run keeps what it has.
    """
    known = set(map(key_of, rows))
    left = [part for part in plan if (name(part[0]), *words_of(*part[1:])) not in known]
    gc.collect()
    gc.freeze()  # what is imported stays, so the collection after each case need not visit it, which took 0.4 seconds
    columns = (SpinnerColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(plan), completed=len(plan) - len(left))
        for done, (case, shape, dtype) in enumerate(left):
            progress.update(task, description=" ".join((name(case), *words_of(shape, dtype))))
            wanted = providers_of(case, shape, options.preset, options.providers)
            try:
                found = measure(case, shape, dtype, device, PRESETS[options.preset], wanted)
            except KeyboardInterrupt:
                progress.console.print("interrupted: reporting what was measured so far")
                return len(left) - done
            for row in found:
                row["floor_ms"] = floor_ms(row, case, shape, dtype, ceilings)
                taken = row["ms"] if math.isnan(row["device_ms"]) else row["device_ms"]
                row["share"] = row["floor_ms"] / taken
            rows += found
            save(rows, options.out)
            progress.advance(task)
    return 0


def name(case):
    return " ".join([case.name, *case.option_words()])


def key_of(row):
    return " ".join(filter(None, (row["loss"], row["options"]))), row["shape"], row["dtype"]
