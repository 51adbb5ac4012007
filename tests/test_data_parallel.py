"""Means over the rows of several processes, or of several batches: equal to one process with all rows.

Processes hold different numbers of rows that count, so the mean of their means is not the mean of all rows.
"""

import pytest
import torch
import torch.distributed as dist
from processes import run

import triton_losses
from triton_losses import functional

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.not_interpreted,
]
CLASSES, FEATURES, ROWS = 11, 5, 8


def everyones(size):
    """Hidden states, labels and weight of all processes; rank r ignores most of its rows if r is large."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(size * ROWS, FEATURES, generator=generator, dtype=torch.float64)
    weight = torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (size * ROWS,), generator=generator)
    for rank in range(size):
        labels[rank * ROWS : rank * ROWS + 2 * rank + 1] = -100
    return hidden, weight, labels


LOSSES = {
    "cross_entropy": lambda h, w, t, **more: functional.cross_entropy(h @ w.t(), t, **more),
    "cross_entropy, weighted": lambda h, w, t, **more: functional.cross_entropy(
        h @ w.t(), t, torch.linspace(0.5, 2, CLASSES, dtype=h.dtype), label_smoothing=0.1, **more
    ),
    "cross_entropy of probabilities": lambda h, w, t, **more: functional.cross_entropy(
        h @ w.t(), torch.nn.functional.one_hot(t.clamp(min=0), CLASSES).to(h.dtype), **more
    ),
    "focal_loss": lambda h, w, t, **more: functional.focal_loss(h @ w.t(), t, **more),
    "linear_cross_entropy": lambda h, w, t, **more: functional.linear_cross_entropy(h, w, t, **more),
    "linear_cross_entropy, token weights": lambda h, w, t, **more: functional.linear_cross_entropy(
        h, w, t, token_weights=1 + h[:, 0].detach() ** 2, **more
    ),
    "distillation_loss": lambda h, w, t, **more: functional.distillation_loss(
        h @ w.t(), 2 * (h @ w.t()).detach(), labels=t, **more
    ),
    "linear_distillation_loss": lambda h, w, t, **more: functional.linear_distillation_loss(
        h, w, h.detach(), 2 * w.detach(), labels=t, **more
    ),
}


def leaf(x):
    return x.detach().clone().requires_grad_()


def of_a_process(rank, size, name):
    hidden, weight, labels = everyones(size)
    whole = leaf(weight)
    expected = LOSSES[name](hidden, whole, labels)
    expected.backward()
    mine, own = slice(rank * ROWS, (rank + 1) * ROWS), leaf(weight)
    found = LOSSES[name](hidden[mine], own, labels[mine], process_group=dist.group.WORLD)
    found.backward()
    for value, wanted in ((found.detach(), expected.detach()), (own.grad, whole.grad)):
        dist.all_reduce(value)  # DDP and FSDP average gradients
        torch.testing.assert_close(value / size, wanted)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [2, 4])
def test_the_mean_of_the_processes_means_is_the_mean_of_all_rows(size, name):
    run(size, of_a_process, name)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_batches_divided_by_the_number_of_all_rows_add_up_to_one_batch(name, as_tensor):
    hidden, weight, labels = everyones(3)
    whole, own = leaf(weight), leaf(weight)
    LOSSES[name](hidden, whole, labels, reduction="sum").div(7.0).backward()
    for part in range(3):
        mine = slice(part * ROWS, (part + 1) * ROWS)
        items = torch.tensor(7) if as_tensor else 7
        LOSSES[name](hidden[mine], own, labels[mine], num_items=items).backward()
    torch.testing.assert_close(own.grad, whole.grad)


@pytest.mark.parametrize("name", ["cross_entropy", "focal_loss", "linear_cross_entropy", "distillation_loss"])
def test_a_divisor_is_for_means(name):
    hidden, weight, labels = everyones(1)
    with pytest.raises(ValueError, match="num_items is for reduction='mean', got reduction='sum'"):
        LOSSES[name](hidden, weight, labels, num_items=3, reduction="sum")
    with pytest.raises(ValueError, match="process_group is for reduction='mean', got reduction='none'"):
        LOSSES[name](hidden, weight, labels, process_group="all", reduction="none")
    with pytest.raises(ValueError, match="give one of them"):
        LOSSES[name](hidden, weight, labels, process_group="all", num_items=3)


@pytest.mark.parametrize("make", [triton_losses.CrossEntropyLoss, triton_losses.FocalLoss])
def test_a_module_takes_the_number_of_items_with_each_call(make):
    hidden, weight, labels = everyones(1)
    logits = hidden @ weight.t()
    torch.testing.assert_close(make()(logits, labels, num_items=5), make(reduction="sum")(logits, labels) / 5)


class Model(torch.nn.Module):
    """Two layers and the head; ``loss`` says how the head's loss is made."""

    def __init__(self, process_group=None):
        super().__init__()
        torch.manual_seed(3)
        self.body = torch.nn.Sequential(torch.nn.Linear(FEATURES, FEATURES), torch.nn.Tanh())
        self.head = triton_losses.LinearCrossEntropyHead(FEATURES, CLASSES, process_group=process_group)

    def forward(self, x, labels):
        return self.head(self.body(x), labels)


def steps(model, parts):
    """The losses of three steps, each of which adds up the gradients of all parts."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(3):
        optimizer.zero_grad()
        for x, labels in parts:
            loss = model(x, labels)
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
    return torch.stack(losses)


def trained(rank, size, way):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    hidden, _, labels = everyones(size)
    hidden = hidden.float()
    alone = Model()
    expected = steps(alone, [(hidden, labels)])
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    model = Model(dist.group.WORLD)
    if way == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (size,))
        if way == "fsdp, head too":
            fully_shard(model.head, mesh=mesh)
        fully_shard(model, mesh=mesh)
    found = steps(model, [(hidden[mine], labels[mine])])
    dist.all_reduce(found)
    torch.testing.assert_close(found / size, expected)
    state = {name.removeprefix("module."): value for name, value in model.state_dict().items()}
    for name, value in alone.state_dict().items():
        own = state[name].full_tensor() if hasattr(state[name], "full_tensor") else state[name]
        torch.testing.assert_close(own, value)


@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp, head too"])
@pytest.mark.parametrize("size", [2, 4])
def test_training_on_several_processes_is_training_on_one(size, way):
    run(size, trained, way)
