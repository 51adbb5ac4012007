"""Losses of a row of unnormalised probabilities x: p_j = x_j / Σ_k x_k, and L_r = Σ_j f(y_j, p_j).

A formula takes y, p, then scalars, and returns f and its partial derivatives with respect to both. These and their sum
over the row give

    ∂L/∂x_j = (∂f/∂p_j - Σ_k p_k ∂f/∂p_k) / Σ_k x_k        ∂L/∂y_j = ∂f/∂y_j

A label t may be given instead of y_j = [j = t]. Then f and ∂f/∂p must be 0 where y is 0, so that only p_t and Σ x are
needed. Rows with the label `ignore_index` have loss 0, and the mean is over the other rows.

    forward   reads x twice, the second time from the cache, and y once; with labels it reads x once. It saves Σ x;
              kernels also save Σ p ∂f/∂p
    backward  reads x and y and writes the gradients; with labels it reads one number per row
"""

from typing import NamedTuple

import torch

from triton_losses.blocks import proportion_rows as blocks
from triton_losses.core.bridge import Bridge
from triton_losses.core.compiler import triton
from triton_losses.core.reduction import promoted, result_dtype
from triton_losses.whole import proportion_rows as whole

if triton is not None:
    from triton_losses.kernels import proportion_rows as kernels
else:
    kernels = None  # type: ignore[assignment]


class Problem(NamedTuple):
    formula: str
    scalars: tuple[float, ...]
    ignore_index: int  # where the target is labels
    reduction: str
    dtype: torch.dtype  # of the result


read = Bridge("proportion_rows", Problem, inputs=2, outputs=1, whole=whole, blocks=blocks, kernels=kernels)


def proportion_rows(formula, x, y, scalars=(), ignore_index=-100, reduction="mean"):
    """``formula`` of every row of ``x`` (rows, columns) and its target, a row of ``y``, or a label (rows,)."""
    dtype = result_dtype(x, promoted(x, y) if y.is_floating_point() else x.dtype)
    problem = Problem(formula.name, tuple(map(float, scalars)), ignore_index, reduction, dtype)
    return read(problem, x, y) if x.shape[1] else read.in_plain_torch(problem, (x, y))[0]
