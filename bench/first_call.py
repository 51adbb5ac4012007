"""Seconds of a loss's first call in a new process: ``python -m bench first``.

Each provider gets two processes that call every loss once, forward and backward. The first process finds no kernel on
disk (cold), the second those that the first one wrote. What several losses share, the first of them pays for.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings

import pandas
import torch

from bench.failures import noted
from bench.measure import words_of
from bench.passes import Call, learned_by
from bench.providers import PROVIDERS
from reference import cases

COMPARED = ("triton_losses", "torch.compile")
CACHES = ("TRITON_CACHE_DIR", "TRITON_LOSSES_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
COLUMNS = ("loss", "options", "shape", "device", "provider", "cold_s", "disk_s", "failed")
EXPLANATION = (
    "Seconds of the first call in a new process, forward and backward, with compilation and tuning: cold, with nothing "
    "on disk, and from the disk that such a process left."
)


def table(timed, device):
    """A frame with COLUMNS."""
    timed = [case for case in timed if case.bench.get("quick")]
    rows = []
    for provider in COMPARED:
        with tempfile.TemporaryDirectory() as directory:
            cold, disk = (in_a_new_process(timed, provider, device, directory) for _ in ("cold", "disk"))
        for case, (cold_s, failed), (disk_s, _) in zip(timed, cold, disk, strict=True):
            words = case.name, " ".join(case.option_words()), words_of(case.largest("quick"), torch.float32)[0]
            rows.append((*words, device.type, provider, cold_s, disk_s, failed))
    return pandas.DataFrame(rows, columns=COLUMNS)


def in_a_new_process(timed, provider, device, directory):
    """(seconds, "") of each case's first call there, or (nan, error)."""
    own = {name: os.path.join(directory, name) for name in CACHES}
    numbers = [str(cases.CASES.index(case)) for case in timed]
    command = [sys.executable, "-m", "bench.first_call", provider, device.type, *numbers]
    finished = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    if finished.returncode:
        return [(float("nan"), finished.stderr.strip().splitlines()[-1])] * len(timed)
    return json.loads(finished.stdout.splitlines()[-1])


def seconds_of_first_calls(timed, provider, device):
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    warm_up = torch.ones(4, device=device, requires_grad=True)
    (warm_up @ warm_up).backward()  # what a process's first operation costs is not the loss's
    wait()
    found = []
    for case in timed:
        failures, seconds = {}, float("nan")
        with noted(failures, provider):
            tensors, options = case.arguments(case.largest("quick"), device=device, drawn_there=True)
            call = Call(PROVIDERS[provider].make(case), tensors, options, learned_by(case))
            wait()
            start = time.perf_counter()
            call.value_and_gradients()
            wait()
            seconds = time.perf_counter() - start
        found.append((seconds, failures.get(provider, "")))
    return found


def shown(frame):
    loss = (frame["loss"] + " " + frame["options"]).str.strip() + " " + frame["shape"]
    return frame.assign(loss=loss).pivot(index="loss", columns="provider", values=["cold_s", "disk_s"]).round(2)


def write(frame, lines, directory):
    directory.mkdir(parents=True, exist_ok=True)
    frame.to_csv(directory / "first.csv", index=False)
    parts = ["# Seconds of a first call", "\n".join(f"- {line}" for line in lines), EXPLANATION]
    (directory / "first.md").write_text("\n\n".join([*parts, shown(frame).to_markdown()]) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    provider, kind, *numbers = sys.argv[1:]
    print(json.dumps(seconds_of_first_calls([cases.CASES[int(i)] for i in numbers], provider, torch.device(kind))))
