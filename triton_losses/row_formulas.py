"""The formulas of a row of logits and a label, which themes share: classification from logits, language from hidden states."""

from triton_losses.compiler import tl
from triton_losses.device_math import at_least_tiny, exp, expm1, power
from triton_losses.formula import formula


@formula
def negative_log_likelihood(picked, weight):
    return -weight * picked, -weight


@formula
def chosen_log_p(log_p):
    return log_p, 1.0


@formula
def log_p_beside_entropy(log_p, entropy):  # for a forward that is to save the entropy too
    return log_p, 1.0, 0.0


@formula
def row_entropy(entropy):
    return entropy, 1.0


@formula
def along(log_p, entropy, d_log_p, d_entropy):  # a backward to both: their upstream gradients are operands of the row
    return d_log_p * log_p + d_entropy * entropy, d_log_p, d_entropy


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
def cross_entropy_of_probabilities(p, log_q, smoothing, uniform):
    kept = 1.0 - smoothing
    target = kept * p + uniform
    return tl.where(target == 0.0, target, -target * log_q), -kept * log_q, -target


@formula
def softmax_focal(log_p, weight, gamma, alpha):
    miss = at_least_tiny(-expm1(log_p))  # 1 - p, without the difference
    modulator = alpha * weight * power(miss, gamma)
    return -modulator * log_p, modulator * (gamma * log_p * exp(log_p) / miss - 1.0)


def cross_entropy_formula(label_smoothing, z_loss):
    """The one that these options need, and its scalars: 0 · log 0 would be nan in a masked vocabulary."""
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss must be >= 0, got {z_loss}")
    if label_smoothing:
        return cross_entropy_smoothed, (label_smoothing, z_loss)
    return (cross_entropy_with_z_loss, (z_loss,)) if z_loss else (cross_entropy_plain, ())


def check_shape_of_logits(temperature, softcap):
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"softcap must be >= 0 (0: none), got {softcap}")
