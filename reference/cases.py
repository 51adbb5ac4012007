"""The table: every loss with its options and inputs. Tests and bench both walk it, so a loss that stands here is tested,
compiled, built for GPUs and timed.

A draw makes a loss's tensors, the differentiated ones first. An option whose value is a function is drawn too: it is
called with the input.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

IGNORED = -100


@dataclass(frozen=True)
class Case:
    name: str  # of the function, in reference.losses and in triton_losses.functional
    draw: Callable  # (shape, dtype, device) -> tensors: input, target
    options: Mapping = field(default_factory=dict)
    note: str = ""  # what is hard about the inputs; such a case is tested, not timed
    differentiable: int = 1  # how many of the leading tensors take a gradient
    shapes: tuple = ((7, 130), (1, 1), (3, 5, 4), (3, 3001))  # for tests: ragged, one element, more dimensions, more than a block
    bench: Mapping = field(default_factory=dict)  # preset -> shapes; none: not timed
    headline: bool = False  # the quick preset compiles these alone

    def __str__(self):
        return "-".join([self.name, *([self.note.replace(" ", "_")] if self.note else []), *self.option_words()])

    def option_words(self):
        return [f"{name}={value.__name__ if callable(value) else value}" for name, value in self.options.items()]

    def arguments(self, shape, dtype=torch.float32, device="cpu", seed=0):
        """Tensors and options, the same for the same seed on every device."""
        torch.manual_seed(seed)
        tensors = tuple(t.to(device) for t in self.draw(shape, dtype))
        options = {name: value(tensors[0]) if callable(value) else value for name, value in self.options.items()}
        return tensors, options


def numbers(shape, dtype):
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def kinks(shape, dtype):
    """Residuals of exactly -2, -1, -½, 0, ½, 1, 2: where these losses bend."""
    target = torch.randint(-3, 4, shape).to(dtype)
    return target + torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0], dtype=dtype)[torch.randint(7, shape)], target


def with_nan(shape, dtype):
    input, target = numbers(shape, dtype)
    input.view(-1)[::3] = float("nan")
    return input, target


def infinite(shape, dtype):
    input, target = numbers(shape, dtype)
    input.view(-1)[::3], input.view(-1)[1::3] = float("inf"), -float("inf")
    return input, target


def logits_and_chances(shape, dtype):
    return torch.randn(shape, dtype=dtype) * 3, torch.rand(shape, dtype=dtype)


def logits_and_bits(shape, dtype):
    return torch.randn(shape, dtype=dtype) * 3, torch.randint(2, shape).to(dtype)


def huge_logits_and_bits(shape, dtype):
    return torch.randn(shape, dtype=dtype) * 1e4, torch.randint(2, shape).to(dtype)


def logits_and_labels(shape, dtype):
    """Class indices for (C,), (N, C) or (N, C, d1, ...); every fifth is ignored, but never the first."""
    classes, where = (shape[0], ()) if len(shape) == 1 else (shape[1], (shape[0], *shape[2:]))
    labels = torch.randint(classes, where)
    labels.view(-1)[4::5] = IGNORED
    return torch.randn(shape, dtype=dtype) * 2, labels


def logits_and_all_labels(shape, dtype):
    """Class indices none of which lies outside the classes, for an ignore_index among them."""
    input, labels = logits_and_labels(shape, dtype)
    return input, labels.clamp(min=0)


def log_probabilities_and_all_labels(shape, dtype):
    input, labels = log_probabilities_and_labels(shape, dtype)
    return input, labels.clamp(min=0)


def log_probabilities_and_labels(shape, dtype):
    input, labels = logits_and_labels(shape, dtype)
    return input.log_softmax(min(len(shape) - 1, 1)), labels


def logits_and_probabilities(shape, dtype):
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype).softmax(min(len(shape) - 1, 1))


def masked_vocabulary(shape, dtype):
    """-inf logits, a whole leading block among them; labels are never masked."""
    input, labels = logits_and_labels(shape, dtype)
    input[:, : shape[1] // 2] = -float("inf")
    input[1:, -2] = -float("inf")
    return input, torch.where(labels == IGNORED, labels, shape[1] - 1)


def masked_label(shape, dtype):
    input, labels = logits_and_labels(shape, dtype)
    labels[0], input[0, 1] = 1, -float("inf")
    return input, labels


def lowest_logits(shape, dtype):
    """finfo.min, as attention-style masks use it: a whole row of it, and most of another."""
    input, labels = logits_and_labels(shape, dtype)
    input[0], input[1, 1:] = torch.finfo(dtype).min, torch.finfo(dtype).min
    return input, labels


def offset_logits(shape, dtype):
    """A common offset of 1e5 must cost no digits beyond those it costs the logits themselves."""
    input, labels = logits_and_labels(shape, dtype)
    return input + (1e5 if dtype != torch.float16 else 1e3), labels


def huge_logits(shape, dtype):
    input, labels = logits_and_labels(shape, dtype)
    return input * 5e3, labels


def a_nan_logit(shape, dtype):
    input, labels = logits_and_labels(shape, dtype)
    input[0, 1], input[2], input[3, 0] = float("nan"), -float("inf"), float("inf")
    return input, labels


def all_ignored(shape, dtype):
    input, labels = logits_and_labels(shape, dtype)
    return input, torch.full_like(labels, IGNORED)


def certain(shape, dtype):
    """The label's probability is 1, or almost: what focal modulators divide by."""
    input, labels = logits_and_labels(shape, dtype)
    rows = torch.arange(shape[0])
    input[rows, labels.clamp(min=0)] += torch.tensor([200.0, 17.0, 8.0])[rows % 3].to(dtype)
    return input, labels


def like_input(input):
    return torch.rand_like(input) + 0.5


def per_class(input):
    return torch.rand(input.shape[min(input.dim() - 1, 1)], dtype=input.dtype).to(input.device) + 0.5


def per_column(input):
    return torch.rand(input.shape[-1:], dtype=input.dtype).to(input.device) * 3 + 0.1


TIMED = {"quick": ((64, 10), (1 << 24,)), "full": ((64, 10), (1 << 20,), (1 << 24,), (1 << 27,))}
TIMED_ROWS = {"quick": ((64, 10), (1024, 32000)), "full": ((64, 10), (8192, 1000), (1024, 32000), (8192, 128256))}
ROWS = ((7, 130), (5, 1), (1, 33), (6,), (2, 3, 4, 5), (3, 2071))  # ragged, one class, one row, unbatched, more dimensions, many blocks
HARD = ((9, 70),)


def regression(name, options=(), **more):
    return Case(name, numbers, dict(options), differentiable=2, **more)


def binary(name, options=(), draw=logits_and_chances, **more):
    return Case(name, draw, dict(options), differentiable=2, **more)


def rows(name, options=(), draw=logits_and_labels, **more):
    return Case(name, draw, dict(options), **{"shapes": ROWS, **more})


def hard_rows(name, draw, options=()):
    return Case(name, draw, dict(options), note=draw.__name__.replace("_", " "), shapes=HARD)


CASES = [
    regression("mse_loss", bench=TIMED, headline=True),
    regression("mse_loss", {"weight": like_input}),
    regression("l1_loss", bench=TIMED),
    regression("l1_loss", {"weight": like_input}),
    regression("smooth_l1_loss", bench=TIMED),
    regression("smooth_l1_loss", {"beta": 0.3}),
    regression("smooth_l1_loss", {"beta": 0.0}),
    regression("huber_loss", bench=TIMED, headline=True),
    regression("huber_loss", {"delta": 0.3}),
    regression("huber_loss", {"weight": like_input, "delta": 2.0}),
    regression("log_cosh_loss", bench=TIMED),
    *(
        Case(name, draw, note=draw.__name__.replace("_", " "), differentiable=2, shapes=((9, 7),))
        for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "log_cosh_loss")
        for draw in (kinks, with_nan, infinite)
    ),
    binary("binary_cross_entropy_with_logits", bench=TIMED, headline=True),
    binary("binary_cross_entropy_with_logits", {"weight": like_input}),
    binary("binary_cross_entropy_with_logits", {"weight": per_column, "pos_weight": per_column}, bench={"full": ((1 << 18, 64),)}),
    binary("binary_cross_entropy_with_logits", {"pos_weight": per_column}, huge_logits_and_bits, note="huge logits"),
    binary("binary_cross_entropy_with_logits", (), with_nan, note="with nan"),
    binary("sigmoid_focal_loss", {"reduction": "mean"}, logits_and_bits, bench=TIMED, headline=True),
    binary("sigmoid_focal_loss", {"alpha": 0.6, "gamma": 1.5}),
    binary("sigmoid_focal_loss", {"alpha": -1.0, "gamma": 0.0}, logits_and_bits),
    binary("sigmoid_focal_loss", {"gamma": 0.5}, huge_logits_and_bits, note="huge logits"),
    rows("nll_loss", (), log_probabilities_and_labels, bench=TIMED_ROWS),
    rows("nll_loss", {"weight": per_class, "ignore_index": 0}, log_probabilities_and_all_labels),
    hard_rows("nll_loss", all_ignored),
    rows("cross_entropy", bench=TIMED_ROWS, headline=True),
    rows("cross_entropy", {"weight": per_class, "ignore_index": 0}, logits_and_all_labels),
    rows("cross_entropy", {"label_smoothing": 0.1}, bench=TIMED_ROWS),
    rows("cross_entropy", {"label_smoothing": 0.1, "weight": per_class}),
    rows("cross_entropy", {"z_loss": 1e-2}),
    rows("cross_entropy", {"z_loss": 1e-2, "label_smoothing": 0.2, "weight": per_class, "ignore_index": 0}, logits_and_all_labels),
    rows("cross_entropy", {"label_smoothing": 0.2, "weight": per_class}, logits_and_probabilities),
    rows("cross_entropy", {"z_loss": 1e-2}, logits_and_probabilities),
    *(
        hard_rows("cross_entropy", draw)
        for draw in (masked_vocabulary, masked_label, lowest_logits, offset_logits, huge_logits, a_nan_logit, all_ignored)
    ),
    hard_rows("cross_entropy", offset_logits, {"label_smoothing": 0.1, "weight": per_class}),
    hard_rows("cross_entropy", all_ignored, {"label_smoothing": 0.1}),
    hard_rows("cross_entropy", masked_vocabulary, {"z_loss": 1e-2}),
    rows("focal_loss", bench=TIMED_ROWS),
    rows("focal_loss", {"gamma": 0.0, "weight": per_class, "ignore_index": 0}, logits_and_all_labels),
    rows("focal_loss", {"gamma": 0.5, "alpha": 0.25, "weight": per_class}),
    *(hard_rows("focal_loss", draw, {"gamma": 0.5}) for draw in (certain, masked_vocabulary, masked_label, huge_logits, all_ignored)),
]
