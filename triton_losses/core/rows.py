"""What the readings of rows share: the statistics that a row formula takes, which rows count, and what one pass over
rows does.
"""

import functools
from typing import NamedTuple

import torch

STATISTICS = ("picked", "log_p", "mean_log_p", "lse", "entropy")
LOWEST = -3.4028234663852886e38  # finite, for 0 · -inf is nan
MOST_PADDING = 64  # a row's stride may exceed its length by less than this; beyond it rows are copied


@functools.cache
def slots_of(formula):
    """Where each statistic's partial stands in what the formula returns, 0 where it is not taken; last: takes the
    weight.
    """
    taken = [name for name in (*STATISTICS, "weight") if name in formula.parameters]
    if list(formula.parameters[: len(taken)]) != taken:
        raise ValueError(f"formula {formula.name}: statistics come first, in the order {(*STATISTICS, 'weight')}")
    return tuple(taken.index(name) + 1 if name in taken else 0 for name in (*STATISTICS, "weight"))


def arguments_of(formula, statistics, weight):
    """The statistics (in STATISTICS' order) and the weight, those alone that the formula takes."""
    return [s for s, slot in zip((*statistics, weight), slots_of(formula)) if slot]


def transform(x, softcap, scale):
    x = softcap * torch.tanh(x / softcap) if softcap else x
    return x if scale == 1 else x * scale


class Pass(NamedTuple):
    """What one pass over the rows reads and fills, beside the logits. A forward, a backward, or both at once.

    saved: (4, rows), what a backward needs of each row: filled by a forward, read by a backward alone.
    forward: whether there is a forward, which returns losses and weights (rows,); weights None: all 1.
    entropy: fill saved[3] with the rows' entropies, whether the formula takes them or not.
    likeliest: (rows,) integers, to fill with the first of each row's highest columns, -1 where ignored.
    grad: to fill, and it may be the logits, with the gradient of Σ upstream · losses.
    operands: (rows,) each, more arguments of the formula.
    room: on a CPU, where logits and grad are both the first columns of it, contiguous (rows, more columns), the rest is
    free.
    """

    saved: torch.Tensor
    forward: bool = False
    entropy: bool = False
    likeliest: torch.Tensor | None = None
    grad: torch.Tensor | None = None
    upstream: torch.Tensor | None = None
    operands: tuple = ()
    room: torch.Tensor | None = None


def readable(logits):
    """Rows that lie one after another, with little between them."""
    rows, cols = logits.shape
    if logits.stride(1) == 1 and (rows == 1 or 0 <= logits.stride(0) - cols < MOST_PADDING):
        return logits
    return logits.contiguous()


def counted(labels, class_weights, cols, ignore_index, dtype):
    """Which rows count (None: all), labels (rows, 1) that can index, and the rows' weights (None: all 1).

    It looks at the labels, and refuses one that is no class: for a CPU's tensors.
    """
    kept = None
    if labels.numel():
        low, high = (int(v) for v in torch.aminmax(labels))
        if low < 0 or high >= cols or low <= ignore_index <= high:
            kept = labels != ignore_index
            if low < 0 or high >= cols:
                wrong = labels[kept & ((labels < 0) | (labels >= cols))]
                if wrong.numel():
                    raise IndexError(
                        f"Target {int(wrong[0])} is out of bounds: "
                        f"it must be in [0, {cols}), or ignore_index, {ignore_index}"
                    )
                labels = torch.where(kept, labels, 0)
    labels = labels.long()
    weights = None
    if class_weights is not None:
        weights = class_weights.to(dtype)[labels]
        weights = weights if kept is None else torch.where(kept, weights, 0)
    elif kept is not None:
        weights = kept.to(dtype)
    return kept, labels[:, None], weights
