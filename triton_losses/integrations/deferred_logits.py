"""Logits that are not computed, for a model whose loss is to come from its hidden states.

A head that is given `HiddenStates` in place of a tensor returns `Logits`, which hold the operands of the head's product
and not its result. They know the few operations that models apply between the head and the loss: scaling, tanh, casts,
views, the shift by one token, the sum of a LoRA adapter. `cross_entropy` of them is `linear_cross_entropy`. Every other
use of them raises NotImplementedError, so that no model silently gets another loss than its own.
"""

import dataclasses
import numbers
from typing import NamedTuple

import torch

from triton_losses.core.reduction import under_autocast
from triton_losses.families.linear_rows import dtype_of_product
from triton_losses.language import linear_cross_entropy


class Options(NamedTuple):
    z_loss: float
    label_smoothing: float
    chunk_bytes: int
    kept_tokens: int | str


@dataclasses.dataclass
class Call:
    """One call of a model's forward."""

    options: Options
    name: str  # of the model's class, for errors
    losses: int = 0  # how many were computed

    def give_hidden_states(self, head, args):
        """A forward pre-hook of the head."""
        if args and isinstance(args[0], torch.Tensor):
            return HiddenStates(args[0], self), *args[1:]


class Recorded:
    """What takes a tensor's place in a head. Whatever is not defined raises."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        known = FUNCTIONS.get(function)
        if known is None or not args or not isinstance(args[0], Recorded):
            found = next((a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Recorded)), None)
            name = getattr(function, "__name__", str(function))
            raise unknown(name, cls if found is None else found)
        return known(*args, **(kwargs or {}))

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise unknown(name, self)

    @property
    def ndim(self):
        return len(self.shape)

    def dim(self):
        return len(self.shape)

    def size(self, dim=None):
        return self.shape if dim is None else self.shape[dim]

    def __len__(self):
        return self.shape[0]


def unknown(name, found):
    model = f"{found.call.name}: " if isinstance(found, Recorded) else ""
    return NotImplementedError(
        f"{model}linear_cross_entropy does not know what {name} does to {KNOWN}; got {name}. "
        "return_logits=True makes the logits of one call, undo_linear_cross_entropy those of all"
    )


KNOWN = (
    "a head and its logits: it knows linear, dropout before it, the sum of a LoRA adapter, * and / by a number > 0, "
    "tanh, casts, contiguous, slices, views as (..., classes), and cross_entropy of (rows, classes)"
)


def refusal(name):
    def refuse(self, *_):
        raise unknown(name, self)

    return refuse


UNKNOWN = "bool iter eq ne lt le gt ge neg abs sub rsub radd pow rpow matmul rmatmul rtruediv mod setitem"
for operator in UNKNOWN.split():
    setattr(Recorded, f"__{operator}__", refusal(f"__{operator}__"))


@dataclasses.dataclass(eq=False)
class HiddenStates(Recorded):
    """The hidden states that enter the head."""

    values: torch.Tensor
    call: Call

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return self.values.dtype

    @property
    def device(self):
        return self.values.device

    def to(self, *args, **kwargs):
        return HiddenStates(self.values.to(*args, **kwargs), self.call)

    def float(self):
        return self.to(torch.float32)

    def contiguous(self):
        return self


@dataclasses.dataclass(eq=False)
class Logits(Recorded):
    """``softcap · tanh((x Wᵀ + b) / softcap) / T``, not computed: what a head returns."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    call: Call
    dtype: torch.dtype  # that the logits would have, and the loss has
    autocast: torch.dtype | None  # of autocast where the head was called; None: it was off
    temperature: float = 1.0
    softcap: float = 0.0  # 0: none

    @property
    def shape(self):
        return torch.Size((*self.hidden.shape[:-1], self.classes))

    @property
    def device(self):
        return self.hidden.device

    def __post_init__(self):
        self.classes, self.features = self.weight.shape

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def __truediv__(self, divisor):
        return self.replace(temperature=self.temperature * self.positive(divisor, "__truediv__"))

    def __mul__(self, factor):
        return self.replace(temperature=self.temperature / self.positive(factor, "__mul__"))

    __rmul__ = __mul__

    def positive(self, number, name):
        """A number as a float; the sign of logits does not change."""
        if not isinstance(number, numbers.Real) or not 0 < number < float("inf"):
            what = type(number).__name__ if isinstance(number, torch.Tensor | Recorded) else repr(number)
            raise unknown(f"{name} by {what}", self)
        return float(number)

    def __add__(self, other):
        """The product of both operands' features side by side: [x, x'] [W, W']ᵀ. So a LoRA adapter is added."""
        alike = isinstance(other, Logits) and (self.shape, self.autocast) == (other.shape, other.autocast)
        if not alike or self.softcap or other.softcap:
            raise unknown("__add__", self)
        factor = self.temperature / other.temperature
        biases = [b for b in (self.bias, other.bias if other.bias is None else other.bias * factor) if b is not None]
        return self.replace(
            hidden=torch.cat([self.hidden, other.hidden * factor], -1),
            weight=torch.cat([self.weight, other.weight], -1),
            bias=sum(biases[1:], biases[0]) if biases else None,
            dtype=torch.promote_types(self.dtype, other.dtype),
        )

    def tanh(self):
        """tanh(z / T) = softcap · tanh(z / softcap) / T with softcap = T."""
        if self.softcap:
            raise unknown("a second tanh", self)
        return self.replace(softcap=self.temperature)

    def to(self, *args, **kwargs):
        """A cast. What goes to another device can be returned, as Accelerate does, but not used."""
        wanted = [*args, *kwargs.values()]
        for value in wanted:
            place = isinstance(value, str | torch.device | int) and not isinstance(value, bool)
            if isinstance(value, torch.Tensor):
                raise unknown("to(tensor)", self)
            if place and not same_device(torch.device(value), self.device):
                return LogitsElsewhere(self.call)
        dtypes = [value for value in wanted if isinstance(value, torch.dtype)]
        if not all(dtype.is_floating_point for dtype in dtypes):
            raise unknown(f"to({dtypes[0]})", self)
        return self.replace(dtype=dtypes[0]) if dtypes else self

    def float(self):
        return self.to(torch.float32)

    def contiguous(self):
        return self

    def view(self, *shape):
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if not shape or shape[-1] != self.classes:
            raise unknown(f"view as {shape}", self)
        return self.replace(hidden=self.hidden.reshape(*shape[:-1], self.features))

    reshape = view

    def __getitem__(self, index):
        """A slice of the tokens. It must not reach the classes."""
        index = index if isinstance(index, tuple) else (index,)
        plain = all(part is Ellipsis or isinstance(part, slice) for part in index)
        if not plain or (index[-1] != slice(None) and (Ellipsis in index or len(index) >= self.dim())):
            raise unknown("an index other than slices of tokens", self)
        return self.replace(hidden=self.hidden[index])


@dataclasses.dataclass(eq=False)
class LogitsElsewhere(Recorded):
    """Logits that were to go to another device. Every use raises."""

    call: Call


def same_device(wanted, device):
    return wanted.type == device.type and wanted.index in (None, device.index)


def linear(input, weight, bias=None):
    """The head's product, not computed. In a LoRA adapter it is the second of two, and the first is computed."""
    if isinstance(input, LogitsElsewhere):
        raise unknown("linear on another device", input)
    x = input.values if isinstance(input, HiddenStates) else computed(input)
    for tensor in (weight, bias):
        if tensor is not None and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise unknown(f"linear with a {type(tensor).__name__}", input)
    autocast = torch.get_autocast_dtype(x.device.type) if under_autocast(x) else None
    if autocast is None and x.dtype != weight.dtype:
        raise RuntimeError(
            f"expected hidden states and the head's weight of one dtype, got {x.dtype} and {weight.dtype}"
        )
    return Logits(x, weight, bias, input.call, dtype_of_product(x, weight), autocast)


def computed(logits):
    if logits.softcap:
        raise unknown("linear after tanh", logits)
    product = torch.nn.functional.linear(logits.hidden, logits.weight, logits.bias)
    return product if logits.temperature == 1.0 else product / logits.temperature


def dropout(input, p=0.5, training=True, inplace=False):
    if not isinstance(input, HiddenStates):
        raise unknown("dropout after linear", input)
    return HiddenStates(torch.nn.functional.dropout(input.values, p, training, inplace), input.call)


def cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    """torch's cross_entropy of logits that are not computed."""
    if not isinstance(input, Logits) or input.dim() != 2 or size_average is not None or reduce is not None:
        raise unknown("cross_entropy of other than (rows, classes), or with size_average or reduce", input)
    options = input.call.options
    if label_smoothing and options.label_smoothing:
        raise ValueError(
            f"label_smoothing is set twice: {label_smoothing} in the model's loss and {options.label_smoothing} in "
            "use_linear_cross_entropy"
        )
    check_not_freed(input)
    # the product is made here, in the dtype that it would have had where the head was called
    with torch.autocast(input.device.type, dtype=input.autocast, enabled=input.autocast is not None):
        loss = linear_cross_entropy(
            input.hidden,
            input.weight,
            target,
            linear_bias=input.bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing or options.label_smoothing,
            softcap=input.softcap,
            temperature=input.temperature,
            z_loss=options.z_loss,
            chunk_bytes=options.chunk_bytes,
            kept_tokens=options.kept_tokens,
            out_dtype=input.dtype,
        )
    input.call.losses += 1
    return loss


def check_not_freed(logits):
    """FSDP and DeepSpeed free the weight of a head that is a unit of its own when its forward ends."""
    weight = logits.weight
    if weight.shape != (logits.classes, logits.features) or not weight.untyped_storage().size():
        raise RuntimeError(
            "the head's weight must still be there when the loss is computed, but it was freed: leave the head in the "
            "outermost unit of FSDP, and do not use DeepSpeed ZeRO-3"
        )


FUNCTIONS = {
    torch.nn.functional.linear: linear,
    torch.nn.functional.dropout: dropout,
    torch.nn.functional.cross_entropy: cross_entropy,
    torch.tanh: Logits.tanh,
}
