"""Losses of the form L_ij = f(x_ij, [j = t_i]): an elementwise formula of a logit and a bit, 1 in the label's column.

    forward   reads logits and labels once; writes L, or its sum
    backward  reads both again; writes ∂L/∂x · upstream

The one-hot tensor of the bits would be as large as the logits, so kernels and blocks never create all of it. In a row
with the label `background` all bits are 0.
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
        """The whole reading of elementwise losses reads this attribute; labelled elements have no weights."""
        return False


read = Bridge("labelled_elements", Problem, inputs=2, outputs=1, whole=whole, blocks=blocks, kernels=kernels)


def labelled_elements(formula, x, labels, scalars=(), background=-1, reduction="mean"):
    """Reduce ``formula(x, bit, *scalars)``; x (..., classes), labels (...): class indices or ``background``."""
    shape, problem = x.shape, Problem(formula.name, tuple(map(float, scalars)), background, reduction, result_dtype(x))
    if len(shape) != 2:
        x, labels = x.reshape(labels.numel(), shape[-1]), labels.reshape(-1)
    losses = read(problem, x, labels)
    return losses.view(shape) if reduction == "none" and len(shape) != 2 else losses
