"""Ranking and metric losses: which of two scores is to be the larger, and how near vectors are to lie."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from triton_losses.core.compiler import tl
from triton_losses.core.device_math import at_least, at_least_tiny, power, relu, root, root_slope, sign, step
from triton_losses.core.dispatch import aten_serves
from triton_losses.core.formula import Formula, formula
from triton_losses.core.op import readable
from triton_losses.core.reduction import DTYPES, reduction_of
from triton_losses.families.elementwise import elementwise
from triton_losses.families.pairs import pairs

# up to this many numbers, overhead and a single thread make a CPU call slower than ATen's: four times at 64 x 10
FEW = 1 << 19

# Formulas of one coordinate of two vectors


@formula
def product(x, y):
    return x * y, y, x


@formula
def squared_difference(x, y, eps):
    d = x - y + eps
    return d * d, 2.0 * d, -2.0 * d


@formula
def absolute_difference(x, y, eps):
    d = x - y + eps
    return tl.abs(d), sign(d), -sign(d)


@formula
def power_of_difference(x, y, eps, p):
    d = x - y + eps
    slope = p * sign(d) * power(tl.abs(d), p - 1.0)
    return power(tl.abs(d), p), slope, -slope


# Formulas of the sums that those give for a row


@formula
def triplet(near, far, margin, p):  # anchor to positive, anchor to negative: distances to the power p
    slack = margin + root(near, p) - root(far, p)
    return relu(slack), step(slack) * root_slope(near, p), -step(slack) * root_slope(far, p)


@formula
def triplet_swapped(near, far, beyond, margin, p):  # beyond: positive to negative
    slack = margin + root(near, p) - root(tl.where(far > beyond, beyond, far), p)
    nearer = 0.5 - 0.5 * sign(far - beyond)  # the nearer one gets the gradient, two equals half each
    active = step(slack)
    return (
        relu(slack),
        active * root_slope(near, p),
        -active * nearer * root_slope(far, p),
        active * (nearer - 1.0) * root_slope(beyond, p),
    )


@formula
def cosine_embedding(ab, aa, bb, y, margin):
    square_a = aa + 9.999999960041972e-13  # torch's 1e-12 in float32
    square_b = bb + 9.999999960041972e-13
    scale = 1.0 / (tl.sqrt(square_a) * tl.sqrt(square_b))  # the product of the squares could overflow
    cosine = ab * scale
    beyond = cosine - margin
    slope = tl.where(y == 1.0, -1.0, tl.where(y == -1.0, step(beyond), 0.0))
    loss = tl.where(y == 1.0, 1.0 - cosine, tl.where(y == -1.0, relu(beyond), 0.0))
    return loss, slope * scale, -0.5 * slope * cosine / square_a, -0.5 * slope * cosine / square_b, 0.0 * slope


@formula
def squared_cosine_error(ab, aa, bb, y, eps):
    length_a = tl.sqrt(aa)
    length_b = tl.sqrt(bb)
    bounded_a = at_least(length_a, eps)  # the derivative ignores this bound, as in torch
    bounded_b = at_least(length_b, eps)
    scale = 1.0 / (bounded_a * bounded_b)
    cosine = ab * scale
    miss = cosine - y
    slope_a = -miss * cosine / bounded_a / at_least_tiny(length_a)
    slope_b = -miss * cosine / bounded_b / at_least_tiny(length_b)
    return miss * miss, 2.0 * miss * scale, slope_a, slope_b, -2.0 * miss


@formula
def contrastive(square, y, margin):
    gap = relu(margin - root(square, 2.0))
    apart = 1.0 - y
    return y * square + apart * gap * gap, y - 2.0 * apart * gap * root_slope(square, 2.0), square - gap * gap


@formula
def margin_ranking(x1, x2, y, margin):
    d = x1 - x2
    slack = margin - y * d
    active = step(slack)
    return relu(slack), -y * active, y * active, -d * active


def are_real(*tensors):
    """Whether the dtypes are among those of our losses; PyTorch's functions also take integers and complex numbers."""
    return all(t.dtype in DTYPES for t in tensors)


def are_atens(*tensors):
    """Whether ATen serves: few numbers on a CPU, of a dtype in which ATen does not round intermediate results."""
    return aten_serves(tensors[0], most=FEW) and all(t.element_size() >= 4 for t in tensors)


def promoted(*tensors):
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors))


def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``max(0, m - y (x₁ - x₂))``: the first score is to be the larger where ``y = 1``, the second where ``y = -1``.

    input1, input2: scores, floating, shapes that broadcast and have as many dimensions (else RuntimeError). target:
    labels -1 or +1 (other numbers are multiplied in all the same), likewise. margin: m, in units of the scores; exactly
    there the gradient is that inside it. reduction: "mean", "sum" or "none"; size_average and reduce are torch's older
    spelling of it. As ``torch.nn.functional.margin_ranking_loss``.

    >>> first, second, target = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])
    >>> margin_ranking_loss(first, second, target, reduction="none")
    tensor([0., 1.])
    """
    reduction = reduction_of(reduction, size_average, reduce)
    if not input1.dim() == input2.dim() == target.dim():
        sizes = f"input1: {input1.size()}, input2: {input2.size()}, target: {target.size()}"
        raise RuntimeError(f"margin_ranking_loss: all tensors must have as many dimensions, got {sizes}")
    if not are_real(input1, input2):
        return torch.nn.functional.margin_ranking_loss(input1, input2, target, margin, reduction=reduction)
    return elementwise(
        margin_ranking, (input1, input2, target), (margin,), reduction, None, promoted(input1, input2, target)
    )


def check_margin(margin):
    if margin <= 0:
        raise ValueError(f"margin must be greater than 0, got {margin}")


def check_triplet(anchor, positive, negative):
    if not anchor.dim() == positive.dim() == negative.dim():
        found = f"anchor {anchor.dim()}D, positive {positive.dim()}D, and negative {negative.dim()}D inputs"
        raise RuntimeError(
            "The anchor, positive, and negative tensors are expected to have the same number of dimensions, "
            f"but got: {found}"
        )


POWERS: dict[float, Formula] = {1: absolute_difference, 2: squared_difference}
TRIPLET = (0, 1), (0, 2)
SWAPPED = *TRIPLET, (1, 2)


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``max(0, m + ‖a - b‖ - ‖a - c‖)``: an anchor a is to lie nearer to a positive b than to a negative c, by the
    margin m.

    anchor, positive, negative: (..., D), floating, shapes that broadcast and have as many dimensions (else
    RuntimeError); reduction="none" gives (...). margin: > 0, else ValueError. p: the norm's, ``(Σ_j |d_j|^p)^(1/p)``;
    for one that is not >= 1 or infinite PyTorch's own function computes the loss. eps: is added to every difference, so
    that two equal vectors are no kink. swap: where the positive lies nearer to the negative than the anchor does, take
    their distance for the last; the gradient of two equal distances goes to both in halves. reduction, size_average,
    reduce: as in ``margin_ranking_loss``. As ``torch.nn.functional.triplet_margin_loss``. Balntas et al. 2016,
    doi:10.5244/C.30.119.

    >>> anchor, near, far = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 5.5]])
    >>> triplet_margin_loss(anchor, near, far)
    tensor(0.5000)
    """
    reduction = reduction_of(reduction, size_average, reduce)
    check_margin(margin)
    check_triplet(anchor, positive, negative)
    vectors = anchor, positive, negative
    ours = (
        are_real(*vectors)
        and 1 <= p < math.inf
        and anchor.dim()
        and anchor.shape[-1] == positive.shape[-1] == negative.shape[-1]
    )
    # a last dimension that broadcasts counts once in one distance, and several times in another
    if not ours or are_atens(*vectors):
        return torch.nn.functional.triplet_margin_loss(*vectors, margin, p, eps, swap, reduction=reduction)
    distance, of_distance = POWERS.get(p, power_of_difference), (eps,) if p in POWERS else (eps, p)
    formula, of = (triplet_swapped, SWAPPED) if swap else (triplet, TRIPLET)
    options = {
        "scalars": (float(margin), float(p)),
        "coordinate_scalars": tuple(map(float, of_distance)),
        "reduction": reduction,
        "dtype": promoted(*vectors),
    }
    return pairs(formula, distance, vectors, of, **options)


def triplet_margin_with_distance_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """``max(0, m + d(a, b) - d(a, c))``: the triplet margin loss of any distance d.

    distance_function: takes two tensors such as anchor and positive and returns their distances; whatever it is,
    PyTorch computes the loss from them. None: the Euclidean one, as in ``triplet_margin_loss``.
    The rest as there. As ``torch.nn.functional.triplet_margin_with_distance_loss``.

    >>> anchor, near, far = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 5.5]])
    >>> triplet_margin_with_distance_loss(anchor, near, far, distance_function=lambda a, b: (a - b).abs().sum(-1))
    tensor(2.5000)
    """
    if distance_function is None:
        return triplet_margin_loss(anchor, positive, negative, margin, swap=swap, reduction=reduction)
    reduction = reduction_of(reduction)
    check_margin(margin)
    check_triplet(anchor, positive, negative)
    near, far = distance_function(anchor, positive), distance_function(anchor, negative)
    if swap:
        far = torch.minimum(far, distance_function(positive, negative))
    losses = torch.clamp_min(margin + near - far, 0)
    return losses if reduction == "none" else getattr(losses, reduction)()


COSINE = (0, 1), (0, 0), (1, 1)


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``1 - cos(a, b)`` where ``y = 1``, ``max(0, cos(a, b) - m)`` where ``y = -1``: vectors that point alike, or do
    not.

    ``cos(a, b) = a·b / √((a·a + 1e-12) (b·b + 1e-12))``. input1, input2: (N, D), or (D,) each, floating. target: (N,),
    or () for (D,) (else RuntimeError): 1 or -1; any other number costs nothing, as in torch, and the target gets no
    gradient. margin: m, in [-1, 1] to mean anything; exactly there the gradient is that beyond it. reduction,
    size_average, reduce: as in ``margin_ranking_loss``. As ``torch.nn.functional.cosine_embedding_loss``.

    >>> a, b = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    >>> cosine_embedding_loss(a, b, torch.tensor([1, -1]), margin=0.25, reduction="none")
    tensor([1.0000, 0.7500])
    """
    reduction = reduction_of(reduction, size_average, reduce)
    plain = input1.dim() == input2.dim() == target.dim() + 1 <= 2 and input1.shape[-1] == input2.shape[-1]
    if not plain or not are_real(input1, input2) or are_atens(input1, input2):  # torch refuses most that is not plain
        return torch.nn.functional.cosine_embedding_loss(input1, input2, target, margin, reduction=reduction)
    options = {"scalars": (float(margin),), "reduction": reduction, "dtype": promoted(input1, input2)}
    return pairs(cosine_embedding, product, (input1, input2), COSINE, target.detach(), **options)


def check_pairs(input1, input2, target):
    for name, tensor in (("input1", input1), ("input2", input2)):
        if tensor.dtype not in DTYPES or not tensor.dim():
            raise ValueError(
                f"{name} must be one of {DTYPES}, with a last dimension; got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if input1.shape != input2.shape or target.shape != input1.shape[:-1]:
        shapes = f"{tuple(input1.shape)}, {tuple(input2.shape)} and {tuple(target.shape)}"
        raise ValueError(
            f"input1 and input2 must have one shape, and target that shape less its last dimension; got {shapes}"
        )


def cosine_similarity_loss(
    input1: Tensor, input2: Tensor, target: Tensor, reduction: str = "mean", eps: float = 1e-8
) -> Tensor:
    """``(cos(a, b) - y)²``: how alike two vectors are is to be y.

    ``cos(a, b) = a·b / (max(‖a‖, ε) max(‖b‖, ε))``. input1, input2: (..., D), floating, one shape. target: (...),
    floating or integers: the cosine wanted (else ValueError). eps: ε. reduction: "mean", "sum" or "none": (...).
    Sentence-BERT: Reimers and Gurevych 2019, arXiv:1908.10084.

    >>> a, b = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    >>> cosine_similarity_loss(a, b, torch.tensor([0.5, 1.0]), reduction="none")
    tensor([0.2500, 0.0000])
    """
    reduction = reduction_of(reduction)
    check_pairs(input1, input2, target)
    options = {"scalars": (float(eps),), "reduction": reduction, "dtype": promoted(input1, input2)}
    return pairs(squared_cosine_error, product, (input1, input2), COSINE, target, **options)


def contrastive_loss(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """``y d² + (1 - y) max(0, m - d)²``, ``d = ‖a - b‖``: similar vectors (y = 1) are to meet, others to lie m apart.

    target 1 means similar, 0 dissimilar, as in Keras; in the paper it is the other way round, and everything halved.
    input1, input2: (..., D), floating, one shape. target: (...), floating or integers, in [0, 1] (else ValueError, for
    CPU tensors). margin: m >= 0 (else ValueError), in units of the inputs. Two dissimilar vectors that are equal get
    gradient 0: no direction leads apart. reduction: "mean", "sum" or "none": (...). Hadsell, Chopra and LeCun 2006,
    doi:10.1109/CVPR.2006.100.

    >>> a, b = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.3, 0.4], [0.3, 0.4]])
    >>> contrastive_loss(a, b, torch.tensor([1, 0]), margin=2.0, reduction="none")
    tensor([0.2500, 2.2500])
    """
    reduction = reduction_of(reduction)
    check_pairs(input1, input2, target)
    if not margin >= 0:
        raise ValueError(f"margin must be >= 0, got {margin}")
    if readable(target) and target.numel():
        low, high = target.detach().aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"every target must be in [0, 1], got {low.item()} to {high.item()}")
    options = {
        "scalars": (float(margin),),
        "coordinate_scalars": (0.0,),
        "reduction": reduction,
        "dtype": promoted(input1, input2),
    }
    return pairs(contrastive, squared_difference, (input1, input2), ((0, 1),), target, **options)
