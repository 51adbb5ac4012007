"""The training loss of Hugging Face's language models by ``linear_cross_entropy``, which never makes logits whole.

    use_linear_cross_entropy    changes one model
    undo_linear_cross_entropy   changes it back

The model's own forward runs, with one difference: its head is given `HiddenStates` in place of a tensor, and so returns
`Logits`, which hold the operands of the head's product and not its result. Logits know the few operations that models
apply between the head and the loss: scaling, tanh, casts, views, the shift by one token, the sum of a LoRA adapter.
`cross_entropy` of them is `linear_cross_entropy`. Every other use of them raises NotImplementedError, so that no model
silently gets another loss than its own. Nothing here depends on a model's class.
"""

import dataclasses
import functools
import inspect
import numbers
import re
from typing import NamedTuple, TypeVar

import torch
import transformers

from triton_losses.families.linear_rows import dtype_of_product
from triton_losses.language import linear_cross_entropy, upper_bound
from triton_losses.row_formulas import cross_entropy_formula

VERSIONS = (4, 57), (6, 0)  # of transformers: from the first to below the second
PATCH = "_linear_cross_entropy"  # the attribute of a changed model that holds its TrainingForward
Model = TypeVar("Model")


class Options(NamedTuple):
    z_loss: float
    label_smoothing: float
    chunk_bytes: int
    kept_tokens: int | str


def use_linear_cross_entropy(
    model: Model,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_bytes: int = 0,
    kept_tokens: int | str = "count",
) -> Model:
    """Make ``model(labels=...)`` compute its training loss by ``linear_cross_entropy``, without logits.

    model: of transformers, with output embeddings and labels, such as LlamaForCausalLM; or a PEFT model of one. This
    one object is changed, not its class, and returned; do it before Accelerate, DDP or FSDP wrap the model.
    z_loss, label_smoothing, chunk_bytes, kept_tokens: as in ``linear_cross_entropy``; the first two are part of the
    training loss alone.

    It applies where labels are given, ``model.training`` is True and nobody asks for logits. ``outputs.logits`` is then
    None, and with return_dict=False None stands in its place in the tuple. In all other calls (evaluation, generation,
    no labels) the model's own forward runs unchanged. A caller asks for logits by ``model(..., return_logits=True)`` or
    by ``logits_to_keep``; in training that raises ValueError if z_loss or label_smoothing is set, since the loss would
    be another. Transformers' Trainer takes labels away from the model if it has a label_smoothing_factor or a
    compute_loss_func: then the logits are made, and the options here do not apply.

    Shift, ignored labels, num_items_in_batch, auxiliary losses, logit scales and soft-capping are the model's own. A
    model that does anything else with its logits raises NotImplementedError when it is trained. A LoRA adapter on the
    head is trained without logits, too, at the cost of a copy of the head's weight in each step. A head that is
    quantised, sharded as a unit of its own (FSDP, DeepSpeed ZeRO-3) or tensor-parallel raises. Not for nn.DataParallel.
    torch.compile breaks the graph once, before the model's own forward; undo the change before torch.export.
    Versions of transformers before 4.57 or from 6.0 raise ImportError, a model that is not one of transformers
    TypeError, one without output embeddings or labels NotImplementedError, a second call for the same model
    RuntimeError; options out of range raise as in ``linear_cross_entropy``.

    >>> model = use_linear_cross_entropy(LlamaForCausalLM(config), z_loss=1e-4).train()
    >>> model(input_ids=ids, labels=ids).loss.backward()
    """
    check_version(transformers.__version__)
    cross_entropy_formula(label_smoothing, z_loss)  # raises for options out of range
    upper_bound(kept_tokens)
    changed = own_model(model)
    if isinstance(vars(changed).get(PATCH), TrainingForward):
        raise RuntimeError(
            f"this {type(changed).__name__} already uses linear_cross_entropy: call undo_linear_cross_entropy first"
        )
    forward = TrainingForward(changed, Options(z_loss, label_smoothing, chunk_bytes, kept_tokens))
    changed.forward = forward
    setattr(changed, PATCH, forward)
    return model


def undo_linear_cross_entropy(model: Model) -> Model:
    """Give ``model`` its own training loss back, and return it. RuntimeError if it was not changed.

    It also works after Accelerate has wrapped the model's forward.

    >>> model = undo_linear_cross_entropy(model)
    """
    changed = own_model(model)
    forward = vars(changed).get(PATCH)
    if not isinstance(forward, TrainingForward):
        raise RuntimeError(f"this {type(changed).__name__} does not use linear_cross_entropy: there is nothing to undo")
    delattr(changed, PATCH)
    forward.options = None  # what has wrapped this forward in the meantime goes on calling it
    if vars(changed).get("forward") is forward:
        del changed.forward
        if forward.before is not None:
            changed.forward = forward.before
    return model


def check_version(version):
    release = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    first, end = VERSIONS
    if not first <= release < end:
        known = f"from {first[0]}.{first[1]} to below {end[0]}.{end[1]}"
        raise ImportError(f"triton_losses knows transformers {known}, got {version}")


def own_model(model):
    """The model of transformers itself, which a PEFT model contains."""
    inner = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    if not isinstance(inner, transformers.PreTrainedModel):
        raise TypeError(f"model must be a model of transformers, before it is wrapped, got {type(inner).__name__}")
    return inner


class TrainingForward:
    """The forward of one changed model. An object and not a closure, so that the model can be copied and pickled."""

    def __init__(self, model, options):
        self.model = model
        self.options = options  # None: undone
        self.before = vars(model).get("forward")  # a forward of this one object; None: its class's
        names = inspect.signature(self.own_forward()).parameters
        self.positional = [name for name, p in names.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if "labels" not in names:
            raise NotImplementedError(f"{type(model).__name__}.forward must take labels, it takes {list(names)}")
        head_of(model)

    def own_forward(self):
        return self.before or functools.partial(type(self.model).forward, self.model)

    @property
    def __signature__(self):
        """Trainer reads from it which columns of a dataset the model takes."""
        return inspect.signature(self.own_forward())

    @torch.compiler.disable(recursive=False)  # torch.compile begins at what is called here
    def __call__(self, *args, return_logits=False, **kwargs):
        given = dict(zip(self.positional, args)) | kwargs
        options = self.options
        if options is None or not self.model.training or given.get("labels") is None:
            return self.own_forward()(*args, **kwargs)
        if return_logits or asks_for_logits(given.get("logits_to_keep")):
            if options.z_loss or options.label_smoothing:
                raise ValueError(
                    "a training loss with logits is the model's own: it has no z_loss or label_smoothing, got "
                    f"z_loss={options.z_loss} and label_smoothing={options.label_smoothing}"
                )
            return self.own_forward()(*args, **kwargs)
        call = Call(options, type(self.model).__name__)
        hook = head_of(self.model).register_forward_pre_hook(call.give_hidden_states)
        try:
            outputs = forward_with_hook(self.own_forward(), args, kwargs)
        finally:
            hook.remove()
        if not call.losses:
            raise NotImplementedError(
                f"{call.name}'s loss must be cross_entropy of what its output embeddings return; it made another. "
                "undo_linear_cross_entropy gives it back"
            )
        return without_logits(outputs)


def forward_with_hook(forward, args, kwargs):
    """A frame of its own: torch.compile does not look at hooks when it looks up what it has compiled for a frame."""
    return forward(*args, **kwargs)


def asks_for_logits(logits_to_keep):
    return logits_to_keep is not None and (isinstance(logits_to_keep, torch.Tensor) or logits_to_keep != 0)


def head_of(model):
    head = model.get_output_embeddings()
    if head is None:
        raise NotImplementedError(f"{type(model).__name__} must have output embeddings, it has none")
    return head


def without_logits(outputs):
    """The same outputs with None where Logits stood."""
    if type(outputs) is tuple:
        return tuple(None if isinstance(value, Recorded) else value for value in outputs)
    if not dataclasses.is_dataclass(outputs):
        raise NotImplementedError(f"a model must return a tuple or a ModelOutput, got {type(outputs).__name__}")
    names = [field.name for field in dataclasses.fields(outputs) if isinstance(getattr(outputs, field.name), Recorded)]
    return dataclasses.replace(outputs, **dict.fromkeys(names))


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
    autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
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
