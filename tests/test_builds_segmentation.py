"""The regions kernels build for GPUs that this machine does not have: at every number of classes without spills, 16
bytes at a time.
"""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton, which is not installed")

from test_builds import built, forward_and_backward, offsets_of, pytestmark  # noqa: F401  the same conditions

from bench.machine_code import accesses, loops_of
from bench.offline_build import TARGETS
from triton_losses import functional

PIXELS = 1 << 14
PASSES = ("forward", "scores", "backward")


def dice(dtype, classes, target=torch.uint8, pixels=PIXELS, loss="dice_ce_loss", **options):
    """Forward and backward; the numbers are meaningless."""
    logits = torch.zeros(1, classes, pixels, dtype=dtype, requires_grad=True)
    labels = torch.zeros((1, pixels) if classes > 1 and not target.is_floating_point else logits.shape, dtype=target)
    getattr(functional, loss)(logits, labels, sigmoid=classes == 1, softmax=classes > 1, **options).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 4, 19, 32, 150])
def test_dice_with_cross_entropy_builds_for_any_number_of_classes(classes, dtype):
    forward, _, backward = forward_and_backward("sm_90", dice, dtype, classes, passes=PASSES)
    for build in (forward, backward):
        found = {access for loop in loops_of(build.lines) for access in accesses(loop)}
        wide = {("load", 128), *([("store", 128)] if "backward" in build.kernel.name else [])}
        assert wide <= found, f"{build}: {found}"
        narrow = {("load", 32), ("load", 64)}  # of four and of eight bytes that are labels
        assert found <= wide | narrow, f"{build}: {found}"


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("classes", [4, 19])
def test_dice_builds_on_every_target(classes, name):
    forward_and_backward(name, dice, torch.bfloat16, classes, passes=PASSES)
    # at 19 its compiler parks two scalar registers in a vector's lanes, in the loop
    if name != "gfx942" or classes == 4:
        options = {"loss": "dice_focal_loss", "use_softmax": True, "ignore_index": 255}
        forward_and_backward(name, dice, torch.bfloat16, classes, passes=PASSES, **options)


MORE = {
    "soft maps": {"target": torch.float32, "classes": 19, "label_smoothing": 0.1},
    "ignored": {"classes": 19, "ignore_index": 255},
    "double precision": {"classes": 19, "dtype": torch.float64},
    "a focal loss": {"loss": "dice_focal_loss", "classes": 19, "use_softmax": True, "ignore_index": 255},
    "a focal loss of one class": {"loss": "dice_focal_loss", "classes": 1, "target": torch.float32},
    "soft labels": {"loss": "jaccard_loss", "classes": 4, "target": torch.float32, "soft_label": True},
    "odd planes": {"classes": 4, "pixels": 1001},
    "one score of a batch": {
        "loss": "dice_loss",
        "classes": 19,
        "batch": True,
        "empty": "exclude",
        "weight": [1.0] * 19,
    },
    "a weighted sum of classes": {
        "loss": "generalized_dice_loss",
        "classes": 19,
        "log_loss": True,
        "include_background": False,
    },
    "powers": {"loss": "focal_tversky_loss", "classes": 150, "log_loss": True, "average": "micro"},
    "no reduction": {"loss": "dice_ce_loss", "classes": 4, "reduction": "none", "weight": [1.0] * 4},
}


@pytest.mark.parametrize("options", MORE.values(), ids=MORE)
def test_its_options_build_without_spills(options):
    forward_and_backward("sm_90", dice, **{"dtype": torch.bfloat16, **options}, passes=PASSES)


def test_every_configuration_of_regions_builds_without_spills():
    forward, _, backward = forward_and_backward("sm_90", dice, torch.bfloat16, 19, passes=PASSES)

    def all_others():
        for build in (forward, backward):
            configs = build.launch.configs(build.arguments)
            assert len(configs) > 2 and build.config in configs
            pixels = {config["LANES"] * config["STEPS"] * build.arguments["KIND"].vec for config in configs}
            assert len(pixels) == 1  # a program's, whatever the configuration
            for config in configs:
                if config != build.config:
                    build.launch.launch(build.arguments, config)

    built("sm_90", all_others)


def test_images_beyond_2_31_elements_are_built_with_64_bit_offsets():
    forward, _, backward = forward_and_backward("sm_90", dice, torch.bfloat16, 4, passes=PASSES)
    for build in (forward, backward):
        assert offsets_of(build, "%logits") == {"i64"}, build
