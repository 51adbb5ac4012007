"""Modules: their options, copies, subclasses and buffers."""

import copy
import inspect
import pickle

import pytest
import torch
from table import MODULES, TORCHS_MODULES, class_weights, draw

pytestmark = pytest.mark.not_interpreted


def call(module):
    return module(*draw(module.function.__name__))


@pytest.mark.parametrize("name", MODULES)
def test_options_are_attributes_and_read_at_every_call(name):
    module = MODULES[name]()
    for reduction in ("none", "sum", "mean"):
        module.reduction = reduction
        assert f"reduction='{reduction}'" in repr(module)
        assert torch.equal(call(module), module.function(*draw(module.function.__name__), reduction=reduction))
    for option, parameter in inspect.signature(MODULES[name]).parameters.items():
        assert option in ("size_average", "reduce", "reduction") or getattr(module, option) == parameter.default


@pytest.mark.parametrize("name", MODULES)
def test_modules_survive_copying_and_pickling(name):
    module = MODULES[name](reduction="sum")
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module) and twin.reduction == "sum"
        twin.reduction = "mean"
        if name == "LovaszLoss":  # of a batch there is one
            continue
        assert not torch.equal(call(twin), call(module)) and module.reduction == "sum"


@pytest.mark.parametrize("name", MODULES)
def test_modules_can_be_subclassed(name):
    class Scaled(MODULES[name]):
        def __init__(self, scale):
            super().__init__(reduction="sum")
            self.scale = scale

        def forward(self, *tensors):
            return self.scale * super().forward(*tensors)

    scaled = Scaled(3.0)
    assert torch.equal(call(scaled), 3.0 * call(MODULES[name](reduction="sum"))) and "reduction='sum'" in repr(scaled)


@pytest.mark.parametrize("name", [name for name in MODULES if MODULES[name].tensors])
def test_tensors_are_buffers_that_travel_with_the_module(name):
    buffers = MODULES[name].tensors
    module = MODULES[name](**{buffer: class_weights() for buffer in buffers})
    before = call(module)
    if name in TORCHS_MODULES:
        torchs = getattr(torch.nn, name)(**{buffer: class_weights().flip(0) for buffer in buffers})
        assert list(module.state_dict()) == list(torchs.state_dict()) and not MODULES[name]().state_dict()
        module.load_state_dict(torchs.state_dict())
        torch.testing.assert_close(call(module), torchs(*draw(module.function.__name__)))
        assert not torch.equal(call(module), before)
    assert {t.dtype for t in module.to(torch.float64).buffers()} == {torch.float64}
    assert {t.device.type for t in module.to("meta").buffers()} == {"meta"}
