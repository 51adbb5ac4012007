"""Losses of two rows, L_r = Σ_j f(log p_j, log q_j), directly from logits: p = softmax(y / T), q = softmax(x / T).

A row formula takes log_p, log_q, then scalars, and returns f and its partial derivatives with respect to both. These
and their sums over the row give

    ∂L/∂x_j = (∂f/∂log q_j - q_j Σ_k ∂f/∂log q_k) / T        and the same for y and p

p may instead be *given* as probabilities, which need not sum to 1: then f takes p itself, and ∂L/∂p_j = ∂f/∂p_j.
Weights of the columns multiply f. A z-loss adds z · lse², with lse = log Σ exp(x / T). A factor multiplies the whole
loss.

    forward   reads both rows; kernels save six numbers per row: max and log Σ exp(· - max) of each (separately, as in
              label_rows), and the two sums of partial derivatives
    backward  reads both rows and writes the gradients

**The rule of one read.** In general f needs the log-sum-exp of both rows first, so the rows are read twice, the second
time from the cache. One read is enough if f is linear in log q and, for p from logits, ∂f/∂log q = -p. Then adding a to
log p and b to log q turns f into e^a (f + (b - a) ∂f/∂log q), so sums computed with running maxima can be corrected to
the final maxima, and Σ exp(log p) is known from the sum of ∂f/∂log q.
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
    given: bool = False  # whether p is probabilities; if not, logits
    one_read: bool = False  # whether the formula follows the rule of one read
    scale: float = 1.0  # 1 / temperature
    z_loss: float = 0.0
    factor: float = 1.0  # of the loss
    ignore_index: int = -100  # the label of a row that does not count
    reduction: str = "mean"  # over the rows that count
    dtype: torch.dtype = torch.float32  # of the result


class Pass(NamedTuple):
    """The gradients of Σ upstream · losses that `walk` computes beside the losses."""

    grads: tuple = (None, None)  # tensors to fill, of p and of q, or None; they may be p and q themselves
    upstream: torch.Tensor | None = None  # (rows,) where a gradient is wanted


read = Bridge("distribution_rows", Problem, inputs=4, outputs=1, whole=whole, blocks=blocks, kernels=kernels)


def distribution_rows(formula, p, q, weight=None, labels=None, out_dtype=None, **options):
    """``formula`` of every pair of rows of ``p`` and ``q`` (rows, columns).

    weight: of the columns. labels: (rows,). out_dtype: of the result; if None, the promoted type, or float32 under
    autocast. options: fields of Problem.
    """
    problem = Problem(formula.name, dtype=out_dtype or result_dtype(q, promoted(p, q)), **options)
    if weight is not None and weight.requires_grad:
        return whole.forward((p, q, weight, labels), problem)
    if q.shape[1] == 0:
        return in_plain_torch(problem, p, q, weight, labels)
    return read(problem, p, q, weight, labels)


def in_plain_torch(problem, *tensors):
    """The loss by the whole reading; its gradient uses the formula's own partial derivatives."""
    return read.in_plain_torch(problem, tensors)[0]


def walk(tensors, problem, task):
    """Run one Pass over the pairs of rows, with kernels or blocks, and return their losses, 0 where ignored.

    Kernels need tensors that `core.rows.readable` would return as they are. The problem's reduction is "none", and its
    dtype is the one in which the losses are computed.
    """
    return (kernels if runs_kernels(tensors[1]) else blocks).walk(tensors, problem, task)
