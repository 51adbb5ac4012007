"""The kernels of images and of class indices, built for GPUs that are not here: as test_builds.py does for the table's
rows.
"""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton, which is not installed")

from test_builds import built, forward_and_backward, offsets_of

from bench.machine_code import accesses, loops_of
from bench.offline_build import TARGETS
from triton_losses import functional

pytestmark = [
    pytest.mark.not_interpreted,
    pytest.mark.builds,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which the other tests build the kernels for"),
]

DTYPES = (torch.bfloat16, torch.float32)
CLASSES = (2, 4, 19, 32, 150)


def images(name, dtype, classes, pixels=(64, 64), count=3, weighted=False, **options):
    logits = torch.zeros(count, classes, *pixels, dtype=dtype, requires_grad=True)
    weight = torch.ones(classes) if weighted else None
    getattr(functional, name)(
        logits, torch.zeros(count, *pixels, dtype=torch.int64), weight, **options
    ).sum().backward()


def all_options(dtype, classes, **more):
    images("cross_entropy", dtype, classes, weighted=True, label_smoothing=0.1, z_loss=0.1, **more)


def class_indices(dtype, classes, rows=60, reduction="mean"):
    logits = torch.zeros(rows, classes, dtype=dtype, requires_grad=True)
    functional.sigmoid_focal_loss(logits, torch.zeros(rows, dtype=torch.int64), reduction=reduction).sum().backward()


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_build_without_spills(dtype, classes, name):
    forward_and_backward(name, images, "focal_loss", dtype, classes, weighted=True, reduction="none")


@pytest.mark.parametrize("classes", (*CLASSES, 12))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_with_all_options_and_with_none_build_without_spills(dtype, classes):
    forward_and_backward("sm_90", images, "cross_entropy", dtype, classes)
    forward_and_backward("sm_90", all_options, dtype, classes)


@pytest.mark.parametrize("classes", (2, 24, 150))
def test_images_of_float64_build_without_spills(classes):
    forward_and_backward("sm_90", all_options, torch.float64, classes)


def test_images_of_log_probabilities_build_without_spills():
    forward_and_backward("sm_90", images, "nll_loss", torch.bfloat16, 19, weighted=True)


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
@pytest.mark.parametrize("classes", (4, 19, 150))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_access_to_a_plane_is_of_16_bytes(dtype, classes, name):
    """At widths of whole vectors; what is left is each pixel's label's own logit, the upstream gradient, and what the
    formula reads of it.
    """
    forward, backward = forward_and_backward(name, images, "cross_entropy", dtype, classes)
    held = backward.arguments["KIND"].held
    for build, kinds in ((forward, ["load"]), (backward, ["load", "store"])):
        if held:
            wide = [kind for kind, bits in accesses(build.lines) if bits == 128]
            assert all(wide.count(kind) >= held for kind in kinds), f"{build}: {accesses(build.lines)}"
        else:
            loops = [found for found in map(accesses, loops_of(build.lines)) if found]
            assert {bits for loop in loops for _, bits in loop} == {128}, f"{build}: {loops}"
            assert sorted(kinds * build.config["UNROLL"]) in [[kind for kind, _ in loop] for loop in loops], (
                f"{build}: {loops}"
            )


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
@pytest.mark.parametrize("classes", (4, 40))
def test_every_configuration_builds_without_spills(classes, name):
    by_rule = forward_and_backward(name, images, "cross_entropy", torch.bfloat16, classes)

    def all_others():
        for build in by_rule:
            configs = build.launch.configs(build.arguments)
            assert len(configs) > 2
            for config in configs:
                if config != build.config:
                    build.launch.launch(build.arguments, config)

    built(name, all_others)


@pytest.mark.parametrize("classes", (4, 150))
def test_images_beyond_2_31_elements_are_built_with_64_bit_offsets(classes):
    small = built("sm_90", images, "cross_entropy", torch.bfloat16, classes)

    def large():
        for build in small:
            strides = {"image_stride": 2**33, "class_stride": 2**33 // classes // 16 * 16, "pixels": 2**31 + 16}
            build.launch.launch({**build.arguments, **strides}, build.config)

    forward, backward = forward_and_backward("sm_90", large)
    for build, pointers in ((forward, ["%logits", "%labels"]), (backward, ["%logits", "%grad", "%labels"])):
        assert build.kernel.src.signature["pixels"] == "i64"
        for pointer in pointers:
            assert offsets_of(build, pointer) == {"i64"}, f"{build}: {pointer}: {offsets_of(build, pointer)}"


@pytest.mark.parametrize(
    "dtype, name", [*((dtype, name) for dtype in DTYPES for name in TARGETS), (torch.float64, "sm_90")], ids=str
)
@pytest.mark.parametrize("classes", (80, 91))
def test_class_indices_build_without_spills_and_with_16_byte_accesses(classes, dtype, name):
    forward, backward = forward_and_backward(name, class_indices, dtype, classes)
    assert ("load", 128) in accesses(forward.lines), forward
    assert {("load", 128), ("store", 128)} <= set(accesses(backward.lines)), backward
    (whole, _) = forward_and_backward(name, class_indices, dtype, classes, reduction="none")
    assert {("load", 128), ("store", 128)} <= set(accesses(whole.lines)), whole


def test_more_than_2_31_elements_of_classes_are_built_with_64_bit_offsets():
    small = built("sm_90", class_indices, torch.bfloat16, 80)

    def large():
        for build in small:
            build.launch.launch({**build.arguments, "n": 2**31 + 16}, build.config)

    for build in forward_and_backward("sm_90", large):
        assert offsets_of(build, "%x") == offsets_of(build, "%labels") == {"i64"}, build
