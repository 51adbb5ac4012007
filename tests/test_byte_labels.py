"""Labels of one byte: 156 is a class like any other, though as a byte it is what -100 wraps to."""

import inspect

import pytest
import torch

from reference.cases import CASES
from triton_losses import functional
from triton_losses.core import dispatch

CLASSES = 160
TAKING_LABELS = [
    case
    for case in {
        case.name: case for case in reversed(CASES) if not (case.note or case.options or case.steps or case.pairwise)
    }.values()
    if "ignore_index" in inspect.signature(getattr(functional, case.name)).parameters
]


def in_every_way(loss, tensors):
    """Value, gradient, the gradient that can be differentiated again, and the value under vmap."""
    x, *rest = (t.detach() for t in tensors)
    x.requires_grad_()
    value = loss(x, *rest)
    twice = torch.autograd.grad(loss(x, *rest).sum(), x, create_graph=True)
    return value, *torch.autograd.grad(value.sum(), x), *twice, torch.func.vmap(lambda x: loss(x, *rest))(x[None])


@pytest.mark.parametrize("aten", [False, True], ids=["ours", "by ATen where it serves"])
@pytest.mark.parametrize("case", TAKING_LABELS, ids=str)
def test_class_156_counts(case, aten, device, monkeypatch):
    monkeypatch.setattr(dispatch, "ATEN", aten)
    torch.manual_seed(0)
    tensors, _ = case.arguments(case.shape(5, CLASSES) if not case.classes else (2, CLASSES, 5), torch.float32, device)
    loss = getattr(functional, case.name)
    which = "labels" if "labels" in inspect.signature(loss).parameters else None
    labels = torch.tensor([156, 3, 155, 156, 159] * 2, device=device)[: 5 if not case.classes else 10]
    results = []
    for dtype in (torch.uint8, torch.int64):
        given = labels.view(2, 5).to(dtype) if case.classes else labels.to(dtype)
        named = {which: given} if which else {}
        options = named | ({"softmax": True} if "softmax" in inspect.signature(loss).parameters else {})
        inputs = tensors if which else (*tensors[:-1], given)
        results.append(in_every_way(lambda *t, options=options: loss(*t, **options), inputs))
    torch.testing.assert_close(*results)
