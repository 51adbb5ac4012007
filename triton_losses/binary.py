"""Binary losses: one logit, chance or score per independent yes/no question."""

import numbers

import torch
from torch import Tensor

from triton_losses.blocks.elementwise import blocks
from triton_losses.core.compiler import tl
from triton_losses.core.device_math import at_least, log, log1p, quotient, relu, sigmoid, softplus, step
from triton_losses.core.formula import formula
from triton_losses.core.op import readable
from triton_losses.core.reduction import promoted, reduction_of, result_dtype, under_autocast
from triton_losses.core.threads import elements, share
from triton_losses.element_formulas import logistic, sigmoid_focal_formula, weighted_logistic
from triton_losses.families.elementwise import elementwise
from triton_losses.families.labelled_elements import labelled_elements

INDICES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@formula
def cross_entropy_of_chances(x, y):
    yes = log(x)
    no = log1p(-x)
    loss = (y - 1.0) * at_least(no, -100.0) - y * at_least(yes, -100.0)
    return loss, quotient(x - y, at_least(x * (1.0 - x), 9.999999960041972e-13)), no - yes  # torch's 1e-12 in float32


@formula
def hinge(x, y, margin):
    slack = margin - x * y
    return relu(slack), -y * step(slack), tl.where(slack >= 0.0, -x, 0.0)


@formula
def squared_hinge(x, y, margin):
    slack = relu(margin - x * y)
    return slack * slack, -2.0 * y * slack, -2.0 * x * slack


@formula
def exponential(x, y):
    minus = -y
    e = tl.exp2(x * minus * 1.4426950408889634)  # kernels compute exp so; in PyTorch it takes a quarter of exp's time
    return e, minus * e, -x * e


@formula
def soft_margin(x, y):
    minus = -y
    z = x * minus
    p = sigmoid(z)
    return softplus(z), minus * p, -x * p


@formula
def hinge_embedding(x, y, margin):
    apart = margin - x
    loss = tl.where(y == 1.0, x, relu(apart) + tl.where(y == -1.0, 0.0, x))
    dx = tl.where(y == 1.0, 1.0, tl.where(y == -1.0, -step(apart), 1.0 - step(apart)))
    return loss, dx, 0.0 * step(apart)


def check_same_size(input, target):
    if target.size() != input.size():
        raise ValueError(f"Target size ({target.size()}) must be the same as input size ({input.size()})")


def check_broadcasts_into(input, **options):
    """Each option must broadcast to the input's shape without making it larger."""
    for name, value in options.items():
        if value is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a Tensor, got {value!r}")
        if value.dim() > input.dim() or any(v not in (i, 1) for v, i in zip(value.shape[::-1], input.shape[::-1])):
            raise RuntimeError(
                f"{name} of shape {tuple(value.shape)} must broadcast to the input's shape {tuple(input.shape)}"
            )


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """``-w (p₊ y log σ(x) + (1 - y) log(1 - σ(x)))``: binary cross entropy of logits, in a form that never overflows.

    input: logits, floating, any shape. target: chances in [0, 1], the input's size (else ValueError). weight,
    pos_weight (p₊, one per class as a rule): broadcast to the input's shape; the mean divides by the number of
    elements. reduction: "mean", "sum" or "none"; size_average and reduce are torch's older spelling of it.
    As ``torch.nn.functional.binary_cross_entropy_with_logits``.

    >>> binary_cross_entropy_with_logits(torch.tensor([0.0, -5.0]), torch.tensor([1.0, 1.0]), reduction="none")
    tensor([0.6931, 5.0067])
    """
    reduction = reduction_of(reduction, size_average, reduce)
    check_same_size(input, target)
    if not input.is_floating_point():
        raise NotImplementedError(f"input must be floating-point, got {input.dtype}")
    if not target.is_floating_point():
        raise RuntimeError(f"target must be floating-point, got {target.dtype}")
    check_broadcasts_into(input, weight=weight, pos_weight=pos_weight)
    if weight is not None and weight.requires_grad:
        raise RuntimeError(
            "binary_cross_entropy_with_logits is not differentiable with respect to weight: it must not require grad"
        )
    if pos_weight is None:
        # the result has the target's dtype, as in torch
        aten = torch.nn.functional.binary_cross_entropy_with_logits
        return elementwise(logistic, (input, target), (), reduction, weight, target.dtype, aten=aten)
    return elementwise(weighted_logistic, (input, target, pos_weight), (), reduction, weight, target.dtype)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float | None = 0.25,
    gamma: float = 2,
    reduction: str = "none",
    *,
    background: int = -1,
) -> Tensor:
    """``-α_t (1 - p_t)^γ log p_t`` per logit, with ``p_t = σ(x)`` for y = 1 and ``1 - σ(x)`` for y = 0: the focal loss.

    inputs: logits, floating, any shape. targets: the inputs' size; 0 or 1, or any chance between. Or, without a one-hot
    map, integer class indices for inputs (..., C), of shape (...): y is 1 at the target's class, and nowhere where the
    target is background; other targets outside [0, C) raise IndexError (a device assertion on a GPU). alpha: weight of
    y = 1 against 1 - alpha of y = 0, so in [0, 1]; None or negative for no weighting. gamma: >= 0 (else ValueError),
    and right for every such value, for logits of any size. reduction: "none", "mean" (over all logits) or "sum".
    As ``torchvision.ops.sigmoid_focal_loss``. Lin et al. 2017, arXiv:1708.02002.

    >>> sigmoid_focal_loss(torch.tensor([0.0, 4.0]), torch.tensor([1.0, 1.0]))
    tensor([4.3322e-02, 1.4679e-06])
    >>> sigmoid_focal_loss(torch.zeros(2, 3), torch.tensor([2, -1]), reduction="sum")
    tensor(0.6931)
    """
    indices = (
        isinstance(targets, torch.Tensor)
        and targets.dtype in INDICES
        and inputs.dim()
        and targets.shape == inputs.shape[:-1]
    )
    if not indices:
        check_same_size(inputs, targets)
    if not inputs.is_floating_point():
        raise NotImplementedError(f"inputs must be floating-point, got {inputs.dtype}")
    if not gamma >= 0:
        raise ValueError(f"gamma must be >= 0, got {gamma}")
    if alpha is not None and not alpha <= 1:
        raise ValueError(f"alpha must be at most 1 (None or negative: no weighting), got {alpha}")
    formula, scalars = sigmoid_focal_formula(None if alpha is None or alpha < 0 else alpha, gamma)
    reduction = reduction_of(reduction)
    if not indices:
        return elementwise(formula, (inputs, targets), scalars, reduction)
    if not isinstance(background, numbers.Integral):
        raise TypeError(f"background must be an integer, got {background!r}")
    if targets.device != inputs.device:
        raise RuntimeError(
            "expected all tensors to be on the same device, "
            f"but inputs are on {inputs.device}, targets on {targets.device}"
        )
    return labelled_elements(formula, inputs, targets, scalars, int(background), reduction)


def check_chances(**tensors):
    """Values must be in [0, 1]; NaN is refused, as in torch. Only CPU tensors are checked."""
    for name, t in tensors.items():
        if readable(t) and t.numel():
            low, high = t.detach().aminmax()
            if not (low >= 0 and high <= 1):
                raise RuntimeError(
                    f"all elements of {name} should be between 0 and 1, got {low.item()} to {high.item()}"
                )


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``-w (y log x + (1 - y) log(1 - x))``, each logarithm at least -100: binary cross entropy of chances.

    input: chances, floating, any shape. target: chances, the input's size (else ValueError) and dtype; for CPU tensors,
    values of either outside [0, 1] raise RuntimeError. weight: broadcasts to the input's shape; the mean divides by the
    number of elements. reduction: "mean", "sum" or "none"; size_average and reduce are torch's older spelling of it. By
    x the gradient is ``(x - y) / max(x(1 - x), 1e-12)``. As ``torch.nn.functional.binary_cross_entropy``; for logits,
    ``binary_cross_entropy_with_logits`` is the better one.

    >>> binary_cross_entropy(torch.tensor([0.5, 0.0]), torch.tensor([1.0, 1.0]), reduction="none")
    tensor([  0.6931, 100.0000])
    """
    reduction = reduction_of(reduction, size_average, reduce)
    check_same_size(input, target)
    if not input.is_floating_point():
        raise NotImplementedError(f"input must be floating-point, got {input.dtype}")
    check_broadcasts_into(input, weight=weight)
    if target.dtype != input.dtype and not under_autocast(input):
        raise RuntimeError(f"target must have the input's dtype {input.dtype}, got {target.dtype}")
    if weight is not None and weight.requires_grad:
        raise RuntimeError(
            "binary_cross_entropy is not differentiable with respect to weight: it must not require grad"
        )
    check_chances(input=input, target=target)
    return elementwise(cross_entropy_of_chances, (input, target), (), reduction, weight, input.dtype)


def check_signs(input, target):
    """Scores and labels must have one size, and labels be -1 or +1, which is checked only for CPU tensors."""
    check_same_size(input, target)
    if not input.is_floating_point():
        raise NotImplementedError(f"input must be floating-point, got {input.dtype}")
    if readable(target) and target.numel():
        parts = [part for (part,) in blocks([target.detach()], elements(target.dtype))]
        wrong = []

        def look(i):  # one block at a time, because |y| of a whole tensor takes as long as a loss
            size = parts[i].abs()
            if not (size.amin() == 1 and size.amax() == 1):
                wrong.append(i)

        share(look, len(parts))
        if wrong:
            part = parts[min(wrong)]
            raise ValueError(f"every label must be -1 or +1, got {part[part.abs() != 1][0].item()}")


def hinge_loss(input: Tensor, target: Tensor, margin: float = 1.0, reduction: str = "mean") -> Tensor:
    """``max(0, m - y x)``: the hinge loss of support vector machines.

    input: scores, floating, any shape. target: labels -1 or +1, floating or integers, the input's size (else
    ValueError; other labels too, for CPU tensors). margin: m, in units of ``input``. Exactly at the margin the gradient
    is ``-y``, as inside it. reduction: "mean", "sum" or "none". Cortes and Vapnik 1995, doi:10.1007/BF00994018.

    >>> hinge_loss(torch.tensor([0.5, 3.0, 3.0]), torch.tensor([1.0, 1.0, -1.0]), reduction="none")
    tensor([0.5000, 0.0000, 4.0000])
    """
    check_signs(input, target)
    return elementwise(hinge, (input, target), (margin,), reduction_of(reduction))


def squared_hinge_loss(input: Tensor, target: Tensor, margin: float = 1.0, reduction: str = "mean") -> Tensor:
    """``max(0, m - y x)²``: the squared hinge loss, smooth at the margin.

    input, target, margin, reduction: as in ``hinge_loss``.

    >>> squared_hinge_loss(torch.tensor([0.5, 3.0, 3.0]), torch.tensor([1.0, 1.0, -1.0]), reduction="none")
    tensor([ 0.2500,  0.0000, 16.0000])
    """
    check_signs(input, target)
    return elementwise(squared_hinge, (input, target), (margin,), reduction_of(reduction))


def perceptron_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """``max(0, -y x)``: the perceptron's loss, a hinge without margin.

    input, target, reduction: as in ``hinge_loss``. At x = 0 the gradient is ``-y``, so that learning may start there.
    Rosenblatt 1958, doi:10.1037/h0042519.

    >>> perceptron_loss(torch.tensor([0.5, -3.0]), torch.tensor([1.0, 1.0]), reduction="none")
    tensor([0., 3.])
    """
    check_signs(input, target)
    return elementwise(hinge, (input, target), (0.0,), reduction_of(reduction))


def exponential_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """``exp(-y x)``: the exponential loss that AdaBoost lowers.

    input, target, reduction: as in ``hinge_loss``. Friedman, Hastie and Tibshirani 2000, doi:10.1214/aos/1016218223.

    >>> exponential_loss(torch.tensor([0.0, 1.0]), torch.tensor([1.0, -1.0]), reduction="none")
    tensor([1.0000, 2.7183])
    """
    check_signs(input, target)
    return elementwise(exponential, (input, target), (), reduction_of(reduction))


def soft_margin_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean"
) -> Tensor:
    """``log(1 + exp(-y x))``: the logistic loss of labels -1 and +1, in a form that never overflows.

    input: logits, floating, any shape. target: labels -1 or +1 (other numbers are multiplied in all the same),
    broadcasts to the input's shape (else RuntimeError). reduction: "mean", "sum" or "none"; size_average and reduce are
    torch's older spelling of it. As ``torch.nn.functional.soft_margin_loss``.

    >>> soft_margin_loss(torch.tensor([0.0, -200.0]), torch.tensor([1.0, 1.0]), reduction="none")
    tensor([  0.6931, 200.0000])
    """
    reduction = reduction_of(reduction, size_average, reduce)
    if not input.is_floating_point():
        raise RuntimeError(f"input must be floating-point, got {input.dtype}")
    check_broadcasts_into(input, target=target)
    return elementwise(soft_margin, (input, target), (), reduction, None, input.dtype)


def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``-1/C Σ_j w_j (y_j log σ(x_j) + (1 - y_j) log(1 - σ(x_j)))``: binary cross entropy of logits, its mean over the
    classes.

    input: logits, (N, C), (C) or (N, d1, ..., C), floating. target: 0 and 1, floating or integers, broadcasts with
    input. weight: as a rule (C), broadcasts. reduction: "mean" and "sum" over rows, "none": the input's shape without
    C; size_average and reduce are torch's older spelling of it. input, target and weight all get gradients. As
    ``torch.nn.functional.multilabel_soft_margin_loss``.

    >>> multilabel_soft_margin_loss(torch.tensor([[0.0, -5.0]]), torch.tensor([[1.0, 1.0]]))
    tensor(2.8499)
    """
    reduction = reduction_of(reduction, size_average, reduce)
    if not input.is_floating_point():
        raise NotImplementedError(f"input must be floating-point, got {input.dtype}")
    if target.dtype == torch.bool:
        raise RuntimeError("target must be a number: bool has no 1 - y")
    if input.dim() == 0:
        raise IndexError("input must have at least one dimension, of classes: got a scalar")
    dtype = promoted(input, target)
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    dtype, wide = result_dtype(input, dtype), torch.promote_types(dtype, torch.float32)
    classes, axis = input.shape[-1], input.dim() - 1
    tensors = (target,) if weight is None else (target, weight)
    alike = all(
        t.dim() <= input.dim() and all(a in (1, b) for a, b in zip(t.shape[::-1], input.shape[::-1])) for t in tensors
    )
    if alike and reduction != "none":
        loss = elementwise(logistic, (input, target), (), reduction, weight, wide)
        return (loss / classes if reduction == "sum" else loss).to(dtype)
    losses = elementwise(logistic, (input, target), (), "none", weight, wide).sum(axis) / classes
    return (losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()).to(dtype)


def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``x`` where ``y = 1``, ``max(0, m - x)`` where ``y = -1``: distances of pairs that are alike (1) or not (-1).

    input: distances, floating. target: labels -1 or +1, broadcasts with input; any other number counts as both, as in
    torch. margin: m, in units of ``input``; exactly there the gradient of y = -1 is -1. The target gets no gradient.
    reduction, size_average, reduce: as in ``soft_margin_loss``. As ``torch.nn.functional.hinge_embedding_loss``.

    >>> hinge_embedding_loss(torch.tensor([0.3, 0.3, 2.0]), torch.tensor([1.0, -1.0, -1.0]), reduction="none")
    tensor([0.3000, 0.7000, 0.0000])
    """
    reduction = reduction_of(reduction, size_average, reduce)
    return elementwise(hinge_embedding, (input, target.detach()), (margin,), reduction, None, input.dtype)
