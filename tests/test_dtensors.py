"""Losses of DTensors: equal to one process with the whole tensors, wherever rows and classes lie."""

import pytest
import torch
import torch.distributed as dist
from processes import run

from triton_losses.functional import (
    cross_entropy,
    distillation_loss,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_log_probs,
)

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.not_interpreted,
]
# this torch accumulates the gradient that to_local returns replicated, where columns are in uneven shards
OLD = torch.__version__ < "2.13"
CLASSES, FEATURES = 11, 6
SHAPE = (4, 6)


def whole_tensors():
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(CLASSES, SHAPE, generator=generator)
    labels[0, :4], labels[3, 1] = -100, -100
    return {
        "input": randn(*SHAPE, FEATURES),
        "linear_weight": randn(CLASSES, FEATURES),
        "linear_bias": randn(CLASSES),
        "teacher_hidden": randn(*SHAPE, 3),
        "teacher_weight": randn(CLASSES, 3),
        "target": labels,
        "token_weights": randn(*SHAPE) ** 2,
        "weight": torch.linspace(0.5, 2, CLASSES, dtype=torch.float64),
        "logits": randn(24, CLASSES),
        "teacher_logits": randn(24, CLASSES),
        "images": randn(4, CLASSES, 3, 2),
        "image_labels": labels.view(4, 3, 2),
        "flat": labels.flatten(),
    }


# a loss of these tensors, and which of them have gradients
LOSSES = {
    "cross_entropy": (lambda t, **o: cross_entropy(t["logits"], t["flat"], **o), ("logits",)),
    "cross_entropy, weighted and smoothed": (
        lambda t, **o: cross_entropy(t["logits"], t["flat"], t["weight"], label_smoothing=0.1, **o),
        ("logits",),
    ),
    "cross_entropy of images": (lambda t, **o: cross_entropy(t["images"], t["image_labels"], **o), ("images",)),
    "linear_cross_entropy": (
        lambda t, **o: linear_cross_entropy(
            t["input"], t["linear_weight"], t["target"], linear_bias=t["linear_bias"], **o
        ),
        ("input", "linear_weight", "linear_bias"),
    ),
    "linear_cross_entropy, token weights": (
        lambda t, **o: linear_cross_entropy(
            t["input"], t["linear_weight"], t["target"], weight=t["weight"], token_weights=t["token_weights"], **o
        ),
        ("input", "linear_weight", "token_weights"),
    ),
    "linear_log_probs": (
        lambda t, reduction="mean": linear_log_probs(t["input"], t["linear_weight"], t["target"], return_entropy=True)[
            1
        ].sum(),
        ("input", "linear_weight"),
    ),
    "distillation_loss": (
        lambda t, **o: distillation_loss(t["logits"], t["teacher_logits"], direction="jsd", labels=t["flat"], **o),
        ("logits",),
    ),
    "linear_distillation_loss": (
        lambda t, **o: linear_distillation_loss(
            t["input"], t["linear_weight"], t["teacher_hidden"], t["teacher_weight"], direction="reverse", **o
        ),
        ("input", "linear_weight"),
    ),
}
OF_ROWS = (
    "input",
    "target",
    "token_weights",
    "logits",
    "teacher_logits",
    "images",
    "image_labels",
    "flat",
    "teacher_hidden",
)
OF_CLASSES = {"logits": 1, "teacher_logits": 1, "linear_weight": 0, "linear_bias": 0, "teacher_weight": 0}
WAYS = ("classes", "rows", "rows and classes", "sequences and classes", "uneven rows")


def placements(name, way, tensor):
    """Where a tensor lies, on a mesh of one dimension; on (rows, classes) for "rows and classes"."""
    from torch.distributed.tensor import Replicate, Shard

    classes = Shard(OF_CLASSES[name]) if name in OF_CLASSES else Replicate()
    rows = Shard(0) if name in OF_ROWS else Replicate()
    if way == "classes":
        return [classes]
    if way in ("rows", "uneven rows"):
        return [rows]
    if way == "sequences and classes":  # on the same processes: hidden states are gathered
        return [Shard(1)] if name in ("input", "teacher_hidden") else [classes]
    return [rows, classes]


def over_a_mesh(rank, size, name, way, reduction):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh = init_device_mesh("cpu", (2, size // 2) if way == "rows and classes" else (size,))
    loss, leaves = LOSSES[name]
    tensors = whole_tensors()
    if way == "uneven rows":
        tensors = {n: t[: len(t) - 1] if n in OF_ROWS else t for n, t in tensors.items()}
    whole = {n: t.clone().requires_grad_(n in leaves) for n, t in tensors.items()}
    expected = loss(whole, reduction=reduction)
    found = {
        n: distribute_tensor(t, mesh, placements(n, way, t)).detach().requires_grad_(n in leaves)
        for n, t in tensors.items()
    }
    result = loss(found, reduction=reduction)
    assert isinstance(result, DTensor) and result.shape == expected.shape
    torch.testing.assert_close(result.full_tensor(), expected)
    (expected * torch.linspace(0.5, 1.5, expected.numel(), dtype=expected.dtype).view(expected.shape)).sum().backward()
    upstream = torch.linspace(0.5, 1.5, expected.numel(), dtype=expected.dtype).view(expected.shape)
    if expected.dim():
        upstream = distribute_tensor(upstream, mesh, result.placements)
        (result * upstream).sum().backward()
    else:
        (result * 1.0 if expected.numel() > 1 else result * float(upstream)).backward()
    for n in leaves:
        if n != "logits" or not OLD:
            assert found[n].grad.placements == found[n].placements
        torch.testing.assert_close(found[n].grad.full_tensor(), whole[n].grad, msg=lambda m: f"{n}: {m}")


def cases():
    for name in LOSSES:
        for way in WAYS:
            if "images" in name and way in ("classes", "rows and classes", "sequences and classes"):
                continue
            if way == "sequences and classes" and "linear" not in name:
                continue
            for size in (2, 4) if way != "rows and classes" else (4,):
                for reduction in ("mean",) if "log_probs" in name else ("mean", "none"):
                    yield pytest.param(size, name, way, reduction, id=f"{name}, {way}, {size}, {reduction}")


@pytest.mark.parametrize("size, name, way, reduction", cases())
def test_a_loss_of_dtensors_is_that_of_the_whole_tensors(size, name, way, reduction):
    run(size, over_a_mesh, name, way, reduction)


def compiled(rank, size, name, way):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (2, size // 2) if way == "rows and classes" else (size,))
    loss, leaves = LOSSES[name]
    tensors = whole_tensors()
    expected, found = (
        {
            n: distribute_tensor(t, mesh, placements(n, way, t)).detach().requires_grad_(n in leaves)
            for n, t in tensors.items()
        }
        for _ in range(2)
    )
    loss(expected).backward()
    torch._dynamo.reset()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(found).backward()
    for n in leaves:
        torch.testing.assert_close(found[n].grad.full_tensor(), expected[n].grad.full_tensor())


@pytest.mark.parametrize("size, way", [(2, "classes"), (4, "rows and classes")])
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy", "distillation_loss"])
def test_one_compiled_graph(size, name, way):
    run(size, compiled, name, way)


def refused(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh, tensors = init_device_mesh("cpu", (size,)), whole_tensors()
    logits, labels = distribute_tensor(tensors["logits"], mesh, [Shard(1)]), tensors["flat"]
    with pytest.raises(TypeError, match="target is not: say where it lies with DTensor.from_local"):
        cross_entropy(logits, labels)
    spread = distribute_tensor(labels, mesh, [Replicate()])
    with pytest.raises(TypeError, match="input is not"):
        cross_entropy(tensors["logits"], spread)
    with pytest.raises(ValueError, match="group is for tensors of one process"):
        cross_entropy(logits, spread, group=dist.group.WORLD)
    images = distribute_tensor(tensors["images"], mesh, [Shard(1)])
    with pytest.raises(NotImplementedError, match="images of shape .* must not be sharded along their classes"):
        cross_entropy(images, distribute_tensor(tensors["image_labels"], mesh, [Replicate()]))
    hidden = distribute_tensor(tensors["input"], mesh, [Replicate()])
    weight = distribute_tensor(tensors["linear_weight"], mesh, [Shard(1)])
    target = distribute_tensor(tensors["target"], mesh, [Replicate()])
    with pytest.raises(NotImplementedError, match=r"linear_weight .* must not be sharded along its dimension 1"):
        linear_cross_entropy(hidden, weight, target)
    sequences = distribute_tensor(tensors["input"], mesh, [Shard(1)])
    weight = distribute_tensor(tensors["linear_weight"], mesh, [Replicate()])
    with pytest.raises(NotImplementedError, match="shift=True needs whole sequences"):
        linear_cross_entropy(sequences, weight, target, shift=True)
    square = init_device_mesh("cpu", (size // 2, 2))
    twice = DTensor.from_local(torch.zeros(24, 3), square, [Shard(1), Shard(1)])
    with pytest.raises(NotImplementedError, match="sharded along one mesh dimension"):
        cross_entropy(twice, distribute_tensor(labels, square, [Replicate(), Replicate()]))
    with pytest.raises(ValueError, match="must have one mesh: target is on"):
        cross_entropy(logits, distribute_tensor(labels, square, [Replicate(), Replicate()]))


def test_what_cannot_be_placed_raises():
    run(4, refused)


def partial_logits(rank, size):
    """A row-parallel head leaves its logits as a sum that no one has computed yet."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    mesh, tensors = init_device_mesh("cpu", (size,)), whole_tensors()
    whole, own = (tensors["logits"].clone().div(n).requires_grad_() for n in (1, size))
    expected = cross_entropy(whole, tensors["flat"])
    expected.backward()
    target = distribute_tensor(tensors["flat"], mesh, [Replicate()])
    found = cross_entropy(DTensor.from_local(own, mesh, [Partial()]), target)
    found.backward()
    torch.testing.assert_close(found.full_tensor(), expected)
    torch.testing.assert_close(own.grad, whole.grad)


def test_partial_logits_are_summed_up():
    run(2, partial_logits)


def under_loss_parallel(rank, size):
    """torch's own context for such logits: its cross entropy, and ours within it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    mesh, tensors = init_device_mesh("cpu", (size,)), whole_tensors()
    ours, theirs = (distribute_tensor(tensors["logits"], mesh, [Shard(1)]).requires_grad_() for _ in range(2))
    target = distribute_tensor(tensors["flat"], mesh, [Replicate()])
    with loss_parallel():
        expected = torch.nn.functional.cross_entropy(theirs, target)
        expected.backward()
        found = cross_entropy(ours, target)
        found.backward()
    torch.testing.assert_close(found.full_tensor(), expected.full_tensor())
    torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad.full_tensor())


def test_within_torchs_loss_parallel_the_loss_is_torchs():
    run(2, under_loss_parallel)
