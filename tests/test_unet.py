"""A small network learns to segment by DiceCE, step by step as it does by the eager loss."""

import copy
import functools

import pytest
import torch
from test_segmentation import one_hot, one_thread  # noqa: F401  a fixture

import reference.losses
import triton_losses
from triton_losses import functional


def drawing(images, size, generator):
    """Discs (1), rings (2) and bars (3) on a noisy ground, and which is where."""
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).float()
    pictures, labels = torch.zeros(images, 1, size, size), torch.zeros(images, size, size, dtype=torch.int64)
    for i in range(images):
        for kind in (1, 2, 3):
            centre = torch.rand(2, 1, 1, generator=generator) * (size - 16) + 8
            distance = (grid - centre).square().sum(0).sqrt()
            bar = ((grid - centre).abs() < torch.tensor([2.0, 8.0]).view(2, 1, 1)).all(0)
            inside = {1: distance < 6, 2: (distance < 7) & (distance > 4), 3: bar}[kind]
            labels[i][inside], pictures[i, 0][inside] = kind, (0.5, 1.0, 1.5)[kind - 1]
    return pictures + 0.15 * torch.randn(pictures.shape, generator=generator), labels


class UNet(torch.nn.Module):
    def __init__(self, width=12, classes=4):
        super().__init__()

        def block(a, b):
            return torch.nn.Sequential(torch.nn.Conv2d(a, b, 3, padding=1), torch.nn.GroupNorm(4, b), torch.nn.ReLU())

        self.down, self.bottom, self.up = block(1, width), block(width, 2 * width), block(3 * width, width)
        self.head = torch.nn.Conv2d(width, classes, 1)

    def forward(self, x):
        fine = self.down(x)
        coarse = self.bottom(torch.nn.functional.max_pool2d(fine, 2))
        return self.head(self.up(torch.cat([fine, torch.nn.functional.interpolate(coarse, scale_factor=2)], 1)))


def train(network, loss, steps):
    generator, losses = torch.Generator().manual_seed(1), []
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(steps):
        x, y = drawing(4, 32, generator)
        value = loss(network(x), y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.not_interpreted
def test_a_unet_learns_to_segment_and_takes_the_path_that_eager_losses_take():
    torch.manual_seed(0)
    network = UNet()
    twin = copy.deepcopy(network)
    ours = train(network, triton_losses.DiceCELoss(softmax=True, include_background=False), 70)
    eager = train(twin, functools.partial(reference.losses.dice_ce_loss, softmax=True, include_background=False), 15)
    torch.testing.assert_close(ours[:15], eager, rtol=2e-3, atol=1e-3)  # roundings grow from step to step
    x, y = drawing(8, 32, torch.Generator().manual_seed(2))
    _, (overlap, predicted, wanted) = functional.dice_loss(one_hot(network(x).argmax(1), 4), y, return_stats=True)
    dice = 2 * overlap.sum(0) / (predicted + wanted).sum(0)
    assert dice.min() > 0.9, dice
