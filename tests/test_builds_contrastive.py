"""The kernels of the contrastive losses build for GPUs that are not here: what test_builds.py does not ask of them."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton, which is not installed")

from test_builds import accesses, built, offsets_of, pytestmark  # noqa: F401  the same conditions

from bench.offline_build import TARGETS
from triton_losses import functional
from triton_losses.core.similarities import ALL, Problem, Sides
from triton_losses.kernels import similarity_rows as kernels


def gradient_of_16_bits(dtype, rows, columns):
    """A chunk of CLIP, as on a GPU: float32 products, and a gradient in the features' type."""
    x, one = torch.zeros(rows, columns), torch.ones(())
    sides = Sides(one, None, None, None, None, None)
    problem = Problem((ALL,), (1.0,), columns=True, sums=True, dtype=dtype)
    slopes = torch.zeros(problem.least, rows), torch.zeros(4, columns)
    grad = torch.zeros(rows, columns, dtype=dtype)
    kernels.gradient(x, slice(0, rows), sides, slopes, (grad, torch.zeros(0)), problem)


def clip(rows, features=8):
    x, y = (torch.zeros(rows, features, requires_grad=True) for _ in range(2))
    functional.clip_loss(x, y, torch.ones((), requires_grad=True)).backward()


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_16_bit_features_builds_without_spills(dtype, name):
    for columns in (1000, 1001):
        (build,) = built(name, gradient_of_16_bits, dtype, 64, columns)
        assert build.kernel.name == "similarity_gradient"


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_tiles_are_read_and_written_in_16_bytes(name):
    """Of a batch that is a multiple of 16."""
    statistics, _, _, gradient = built(name, clip, 256)
    assert ("load", 128) in accesses(statistics.lines)
    found = accesses(gradient.lines)
    assert ("load", 128) in found and ("store", 128) in found


def test_a_chunk_beyond_2_31_elements_is_built_with_64_bit_offsets():
    small = built("sm_90", clip, 256)

    def large():
        for build in (small[0], small[3]):
            build.launch.launch({**build.arguments, "rows": 1 << 20, "cols": 1 << 14, "stride": 1 << 14}, build.config)

    for build in built("sm_90", large):
        assert "i64" in offsets_of(build, "%products"), build
