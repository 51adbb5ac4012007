"""Losses of a few vectors per row: L_r = f(S_1, S_2, ..., y), of sums over pairs of vectors, S_k = Σ_j g(u_j, v_j).

g is a formula of one coordinate of each vector. With g = x y the sums are u·v, or u·u for a vector paired with itself.
With a power of |x - y| they are distances, which are never computed as u·u - 2 u·v + v·v, because that cancels. f is a
formula of the sums and, if there is one, a target y.

    forward   reads every vector once; writes the losses and saves the sums
    backward  reads every vector again; writes ∂L/∂u_j = Σ_k ∂f/∂S_k · ∂g/∂u_j over the pairs that contain u
"""

import math
from typing import NamedTuple

import torch

from triton_losses.blocks import pairs as blocks
from triton_losses.core.bridge import Bridge
from triton_losses.core.compiler import triton
from triton_losses.core.reduction import result_dtype, widest
from triton_losses.whole import pairs as whole

if triton is not None:
    from triton_losses.kernels import pairs as kernels
else:
    kernels = None  # type: ignore[assignment]


class Problem(NamedTuple):
    coordinate: str  # g
    formula: str  # f
    pairs: tuple[int, ...]  # the indices of two vectors for each sum
    dtype: torch.dtype  # of the result
    scalars: tuple[float, ...] = ()  # of f
    coordinate_scalars: tuple[float, ...] = ()  # of g
    reduction: str = "mean"


read = Bridge("pairs", Problem, inputs=4, outputs=1, whole=whole, blocks=blocks, kernels=kernels)


def pairs(formula, coordinate, vectors, of, target=None, *, dtype, **options):
    """``formula`` of the target and of the sums of ``coordinate`` over each pair of ``vectors``.

    vectors: two or three tensors (..., D) that broadcast. of: the pairs, as indices of vectors. target: (...).
    dtype: of the result, unless autocast makes it float32. options: fields of Problem.
    """
    x = vectors[0]
    for v in (*vectors[1:], target):
        if v is not None and v.device != x.device:
            raise RuntimeError(f"expected all tensors to be on the same device, but found {x.device} and {v.device}")
    shape = x.shape
    if any(v.shape != shape for v in vectors) or target is not None and target.shape != shape[:-1]:
        shapes, wide = [v.shape for v in vectors], widest(vectors)
        shape = torch.broadcast_shapes(*shapes, *([] if target is None else [(*target.shape, 1)]))
        # in the wide dtype, so that gradients are summed over broadcast dimensions before they are rounded
        vectors = [v if v.shape == shape else v.to(wide).expand(shape) for v in vectors]
        target = target if target is None else target.expand(shape[:-1])
    if len(shape) != 2:
        vectors = [v.reshape(math.prod(shape[:-1]), shape[-1]) for v in vectors]
        target = target if target is None else target.reshape(-1)
    places, dtype = tuple(place for pair in of for place in pair), result_dtype(x, dtype)
    problem = Problem(coordinate.name, formula.name, places, dtype, **options)
    losses = read(problem, *vectors, *[None] * (3 - len(vectors)), target)
    return losses.view(shape[:-1]) if problem.reduction == "none" and len(shape) != 2 else losses
