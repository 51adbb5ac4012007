"""What the readings of rows share: the statistics of a row formula, which rows count, and the `Pass` over the rows."""

import functools
from typing import NamedTuple

import torch

STATISTICS = ("picked", "log_p", "mean_log_p", "lse", "entropy")
LOWEST = -3.4028234663852886e38  # finite, because 0 · -inf is nan
MOST_PADDING = 64  # rows are copied if their stride exceeds their length by this many elements or more


@functools.cache
def slots_of(formula):
    """For each statistic the index of its partial in what the formula returns, or 0 if the formula does not take it.

    The last entry is not 0 if the formula takes the weight.
    """
    taken = [name for name in (*STATISTICS, "weight") if name in formula.parameters]
    if list(formula.parameters[: len(taken)]) != taken:
        raise ValueError(f"formula {formula.name}: statistics come first, in the order {(*STATISTICS, 'weight')}")
    return tuple(taken.index(name) + 1 if name in taken else 0 for name in (*STATISTICS, "weight"))


def wanted_of(formula):
    """Which of the formula's partials a backward wants: those by all statistics that it takes."""
    return tuple(True for slot in slots_of(formula)[:5] if slot)


def arguments_of(formula, statistics, weight):
    """Those of the statistics (in the order of STATISTICS) and the weight that the formula takes."""
    return [s for s, slot in zip((*statistics, weight), slots_of(formula)) if slot]


def transform(x, softcap, scale):
    x = softcap * torch.tanh(x / softcap) if softcap else x
    return x if scale == 1 else x * scale


class Pass(NamedTuple):
    """What one pass over the rows reads and fills, beside the logits. A pass is a forward, a backward, or both at once.

    saved: (4, rows), what a backward needs of each row. A forward fills it; a pass without a forward reads it.
    forward: whether the pass computes and returns losses and weights (rows,); weights may be None, if all are 1.
    entropy: whether to fill saved[3] with the rows' entropies even if the formula does not take them.
    likeliest: (rows,) integers to fill with each row's argmax, the first in a tie; -1 where ignored.
    grad: a tensor to fill with the gradient of Σ upstream · losses; it may be the logits themselves.
    operands: further arguments of the formula, (rows,) each.
    room: on a CPU, a contiguous buffer (rows, more columns). Logits and grad are both its first columns; the other
    columns may be overwritten.
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
    """The logits, with contiguous rows and little padding between them; copied if they are not so already."""
    rows, cols = logits.shape
    if logits.stride(1) == 1 and (rows == 1 or 0 <= logits.stride(0) - cols < MOST_PADDING):
        return logits
    return logits.contiguous()


def empty_with_strides(x):
    """Memory like x with its strides too, because a kernel takes one stride for both: rows may have gaps between."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def counted(labels, class_weights, cols, ignore_index, dtype):
    """Which rows count (None: all), labels (rows, 1) that are valid indices, and the rows' weights (None: all 1).

    It is for CPU tensors, because it reads the labels' values. It raises an IndexError if a label is no class.
    """
    kept = None
    if labels.numel():
        low, high = (int(v) for v in torch.aminmax(labels))
        if low < 0 or high >= cols or low <= ignore_index <= high:
            kept = labels != ignore_index
            if low < 0 or high >= cols:
                valid = torch.where(kept, labels, 0)
                low, high = (int(v) for v in torch.aminmax(valid))
                if low < 0 or high >= cols:
                    wrong = labels[kept & ((labels < 0) | (labels >= cols))]
                    if wrong.numel():  # not if there are no classes and all rows are ignored
                        raise IndexError(
                            f"Target {int(wrong[0])} is out of bounds: "
                            f"it must be in [0, {cols}), or ignore_index, {ignore_index}"
                        )
                labels = valid
    labels = labels.long()
    weights = None
    if class_weights is not None:
        weights = class_weights.to(dtype)[labels]
        weights = weights if kept is None else torch.where(kept, weights, 0)
    elif kept is not None:
        weights = kept.to(dtype)
    return kept, labels[:, None], weights
