"""What the segmentation losses refuse, and that they say why: the rule and what they got."""

import pytest
import torch
from test_segmentation import image, one_hot

import triton_losses
from triton_losses import functional

X, Y = image(dtype=torch.float32)
ONE, MAP = X[:, :1], one_hot(Y, 4, torch.float32)
REFUSED = {
    "a label beyond the classes": (IndexError, "Target 4 is out of bounds: it must be in [0, 4)", X, Y + 1, {}),
    "a negative label": (IndexError, "Target -1 ", X, Y - 1, {}),
    "a label beside the ignored": (
        IndexError,
        "Target 7 is out of bounds: it must be in [0, 4), or",
        X,
        Y * 0 + 7,
        {"ignore_index": 5},
    ),
    "one class": (ValueError, "softmax over 1 class", ONE, Y * 0, {}),
    "two activations": (ValueError, "at most one of sigmoid, softmax", X, Y, {"sigmoid": True}),
    "labels of another size": (ValueError, "(2, 5, 6)", X, Y[:, :3], {}),
    "a map of another size": (ValueError, "(2, 3, 5, 6)", X, MAP[:, :3], {}),
    "floating labels": (ValueError, "to_onehot_y", X, Y.float(), {}),
    "a map to make one-hot": (ValueError, "(2, 4, 5, 6)", X, MAP, {"to_onehot_y": True}),
    "negative smoothing": (ValueError, "smooth_dr must be >= 0, got -1", X, Y, {"smooth_dr": -1}),
    "integer logits": (NotImplementedError, "int64", X.long(), Y, {}),
    "a target elsewhere": (RuntimeError, "meta", X, Y.to("meta"), {}),
    "a target to learn": (RuntimeError, "must not require grad", X, MAP.clone().requires_grad_(), {}),
    "weights of fewer classes": (ValueError, "(4,)", X, Y, {"weight": [1.0, 2.0]}),
    "a negative weight": (ValueError, "-1.0", X, Y, {"weight": [1.0, 2.0, 3.0, -1.0]}),
    "an unknown reduction": (ValueError, "average", X, Y, {"reduction": "average"}),
    "a fraction to ignore": (TypeError, "1.5", X, Y, {"ignore_index": 1.5}),
    "a map to ignore in": (ValueError, "ignore_index beside softmax needs labels", X, MAP, {"ignore_index": 2}),
    "no batch across processes": (ValueError, "batch=True", X, Y, {"process_group": object()}),
    "no image": (ValueError, "(B, C, *)", X[0, 0, 0], Y[0, 0, :1], {}),
    "no tensor": (TypeError, "[0]", X, [0], {}),
}


@pytest.mark.parametrize("kind, words, x, y, options", REFUSED.values(), ids=REFUSED)
def test_refuses_with_the_rule_and_what_it_got(kind, words, x, y, options):
    names = [name for name in ("dice_loss", "dice_ce_loss") if name == "dice_loss" or "negative weight" not in words]
    for name in names:
        with pytest.raises(kind) as caught:
            getattr(functional, name)(x, y, **{"softmax": True, **options})
        assert words in str(caught.value)


MORE_REFUSED = [
    ("dice_loss", "empty", {"empty": "skip"}),
    ("dice_loss", "average", {"average": "none"}),
    ("dice_loss", "[7]", {"classes": [7]}),
    ("dice_loss", "include_background", {"classes": [1], "include_background": False}),
    ("tversky_loss", "alpha", {"alpha": -0.5}),
    ("focal_tversky_loss", "gamma", {"gamma": 0}),
    ("generalized_dice_loss", "w_type", {"w_type": "cube"}),
    ("dice_ce_loss", "lambda_ce", {"lambda_ce": -1}),
    ("dice_ce_loss", "label_smoothing", {"label_smoothing": 1.5}),
    ("dice_ce_loss", "none", {"reduction": "none", "batch": True}),
    ("dice_focal_loss", "alpha", {"alpha": 2}),
    ("dice_focal_loss", "gamma", {"gamma": -1}),
    ("lovasz_loss", "mode", {"mode": "hinged"}),
    ("lovasz_loss", "classes", {"classes": "some"}),
]


@pytest.mark.parametrize("name, words, options", MORE_REFUSED, ids=lambda thing: str(thing))
def test_refuses_an_option_that_is_none(name, words, options):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        getattr(functional, name)(X, Y, **options, **({} if name == "lovasz_loss" else {"softmax": True}))


def test_presets_refuse_what_the_other_library_has_not():
    for make in (
        lambda: triton_losses.DiceLoss.from_smp("multi"),
        lambda: triton_losses.DiceLoss.from_smp("binary", classes=[0]),
        lambda: triton_losses.DiceLoss.from_nnunet(apply_nonlin="tanh"),
        lambda: triton_losses.DiceLoss.from_kornia(weight=torch.ones(3)),
    ):
        with pytest.raises(ValueError, match="got|needs"):
            make()


def test_other_act_must_be_a_function():
    with pytest.raises(TypeError, match="callable, got a str"):
        functional.dice_loss(X, Y, other_act="tanh")
