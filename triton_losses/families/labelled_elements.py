"""Losses of the form L_ij = f(x_ij, [j = t_i]): an elementwise formula of a logit and a bit, where a row's label says
which bit is 1.

    forward   reads logits and labels once; writes L, or its sum
    backward  reads both again; writes ∂L/∂x · upstream

The map of bits, one-hot, would be as large as the logits: kernels and blocks never make it. A row whose label is
`background` has no 1.
"""

from typing import NamedTuple

import torch

from triton_losses.blocks import labelled_elements as blocks
from triton_losses.core.bridge import Bridge
from triton_losses.core.compiler import triton
from triton_losses.core.reduction import result_dtype
from triton_losses.whole import labelled_elements as whole

if triton is not None:
    from triton_losses.kernels import labelled_elements as kernels
else:
    kernels = None  # type: ignore[assignment]


class Problem(NamedTuple):
    formula: str
    scalars: tuple[float, ...]
    background: int
    reduction: str  # the mean is over elements
    dtype: torch.dtype  # of the result

    @property
    def weighted(self):
        """What the whole reading of elementwise losses asks of a problem."""
        return False


read = Bridge("labelled_elements", Problem, inputs=2, outputs=1, whole=whole, blocks=blocks, kernels=kernels)


def labelled_elements(formula, x, labels, scalars=(), background=-1, reduction="mean"):
    """Reduce ``formula(x, bit, *scalars)``; x (..., classes), labels (...): class indices or ``background``."""
    shape, problem = x.shape, Problem(formula.name, tuple(map(float, scalars)), background, reduction, result_dtype(x))
    if len(shape) != 2:
        x, labels = x.reshape(labels.numel(), shape[-1]), labels.reshape(-1)
    losses = read(problem, x, labels)
    return losses.view(shape) if reduction == "none" and len(shape) != 2 else losses
