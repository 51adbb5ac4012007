"""Objectives: several losses, and a penalty on parameters, as one module that returns one number to minimise.

    WeightedSum       several losses of the same input
    MultiOutputLoss   a loss for each head of a model that has several
    ParameterPenalty  L1 and L2 of parameters, for use as one of the losses of a WeightedSum

They call any loss functions or modules, and hold no numbers of their own besides the weights.
"""

import math
import numbers
from collections.abc import Mapping

import torch


class Function(torch.nn.Module):
    """A loss function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs, **named):
        return self.function(*inputs, **named)

    def extra_repr(self):
        return repr(self.function)


def check_names(what, found, known):
    """The names must be exactly the known ones."""
    missing, unknown = [name for name in known if name not in found], [name for name in found if name not in known]
    if missing or unknown:
        said = [f"{what} must be named as the losses are, {list(known)}"]
        said += [f"missing: {missing}"] if missing else []
        said += [f"unknown: {unknown}"] if unknown else []
        raise ValueError("; ".join(said))


def check_weight(name, weight):
    if isinstance(weight, torch.Tensor):
        if weight.dim():
            raise ValueError(f"the weight of {name!r} must be one number, got a tensor of shape {tuple(weight.shape)}")
    elif not isinstance(weight, numbers.Real) or not math.isfinite(weight):
        raise ValueError(f"the weight of {name!r} must be a finite number or a scalar tensor, got {weight!r}")


class Named(torch.nn.Module):
    """Losses by name, and the weight of each."""

    def __init__(self, losses, weights=None):
        super().__init__()
        if not isinstance(losses, Mapping):
            raise TypeError(f"losses must be a dict of losses by name, got {losses!r}")
        if not isinstance(weights, Mapping | None):
            raise TypeError(f"weights must be a dict of numbers by the losses' names, got {weights!r}")
        if not losses:
            raise ValueError("losses must name at least one loss, got none")
        for name, loss in losses.items():
            if not callable(loss):
                raise TypeError(f"the loss named {name!r} must be a module or a function, got {loss!r}")
        weights = dict.fromkeys(losses, 1.0) | dict(weights or {})
        check_names("weights", weights, losses)
        for name, weight in weights.items():
            check_weight(name, weight)
        self.losses = torch.nn.ModuleDict(
            {k: v if isinstance(v, torch.nn.Module) else Function(v) for k, v in losses.items()}
        )
        self.weights = weights

    def total(self, parts, return_parts):
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"losses that are added must have one shape, got {shapes}")
        total = sum(self.weights[name] * part for name, part in parts.items())
        return (total, parts) if return_parts else total

    def extra_repr(self):
        return f"weights={self.weights}"


class WeightedSum(Named):
    """``Σ_k w_k L_k(x, y, …)``: several losses of the same input as one.

    losses: by name, modules or functions; weights: by name, numbers or scalar tensors, 1 for those not named
    (ValueError for a name that no loss has). They may be changed at any time; inside torch.compile a number that
    changes compiles anew, a tensor that changes does not. Calling it passes everything to every loss; return_parts=True
    returns the losses by name, too, as they were before they were weighted. The losses must return tensors of one shape
    (else ValueError).

    >>> from triton_losses import L1Loss, MSELoss
    >>> loss = WeightedSum({"square": MSELoss(), "absolute": L1Loss()}, weights={"absolute": 0.5})
    >>> loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    tensor(2.5000)
    """

    def forward(self, *inputs, return_parts=False, **named):
        return self.total({name: loss(*inputs, **named) for name, loss in self.losses.items()}, return_parts)


class MultiOutputLoss(Named):
    """``Σ_h w_h L_h(x_h, y_h)``: the losses of a model with several heads, each of its own output and target.

    losses, weights: by the heads' names, as in ``WeightedSum``. Called with two dicts, of the outputs and of the
    targets by head; a head that is missing or unknown in either raises a ValueError that names it. return_parts as
    there.

    >>> from triton_losses import CrossEntropyLoss, MSELoss
    >>> loss = MultiOutputLoss({"kind": CrossEntropyLoss(), "size": MSELoss()}, weights={"size": 0.1})
    >>> outputs = {"kind": torch.zeros(2, 4), "size": torch.tensor([1.0, 2.0])}
    >>> loss(outputs, {"kind": torch.tensor([3, 0]), "size": torch.tensor([1.0, 4.0])}, return_parts=True)
    (tensor(1.5863), {'kind': tensor(1.3863), 'size': tensor(2.)})
    """

    def forward(self, outputs, targets, *, return_parts=False):
        for what, given in (("outputs", outputs), ("targets", targets)):
            if not isinstance(given, Mapping):
                raise TypeError(
                    f"{what} must be a dict by the heads' names {list(self.losses)}, got {type(given).__name__}"
                )
            check_names(what, given, self.losses)
        return self.total(
            {name: loss(outputs[name], targets[name]) for name, loss in self.losses.items()}, return_parts
        )


class ParameterPenalty(torch.nn.Module):
    """``λ₁ Σ|θ| + λ₂ Σθ²``: what large parameters cost; λ₁ alone is the lasso, λ₂ alone ridge regression, both the
    elastic net.

    parameters: a module, all of whose parameters count as they are at each call, or tensors (else TypeError; ValueError
    where there are none). They stay the model's: this module's own ``parameters()`` and ``state_dict()`` are empty. l1,
    l2: λ₁ and λ₂, >= 0 (else ValueError); the gradient is ``λ₁ sign(θ) + 2 λ₂ θ``, 0 for θ = 0. Computed in float32 or
    wider. Whatever it is called with is passed over, so that it can stand among the losses of a ``WeightedSum``:

    >>> from triton_losses import MSELoss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, -3.0)
    >>> objective = WeightedSum({"loss": MSELoss(), "penalty": ParameterPenalty(model, l1=0.5, l2=0.25)})
    >>> objective(model(torch.ones(1, 2)), torch.zeros(1, 1), return_parts=True)[1]["penalty"]
    tensor(7.5000, grad_fn=<AddBackward0>)

    Tibshirani 1996, doi:10.1111/j.2517-6161.1996.tb02080.x; Zou and Hastie 2005, doi:10.1111/j.1467-9868.2005.00503.x.
    """

    def __init__(self, parameters, l1=0.0, l2=0.0):
        super().__init__()
        for name, value in (("l1", l1), ("l2", l2)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        self.l1, self.l2 = l1, l2
        # in a tuple, so that torch.nn.Module does not register them as its own
        self.held = (parameters,) if isinstance(parameters, (torch.nn.Module, torch.Tensor)) else tuple(parameters)
        for tensor in self.tensors():
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                raise TypeError(f"parameters must be a module or floating-point tensors, got {tensor!r}")
        if not any(True for _ in self.tensors()):
            raise ValueError("parameters must hold at least one, got none")

    def tensors(self):
        module = len(self.held) == 1 and isinstance(self.held[0], torch.nn.Module)
        return self.held[0].parameters() if module else self.held

    def forward(self, *inputs, **named):
        total = 0.0
        for tensor in self.tensors():
            wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            if self.l1:
                total = total + self.l1 * wide.abs().sum()
            if self.l2:
                total = total + self.l2 * wide.square().sum()
        return total if self.l1 or self.l2 else wide.new_zeros(())

    def extra_repr(self):
        return f"l1={self.l1}, l2={self.l2}"
