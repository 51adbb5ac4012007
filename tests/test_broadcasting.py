"""Weights that broadcast to the elements are read where they lie, in whatever dimensions they are repeated."""

import itertools

import pytest
import torch

from triton_losses import functional

SHAPE = (5, 70, 60)  # several programs of a kernel
SMALLER = [(60,), (70, 60), (5, 1, 1), (5, 70, 1), (70, 1), (1,), (5, 1, 60), (1, 70, 1), SHAPE]


def drawn(shape, device, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weight, pos_weight", itertools.product(SMALLER, [None, (60,), (5, 70, 1)]), ids=str)
def test_a_weight_of_any_shape_that_broadcasts_is_torchs(weight, pos_weight, reduction, device):
    x = drawn(SHAPE, device, 1).requires_grad_()
    options = {"weight": drawn(weight, device, 3), "reduction": reduction}
    if pos_weight is not None:
        options["pos_weight"] = drawn(pos_weight, device, 4)
    target, results = drawn(SHAPE, device, 2), []
    for module in (functional, torch.nn.functional):
        loss = module.binary_cross_entropy_with_logits(x, target, **options)
        results.append([loss, *torch.autograd.grad(loss, x, drawn(loss.shape, device, 5))])
    for ours, torchs in zip(*results):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "shape, wanted", [((60,), (1, 60)), ((5, 1, 1), (-1, 4200)), ((5, 70, 1), (-1, 60)), ((1,), (1, 1))]
)
def test_one_read_of_repeated_numbers(shape, wanted):
    pytest.importorskip("triton", reason="kernels need Triton, which is not installed")
    from triton_losses.kernels.elementwise import read_of

    assert read_of(torch.rand(shape).expand(SHAPE), SHAPE) == wanted
    assert read_of(torch.rand(5, 1, 60).expand(SHAPE), SHAPE) is None  # repeated in the middle: copied
    assert read_of(torch.rand(14)[::2, None].expand(7, 6), (7, 6)) is None  # with gaps: copied
