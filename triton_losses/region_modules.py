"""The losses of regions as modules, with what other libraries call them; and one for outputs at several scales."""

import torch

from triton_losses import functional as F
from triton_losses.modules import Loss

SMP_MODES = {"binary": {"sigmoid": True}, "multilabel": {"sigmoid": True}, "multiclass": {"softmax": True}}


def as_tensor(values):
    """A tensor of the values; a tensor stays where it is, while torch.as_tensor moves it to the default device."""
    return values if isinstance(values, torch.Tensor) else torch.as_tensor(values)


class RegionLoss(Loss):
    """A loss of regions. Its weight may be given as numbers too, and becomes a buffer of the module."""

    def register_buffer(self, name, tensor, persistent=True):
        super().register_buffer(name, tensor if tensor is None else as_tensor(tensor), persistent)


def smp_options(mode, classes, log_loss, from_logits, smooth, ignore_index, class_weights):
    """Our options for segmentation-models-pytorch's: sums over the batch, and an absent class costs nothing."""
    if mode not in SMP_MODES:
        raise ValueError(f"mode must be one of {tuple(SMP_MODES)}, got {mode!r}")
    if mode == "binary" and (classes is not None or class_weights is not None):
        raise ValueError(
            f'classes and class_weights are not supported with mode="binary", got {classes} and {class_weights}'
        )
    if class_weights is not None:  # smp takes a weighted mean; our weights are a factor of each class
        weights = as_tensor(class_weights).to(torch.float32)
        weights = weights if classes is None else weights[list(classes)]
        class_weights = weights * (len(weights) / weights.sum())
    activation = SMP_MODES[mode] if from_logits else {}
    return activation | {
        "batch": True,
        "empty": "zero",
        "soft_label": mode != "multiclass",
        "classes": classes,
        "log_loss": log_loss,
        "smooth_nr": smooth,
        "smooth_dr": smooth,
        "ignore_index": ignore_index,
        "weight": class_weights,
    }


class DiceLoss(RegionLoss, function=F.dice_loss):
    @classmethod
    def from_smp(
        cls, mode, *, classes=None, log_loss=False, from_logits=True, smooth=0.0, ignore_index=None, class_weights=None
    ):
        """segmentation-models-pytorch's ``DiceLoss``, same value and gradient. mode: "binary", "multilabel" or
        "multiclass".
        """
        return cls(**smp_options(mode, classes, log_loss, from_logits, 2 * smooth, ignore_index, class_weights))

    @classmethod
    def from_nnunet(
        cls, *, apply_nonlin="softmax", batch_dice=False, do_bg=True, smooth=1.0, ignore_label=None, process_group=None
    ):
        """nnU-Net's ``MemoryEfficientSoftDiceLoss``: minus Dice. apply_nonlin: "softmax", "sigmoid" or None."""
        if apply_nonlin not in ("softmax", "sigmoid", None):
            raise ValueError(f'apply_nonlin must be "softmax", "sigmoid" or None, got {apply_nonlin!r}')
        activation = {} if apply_nonlin is None else {apply_nonlin: True}
        options = {"batch": batch_dice, "smooth_nr": smooth, "smooth_dr": smooth, "process_group": process_group}
        return MinusDiceLoss(do_bg, ignore_index=ignore_label, **options, **activation)

    @classmethod
    def from_kornia(cls, *, average="micro", eps=1e-8, weight=None, ignore_index=-100):
        """kornia's ``DiceLoss``, of logits and labels; a weight beside average="macro" alone."""
        if weight is not None and average == "micro":
            raise ValueError(
                'weight needs average="macro": kornia\'s "micro" multiplies probabilities by it, which is no Dice'
            )
        options = {
            "average": average,
            "smooth_nr": 0.0,
            "smooth_dr": eps,
            "weight": weight,
            "ignore_index": ignore_index,
        }
        return cls(softmax=True, empty="smooth" if average == "micro" else "exclude", **options)

    @classmethod
    def from_keras(cls, *, epsilon=1e-7):
        """Keras' ``Dice`` with its axis=None: of probabilities, one sum over batch, classes and space."""
        return cls(batch=True, average="micro", smooth_nr=0.0, smooth_dr=epsilon)


class MinusDiceLoss(DiceLoss):
    """nnU-Net's sign: -Dice, where others have 1 - Dice."""

    def forward(self, input, target):
        return super().forward(input, target) - 1


class JaccardLoss(RegionLoss, function=F.jaccard_loss):
    @classmethod
    def from_smp(
        cls, mode, *, classes=None, log_loss=False, from_logits=True, smooth=0.0, ignore_index=None, class_weights=None
    ):
        """segmentation-models-pytorch's ``JaccardLoss``, same value and gradient. mode: as in ``DiceLoss.from_smp``."""
        return cls(**smp_options(mode, classes, log_loss, from_logits, smooth, ignore_index, class_weights))


class TverskyLoss(RegionLoss, function=F.tversky_loss):
    @classmethod
    def from_smp(
        cls,
        mode,
        *,
        classes=None,
        log_loss=False,
        from_logits=True,
        smooth=0.0,
        ignore_index=None,
        alpha=0.5,
        beta=0.5,
        gamma=1.0,
        class_weights=None,
    ):
        """segmentation-models-pytorch's ``TverskyLoss``: gamma is the mean's power. mode: see ``DiceLoss.from_smp``."""
        options = smp_options(mode, classes, log_loss, from_logits, smooth, ignore_index, class_weights)
        return (
            cls(alpha=alpha, beta=beta, **options)
            if gamma == 1
            else PowerOfTverskyLoss(gamma, alpha=alpha, beta=beta, **options)
        )


class PowerOfTverskyLoss(TverskyLoss):
    """The mean to the power gamma; ``FocalTverskyLoss`` takes each class's."""

    def __init__(self, gamma, **options):
        super().__init__(**options)
        self.gamma = gamma

    def forward(self, input, target):
        return super().forward(input, target) ** self.gamma


class FocalTverskyLoss(RegionLoss, function=F.focal_tversky_loss): ...


class GeneralizedDiceLoss(RegionLoss, function=F.generalized_dice_loss): ...


class DiceCELoss(RegionLoss, function=F.dice_ce_loss): ...


class DiceFocalLoss(RegionLoss, function=F.dice_focal_loss): ...


class ComboLoss(RegionLoss, function=F.combo_loss): ...


class LovaszLoss(RegionLoss, function=F.lovasz_loss): ...


class DeepSupervisionLoss(torch.nn.Module):
    """``Σ_i w_i loss(output_i, target_i)``: a loss of a network's outputs at several scales, the finest first.

    loss: a module of an output and a target. weights: one for each output; None: 1, ½, ¼, ... and at least 1/16, as
    MONAI's. An output of weight 0 costs nothing, not even time. forward takes a list of outputs and one target, which
    is then sampled at each output's pixels (the nearest one, as torch's "nearest-exact"), or a list of targets; of one
    output not in a list, its loss.
    """

    def __init__(self, loss, weights=None):
        super().__init__()
        self.loss, self.weights = loss, weights

    def forward(self, outputs, targets):
        if isinstance(outputs, torch.Tensor):
            return self.loss(outputs, targets)
        weights = [max(0.5**i, 0.0625) for i in range(len(outputs))] if self.weights is None else self.weights
        targets = [targets] * len(outputs) if isinstance(targets, torch.Tensor) else targets
        if not len(weights) == len(outputs) == len(targets) > 0:
            raise ValueError(
                "each output needs a weight and a target: "
                f"got {len(outputs)}, {len(weights)} and {len(targets)} of them"
            )
        parts = [(w, x, y) for w, x, y in zip(weights, outputs, targets) if w]
        return sum(w * self.loss(x, nearest(y, x.shape[2:])) for w, x, y in parts)

    def extra_repr(self):
        return f"weights={self.weights}"


def nearest(target, space):
    """The target, of any dtype, sampled at the middles of ``space`` pixels in its last dimensions."""
    for i, size in enumerate(space, target.dim() - len(space)):
        if target.shape[i] != size:
            middles = (2 * torch.arange(size, device=target.device) + 1) * target.shape[i] // (2 * size)
            target = target.index_select(i, middles)
    return target
