"""Losses of a row of scores whose labels should outscore the others: L_r = 1/C Σ_{t∈T} w_t Σ_{j∉T} f(x_j - x_t).

T are the row's labels: one, or a set, which ends before the first negative one; a label that stands in it twice counts
twice.
A formula takes d = x_j - x_t and the margin m, and returns f and f': f is max(0, m + d) or its square.
With s_t = w_t/C Σ_{j∉T} f'(x_j - x_t),

    ∂L/∂x_t = -s_t        ∂L/∂x_j = 1/C Σ_{t∈T} w_t f'(x_j - x_t)  where j is no label

    forward   reads a row once for each of its labels; writes its loss and saves s_t
    backward  reads a row once and writes its gradient

On a CPU ATen's own loops do that, of one label a row, or of sets with p = m = w = 1.
"""

from typing import NamedTuple

import torch

from triton_losses.blocks import margin_rows as blocks
from triton_losses.core.bridge import Bridge
from triton_losses.core.compiler import triton
from triton_losses.core.reduction import result_dtype
from triton_losses.whole import margin_rows as whole

if triton is not None:
    from triton_losses.kernels import margin_rows as kernels
else:
    kernels = None  # type: ignore[assignment]


class Problem(NamedTuple):
    formula: str  # margin_excess or squared_margin_excess
    margin: float
    reduction: str  # the mean is over rows
    dtype: torch.dtype  # of the result


read = Bridge("margin_rows", Problem, inputs=3, outputs=1, whole=whole, blocks=blocks, kernels=kernels)


def margin_rows(formula, x, labels, class_weights=None, margin=1.0, reduction="mean"):
    """``formula`` of each row of ``x`` (rows, columns) and its labels: (rows,), or sets (rows, columns)."""
    return read(Problem(formula.name, margin, reduction, result_dtype(x)), x, labels, class_weights)


def margin_rows_by_aten(formula, x, labels, class_weights=None, margin=1.0, reduction="mean"):
    """The same as an operation of ATen's in autograd's graph: of few numbers on a CPU, where an op of ours takes too
    long.

    ATen cannot differentiate its own gradient. Where that is asked for, a hook puts the whole reading's in its place.
    The hook keeps x as long as the loss is there.
    """
    loss = blocks.loss_of(x, labels, class_weights, formula.name, margin, reduction)
    if loss.requires_grad:

        def differentiable(gradients, upstream):
            if torch.is_grad_enabled():
                problem = Problem(formula.name, margin, reduction, x.dtype)
                return tuple(whole.backward((x, labels, class_weights), upstream, problem, (True,)))

        loss.grad_fn.register_hook(differentiable)
    return loss
