"""Every kernel builds where an integer argument is 1: Triton makes a constant of such an argument, which folds away and
has no methods.

A compiler that aborts takes its process along: pytest then ends at the case whose name it printed last (with -v).
"""

import importlib
import pkgutil

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton, which is not installed")

from test_builds import (
    PLAIN_TORCH,
    built,
    call,
    ctc,
    huber,
    in_one_pass,
    of_one_row_of,
    pytestmark,  # noqa: F401  the same conditions
    triplet,
)
from test_builds import cross_entropy as rows
from test_builds import head_distillation as pairs_of_rows
from test_builds_segmentation import dice
from test_planes_builds import class_indices, images

import triton_losses.kernels
from reference.cases import CASES
from triton_losses.core.tuning import Tuned

SHAPES = ((4, 1), (1, 1), (1, 5))  # rows, or images, and columns, or pixels
FIRST = {case.name: case for case in reversed(CASES) if not case.note and case not in PLAIN_TORCH}


@pytest.mark.parametrize("name", FIRST)
def test_every_loss_builds_for_one_row_and_for_one_column(name):
    case = FIRST[name]
    for number, columns in SHAPES:
        # of a sequence's classes one is the blank
        built("sm_90", call, case, number, columns + bool(case.steps), torch.float32)


KERNELS = {  # by the module that holds them: calls that launch them all
    "ctc": [(ctc, torch.float32, 3)],
    "ctc_walk": [(ctc, torch.float32, 3)],
    "distribution_rows": [(pairs_of_rows, torch.float32, 1001)],
    "elementwise": [(huber, torch.float32)],
    "label_planes": [(images, "cross_entropy", torch.float32, 19)],
    "finish": [(rows, torch.float32)],
    "long_rows": [(rows, torch.float32, 5001), (in_one_pass, "cross_entropy", torch.float32, 5001)],
    "gradient_in_forward": [(in_one_pass, "cross_entropy", torch.float32, 1001)],
    "short_rows": [(rows, torch.float32, 1001)],
    "labelled_elements": [(class_indices, torch.float32, 19)],
    "margin_rows": [
        (of_one_row_of, "multi_margin_loss", "label", torch.float32, 1001),
        (of_one_row_of, "multilabel_margin_loss", "set", torch.float32, 1001),
    ],
    "pairs": [(triplet, torch.float32)],
    "proportion_rows": [
        (of_one_row_of, f"{name}categorical_cross_entropy", labels, torch.float32, 1001)
        for name, labels in (("", "chances"), ("sparse_", "label"))
    ],
    "region_scores": [(dice, torch.float32, 4), (dice, torch.float32, 1)],
    "similarity_rows": [(call, FIRST["clip_loss"], 60, 100, torch.float32)],
    "regions": [(dice, torch.float32, 4), (dice, torch.float32, 1)],
}
LAUNCHES = [
    (module.name, name)
    for module in pkgutil.iter_modules(triton_losses.kernels.__path__)
    for name, value in vars(importlib.import_module(f"triton_losses.kernels.{module.name}")).items()
    if isinstance(value, Tuned) and value.kernel.fn.__module__.endswith(f".{module.name}")
]


def with_ones(arguments):
    """The arguments, with each integer 1 in its turn; several in one tuple are one argument."""
    for name, value in arguments.items():
        if type(value) is int and name.islower():
            yield {**arguments, name: 1}
        elif isinstance(value, tuple) and value and all(type(v) is int for v in value) and name.islower():
            yield {**arguments, name: (1,) * len(value)}


@pytest.mark.parametrize("module, launch", LAUNCHES)
def test_every_kernel_builds_with_each_integer_argument_being_1(module, launch):
    tuned = getattr(importlib.import_module(f"triton_losses.kernels.{module}"), launch)
    builds = [
        build
        for launching in KERNELS[module]
        for build in built("sm_90", *launching, finish=True)
        if build.launch is tuned
    ]
    assert builds

    def with_each():
        for build in builds:
            for arguments in with_ones(build.arguments):
                tuned.launch(arguments, build.config)

    assert built("sm_90", with_each, finish=True)
