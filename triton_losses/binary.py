"""Binary losses: one logit per independent yes/no question."""

import torch

from triton_losses.device_math import at_least_tiny, log1p_exp_minus_abs, power, quotient, relu, sigmoid
from triton_losses.families.elementwise import elementwise
from triton_losses.families.reduction import reduction_of
from triton_losses.formula import formula


@formula
def logistic(x, y):
    loss = relu(x) - x * y + log1p_exp_minus_abs(x)
    return loss, sigmoid(x) - y, -x


@formula
def weighted_logistic(x, y, positive):
    rest = log1p_exp_minus_abs(x)
    yes = relu(-x) + rest  # -log σ(x)
    no = relu(x) + rest  # -log σ(-x)
    p = sigmoid(x)
    return positive * y * yes + (1.0 - y) * no, (1.0 - y) * p - positive * y * (1.0 - p), positive * yes - no, y * yes


@formula
def sigmoid_focal(x, y, alpha_no, alpha_slope, gamma):
    p = sigmoid(x)
    q = sigmoid(-x)
    entropy = relu(x) - x * y + log1p_exp_minus_abs(x)
    alpha = alpha_no + alpha_slope * y
    miss = at_least_tiny(p * (1.0 - y) + q * y)  # 1 - p_t, without the difference
    modulator = power(miss, gamma)
    slope = quotient(modulator * entropy * gamma, miss)  # ∂(modulator · entropy)/∂miss
    loss = alpha * modulator * entropy
    dx = alpha * (modulator * (p - y) + slope * p * q * (1.0 - 2.0 * y))
    dy = alpha_slope * modulator * entropy + alpha * (slope * (q - p) - modulator * x)
    return loss, dx, dy


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
            raise RuntimeError(f"{name} of shape {tuple(value.shape)} must broadcast to the input's shape {tuple(input.shape)}")


def binary_cross_entropy_with_logits(
    input, target, weight=None, size_average=None, reduce=None, reduction="mean", pos_weight=None
):  # fmt: skip
    """``-w (p₊ y log σ(x) + (1 - y) log(1 - σ(x)))``: binary cross entropy of logits, in a form that never overflows.

    input: logits, floating, any shape. target: chances in [0, 1], the input's size (else ValueError). weight, pos_weight (p₊,
    one per class as a rule): broadcast to the input's shape; the mean divides by the number of elements. reduction: "mean",
    "sum" or "none"; size_average and reduce are torch's older spelling of it.
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
        raise RuntimeError("binary_cross_entropy_with_logits is not differentiable with respect to weight: it must not require grad")
    if pos_weight is None:
        return elementwise(logistic, (input, target), (), reduction, weight, target.dtype)  # in torch the target's decides
    return elementwise(weighted_logistic, (input, target, pos_weight), (), reduction, weight, target.dtype)


def sigmoid_focal_loss(inputs, targets, alpha=0.25, gamma=2, reduction="none"):
    """``-α_t (1 - p_t)^γ log p_t`` per logit, with ``p_t = σ(x)`` for y = 1 and ``1 - σ(x)`` for y = 0: the focal loss.

    inputs: logits, floating, any shape. targets: the inputs' size; 0 or 1, or any chance between. alpha: weight of y = 1
    against 1 - alpha of y = 0, so in [0, 1]; negative means no weighting. gamma: >= 0 (else ValueError), and right for every
    such value, for logits of any size. reduction: "none", "mean" or "sum".
    As ``torchvision.ops.sigmoid_focal_loss``. Lin et al. 2017, arXiv:1708.02002.

    >>> sigmoid_focal_loss(torch.tensor([0.0, 4.0]), torch.tensor([1.0, 1.0]))
    tensor([4.3322e-02, 1.4679e-06])
    """
    check_same_size(inputs, targets)
    if not inputs.is_floating_point():
        raise NotImplementedError(f"inputs must be floating-point, got {inputs.dtype}")
    if not gamma >= 0:
        raise ValueError(f"gamma must be >= 0, got {gamma}")
    if not alpha <= 1:
        raise ValueError(f"alpha must be at most 1 (negative: no weighting), got {alpha}")
    alphas = (1.0, 0.0) if alpha < 0 else (1.0 - alpha, 2.0 * alpha - 1.0)
    return elementwise(sigmoid_focal, (inputs, targets), (*alphas, gamma), reduction_of(reduction))
