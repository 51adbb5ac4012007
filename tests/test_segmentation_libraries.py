"""MONAI's and segmentation-models-pytorch's networks and training loops, with their loss and with ours in its place:
the same losses step by step.

Data are drawn on the spot. What is not installed is skipped.
"""

import importlib.metadata
import pathlib
import re
import sys

import pytest
import torch

import triton_losses
from bench.training_tasks import SHAPES, drawing

pytestmark = pytest.mark.not_interpreted
ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def needed(*packages):
    installed = {found.metadata["name"].lower().replace("_", "-") for found in importlib.metadata.distributions()}
    missing = [name for name in packages if name not in installed]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def images(count):
    """Of discs, squares and frames in noise, (count, 1, 64, 64), with labels of that shape."""
    pictures, labels = zip(*(drawing() for _ in range(count)))
    return torch.stack(pictures), torch.stack(labels)[:, None]


@needed("monai", "pytorch-ignite")
@pytest.mark.parametrize("name, options", [("DiceCELoss", {"softmax": True}), ("DiceFocalLoss", {"sigmoid": True})])
def test_monais_trainer_goes_the_same_way(name, options):
    """SupervisedTrainer with a UNet and a DataLoader: ``loss_function=`` is all that differs."""
    import monai
    from ignite.engine import Events
    from monai.engines import SupervisedTrainer

    samples = [{"image": image, "label": label} for image, label in zip(*images(12))]
    loader = monai.data.DataLoader(samples, batch_size=4)

    def train(loss_function):
        torch.manual_seed(0)
        sizes = {"channels": (8, 16), "strides": (2,), "norm": "instance"}
        network = monai.networks.nets.UNet(spatial_dims=2, in_channels=1, out_channels=SHAPES, **sizes)
        trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=2,
            train_data_loader=loader,
            network=network,
            optimizer=torch.optim.Adam(network.parameters(), 1e-2),
            loss_function=loss_function,
        )
        losses = []
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output[0]["loss"]))
        trainer.run()
        return losses

    theirs = train(getattr(monai.losses, name)(to_onehot_y=True, **options))
    ours = train(getattr(triton_losses, name)(to_onehot_y=True, **options))
    assert len(ours) == 6 and ours[-1] < 0.95 * ours[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def smp(monkeypatch):
    """segmentation-models-pytorch. Its encoders' packages import torchvision, whose operations it does not use: beside
    a torch that torchvision was not built for, only their names must exist.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.startswith("segmentation_models_pytorch")]:
        monkeypatch.delitem(sys.modules, name)  # reference.peers imports its losses alone
    return importlib.import_module("segmentation_models_pytorch")


@needed("segmentation-models-pytorch")
@pytest.mark.parametrize("mode", ["multiclass", "multilabel", "binary"])
def test_smps_unet_goes_the_same_way(mode, smp):
    pictures, labels = images(8)
    target = {"multiclass": labels[:, 0], "binary": (labels > 0).float()}.get(mode)
    if target is None:
        target = torch.nn.functional.one_hot(labels[:, 0], SHAPES).movedim(-1, 1).float()

    def train(loss):
        torch.manual_seed(0)
        decoder = {"encoder_depth": 3, "decoder_channels": (16, 8, 8), "encoder_weights": None}
        model = smp.Unet("resnet18", in_channels=1, classes=1 if mode == "binary" else SHAPES, **decoder)
        optimiser, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        for _ in range(3):
            for image, wanted in zip(pictures.split(4), target.split(4)):
                value = loss(model(image), wanted)
                optimiser.zero_grad()
                value.backward()
                optimiser.step()
                losses.append(value.item())
        return losses

    theirs, ours = train(smp.losses.DiceLoss(mode)), train(triton_losses.DiceLoss.from_smp(mode))
    assert len(ours) == 6 and ours[-1] < ours[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@needed("monai")
def test_the_readmes_example_runs():
    (example,) = re.findall(r"^```py\n(import monai\n.*?)^```", README, re.S | re.M)
    scope = {}
    exec(example, scope)
    assert scope["loss"].isfinite() and all(p.grad is not None for p in scope["network"].parameters())
