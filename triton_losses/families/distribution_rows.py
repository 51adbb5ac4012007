"""Losses of two rows, L_r = Σ_j f(log p_j, log q_j), straight from logits: p = softmax(y / T), q = softmax(x / T).

A row formula takes log_p, log_q, then scalars, and returns f and its partials by both. From those, with the sums over
the row,

    ∂L/∂x_j = (∂f/∂log q_j - q_j Σ_k ∂f/∂log q_k) / T        and the same of y and p

p may be *given* as probabilities instead, which need not sum to 1: then f takes p itself, and ∂L/∂p_j = ∂f/∂p_j. A
weight of each column multiplies f. A z-loss adds z · lse², lse = log Σ exp(x / T). A factor multiplies all of it.

    forward   reads both rows; kernels save six numbers a row: max and log Σ exp(· - max) of each (apart, as in
              label_rows), and the two sums of partials
    backward  reads both rows and writes the gradients

**The rule of one read.** In general f needs both log Σ first: two reads, the second out of the cache. One is enough
where f is linear in log q and, for p from logits, ∂f/∂log q = -p. For then moving log q by b and log p by a makes of f
e^a (f + (b - a) ∂f/∂log q), so sums made with the maxima so far can be moved to the final ones, and Σ exp(log p) is at
hand.
"""

from typing import NamedTuple

import torch

from triton_losses.blocks import distribution_rows as blocks
from triton_losses.core.bridge import Bridge
from triton_losses.core.compiler import runs_kernels, triton
from triton_losses.core.reduction import promoted, result_dtype
from triton_losses.whole import distribution_rows as whole

if triton is not None:
    from triton_losses.kernels import distribution_rows as kernels
else:
    kernels = None  # type: ignore[assignment]


class Problem(NamedTuple):
    formula: str
    scalars: tuple[float, ...] = ()
    given: bool = False  # p is probabilities, else logits
    one_read: bool = False  # the formula follows the rule of one read
    scale: float = 1.0  # 1 / temperature
    z_loss: float = 0.0
    factor: float = 1.0  # of the loss
    ignore_index: int = -100  # the label of a row that costs nothing
    reduction: str = "mean"  # over the rows that count
    dtype: torch.dtype = torch.float32  # of the result


class Pass(NamedTuple):
    """What a walk over the rows makes beside their losses: the gradients of Σ upstream · losses."""

    grads: tuple = (None, None)  # of p and of q, to be filled where given; they may be p and q themselves
    upstream: torch.Tensor | None = None  # (rows,) where a gradient is wanted


read = Bridge("distribution_rows", Problem, inputs=4, outputs=1, whole=whole, blocks=blocks, kernels=kernels)


def distribution_rows(formula, p, q, weight=None, labels=None, out_dtype=None, **options):
    """``formula`` of every pair of rows of ``p`` and ``q`` (rows, columns).

    weight: of the columns. labels: (rows,). out_dtype: of the result; the promoted type, or float32 under autocast,
    when None. options: fields of Problem.
    """
    problem = Problem(formula.name, dtype=out_dtype or result_dtype(q, promoted(p, q)), **options)
    if weight is not None and weight.requires_grad:
        return whole.forward((p, q, weight, labels), problem)
    if q.shape[1] == 0:
        return in_plain_torch(problem, p, q, weight, labels)
    return read(problem, p, q, weight, labels)


def in_plain_torch(problem, *tensors):
    """By the whole reading, with the formula's own partials."""
    return read.in_plain_torch(problem, tensors)[0]


def walk(tensors, problem, task):
    """One Pass over the pairs, by kernels, which want a readable pair, or in blocks. Returns their losses, 0 where
    ignored.

    The problem reduces nothing; its dtype is the one that its losses are computed in.
    """
    return (kernels if runs_kernels(tensors[1]) else blocks).walk(tensors, problem, task)
