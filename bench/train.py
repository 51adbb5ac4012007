"""Short training runs with our losses and with plain PyTorch's: ``python -m bench train [lm] [seg] [dpo] [grpo]``.

lm    a small transformer on the documentation strings of Python's standard library; a token is two bytes
seg   a small convolutional network on drawn shapes: discs and squares in noise
dpo   that transformer, to prefer the text as it goes on, by log-probabilities of its hidden states
grpo  that transformer, by answers that it sampled and rewards for the letters in them, likewise

Both losses meet the same model, the same batches and the same optimiser, so their curves should lie on one another.
The plain way to log-probabilities is all logits, their log_softmax, and a gather.
"""

import copy
import itertools
import statistics
import time

import pandas
import torch
from matplotlib.figure import Figure

import reference.losses
from bench.memory import peak_bytes
from bench.picture import COLOURS, FAINT, GRID, INK
from bench.training_tasks import TASKS
from triton_losses import functional

LOSSES = {"triton_losses": functional, "eager": reference.losses}
RESULTS, PICTURE = "train.csv", "train.png"
EXPLANATION = (
    "Median ms of a step, optimiser included; peak MB of one forward and backward, with the gradients; the loss in the "
    "last tenth of the steps, and the largest difference of the two curves."
)


class Run:
    """A copy of a task's model in training by one provider's losses: the loss and the seconds of every step."""

    def __init__(self, task, losses):
        self.task, self.losses, self.model = task, losses, copy.deepcopy(task.model)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=2e-3)
        self.values, self.seconds = [], []

    def loss(self, batch):
        return self.task.loss(self.losses, self.model, *batch)

    def step(self, batch):
        start = time.perf_counter()
        self.optimiser.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.optimiser.step()
        self.values.append(loss.item())  # waits for the GPU
        self.seconds.append(time.perf_counter() - start)

    def peak(self, device):
        """The peak memory of one forward and backward."""
        self.optimiser.zero_grad()
        return peak_bytes(lambda: lambda: self.loss(self.task.batches[0]).backward(), device)


def table(names, device, steps=40):
    """A frame of every step's loss and time, by task and provider; the providers take turns, step by step."""
    frames = []
    for name in names:
        torch.manual_seed(0)
        task = TASKS[name][1](steps, device)
        runs = {provider: Run(task, losses) for provider, losses in LOSSES.items()}
        for batch in task.batches:
            for run in runs.values():
                run.step(batch)
        for provider, run in runs.items():
            times, peak = [s * 1e3 for s in run.seconds], run.peak(device) / 1e6
            steps_of = {"step": range(steps), "loss": run.values, "ms": times, "peak_mb": peak}
            frames.append(pandas.DataFrame({"task": name, "provider": provider, **steps_of}))
    return pandas.concat(frames, ignore_index=True)


def summary(frame):
    """One row a task and provider."""
    rows = []
    for (task, provider), steps in frame.groupby(["task", "provider"], sort=False):
        others = frame[(frame["task"] == task) & (frame["provider"] != provider)]
        apart = max(abs(a - b) for a, b in zip(steps["loss"], others["loss"]))
        last = statistics.mean(steps["loss"].iloc[-max(len(steps) // 10, 1) :])
        measured = steps["ms"].median(), steps["peak_mb"].iloc[0], last, apart
        rows.append((task, provider, *measured))
    columns = ["task", "provider", "step_ms", "peak_mb", "last_loss", "apart"]
    rounded = {"step_ms": 1, "peak_mb": 1, "last_loss": 4}
    return pandas.DataFrame(rows, columns=columns).round(rounded).set_index(["task", "provider"])


def draw(frame, lines, path):
    tasks = list(dict.fromkeys(frame["task"]))
    columns = min(len(tasks), 2)
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * rows + 0.3), dpi=130, facecolor="white", layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for empty in panels[len(tasks) :]:
        empty.remove()
    for axes, task in zip(panels, tasks):
        ours = zip(LOSSES, (COLOURS[0], COLOURS[3]), (4.0, 1.2), itertools.count(1))
        for provider, colour, width, order in ours:
            steps = frame[(frame["task"] == task) & (frame["provider"] == provider)]
            label = f"{provider}: {steps['ms'].median():.3g} ms a step, {steps['peak_mb'].iloc[0]:.3g} MB"
            axes.plot(steps["step"], steps["loss"], color=colour, linewidth=width, label=label, zorder=order + 1)
        axes.set_title(TASKS[task][0], fontsize=9, color=INK, loc="left")
        axes.set_xlabel("step", fontsize=8, color=FAINT)
        axes.tick_params(labelsize=8, labelcolor=FAINT, length=0)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.legend(frameon=False, fontsize=7.5, labelcolor=INK)
    figure.suptitle("\n".join(["Training loss", *lines[:2]]), fontsize=8, color=INK)
    figure.savefig(path)


def write(frame, lines, directory):
    directory.mkdir(parents=True, exist_ok=True)
    frame.to_csv(directory / RESULTS, index=False)
    draw(frame, lines, directory / PICTURE)
