"""Losses of DTensors: which part of the rows and classes each process has, and what that makes of the result.

A mesh dimension may shard rows (any dimension of the batch), or classes (the last dimension of logits, the first of a
head's weight), or neither. A loss is called on each process with its local tensors: with ``group`` where the classes
are sharded, and with ``num_items``, the weight of all processes' rows, where the rows are and the loss is a mean.

    results per row   placed as the rows are; replicated where the classes are sharded
    sum, mean         Partial where the rows are sharded, else replicated
    gradients         placed as the input; of what all rows share, Partial where the rows are sharded
"""

import functools
import inspect
from typing import Any, NamedTuple

import torch

from triton_losses.core.collectives import name_of, reduce_with_grad
from triton_losses.core.op import GIVEN


class Roles(NamedTuple):
    """The names of a loss's tensors, by what their dimensions are. The first one says where the rows are."""

    hidden: tuple[str, ...] = ()  # (rows..., features)
    logits: tuple[str, ...] = ()  # (rows..., classes), or (N, C, d1, ...) if `images`
    rows: tuple[str, ...] = ()  # (rows...)
    heads: tuple[str, ...] = ()  # (classes, ...)
    shared: tuple[str, ...] = ()  # the same on every process
    images: bool = False

    def all(self):
        return *self.hidden, *self.logits, *self.rows, *self.heads, *self.shared


def has_dtensors(*tensors):
    """Whether any of them is a DTensor."""
    for tensor in tensors:
        if type(tensor) not in GIVEN and isinstance(tensor, torch.Tensor):
            from torch.distributed.tensor import DTensor  # takes long, and who has no DTensors needs none

            if isinstance(tensor, DTensor):
                return True
    return False


def for_dtensors(weight_of, **roles):
    """Decorates a loss, so that it takes DTensors too. weight_of: what a mean divides by, from the same arguments."""

    def decorate(loss):
        names, own = list(inspect.signature(loss).parameters), Roles(**roles)

        @functools.wraps(loss)
        def call(*args, **named):
            if not has_dtensors(*args, *named.values()):
                return loss(*args, **named)
            return over_mesh(loss, own, weight_of, {**dict(zip(names, args)), **named})

        return call

    return decorate


def placed(name, tensor, mesh, sharded):
    """The tensor's placements; sharded: the dimensions that may be sharded. A Partial one will be summed up."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(tensor, DTensor):
        raise TypeError(
            f"some of the loss's tensors are DTensors, but {name} is not: say where it lies with "
            "DTensor.from_local or distribute_tensor"
        )
    if tensor.device_mesh != mesh:
        raise ValueError(f"the loss's DTensors must have one mesh: {name} is on {tensor.device_mesh}, others on {mesh}")
    found = []
    for placement in tensor.placements:
        shards = type(placement) is Shard
        if not (shards or placement.is_replicate() or placement.is_partial()):
            raise NotImplementedError(f"{name} must be Shard, Replicate or Partial on each mesh dimension: {placement}")
        dim = placement.dim % tensor.dim() if shards else None
        if shards and dim not in sharded:
            raise NotImplementedError(
                f"{name} of shape {tuple(tensor.shape)} must not be sharded along its dimension {dim}: {placement}"
            )
        found.append(dim if shards else None)
    return found


class Layout(NamedTuple):
    """Where rows and classes lie on the mesh."""

    mesh: Any
    vocab: int | None  # the mesh dimension that shards the classes
    along: tuple[int | None, ...]  # for each mesh dimension, the dimension of the first tensor that it shards into rows
    class_dim: int  # the first tensor's dimension that is no dimension of rows
    shape: tuple[int, ...]  # of the rows

    def of_rows(self, classes_too=True):
        """Placements of a tensor of rows; classes_too: whether it has the first tensor's class dimension."""
        from torch.distributed.tensor import Replicate, Shard

        shift = [None if d is None else d - (d > self.class_dim and not classes_too) for d in self.along]
        return [Replicate() if d is None else Shard(d) for d in shift]

    def with_classes(self, placements, dim):
        """These placements, but sharded along the tensor's dimension of classes where the classes are sharded."""
        from torch.distributed.tensor import Shard

        return [Shard(dim) if i == self.vocab else placement for i, placement in enumerate(placements)]

    def everywhere(self):
        from torch.distributed.tensor import Replicate

        return [Replicate()] * self.mesh.ndim

    def summed(self):
        """Of what each process has a part of, from its rows."""
        from torch.distributed.tensor import Partial, Replicate

        return [Replicate() if d is None else Partial() for d in self.along]


def layout_of(roles, given, names):
    from torch.distributed.tensor import DTensor

    leader = (roles.hidden or roles.logits)[0]
    first = given[leader]
    mesh = next(given[name] for name in names if isinstance(given[name], DTensor)).device_mesh
    class_dim = min(1, first.dim() - 1) if roles.images else first.dim() - 1
    of_rows = [d for d in range(first.dim()) if d != class_dim]
    sharded: Any = {name: [*of_rows, class_dim] for name in roles.logits}
    sharded |= {name: of_rows for name in roles.hidden} | {name: range(first.dim() - 1) for name in roles.rows}
    sharded |= {name: (0,) for name in roles.heads} | {name: () for name in roles.shared}
    places = {name: placed(name, given[name], mesh, sharded[name]) for name in names}
    of_classes = dict.fromkeys(roles.logits, class_dim) | dict.fromkeys(roles.heads, 0)
    vocab = {i for name in of_classes for i, d in enumerate(places.get(name, ())) if d == of_classes[name]}
    if len(vocab) > 1:
        raise NotImplementedError(f"the classes may be sharded along one mesh dimension, got {sorted(vocab)} of {mesh}")
    if vocab and roles.images and first.dim() > 2:
        raise NotImplementedError(f"images of shape {tuple(first.shape)} must not be sharded along their classes")
    along = tuple(None if i in vocab else d for i, d in enumerate(places[leader]))
    if given.get("shift") and first.dim() - 2 in along:
        raise NotImplementedError("shift=True needs whole sequences: their dimension must not be sharded")
    shape = tuple(first.shape[d] for d in of_rows)
    return Layout(mesh, vocab.pop() if vocab else None, along, class_dim, shape)


def local_tensors(roles, given, names, layout):
    """Each process' tensors, placed as the loss needs them; their gradients are placed back as they came."""
    rows, labels = layout.of_rows(), layout.of_rows(classes_too=False)
    places = dict.fromkeys(roles.logits, (layout.with_classes(rows, layout.class_dim),) * 2)
    places |= dict.fromkeys(roles.hidden, (rows, rows)) | dict.fromkeys(roles.rows, (labels, labels))
    heads = [layout.with_classes(own, 0) for own in (layout.everywhere(), layout.summed())]
    places |= dict.fromkeys(roles.heads, heads) | dict.fromkeys(roles.shared, (layout.everywhere(), layout.summed()))
    found = {}
    for name in names:
        place, of_gradient = places[name]
        found[name] = given[name].redistribute(layout.mesh, place).to_local(grad_placements=of_gradient)
    return found


def over_mesh(loss, roles, weight_of, given):
    """The loss of DTensors, as DTensors. given: its arguments by name."""
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("group", "process_group", "vocab_start"):
        if name in given:
            raise ValueError(f"{name} is for tensors of one process: DTensors say themselves where their parts are")
    names = [name for name in roles.all() if name in given]
    layout = layout_of(roles, given, names)
    mesh, parameters = layout.mesh, parameters_of(loss)
    local = given | local_tensors(roles, given, names, layout)
    if layout.vocab is not None:
        local["group"] = mesh.get_group(layout.vocab)
        if "vocab_start" in parameters:
            whole = given[(*[n for n in roles.heads if n in given], *roles.logits)[0]]
            classes = whole.shape[0 if roles.heads else layout.class_dim]
            of_each = -(-classes // mesh.size(layout.vocab))
            local["vocab_start"] = min(classes, mesh.get_local_rank(layout.vocab) * of_each)
    if "reduction" in parameters and given.get("reduction", "mean") == "mean" and "num_items" not in given:
        weight = weight_of(local)
        for i, d in enumerate(layout.along):
            if d is not None:
                weight = reduce_with_grad(weight, name_of(mesh.get_group(i)))
        local["num_items"] = weight
    each = "reduction" not in parameters or given.get("reduction") == "none"
    return distributed(loss(**local), layout, each)


def distributed(found, layout, each):
    """A loss's results as DTensors. each: whether they have one value per row; others of a tuple always have."""
    from torch.distributed.tensor import DTensor

    if isinstance(found, tuple):
        parts = [distributed(part, layout, each or i > 0) for i, part in enumerate(found)]
        return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)
    if not each:
        return DTensor.from_local(found, layout.mesh, layout.summed(), run_check=False)
    strides = torch.empty(layout.shape, device="meta").stride()
    rows = layout.of_rows(classes_too=False)
    return DTensor.from_local(found, layout.mesh, rows, run_check=False, shape=torch.Size(layout.shape), stride=strides)


@functools.cache
def parameters_of(loss):
    return frozenset(inspect.signature(loss).parameters)
