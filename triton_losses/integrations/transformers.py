"""The training loss of Hugging Face's language models by ``linear_cross_entropy``, which never makes logits whole.

    use_linear_cross_entropy    changes one model
    undo_linear_cross_entropy   changes it back

The model's own forward runs, with one difference: its head returns `Logits` that are not computed (deferred_logits.py).
Nothing here depends on a model's class.
"""

import dataclasses
import functools
import inspect
import re
from typing import TypeVar

import torch
import transformers

from triton_losses.head_checks import upper_bound
from triton_losses.integrations.deferred_logits import Call, Options, Recorded
from triton_losses.row_formulas import cross_entropy_formula

VERSIONS = (4, 57), (6, 0)  # of transformers: from the first to below the second
PATCH = "_linear_cross_entropy"  # the attribute of a changed model that holds its TrainingForward
Model = TypeVar("Model")


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
