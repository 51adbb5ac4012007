"""Short training runs with our losses and with plain PyTorch's: ``python -m bench train [lm] [seg]``.

lm   a small transformer on the documentation strings of Python's standard library; a token is two bytes
seg  a small convolutional network on drawn shapes: discs and squares in noise

Both losses meet the same model, the same batches and the same optimiser, so their curves should lie on one another.
"""

import ast
import copy
import itertools
import statistics
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import pandas
import torch
from matplotlib.figure import Figure
from torch import nn

import reference.losses
from bench.memory import peak_bytes
from bench.picture import COLOURS, FAINT, GRID, INK
from triton_losses import functional

TASKS = ("lm", "seg")
LOSSES = {"triton_losses": functional, "eager": reference.losses}
RESULTS, PICTURE = "train.csv", "train.png"
EXPLANATION = (
    "Median ms of a step, optimiser included; peak MB of one forward and backward, with the gradients; the loss in the "
    "last tenth of the steps, and the largest difference of the two curves."
)
TEXT = 400_000  # bytes
BATCH, CONTEXT, TOKENS, WIDTH = 8, 64, 1 << 16, 64
SIDE, SHAPES = 64, 4


class Task(NamedTuple):
    model: nn.Module
    batches: list
    loss: str
    options: dict


class LanguageModel(nn.Module):
    """Hidden states of a causal transformer; the head's weight is that of the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.places = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device=tokens.device)
        hidden = self.norm(self.layers(self.embedding(tokens) + self.places, mask=mask, is_causal=True))
        return hidden.flatten(0, 1), self.embedding.weight


def text():
    """Documentation strings of the standard library, 400 kB, read from its source."""
    found, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            if documented and (words := ast.get_docstring(node)):
                found.append(words.encode())
                size += len(found[-1])
        if size > TEXT:
            break
    return b"\n\n".join(found)[:TEXT]


def language(steps, device):
    """Tokens of two bytes, and for each the next one as its label."""
    numbers = torch.frombuffer(bytearray(text()), dtype=torch.uint8).long()
    tokens = numbers[: len(numbers) // 2 * 2].view(-1, 2) @ torch.tensor([256, 1])
    starts = torch.randint(len(tokens) - CONTEXT, (steps, BATCH))
    rows = tokens[starts[:, :, None] + torch.arange(CONTEXT + 1)].to(device)
    batches = [((row[:, :-1],), row[:, 1:].flatten()) for row in rows]
    return Task(LanguageModel().to(device), batches, "linear_cross_entropy", {})


def drawing():
    """An image (1, SIDE, SIDE) of noise with a disc, a square and a frame in it, and which of them each pixel shows."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    labels = torch.zeros(SIDE, SIDE, dtype=torch.int64)
    for shape in range(1, SHAPES):
        (a, b), r = torch.randint(8, SIDE - 8, (2,)), torch.randint(5, 12, ())
        far = torch.maximum((y - a).abs(), (x - b).abs())
        inside = ((y - a) ** 2 + (x - b) ** 2 <= r * r, far <= r, (far <= r) & (far > r - 3))[shape - 1]
        labels[inside] = shape
    return (labels / SHAPES + 0.15 * torch.randn(SIDE, SIDE))[None], labels


def segmentation(steps, device):
    layers = [nn.Conv2d(1, 16, 5, padding=2), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(16, 16, 5, padding=2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(16, SHAPES, 1)).to(device)
    batches = []
    for _ in range(steps):
        images, labels = zip(*(drawing() for _ in range(BATCH)))
        batches.append(((torch.stack(images).to(device),), torch.stack(labels).to(device)))
    return Task(model, batches, "dice_ce_loss", {"softmax": True})


def curve(task, losses, device):
    """The loss and the seconds of every step, and the peak memory of one forward and backward."""
    model, function = copy.deepcopy(task.model), getattr(losses, task.loss)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)

    def loss_of(inputs, labels):
        found = model(*inputs)
        return function(*(found if isinstance(found, tuple) else (found,)), labels, **task.options)

    values, seconds = [], []
    for inputs, labels in task.batches:
        start = time.perf_counter()
        optimiser.zero_grad()
        loss = loss_of(inputs, labels)
        loss.backward()
        optimiser.step()
        values.append(loss.item())  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    optimiser.zero_grad()
    peak = peak_bytes(lambda: lambda: loss_of(*task.batches[0]).backward(), device)
    return values, seconds, peak


def table(names, device, steps=40):
    """A frame of every step's loss and time, by task and provider."""
    frames = []
    for name in names:
        torch.manual_seed(0)
        task = {"lm": language, "seg": segmentation}[name](steps, device)
        for provider, losses in LOSSES.items():
            values, seconds, peak = curve(task, losses, device)
            steps_of = {"step": range(steps), "loss": values, "ms": [s * 1e3 for s in seconds], "peak_mb": peak / 1e6}
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
    figure = Figure(figsize=(4.4 * len(tasks), 3.4), dpi=130, facecolor="white", layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        ours = zip(LOSSES, (COLOURS[0], COLOURS[3]), (4.0, 1.2), itertools.count(1))
        for provider, colour, width, order in ours:
            steps = frame[(frame["task"] == task) & (frame["provider"] == provider)]
            label = f"{provider}: {steps['ms'].median():.3g} ms a step, {steps['peak_mb'].iloc[0]:.3g} MB"
            axes.plot(steps["step"], steps["loss"], color=colour, linewidth=width, label=label, zorder=order + 1)
        axes.set_title({"lm": "language model", "seg": "segmentation"}[task], fontsize=9, color=INK, loc="left")
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
