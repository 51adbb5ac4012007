"""Other libraries' losses, where they are installed, and torch's own alternatives: what people switch from.

An adapter takes a case and returns that library's function for it, called as ours is; or None if the library is not
installed, or has no loss with the case's values and gradients. `pip install '.[peers]'` installs most of them.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
import types

import torch

# packages by the names used here. Tests keep values of the first group
OF_SEGMENTATION = {"monai": "monai", "smp": "segmentation-models-pytorch", "kornia": "kornia"}
PACKAGES = OF_SEGMENTATION | {
    "torchvision": "torchvision",
    "liger": "liger-kernel",
    "cut cross entropy": "cut-cross-entropy",
    "fla": "fla-core",
    "quack": "quack-kernels",
    "open_clip": "open_clip_torch",
    "lightly": "lightly",
    "pytorch_metric_learning": "pytorch-metric-learning",
    "info_nce": "info-nce-pytorch",
}
MONAI = {"dice_loss": "DiceLoss", "dice_ce_loss": "DiceCELoss"}
ACTIVATIONS = ({"softmax": True}, {"sigmoid": True})


def module(name):
    """The module of that name, or None where its package is not installed."""
    return importlib.import_module(name) if importlib.util.find_spec(name.split(".")[0]) else None


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


def is_plain(case, *names, may=()):
    """Whether the case is one of these losses, of rows, and has no options but those that ``may`` be there."""
    return case.name in names and not case.note and set(case.options) <= set(may)


def liger(case):
    """Liger-Kernel. Its cross entropy makes the gradient in the forward, in place of the logits."""
    if not is_plain(case, "cross_entropy", "linear_cross_entropy", may=("label_smoothing",)):
        return None
    functions = module("liger_kernel.transformers.functional")
    if functions is None:
        return None
    if case.name == "cross_entropy":
        return functions.liger_cross_entropy
    return functions.liger_fused_linear_cross_entropy


def cut_cross_entropy(case):
    """Cut cross entropy: its own kernels on a GPU, elsewhere its torch.compile path."""
    if not is_plain(case, "linear_cross_entropy"):
        return None
    functions = module("cut_cross_entropy")
    if functions is None:
        return None
    return lambda input, *tensors, **_: functions.linear_cross_entropy(
        input, *tensors, impl="cce" if input.is_cuda else "torch_compile"
    )


def fla(case):
    """flash-linear-attention's cross entropies; that of logits leaves them as they are (inplace_backward=False)."""
    if not is_plain(case, "cross_entropy", "linear_cross_entropy", may=("label_smoothing",)):
        return None
    modules = module("fla.modules")
    if modules is None:
        return None
    if case.name == "cross_entropy":
        loss = modules.FusedCrossEntropyLoss(**case.options)
        return lambda input, target, **_: loss(input, target)
    head = modules.FusedLinearCrossEntropyLoss(**case.options)
    return lambda input, weight, target, **_: head(input, target, weight)


def quack(case):
    """quack-kernels' cross entropy of rows, on NVIDIA's newer GPUs."""
    functions = module("quack.cross_entropy") if is_plain(case, "cross_entropy") else None
    return functions and (lambda input, target, **_: functions.cross_entropy(input, target, reduction="mean"))


def torchvision(case):
    """torchvision's sigmoid_focal_loss, which has the options of ours."""
    operations = module("torchvision.ops") if case.name == "sigmoid_focal_loss" else None
    return operations and operations.sigmoid_focal_loss


def open_clip(case):
    """open_clip's losses of pairs; its file of losses alone is imported, without what its models need."""
    if not is_plain(case, "clip_loss", "siglip_loss"):
        return None
    if "open_clip" not in sys.modules and (spec := importlib.util.find_spec("open_clip")) is not None:
        sys.modules["open_clip"] = types.ModuleType("open_clip")
        sys.modules["open_clip"].__path__ = list(spec.submodule_search_locations)
    if "open_clip" not in sys.modules:
        return None
    losses = importlib.import_module("open_clip.loss")
    loss = losses.ClipLoss() if case.name == "clip_loss" else losses.SigLipLoss()
    return lambda *tensors, **_: loss(*tensors)


def lightly(case):
    """lightly's NT-Xent of two views."""
    losses = module("lightly.loss.ntx_ent_loss") if is_plain(case, "nt_xent_loss") else None
    if losses is None:
        return None
    loss = losses.NTXentLoss()
    return lambda *views, **_: loss(*views)


def pytorch_metric_learning(case):
    """pytorch-metric-learning's NT-Xent, of two views joined."""
    losses = module("pytorch_metric_learning.losses") if is_plain(case, "nt_xent_loss") else None
    if losses is None:
        return None
    loss = losses.NTXentLoss(temperature=0.5)
    return lambda *views, **_: loss(torch.cat(views), torch.arange(len(views[0]), device=views[0].device).repeat(2))


def info_nce(case):
    """info-nce-pytorch's InfoNCE."""
    losses = module("info_nce") if is_plain(case, "info_nce_loss", may=("temperature",)) else None
    return losses and (lambda *tensors, **options: losses.info_nce(*tensors, **options))
