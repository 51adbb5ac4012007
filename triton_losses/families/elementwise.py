"""Losses of the form L_i = w_i · f(x_i, y_i, ...): one value per element.

    forward   reads every operand once; writes L, or its sum
    backward  reads every operand again; writes ∂L/∂operand · upstream for each wanted operand

Only the operands are saved, so a second backward is correct too.
"""

from typing import NamedTuple

import torch

from triton_losses.blocks import elementwise as blocks
from triton_losses.core.bridge import Bridge
from triton_losses.core.compiler import triton
from triton_losses.core.dispatch import SMALL, aten_serves
from triton_losses.core.reduction import promoted, result_dtype
from triton_losses.whole import elementwise as whole

if triton is not None:
    from triton_losses.kernels import elementwise as kernels
else:
    kernels = None  # type: ignore[assignment]


class Problem(NamedTuple):
    formula: str
    scalars: tuple[float, ...]
    weighted: bool  # the last operand is w
    reduction: str
    dtype: torch.dtype  # of the result


read = Bridge(
    "elementwise", Problem, inputs=4, outputs=1, whole=whole, blocks=blocks, kernels=kernels, compiled_whole=True
)


def elementwise(formula, operands, scalars=(), reduction="mean", weight=None, dtype=None, aten=None, aten_up_to=SMALL):
    """Reduce ``weight * formula(*operands, *scalars)``; operands and weight broadcast; the mean is over elements.

    dtype: of the result, unless autocast makes it float32; if None, the operands' promoted type.
    aten: ATen's function for the same loss without weights, which takes the operands and the reduction; it is called
    for up to aten_up_to elements on a CPU.
    """
    if aten is not None and weight is None and aten_serves(*operands, most=aten_up_to):
        return aten(*operands, reduction=reduction)
    x = operands[0]
    dtype = result_dtype(x, dtype or promoted(*operands[:2]))
    if weight is not None:
        operands = (*operands, weight)
    shape, broadcast = x.shape, False
    for v in operands[1:]:
        if v.device != x.device:
            raise RuntimeError(f"expected all tensors to be on the same device, but found {x.device} and {v.device}")
        # shapes of two ranks differ; comparing them would be a guard on their first sizes
        broadcast = broadcast or v.dim() != x.dim() or v.shape != shape
    if broadcast:
        operands = torch.broadcast_tensors(*operands)
    return read(Problem(formula.name, tuple(map(float, scalars)), weight is not None, reduction, dtype), *operands)
