"""One line of the table, and the shapes that lines share."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

IGNORED = -100


@dataclass(frozen=True)
class Case:
    name: str  # of the function, in reference.losses and in triton_losses.functional
    draw: Callable  # (shape, dtype, device) -> tensors: input, target
    options: Mapping = field(default_factory=dict)
    note: str = ""  # what is hard, or special, about the inputs
    differentiable: int = 1  # how many of the leading tensors take a gradient
    # for tests: ragged, one element, more dimensions, more than a block
    shapes: tuple = ((7, 130), (1, 1), (3, 5, 4), (3, 3001))
    bench: Mapping = field(default_factory=dict)  # preset -> shapes; none: not timed
    headline: bool = False  # the quick preset compiles these alone
    # of a head's hidden states: its shapes are (rows, features, classes), its tensors hidden states, weight, target
    features: int = 0
    steps: int = 0  # of a sequence: its shapes are (steps, rows, classes)
    reduces: bool = True  # whether it takes a reduction
    # what the bench compares with, where the reference is written to be right and not fast
    baseline: Callable | None = None
    # whether every row meets every other: its shapes are (rows, features), and it has rows² similarities
    pairwise: bool = False
    classes: int = 0  # of an image's pixels: its shapes are (images, classes, pixels)

    def __str__(self):
        return "-".join([self.name, *([self.note.replace(" ", "_")] if self.note else []), *self.option_words()])

    def logits(self, shape):
        """How many numbers its matrix products make in plain PyTorch; 0 if it has none."""
        return shape[0] * shape[-1] if self.features else shape[0] ** 2 if self.pairwise else 0

    def largest(self, preset):
        """The shape of most numbers that a preset of the bench times."""
        return max(self.bench[preset], key=lambda shape: torch.Size(shape).numel())

    def option_words(self):
        return [f"{name}={value.__name__ if callable(value) else value}" for name, value in self.options.items()]

    def shape(self, rows, columns):
        if self.steps:
            return (self.steps, rows, columns)
        between = [n for n in (self.features, self.classes) if n]
        return (rows, *between, columns)

    def arguments(self, shape, dtype=torch.float32, device="cpu", seed=0, reduction=None, drawn_there=False):
        """Tensors and options, with the reduction, where it takes one: the same for the same seed on every device.

        drawn_there: drawn on the device instead of copied to it, which is much faster; then a GPU has other numbers.
        """
        torch.manual_seed(seed)
        with torch.device(device) if drawn_there else contextlib.nullcontext():
            tensors = tuple(t.to(device) for t in self.draw(shape, dtype))
            like = tensors[0][..., :1].expand(*shape[:-2], shape[-1]) if self.features else tensors[0]
            options = {name: value(like) if callable(value) else value for name, value in self.options.items()}
        return tensors, options | ({"reduction": reduction} if reduction and self.reduces else {})


TIMED = {"quick": ((64, 10), (1 << 24,)), "full": ((64, 10), (1 << 20,), (1 << 24,), (1 << 27,))}
TIMED_LESS = {"quick": ((1 << 22,),), "full": TIMED["full"]}  # quick is three minutes in all
TIMED_ROWS = {"quick": ((64, 10), (1024, 32000)), "full": ((64, 10), (8192, 1000), (1024, 32000), (8192, 128256))}
TIMED_PAIRS = {"quick": ((64, 10), (1024, 32000)), "full": ((64, 10), (1024, 32000), (4096, 128256))}
# ragged, one class, one row, unbatched, more dimensions, many blocks
ROWS = ((7, 130), (5, 1), (1, 33), (6,), (2, 3, 4, 5), (3, 2071))
HARD = ((9, 70),)
# few classes and many, ragged pixels, volumes, more than a block
IMAGES = ((2, 3, 4, 8), (1, 19, 5, 7), (1, 35, 2, 3, 4), (1, 2, 1480))
HARD_IMAGES = ((3, 4, 3, 4),)
TIMED_IMAGES = {"quick": ((4, 19, 256, 256),), "full": ((8, 19, 256, 512), (2, 4, 96, 96, 96))}
