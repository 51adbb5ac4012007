"""Formulas of a logit and a probability, which binary losses and the losses added to Dice share."""

from triton_losses.core.device_math import (
    at_least_tiny,
    less_product,
    log1p_exp_minus_abs,
    power,
    quotient,
    relu,
    sigmoid,
    softplus,
)
from triton_losses.core.formula import formula


@formula
def logistic(x, y):
    p = sigmoid(x)
    loss = less_product(relu(x), x, y) + log1p_exp_minus_abs(x)
    return loss, p - y, -x


@formula
def weighted_logistic(x, y, positive):
    yes = softplus(-x)  # -log σ(x)
    no = softplus(x)  # -log σ(-x)
    p = sigmoid(x)
    return positive * y * yes + (1.0 - y) * no, (1.0 - y) * p - positive * y * (1.0 - p), positive * yes - no, y * yes


def class_balance(alpha):
    """Scalars of a line in y, value at 0 and slope: α at y = 1 and 1 - α at y = 0; 1 at both if alpha is None."""
    return (1.0, 0.0) if alpha is None else (1.0 - alpha, 2.0 * alpha - 1.0)


@formula
def sigmoid_focal(x, y, alpha_no, alpha_slope, gamma):
    p = sigmoid(x)
    q = sigmoid(-x)
    entropy = less_product(relu(x), x, y) + log1p_exp_minus_abs(x)
    alpha = alpha_no + alpha_slope * y
    miss = at_least_tiny(p * (1.0 - y) + q * y)  # 1 - p_t, without cancellation
    modulator = power(miss, gamma)
    slope = quotient(modulator * entropy * gamma, miss)  # ∂(modulator · entropy)/∂miss
    loss = alpha * modulator * entropy
    dx = alpha * (modulator * (p - y) + slope * p * q * (1.0 - 2.0 * y))
    dy = alpha_slope * modulator * entropy + alpha * (slope * (q - p) - modulator * x)
    return loss, dx, dy


@formula
def sigmoid_focal_squared(x, y, alpha_no, alpha_slope):
    """sigmoid_focal for γ = 2, the usual choice: without a branch, a kernel needs a quarter less registers."""
    p = sigmoid(x)
    q = sigmoid(-x)
    entropy = less_product(relu(x), x, y) + log1p_exp_minus_abs(x)
    alpha = alpha_no + alpha_slope * y
    miss = p * (1.0 - y) + q * y
    both = miss * entropy
    loss = alpha * miss * both
    dx = alpha * miss * (miss * (p - y) + 2.0 * entropy * p * q * (1.0 - 2.0 * y))
    dy = alpha_slope * miss * both + alpha * miss * (2.0 * entropy * (q - p) - miss * x)
    return loss, dx, dy


def sigmoid_focal_formula(alpha, gamma):
    """The formula and its scalars."""
    if gamma == 2:
        return sigmoid_focal_squared, class_balance(alpha)
    return sigmoid_focal, (*class_balance(alpha), gamma)
