"""The command ``python -m bench [WORD] [LOSS ...]``; a word asks for something other than times.

host      what a call costs the host; no GPU is needed
build     what the compiler says of the kernels; no GPU is needed
first     the seconds of a first call in a new process, and of one whose kernels are on disk
memory    the heads' peak memory as the vocabulary grows
train     [lm] [seg] [dpo] [grpo]: short training runs with our losses and with plain ones
curves    values and gradients of losses, as a picture
compare   BEFORE.csv AFTER.csv: what got faster or slower between two results of this command
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

import torch

from bench import compare, curves, first_call, memory_curve, train
from bench.ceilings import measured
from bench.conditions import conditions, load
from bench.measure import COLUMNS, PRESETS
from bench.providers import PROVIDERS
from bench.report import failures_of, frame_of, saved, table_of, write
from bench.run import dtypes_of, name, planned, run
from reference import cases

try:
    from bench import build, host
except ImportError:  # Triton is not installed
    build = host = None

WORDS = ("host", "build", "first", "memory", "train", "curves", "compare")
PRESETS_ARE = "quick: a few minutes (default); peers: what other libraries have, at full size; full: hours"


def command_line():
    parser = argparse.ArgumentParser(
        "python -m bench",
        description="Time and memory of the losses beside plain PyTorch.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.epilog = "words:" + __doc__.partition("\n")[2]
    described = "part of a loss's name; all timed losses if none is given; before them perhaps one of the words below"
    parser.add_argument("losses", metavar="LOSS", nargs="*", help=described)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="quick", help=PRESETS_ARE)
    parser.add_argument(
        "--providers", metavar="PROVIDER", nargs="+", choices=tuple(PROVIDERS), default=tuple(PROVIDERS)
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run: keep the rows in --out")
    parser.add_argument("--list", action="store_true", help="name the timed cases and the providers, and end")
    return parser


def chosen(words, parser):
    """The timed cases that have one of the words in their name; all of them if there are no words."""
    timed = [case for case in cases.CASES if case.bench]
    for word in words:
        if not any(word in case.name for case in timed):
            known = ", ".join(dict.fromkeys(case.name for case in timed))
            parser.error(f"no timed loss has {word!r} in its name; known: {known}")
    return [case for case in timed if not words or any(word in case.name for word in words)]


def listing(timed):
    lines = ["Timed cases, and their shapes:"]
    for case in timed:
        lines.append(f"  {name(case)}")
        lines += [
            f"    {preset}: " + ", ".join("×".join(map(str, shape)) for shape in shapes)
            for preset, shapes in case.bench.items()
        ]
    return "\n".join([*lines, "Providers:", *(f"  {name}" for name in PROVIDERS)])


def without_a_gpu(part, timed, out, load_before):
    """Make, write and print the table of ``python -m bench host`` or of ``python -m bench build``."""
    # host leaves out heads and pairwise losses: its driver launches no matrix products, which are not our kernels
    frame = part.table([case for case in timed if part is build or not (case.features or case.pairwise)])
    lines = conditions(torch.device("cpu"), load_before, kernels=True)
    lines = lines if part is host else lines[1:2]  # only the versions, because a build times nothing
    part.write(frame, lines, out)
    text = part.EXPLANATION, part.shown(frame).to_string(), "", part.summary(frame)
    print(*lines, "", *text, f"\nWritten to {out}{os.sep}", sep="\n")


def memory(timed, device, out, load_before, parser):
    if not memory_curve.heads(timed):
        parser.error("memory is for losses of a language model's head, and none of these is one")
    # only hardware and versions, because nothing is timed
    frame, lines = memory_curve.peaks(timed, device), conditions(device, load_before)[:2]
    memory_curve.write(frame, lines, out)
    text = "Peak MB above the inputs, forward and backward.", memory_curve.table_of(frame).to_string()
    print(*lines, "", *text, f"\nWritten to {out}{os.sep}", sep="\n")


def first(timed, device, out, load_before, named):
    frame = first_call.table(timed if named else [case for case in timed if case.headline], device)
    lines = conditions(device, load_before)
    first_call.write(frame, lines, out)
    failed = [f"failed: {row.loss} {row.provider}: {row.failed}" for row in frame.itertuples() if row.failed]
    print(*lines, "", first_call.EXPLANATION, first_call.shown(frame).to_string(), *failed, sep="\n")
    print(f"\nWritten to {out}{os.sep}")


def training(names, device, out, load_before, parser):
    if unknown := set(names) - set(train.TASKS):
        parser.error(f"train takes {', '.join(train.TASKS)}, got {', '.join(sorted(unknown))}")
    frame, lines = train.table(names or train.TASKS, device), conditions(device, load_before)
    train.write(frame, lines, out)
    print(*lines, "", train.EXPLANATION, train.summary(frame).to_string(), f"\nWritten to {out}{os.sep}", sep="\n")


def changes(paths, parser):
    if len(paths) != 2:
        parser.error(f"compare takes two results.csv, got {len(paths)} files")
    try:
        before, after = map(compare.read, paths)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    frame = compare.compared(before, after)
    print(compare.EXPLANATION, compare.shown(frame).to_string(), compare.summary(frame), sep="\n\n")


def times(timed, device, options, load_before, parser):
    plan = planned(timed, device, options.preset)
    if not plan:
        parser.error(f"nothing was measured: none of these cases has a shape in the preset {options.preset!r}")
    # torch's advice to callers of kl_div
    warnings.filterwarnings("ignore", message="reduction: 'mean' divides", category=UserWarning)
    rows = saved(options.out) if options.resume else []
    ceilings = measured(device, dtypes_of(options.preset, device))
    left = run(plan, device, options, ceilings, rows)
    if not rows:
        parser.error("interrupted before anything was measured")
    lines, frame = [*conditions(device, load_before), ceilings.line()], frame_of(rows, COLUMNS)
    if left:
        lines.append(
            f"Interrupted: {left} of {len(plan)} cases were not measured. The same command with --resume goes on."
        )
    write(frame, lines, options.out)
    text = "Median ms of forward and backward; peak MB above the inputs.", table_of(frame).to_string()
    print(*lines, "", *text, sep="\n")
    print(*(f"failed: {line}" for line in failures_of(frame)), f"\nWritten to {options.out}{os.sep}", sep="\n")


def main(arguments=None):
    parser = command_line()
    options = parser.parse_args(arguments)
    word = options.losses.pop(0) if options.losses[:1] and options.losses[0] in WORDS else None
    if word == "compare":
        return changes(options.losses, parser)
    if word == "curves":
        return print(f"Written to {curves.write(options.out)}")
    timed = chosen([] if word == "train" else options.losses, parser)
    if options.list:
        return print(listing(timed))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter's times say nothing about the kernels; unset it")
    load_before = load()
    if word == "memory":
        return memory(timed, device, options.out, load_before, parser)
    if word == "first":
        return first(timed, device, options.out, load_before, bool(options.losses))
    if word == "train":
        return training(options.losses, device, options.out, load_before, parser)
    if word is None:
        return times(timed, device, options, load_before, parser)
    part = {"host": host, "build": build}[word]
    if part is None:
        parser.error(f"{word} needs Triton, which is not installed")
    without_a_gpu(part, timed, options.out, load_before)


if __name__ == "__main__":
    sys.exit(main())
