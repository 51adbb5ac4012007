"""Other libraries' segmentation losses, where they are installed: what people switch from."""

import importlib

import torch

MONAI = {"dice_loss": "DiceLoss", "dice_ce_loss": "DiceCELoss"}
ACTIVATIONS = ({"softmax": True}, {"sigmoid": True})


def installed(module):
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def monai(case):
    """MONAI's class of the same name, or nothing."""
    losses = installed("monai.losses")
    if losses is None or case.name not in MONAI or case.options not in ACTIVATIONS:
        return None

    def call(input, target, **options):
        labels = target.dim() < input.dim()
        return getattr(losses, MONAI[case.name])(to_onehot_y=labels, **options)(input, target[:, None] if labels else target)

    return call


def smp(case):
    """segmentation-models-pytorch's Dice, with PyTorch's cross entropy beside it where the case has one; or nothing."""
    losses = installed("segmentation_models_pytorch.losses")
    if losses is None or case.name not in MONAI or case.options not in ACTIVATIONS:
        return None
    softmax = "softmax" in case.options
    dice = losses.DiceLoss("multiclass" if softmax else "multilabel")
    beside = torch.nn.functional.cross_entropy if softmax else torch.nn.functional.binary_cross_entropy_with_logits
    if case.name == "dice_loss":
        return lambda input, target, **_: dice(input, target)
    return lambda input, target, **_: dice(input, target) + beside(input, target)
