"""Formulas of a row of logits and a label, and of two rows of logits.

Several modules share them: classification and divergence for logits, language for hidden states.
"""

import math
import numbers

import torch

from triton_losses.core.compiler import compute_dtype, tl
from triton_losses.core.device_math import (
    at_least_tiny,
    exact_exp,
    exp,
    expm1,
    log1p_negative,
    negative_part,
    power,
    quotient,
    relu,
    sign,
)
from triton_losses.core.formula import formula
from triton_losses.core.reduction import DTYPES


@formula
def negative_log_likelihood(picked, weight):
    return -weight * picked, -weight


@formula
def chosen_log_p(log_p):
    return log_p, 1.0


@formula
def log_p_beside_entropy(log_p, entropy):  # for a forward that also saves the entropy
    return log_p, 1.0, 0.0


@formula
def row_entropy(entropy):
    return entropy, 1.0


@formula
def log_total(lse):
    return lse, 1.0


@formula
def along(log_p, entropy, d_log_p, d_entropy):  # the backward of both: their upstream gradients are operands of the row
    return d_log_p * log_p + d_entropy * entropy, d_log_p, d_entropy


# Of a part of the classes, whose other parts are elsewhere: see families/sharded_rows.py. A row's label may be in
# another part, so the derivatives by log p of the label and by the log-sum-exp are operands of their own.


@formula
def log_p_beside_mean(log_p, mean_log_p):
    return log_p, 1.0, 0.0


@formula
def along_part(log_p, lse, d_log_p, d_lse):
    return d_log_p * log_p + d_lse * lse, d_log_p, d_lse


@formula
def along_part_with_mean(log_p, mean_log_p, lse, d_log_p, d_mean, d_lse):
    return d_log_p * log_p + d_mean * mean_log_p + d_lse * lse, d_log_p, d_mean, d_lse


@formula
def along_part_with_entropy(log_p, lse, entropy, d_log_p, d_lse, d_entropy):
    return d_log_p * log_p + d_lse * lse + d_entropy * entropy, d_log_p, d_lse, d_entropy


@formula
def cross_entropy_plain(log_p, weight):
    return -weight * log_p, -weight


@formula
def cross_entropy_with_z_loss(log_p, lse, weight, z_loss):
    return z_loss * lse * lse - weight * log_p, -weight, 2.0 * z_loss * lse


@formula
def cross_entropy_smoothed(log_p, mean_log_p, lse, weight, smoothing, z_loss):
    sharp = (1.0 - smoothing) * weight
    return z_loss * lse * lse - sharp * log_p - smoothing * mean_log_p, -sharp, -smoothing, 2.0 * z_loss * lse


@formula
def cross_entropy_of_probabilities(p, log_q):
    return tl.where(p == 0.0, p, -p * log_q), -log_q, -p


@formula
def cross_entropy_of_smoothed_probabilities(p, log_q, smoothing, uniform):
    kept = 1.0 - smoothing
    target = kept * p + uniform
    return tl.where(target == 0.0, target, -target * log_q), -kept * log_q, -target


@formula
def softmax_focal(log_p, weight, gamma, alpha):
    miss = at_least_tiny(-expm1(log_p))  # 1 - p, without cancellation
    modulator = alpha * weight * power(miss, gamma)
    return -modulator * log_p, modulator * (quotient(gamma * log_p * exp(log_p), miss) - 1.0)


@formula
def softmax_focal_squared(log_p, weight, alpha):
    """softmax_focal for γ = 2, the usual choice: a kernel needs no branch."""
    miss = -expm1(log_p)
    modulator = alpha * weight * miss
    return -modulator * miss * log_p, modulator * (2.0 * log_p * exp(log_p) - miss)


def softmax_focal_formula(gamma, alpha):
    """The formula and its scalars."""
    return (softmax_focal_squared, (alpha,)) if gamma == 2 else (softmax_focal, (gamma, alpha))


def cross_entropy_formula(label_smoothing, z_loss):
    """The formula without unused terms, because 0 · log 0 of a masked vocabulary is nan; and its scalars."""
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss must be >= 0, got {z_loss}")
    if label_smoothing:
        return cross_entropy_smoothed, (float(label_smoothing), float(z_loss))
    return (cross_entropy_with_z_loss, (float(z_loss),)) if z_loss else (cross_entropy_plain, ())


def of_probabilities(label_smoothing, classes):
    """The formula of class probabilities with this label smoothing, and its scalars."""
    if not label_smoothing:
        return cross_entropy_of_probabilities, ()
    return cross_entropy_of_smoothed_probabilities, (float(label_smoothing), label_smoothing / max(classes, 1))


def check_shape_of_logits(temperature, softcap):
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"softcap must be >= 0 (0: none), got {softcap}")


def check_counting(labels, shape, ignore_index, out_dtype):
    """Check the labels that say which rows count, the rows' shape, ignore_index and out_dtype."""
    if out_dtype not in (None, *DTYPES):
        raise TypeError(f"out_dtype must be one of {DTYPES}, got {out_dtype!r}")
    if not isinstance(ignore_index, numbers.Integral):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    if labels is not None:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if labels.shape != shape:
            raise ValueError(f"labels must have shape {tuple(shape)}, got {tuple(labels.shape)}")


def rows_that_count(given):
    """How many rows do not have the label ignore_index, from a distillation's arguments by name."""
    first = given.get("student_logits", given.get("student_hidden"))
    labels, wide = given.get("labels"), compute_dtype(first.dtype)
    if labels is None:
        return first.new_full((), math.prod(first.shape[:-1]), dtype=wide)
    return (labels != given.get("ignore_index", -100)).sum().to(wide)


@formula
def relative_entropy(log_p, log_q):
    p = exp(log_p)
    value = tl.where(p == 0.0, p, p * (log_p - log_q))
    return value, value + p, -p


@formula
def jensen_shannon(log_p, log_q, beta, rest):
    p, q = exp(log_p), exp(log_q)
    d = log_q - log_p
    q_above, p_above = relu(d), negative_part(d)
    # log m minus the larger of log p and log q, where m = beta p + rest q
    log_mean = log1p_negative(beta * (exp(-q_above) - 1.0) + rest * (exp(-p_above) - 1.0))
    d_p = tl.where(p == 0.0, p, -beta * p * (log_mean + q_above))
    d_q = tl.where(q == 0.0, q, -rest * q * (log_mean + p_above))
    return d_p + d_q, d_p, d_q


@formula
def total_variation(log_p, log_q):
    p, q = exact_exp(log_p), exact_exp(log_q)
    side = 0.5 * sign(p - q)
    return side * (p - q), side * p, -side * q


DIRECTIONS = ("forward", "reverse", "jsd", "tv")


def divergence_formula(direction, beta):
    """This direction's formula, its scalars, and whether it follows the rule of one read of distribution_rows."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {DIRECTIONS}, got {direction!r}")
    if direction == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must be > 0 and < 1, got {beta}")
    if direction == "jsd":
        return jensen_shannon, (float(beta), 1.0 - beta), False
    return (total_variation, (), False) if direction == "tv" else (relative_entropy, (), True)
