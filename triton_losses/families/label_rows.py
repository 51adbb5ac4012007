"""Losses of a row of logits and the index of its class: L_r = f(statistics of the row, weight of its class).

A row formula takes some of these statistics, in this order, then optionally the weight, then scalars:

    picked      x_t, the logit of the label t                  log_p   x_t - log Σ_j exp x_j
    mean_log_p  Σ_j w_j log p_j / C                            lse     log Σ_j exp x_j
    entropy     H = -Σ_j p_j log p_j
    weight      w_t, the weight of the label's class: 1 where there are no class weights

It returns the loss, then its partial derivative by each statistic that it took, f_log_p and so on. With p = softmax(x)
and w̄ = Σ_j w_j / C,

    ∂L/∂x_j = p_j (f_lse - f_log_p - w̄ f_mean_log_p - f_entropy (log p_j + H))
              + [j = t] (f_log_p + f_picked)  +  f_mean_log_p w_j / C

where x is the logit, or scale · softcap · tanh(logit / softcap).

Logits have one of two layouts: rows (rows, classes) with labels (rows,), or planes (images, classes, pixels) with
labels (images, pixels). In planes each pixel is a row; nothing is permuted or copied.

    forward   reads a row once; writes its loss and saves max x and log Σ exp(x - max x). It saves them separately,
              because if all logits have a large offset in common, rounding the sum would lose digits of the logarithm
    backward  reads a row once and writes its gradient

For a formula that takes only `picked`, one number per row is read. Rows with the label `ignore_index` have loss 0 and
gradient 0.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch

from triton_losses.blocks import label_rows as blocks
from triton_losses.core.bridge import Bridge
from triton_losses.core.compiler import runs_kernels, triton
from triton_losses.core.reduction import result_dtype
from triton_losses.whole import label_rows as whole

if triton is not None:
    from triton_losses.kernels import label_rows as kernels
else:
    kernels = None  # type: ignore[assignment]


class Problem(NamedTuple):
    formula: str
    scalars: tuple[float, ...] = ()
    ignore_index: int = -100
    softcap: float = 0.0  # 0: none
    scale: float = 1.0  # 1 / temperature
    reduction: str = "mean"  # divides by the sum of the rows' weights
    dtype: torch.dtype = torch.float32  # of the result
    gradient_in_forward: bool = False  # kernels of rows: one pass makes the loss and its gradient
    overwrite: bool = False  # the gradient may replace the logits


class StatisticsProblem(NamedTuple):
    """The problem of `row_statistics`, which returns log_p and the entropy, both differentiable."""

    formula: str
    scalars: tuple[float, ...] = ()
    ignore_index: int = -100
    softcap: float = 0.0
    scale: float = 1.0


def statistics_of(reading):
    return reading and SimpleNamespace(forward=reading.statistics_forward, backward=reading.statistics_backward)


readings = {"whole": whole, "blocks": blocks, "kernels": kernels}
read = Bridge("label_rows", Problem, inputs=3, outputs=1, **readings)
read_statistics = Bridge(
    "row_statistics",
    StatisticsProblem,
    inputs=2,
    outputs=2,
    whole=SimpleNamespace(forward=whole.statistics),
    blocks=statistics_of(blocks),
    kernels=statistics_of(kernels),
)


def label_rows(formula, logits, labels, class_weights=None, out_dtype=None, **options):
    """``formula`` of every row of ``logits`` that is not ignored: (rows, classes), or (images, classes, pixels).

    out_dtype: of the result; if None, that of the logits, or float32 under autocast. options: fields of Problem.
    """
    problem = Problem(formula.name, dtype=out_dtype or result_dtype(logits), **options)
    return read(problem, logits, labels, class_weights)


def row_statistics(logits, labels, **options):
    """log_p and entropy of every row of ``logits`` (rows, classes), float32 or wider; 0 where ignored."""
    return read_statistics(StatisticsProblem("log_p_beside_entropy", **options), logits, labels)


def walk(tensors, problem, task):
    """Run one Pass over the rows, with kernels or blocks. If it is a forward, return losses and weights (rows,)."""
    return (kernels if runs_kernels(tensors[0]) else blocks).walk(tensors, problem, task)
