"""sigmoid_focal_loss of class indices is that of the one-hot map to a rounding, and makes no such map."""

import pytest
import torch
from conftest import INTERPRET

from bench.memory import peak_bytes
from triton_losses import functional
from triton_losses.families.labelled_elements import read

SHAPES = ((7, 130), (6, 16), (2, 3, 5), (4,)) if INTERPRET else ((7, 130), (6, 16), (2, 3, 5), (4,), (900, 91))


def draw(shape, background, device="cpu", dtype=torch.float32):
    """Logits, indices of which a third are background, and the same as a map."""
    targets = torch.randint(shape[-1], shape[:-1])
    targets = torch.where(torch.rand(shape[:-1]) < 0.3, background, targets)
    hot = (targets[..., None] == torch.arange(shape[-1])) & (targets != background)[..., None]
    return torch.randn(shape, dtype=dtype).to(device) * 3, targets.to(device), hot.to(device, dtype)


@pytest.mark.parametrize("background", [-1, 1, 1000])
def test_they_give_what_the_map_gives(background, device):
    for shape in SHAPES:
        x, targets, hot = draw(shape, background, device)
        for reduction in ("none", "mean") if not INTERPRET else ("none",):
            results = []
            for y in (targets, targets.short(), hot):
                leaf = x.clone().requires_grad_()
                loss = functional.sigmoid_focal_loss(leaf, y, 0.3, 1.5, reduction, background=background)
                upstream = torch.linspace(-1, 2, loss.numel(), device=device).view_as(loss)
                results.append((loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]))
            for result in results[:2]:
                torch.testing.assert_close(result, results[2], rtol=1e-6, atol=1e-7)


def test_labels_beyond_the_last_class_can_be_background(device):
    """As detectors have it that number the background after the classes."""
    x = torch.randn(5, 4, device=device)
    targets = torch.tensor([0, 4, 3, 4, 1], device=device)
    hot = torch.nn.functional.one_hot(targets, 5)[:, :4].float()
    torch.testing.assert_close(
        functional.sigmoid_focal_loss(x, targets, background=4), functional.sigmoid_focal_loss(x, hot)
    )


def test_second_derivatives_and_vmap(device):
    x, targets, hot = draw((3, 4), -1, device, torch.float64)
    torch.autograd.gradgradcheck(lambda x: functional.sigmoid_focal_loss(x, targets, gamma=1.5), (x.requires_grad_(),))
    one = torch.func.grad(lambda x, y: functional.sigmoid_focal_loss(x, y, reduction="sum"))
    found = torch.func.vmap(one)(x.detach(), targets)
    torch.testing.assert_close(found, torch.autograd.grad(functional.sigmoid_focal_loss(x, hot, reduction="sum"), x)[0])


@pytest.mark.not_interpreted
def test_no_map_is_made():
    x, targets, _ = draw((200000, 80), -1)
    x.requires_grad_()

    def prepare():
        x.grad = None
        return lambda: functional.sigmoid_focal_loss(x, targets, reduction="mean").backward()

    assert peak_bytes(prepare, torch.device("cpu")) < 1.4 * x.nbytes  # the gradient, and a thread's blocks


def test_the_ops_are_well_behaved(device):
    x, targets, _ = draw((5, 16), -1, device)
    tests = ("test_schema", "test_faketensor")
    for reduction in ("none", "mean"):
        options = ("sigmoid_focal", [0.75, -0.5, 1.7], -1, reduction, torch.float32)
        torch.library.opcheck(read.forward_op, ([x, targets], *options), test_utils=tests)
        dout = torch.randn(x.shape if reduction == "none" else (), device=device)
        torch.library.opcheck(read.backward_op, ([x, targets], [], [dout], [True, False], *options), test_utils=tests)
