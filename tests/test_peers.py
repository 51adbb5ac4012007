"""People who come from another library get its values and gradients; except where those are defects, listed here.

The other library's figures are in peer_values.json, which peer_values.py makes; a library that is installed is compared
anew.
"""

import json
import math

import peer_values
import pytest
import torch

import triton_losses
from reference import peers

pytestmark = pytest.mark.not_interpreted  # test_segmentation.py is for the kernels
RECORDS = json.loads(peer_values.FILE.read_text())
ENTRIES = {
    " ".join([*entry[:2], *(f"{k}={v}" for k, v in entry[2].items()), *entry[3:5]]): entry
    for entry in RECORDS["entries"]
}


def ours(library, name, options, shape, kind):
    """The same loss of this package: of the same options, or from its preset."""
    cls, options = getattr(triton_losses, name), dict(options)
    x, y = peer_values.logits(peer_values.SHAPES[shape]), peer_values.target_of(kind, peer_values.SHAPES[shape])
    if library == "monai":
        loss = cls(**options)
    elif name == "LovaszLoss":
        hinge = options.pop("mode") != "multiclass"
        loss = cls("hinge" if hinge else "softmax", **options)
    else:
        if "weight" in options:
            options["weight"] = torch.tensor(options["weight"])
        loss = getattr(cls, f"from_{library}")(**options)
    if options.get("from_logits") is False:
        x = x.softmax(1)
    x = x.requires_grad_()
    value = loss(x, y)
    return value.detach().flatten(), torch.autograd.grad(value.sum(), x)[0].flatten()


IN_FLOAT32 = ("DiceFocalLoss", "GeneralizedDiceLoss", "LovaszLoss")  # theirs, in whole or in part


def tolerance(name):
    # others' one-hot maps and weights are
    return {"rtol": 2e-6, "atol": 2e-7} if name in IN_FLOAT32 else {"rtol": 2e-7, "atol": 1e-9}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_equals_what_the_other_library_gave(entry):
    *call, value, gradient = entry
    for mine, theirs in zip(ours(*call), (value, gradient)):
        torch.testing.assert_close(mine, torch.tensor(theirs, dtype=mine.dtype), **tolerance(call[1]))


@pytest.mark.parametrize("library", peer_values.OF_SEGMENTATION)
def test_the_file_is_what_the_installed_library_gives(library):
    if peers.losses_of(library) is None:
        pytest.skip(f"{library} is not installed")
    for entry in (entry for entry in RECORDS["entries"] if entry[0] == library):
        for now, then in zip(peer_values.measured(*entry[:5]), entry[5:]):
            torch.testing.assert_close(torch.tensor(now), torch.tensor(then), rtol=2e-8, atol=1e-9)


def softmax_and_map(shape=(2, 3, 4, 3)):
    x, y = peer_values.logits(shape).requires_grad_(), peer_values.labels(shape)
    return x, y[:, 0], torch.nn.functional.one_hot(y[:, 0], shape[1]).movedim(-1, 1).double()


def assert_same(loss, value, x):
    torch.testing.assert_close(loss, value)
    torch.testing.assert_close(
        torch.autograd.grad(loss, x, retain_graph=True), torch.autograd.grad(value, x, retain_graph=True)
    )


@pytest.mark.parametrize("do_bg", [True, False])
@pytest.mark.parametrize("batch_dice", [True, False])
def test_nnunets_dice(batch_dice, do_bg):
    """(2 I + s) / (P + T + s) of MemoryEfficientSoftDiceLoss, its mean with a minus."""
    x, y, t = softmax_and_map()
    p = x.softmax(1)
    sums = [(v if do_bg else v[:, 1:]).sum((2, 3)) for v in (p * t, p, t)]
    overlap, predicted, wanted = (v.sum(0) for v in sums) if batch_dice else sums
    dice = (2 * overlap + 1e-5) / (wanted + predicted + 1e-5).clamp_min(1e-8)
    loss = triton_losses.DiceLoss.from_nnunet(batch_dice=batch_dice, do_bg=do_bg, smooth=1e-5)
    assert_same(loss(x, y[:, None]), -dice.mean(), x)


def test_nnunets_ignore_label_is_its_mask():
    x, y, _ = softmax_and_map()
    kept = y != 2
    p, t = x.softmax(1) * kept[:, None], torch.nn.functional.one_hot(y * kept, 3).movedim(-1, 1) * kept[:, None]
    dice = (2 * (p * t).sum((2, 3)) + 1.0) / (p.sum((2, 3)) + t.sum((2, 3)) + 1.0)
    assert_same(triton_losses.DiceLoss.from_nnunet(ignore_label=2)(x, y), -dice.mean(), x)


def test_keras_dice():
    x, _, t = softmax_and_map()
    p = x.softmax(1)
    assert_same(triton_losses.DiceLoss.from_keras()(p, t), 1 - 2 * (p * t).sum() / (p.sum() + t.sum() + 1e-7), x)


# Where another library's figure is a defect, ours is the formula


def test_half_precision_does_not_overflow():
    """At 512² a sum in float16 is inf, and the Dice loss 1 whatever is predicted."""
    for shape in ((1, 2, 512, 512), (1, 2, 128, 128, 128)):
        labels = (torch.arange(math.prod(shape[2:])) % 2).view(1, *shape[2:])
        logits = torch.stack([-8 * (2 * labels - 1), 8 * (2 * labels - 1)], 1).half().requires_grad_()
        loss = triton_losses.DiceLoss(softmax=True)(logits, labels)
        assert loss.dtype == torch.float16 and loss < 1e-3
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all()


def test_nothing_there_and_nothing_predicted_costs_nothing_without_smoothing():
    for name in ("DiceLoss", "JaccardLoss", "TverskyLoss", "FocalTverskyLoss", "GeneralizedDiceLoss"):
        p = torch.zeros(1, 2, 5, requires_grad=True)
        loss = getattr(triton_losses, name)(smooth_nr=0, smooth_dr=0)(p, torch.zeros(1, 2, 5))
        assert loss < 1e-20 and torch.equal(torch.autograd.grad(loss, p)[0], torch.zeros(1, 2, 5))


def test_beside_sigmoid_stands_binary_cross_entropy_whatever_the_number_of_classes():
    x, _, t = softmax_and_map()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(x, t)
    assert_same(triton_losses.DiceCELoss(sigmoid=True)(x, t), triton_losses.DiceLoss(sigmoid=True)(x, t) + bce, x)


def test_a_background_that_does_not_count_is_still_a_class_of_the_softmax():
    x, y, _ = softmax_and_map()
    loss = triton_losses.DiceFocalLoss(include_background=False, softmax=True, use_softmax=True)(x, y)
    focal = triton_losses.FocalLoss(weight=torch.tensor([0.0, 1.0, 1.0]).double())(x, y)
    assert_same(loss, triton_losses.DiceLoss(include_background=False, softmax=True)(x, y) + focal, x)


def test_ignoring_nothing_changes_nothing():
    x, y, t = softmax_and_map()
    for options in ({"softmax": True, "use_softmax": True}, {"sigmoid": True}):
        plain, ignoring = (triton_losses.DiceFocalLoss(**options, ignore_index=i)(x, y) for i in (None, 99))
        assert_same(ignoring, plain, x)
