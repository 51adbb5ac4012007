"""Margin losses of a row of scores, where the labels T should win: L_r = 1/C Σ_{t∈T} w_t Σ_{j∉T} f(x_j - x_t).

T is one label, or a set that ends before its first negative entry; a label that occurs twice counts twice.
A formula takes d = x_j - x_t and the margin m, and returns f and f': f is max(0, m + d) or its square.
With s_t = w_t/C Σ_{j∉T} f'(x_j - x_t),

    ∂L/∂x_t = -s_t        ∂L/∂x_j = 1/C Σ_{t∈T} w_t f'(x_j - x_t)  where j is no label

    forward   reads a row once for each of its labels; writes its loss and saves s_t
    backward  reads a row once and writes its gradient

On a CPU ATen's own functions compute this: for one label per row, or for sets with power, margin and weights 1.
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
    """The same by ATen's operation in autograd's graph: for small tensors on a CPU, where our op takes too long.

    ATen cannot differentiate its own gradient. If the gradient is to be differentiated, a hook replaces it by that of
    the whole reading. The hook keeps x alive as long as the loss.
    """
    loss = blocks.loss_of(x, labels, class_weights, formula.name, margin, reduction)
    if loss.requires_grad:

        def differentiable(gradients, upstream):
            if torch.is_grad_enabled():
                problem = Problem(formula.name, margin, reduction, x.dtype)
                return tuple(whole.backward((x, labels, class_weights), upstream, problem, (True,)))

        loss.grad_fn.register_hook(differentiable)
    return loss
