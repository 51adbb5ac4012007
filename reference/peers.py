"""Other libraries' losses, where they are installed, and torch's own alternatives: what people switch from.

pip install --no-deps monai==1.6.1 segmentation-models-pytorch==0.6.0 kornia==0.9.0
"""

import importlib
import importlib.metadata
import importlib.util
import sys
import types

import torch

PACKAGES = {"monai": "monai", "smp": "segmentation-models-pytorch", "kornia": "kornia"}  # by the names used here
MONAI = {"dice_loss": "DiceLoss", "dice_ce_loss": "DiceCELoss"}
ACTIVATIONS = ({"softmax": True}, {"sigmoid": True})


def losses_of(library):
    """The library's module of losses, or None where it is not installed."""
    name = {"monai": "monai.losses", "smp": "segmentation_models_pytorch.losses", "kornia": "kornia.losses"}[library]
    root = name.split(".")[0]
    if root in sys.modules:
        return importlib.import_module(name)
    spec = importlib.util.find_spec(root)
    if spec is None:
        return None
    if library == "smp":  # without what the package itself imports, its encoders' packages
        sys.modules[root] = types.ModuleType(root)
        sys.modules[root].__path__ = list(spec.submodule_search_locations)
    return importlib.import_module(name)


def versions():
    """Of the libraries that are installed."""
    found = {}
    for name, package in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def monai(case):
    """MONAI's class of the same name, or nothing."""
    losses = losses_of("monai") if case.name in MONAI and case.options in ACTIVATIONS else None
    if losses is None:
        return None

    def call(input, target, **options):
        labels = target.dim() < input.dim()
        return getattr(losses, MONAI[case.name])(to_onehot_y=labels, **options)(
            input, target[:, None] if labels else target
        )

    return call


def smp(case):
    """segmentation-models-pytorch's Dice, with PyTorch's cross entropy beside it where the case has one; or nothing."""
    losses = losses_of("smp") if case.name in MONAI and case.options in ACTIVATIONS else None
    if losses is None:
        return None
    softmax = "softmax" in case.options
    dice = losses.DiceLoss("multiclass" if softmax else "multilabel")
    beside = torch.nn.functional.cross_entropy if softmax else torch.nn.functional.binary_cross_entropy_with_logits
    if case.name == "dice_loss":
        return lambda input, target, **_: dice(input, target)
    return lambda input, target, **_: dice(input, target) + beside(input, target)


def torch_chunked(case):
    """torch's own head that never makes its logits whole, in torch 2.13 and later."""
    head = getattr(torch.nn.functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None) or getattr(
        torch.nn.functional, "LinearCrossEntropyOptions", None
    )
    if head is None or options is None or case.name != "linear_cross_entropy" or case.options:
        return None
    return lambda *tensors: head(*tensors, options=options())
