"""What limits a kernel on an H200, as ``python -m bench build`` reads it off machine code, leaves the speed we want.

The figures are shares of the rate of a copy: of the forward, and of forward and backward together. A share is an upper
bound, so a kernel that passes may still be slower; one that fails cannot be as fast as that.
"""

import pytest
import torch

from bench.passes import bytes_moved_at_least
from reference import cases

build = pytest.importorskip("bench.build", reason="it builds kernels, which needs Triton")
pytestmark = [pytest.mark.builds, pytest.mark.not_interpreted]
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
PHOTOGRAPHS, VOLUMES, MASKS = (8, 19, 512, 1024), (2, 4, 128, 128, 128), (16, 1, 512, 512)
WANTED = {  # loss, shape, dtype: (forward, forward and backward)
    ("dice_loss softmax=True", PHOTOGRAPHS, FLOAT32): (0.85, 0.88),
    ("dice_loss softmax=True", PHOTOGRAPHS, BFLOAT16): (0.75, 0.80),
    ("dice_loss softmax=True", VOLUMES, FLOAT32): (0.70, 0.75),
    ("dice_loss sigmoid=True", MASKS, FLOAT32): (0.60, 0.65),
    ("dice_ce_loss softmax=True", PHOTOGRAPHS, FLOAT32): (0.80, 0.85),
    ("dice_ce_loss softmax=True", PHOTOGRAPHS, BFLOAT16): (0.75, 0.80),
    ("dice_ce_loss softmax=True", VOLUMES, FLOAT32): (0.70, 0.75),
    ("cross_entropy", PHOTOGRAPHS, FLOAT32): (0.81, 0.89),
    ("cross_entropy", PHOTOGRAPHS, BFLOAT16): (0.80, 0.85),
    ("focal_loss", PHOTOGRAPHS, BFLOAT16): (0.80, 0.85),
    # of rows that are not aligned the backward has fewer bytes in flight; an H200 still took 7 % longer with more
    ("cross_entropy", (8192, 50257), BFLOAT16): (0.92, 0.87),
    ("cross_entropy", (8192, 128256), BFLOAT16): (0.92, 0.90),
    ("distillation_loss direction=jsd beta=0.3", (4096, 128256), BFLOAT16): (0.85, 0.88),
    ("kl_div", (1 << 27,), BFLOAT16): (0.90, 0.90),
    ("sigmoid_focal_loss reduction=mean", (1 << 27,), BFLOAT16): (0.85, 0.86),
    ("binary_cross_entropy_with_logits", (1 << 27,), BFLOAT16): (0.90, 0.90),
    ("mse_loss", (1 << 27,), BFLOAT16): (0.90, 0.90),
    ("huber_loss", (1 << 27,), BFLOAT16): (0.90, 0.90),
    ("cosine_embedding_loss", (65536, 1024), BFLOAT16): (0.88, 0.92),
    ("triplet_margin_loss", (65536, 1024), BFLOAT16): (0.78, 0.90),
}


@pytest.mark.parametrize("loss, shape, dtype", WANTED, ids=str)
def test_nothing_that_the_compiler_says_keeps_a_loss_from_the_speed_we_want(loss, shape, dtype):
    is_image = len(shape) > 3
    case = next(
        case
        for case in cases.CASES
        if " ".join([case.name, *case.option_words()]) == loss
        and any((len(timed) > 3) == is_image for timed in case.bench.get("full", ()))
    )
    # a kernel of a few numbers per image takes no time worth a share
    rows = [row for row in build.rows_of(case, shape, dtype, "sm_90") if "scores" not in row["kernel"]]
    tensors, _ = case.arguments(build.small(case, shape), dtype)
    bytes_of = {which: bytes_moved_at_least(which, tensors) for which in ("forward", "backward")}
    share = {which: min(row["share"] for row in rows if which in row["kernel"]) for which in bytes_of}
    both = sum(bytes_of.values()) / sum(bytes_of[which] / share[which] for which in bytes_of)
    wanted = WANTED[loss, shape, dtype]
    assert share["forward"] >= wanted[0] and both >= wanted[1], rows
