"""`tune` measures ahead of time what a loss launches, and `set_autotune` switches measuring on and off."""
# ruff: noqa: F401, F811  (pytest passes fixtures by their names)

import pytest
import torch

pytest.importorskip("triton")

from test_tuning import Kernel, arguments, deterministic, gpu, make

from triton_losses.core import tuning


def test_tune_raises_where_nothing_can_be_measured(gpu, monkeypatch):
    monkeypatch.setattr(tuning, "can_measure", lambda: False)
    with pytest.raises(RuntimeError, match="nothing can be measured"):
        tuning.tune(torch.nn.functional.mse_loss, torch.zeros(2), torch.zeros(2))


def test_tune_raises_under_deterministic_algorithms(gpu, deterministic):
    with pytest.raises(RuntimeError, match="use_deterministic_algorithms"):
        tuning.tune(torch.nn.functional.mse_loss, torch.zeros(2), torch.zeros(2))


class Twice(torch.autograd.Function):
    """2·x with a tuned kernel in each direction."""

    forward_kernel, backward_kernel = None, None

    @staticmethod
    def forward(ctx, x):
        Twice.forward_kernel.config(arguments())
        return 2 * x

    @staticmethod
    def backward(ctx, dout):
        Twice.backward_kernel.config(arguments())
        return 2 * dout


@pytest.fixture
def twice(gpu, monkeypatch):
    monkeypatch.setattr(Twice, "forward_kernel", make(Kernel("forward")))
    monkeypatch.setattr(Twice, "backward_kernel", make(Kernel("backward")))
    return Twice.apply


@pytest.mark.parametrize("enabled", [True, False])
def test_tune_measures_both_directions_whatever_set_autotune_says(gpu, twice, enabled):
    tuning.set_autotune(enabled)
    x = torch.ones(3, requires_grad=True)
    assert tuning.tune(twice, x) is None
    assert gpu == [1, 2, 3] * 2 and tuning.autotune is enabled and x.grad is None


def test_tune_runs_no_backward_where_no_gradient_is_wanted(gpu, twice):
    tuning.tune(twice, torch.ones(3))
    assert gpu == [1, 2, 3]


def test_tune_reaches_the_parameters_of_a_module(gpu, twice):
    class Head(torch.nn.Linear):
        def forward(self, x):
            return twice(super().forward(x)).sum(), None

    head = Head(3, 2)
    tuning.tune(head, torch.ones(1, 3))
    assert gpu == [1, 2, 3] * 2 and head.weight.grad is None


def test_tune_asks_for_the_tensors_that_require_grad(gpu, twice):
    hidden = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="among its arguments"):
        tuning.tune(lambda: twice(hidden))


def test_tune_restores_the_switch_when_the_loss_fails(gpu):
    tuning.set_autotune(False)
    with pytest.raises(ZeroDivisionError):
        tuning.tune(lambda x: 1 / 0, torch.zeros(2))
    assert tuning.autotune is False


@pytest.mark.parametrize("value", [0, "0", None])
def test_set_autotune_takes_a_bool(value):
    with pytest.raises(TypeError, match=f"enabled must be True or False, got {value!r}"):
        tuning.set_autotune(value)
