"""What other libraries' segmentation losses give, over a grid of options: made once, kept in peer_values.json.

    pip install --no-deps monai==1.6.1 segmentation-models-pytorch==0.6.0 kornia==0.9.0 && PYTHONPATH=. python
    tests/peer_values.py

test_peers.py compares ours with the file, and the file with a library that is installed. Only the losses of
segmentation-models-pytorch are imported, so that its encoders' packages need not be there.
"""

import importlib.metadata
import itertools
import json
import pathlib

import torch

from reference.peers import OF_SEGMENTATION, losses_of

FILE = pathlib.Path(__file__).with_suffix(".json")
SHAPES = {"image": (2, 3, 3, 3), "volume": (1, 2, 2, 3, 3), "one class": (2, 1, 3, 3)}


def logits(shape):
    n = torch.Size(shape).numel()
    return (3 * torch.sin(torch.arange(n, dtype=torch.float64) * 1.7 + 0.3)).view(shape)


def labels(shape, void=None):
    """(B, 1, *); of three classes, none is of class 1 in the second image."""
    where = (shape[0], 1, *shape[2:])
    n = torch.Size(where).numel()
    y = ((torch.arange(n) * 7 + torch.arange(n) // 5) % max(shape[1], 2)).view(where)
    if shape[1] > 2:
        y[1:] = torch.where(y[1:] == 1, 2, y[1:])
    return y if void is None else y.masked_fill((torch.arange(n).view(where) % 6) == 2, void)


def maps(shape):
    n = torch.Size(shape).numel()
    return ((torch.arange(n) * 5 % 7) > 3).view(shape).double()


def soft(shape):
    n = torch.Size(shape).numel()
    return torch.cos(torch.arange(n, dtype=torch.float64)).square().view(shape)


def target_of(kind, shape):
    return {"labels": labels, "void": lambda s: labels(s, 255), "maps": maps, "soft": soft}[kind](shape)


def products(**options):
    return [dict(zip(options, values)) for values in itertools.product(*options.values())]


def grid():
    """(library, class, options, shape, target) of each entry; options are the library's own."""
    for shape, reduction in itertools.product(("image", "volume"), ("mean", "sum", "none")):
        yield "monai", "DiceLoss", {"softmax": True, "to_onehot_y": True, "reduction": reduction}, shape, "labels"
    for options in products(
        include_background=[True, False], squared_pred=[True, False], jaccard=[True, False], batch=[True, False]
    ):
        yield "monai", "DiceLoss", {"softmax": True, "to_onehot_y": True, **options}, "image", "labels"
        yield "monai", "DiceLoss", {"sigmoid": True, **options}, "image", "maps"
    for options in products(soft_label=[True, False], squared_pred=[True, False], sigmoid=[True]):
        yield "monai", "DiceLoss", options, "image", "soft"
    for options in (
        {"weight": [0.5, 1.0, 2.0]},
        {"weight": [1.0, 3.0], "include_background": False},
        {"smooth_nr": 0.0, "smooth_dr": 0.5},
    ):
        yield "monai", "DiceLoss", {"softmax": True, "to_onehot_y": True, **options}, "image", "labels"
    yield "monai", "DiceLoss", {"softmax": True, "to_onehot_y": True, "ignore_index": 255}, "image", "void"
    yield "monai", "DiceLoss", {"sigmoid": True}, "one class", "labels"
    for options in products(include_background=[True, False], batch=[True, False], reduction=["mean", "sum"]):
        yield (
            "monai",
            "TverskyLoss",
            {"softmax": True, "to_onehot_y": True, "alpha": 0.3, "beta": 0.7, **options},
            "image",
            "labels",
        )
        yield "monai", "GeneralizedDiceLoss", {"softmax": True, "to_onehot_y": True, **options}, "image", "labels"
    for w_type, batch in itertools.product(("square", "simple", "uniform"), (True, False)):
        yield "monai", "GeneralizedDiceLoss", {"sigmoid": True, "w_type": w_type, "batch": batch}, "image", "maps"
    for options in products(include_background=[True, False], batch=[True, False], reduction=["mean", "sum"]):
        yield (
            "monai",
            "DiceCELoss",
            {"softmax": True, "to_onehot_y": True, "lambda_ce": 0.4, **options},
            "image",
            "labels",
        )
        yield "monai", "DiceFocalLoss", {"sigmoid": True, "gamma": 1.5, **options}, "image", "maps"
    for options in ({"weight": [0.5, 1.0, 2.0]}, {"label_smoothing": 0.1}, {"squared_pred": True, "jaccard": True}):
        yield "monai", "DiceCELoss", {"softmax": True, "to_onehot_y": True, **options}, "image", "labels"
    yield "monai", "DiceCELoss", {"softmax": True}, "image", "soft"
    yield "monai", "DiceCELoss", {"sigmoid": True}, "one class", "labels"
    for options in ({"alpha": 0.25}, {"weight": [0.5, 1.0, 2.0]}, {"softmax": True, "sigmoid": False}):
        yield "monai", "DiceFocalLoss", {"sigmoid": True, "to_onehot_y": True, **options}, "image", "labels"
    for name in ("DiceLoss", "JaccardLoss", "TverskyLoss"):
        more = {"alpha": 0.3, "beta": 0.7} if name == "TverskyLoss" else {}
        for options in products(log_loss=[True, False], smooth=[0.0, 1.0]):
            yield "smp", name, {"mode": "multiclass", **options, **more}, "image", "labels"
            yield "smp", name, {"mode": "multilabel", **options, **more}, "image", "maps"
            yield "smp", name, {"mode": "binary", **options, **more}, "one class", "labels"
        for options in (
            {"ignore_index": 255},
            {"classes": [0, 2]},
            {"class_weights": [0.5, 1.0, 2.0]},
            {"from_logits": False},
        ):
            yield (
                "smp",
                name,
                {"mode": "multiclass", **options, **more},
                "image",
                "void" if "ignore_index" in options else "labels",
            )
        yield "smp", name, {"mode": "multilabel", **more}, "image", "soft"
    yield "smp", "TverskyLoss", {"mode": "multiclass", "gamma": 1.5}, "image", "labels"
    for options in products(mode=["multiclass"], per_image=[True, False]):
        yield "smp", "LovaszLoss", options, "image", "labels"
        yield "smp", "LovaszLoss", {**options, "ignore_index": 255}, "image", "void"
        yield "smp", "LovaszLoss", {**options, "mode": "binary"}, "one class", "labels"
    for average in ("micro", "macro"):
        yield "kornia", "DiceLoss", {"average": average}, "image", "labels"
        yield "kornia", "DiceLoss", {"average": average, "ignore_index": 255}, "image", "void"
    yield "kornia", "DiceLoss", {"average": "macro", "weight": [0.5, 1.0, 2.0]}, "image", "labels"


def measured(library, loss, options, shape, kind):
    """The library's value and gradient."""
    options = {k: torch.tensor(v, dtype=torch.float64) if k == "weight" else v for k, v in options.items()}
    x, y = logits(SHAPES[shape]).requires_grad_(), target_of(kind, SHAPES[shape])
    if library != "monai" and kind in ("labels", "void"):
        y = y[:, 0]
    elif kind == "labels" and shape == "one class":
        y = y.double()
    if options.get("from_logits") is False:
        x = x.detach().softmax(1).requires_grad_()
    if loss == "LovaszLoss":  # knows float32 alone
        x = x.detach().float().requires_grad_()
    value = getattr(losses_of(library), loss)(**options)(x, y)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return [[float(f"{v:.9g}") for v in t.detach().flatten().tolist()] for t in (value, gradient)]


if __name__ == "__main__":
    versions = {
        name: importlib.metadata.version(package) for name, package in {**OF_SEGMENTATION, "torch": "torch"}.items()
    }
    entries = [[*entry, *measured(*entry)] for entry in grid()]
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    FILE.write_text(
        f'{{"versions": {json.dumps(versions)}, "command": "python tests/peer_values.py",\n"entries": [\n{lines}\n]}}\n'
    )
    print(len(entries), "entries")
