"""Every loss as a module: a function with its options as attributes, its tensor options as buffers.

The options and their defaults are read from the function, so they are written once.
"""

import inspect

import torch

from triton_losses import functional as F
from triton_losses.families.reduction import reduction_of

LEGACY = ("size_average", "reduce")


class Loss(torch.nn.Module):
    """A module made from a loss function: what the function takes beside ``inputs`` is an option, given when it is made."""

    def __init_subclass__(cls, function=None, inputs=2, without=(), **more):
        """function: the loss. inputs: how many of its first parameters ``forward`` takes. without: parameters left out."""
        super().__init_subclass__(**more)
        if function is None:  # a user's subclass
            return
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in without]
        inputs, options = parameters[:inputs], parameters[inputs:]
        cls.function, cls.__doc__ = staticmethod(function), function.__doc__
        cls.tensors = tuple(p.name for p in options if p.name in ("weight", "pos_weight"))
        cls.options = tuple(p.name for p in options if p.name not in LEGACY)
        self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        signature = inspect.Signature([self, *options])

        def __init__(self, *args, **kwargs):
            torch.nn.Module.__init__(self)
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            values = bound.arguments
            values["reduction"] = reduction_of(values["reduction"], values.get("size_average"), values.get("reduce"))
            for name in cls.options:
                if name in cls.tensors:
                    self.register_buffer(name, values[name])
                else:
                    setattr(self, name, values[name])

        __init__.__signature__, cls.__init__ = signature, __init__
        if cls.forward is Loss.forward:

            def forward(self, *tensors, **named):
                return cls.function(*tensors, **named, **{name: getattr(self, name) for name in cls.options})

            forward.__signature__, cls.forward = inspect.Signature([self, *inputs]), forward

    def forward(self):
        raise NotImplementedError("Loss is made for subclasses that name a function")

    def extra_repr(self):
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.options if name not in self.tensors)


class MSELoss(Loss, function=F.mse_loss, without=("weight",)): ...


class L1Loss(Loss, function=F.l1_loss, without=("weight",)): ...


class SmoothL1Loss(Loss, function=F.smooth_l1_loss): ...


class HuberLoss(Loss, function=F.huber_loss, without=("weight",)): ...


class LogCoshLoss(Loss, function=F.log_cosh_loss): ...


class BCEWithLogitsLoss(Loss, function=F.binary_cross_entropy_with_logits): ...


class SigmoidFocalLoss(Loss, function=F.sigmoid_focal_loss): ...


class NLLLoss(Loss, function=F.nll_loss): ...


class CrossEntropyLoss(Loss, function=F.cross_entropy): ...


class FocalLoss(Loss, function=F.focal_loss): ...
