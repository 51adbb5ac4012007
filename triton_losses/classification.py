"""Multi-class losses: a row of logits, or of log-probabilities, and the index of the right class."""

import numbers
from typing import Any

import torch
from torch import Tensor

from triton_losses.core.collectives import Group
from triton_losses.core.compiler import compute_dtype, runs_kernels
from triton_losses.core.dispatch import aten_gathers, aten_serves
from triton_losses.core.dtensors import Roles, has_dtensors, over_mesh
from triton_losses.core.reduction import DTYPES, check_divisor, mean_of, promoted, reduced, reduction_of, result_dtype
from triton_losses.families.distribution_rows import distribution_rows
from triton_losses.families.label_rows import label_rows
from triton_losses.families.sharded_rows import shard_of, sharded_rows
from triton_losses.row_formulas import (
    check_shape_of_logits,
    cross_entropy_formula,
    negative_log_likelihood,
    of_probabilities,
    softmax_focal_formula,
)


def check_types(input, target, ignore_index):
    for name, value in (("input", input), ("target", target)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a Tensor, got {value!r}")
    if not isinstance(ignore_index, numbers.Integral):  # includes NumPy's integers
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")


def check_logits(input):
    if input.dtype not in DTYPES:
        raise NotImplementedError(f"input must be one of {DTYPES}, got {input.dtype}")
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, of classes: got a scalar")


def check_overwrite(input):
    """Raise an error if a gradient must not replace the input's values: the caller's own parameters."""
    base = input._base if input._is_view() else input
    if base.is_leaf and base.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "overwrite=True replaces the input by its gradient, so the input must be the result of an operation, "
            f"got a leaf that requires grad, or a view of one, of shape {tuple(input.shape)}"
        )


def check_labels(input, target, weight):
    """torch's rules for (C), (N, C) and (N, C, d1, ...) with class indices, and torch's exception types."""
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"expected target dtype to be Long or Byte, but got {target.dtype}")
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(
                "expected all tensors to be on the same device, "
                f"but input is on {input.device}, {name} on {tensor.device}"
            )
    if input.dim() == 1:
        if target.dim() > 1:
            raise RuntimeError(f"0D or 1D target expected for 1D input, but got target size: {tuple(target.shape)}")
        if target.numel() != 1:
            raise ValueError(f"For 1D input, 1D target must have size 1, but got target size: {tuple(target.shape)}")
    elif target.dim() == 0 or target.shape[0] != input.shape[0]:
        got = target.shape[0] if target.dim() else "none, a scalar"
        raise ValueError(f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({got}).")
    elif target.shape[1:] != input.shape[2:]:
        wanted = (input.shape[0], *input.shape[2:])
        raise RuntimeError(
            f"Expected target size {list(wanted)}, got {list(target.shape)} for input of size {list(input.shape)}"
        )
    classes = input.shape[min(input.dim() - 1, 1)]
    if weight is not None:
        if weight.shape != (classes,) or not weight.is_floating_point():
            raise RuntimeError(
                f"weight must be floating-point of shape ({classes},), got {weight.dtype} {tuple(weight.shape)}"
            )
        if weight.requires_grad:
            raise RuntimeError("the loss is not differentiable with respect to weight: it must not require grad")


def check_probabilities(input, target, weight, ignore_index):
    """torch's rules for class probabilities, and torch's exception types."""
    if not target.is_floating_point():
        raise RuntimeError(f"Expected floating point type for target with class probabilities, got {target.dtype}")
    if target.shape != input.shape:
        kind = ValueError if input.dim() > 1 and target.shape[:1] != input.shape[:1] else RuntimeError
        raise kind(f"class probabilities must have the input's shape, {tuple(input.shape)}, got {tuple(target.shape)}")
    if ignore_index >= 0:
        raise RuntimeError(
            f"ignore_index is not supported for class probabilities: it must be negative, got {ignore_index}"
        )
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(
                "expected all tensors to be on the same device, "
                f"but input is on {input.device}, {name} on {tensor.device}"
            )
    classes = input.shape[min(input.dim() - 1, 1)]
    if weight is not None and weight.shape != (classes,):
        raise RuntimeError(f"weight must have shape ({classes},), one for each class, got {list(weight.shape)}")


def by_rows(formula, input, target, weight, out_dtype=None, **options):
    """label_rows over (C), (N, C) or (N, C, d1, ...): classes are the second dimension if there are two or more.

    An image is read in rows if its classes have stride 1 (channels_last), otherwise in planes.
    """
    check_logits(input)
    check_labels(input, target, weight)
    labels = target if target.dim() == 1 else target.reshape(-1)
    if input.dim() == 1:
        logits = input[None]
    elif input.dim() == 2:
        logits = input
    elif input.stride(1) == 1:
        logits = input.movedim(1, -1).reshape(-1, input.shape[1])
    else:
        logits, labels = input.flatten(2), target.flatten(1)
    losses = label_rows(formula, logits, labels, weight, out_dtype, **options)
    if options["reduction"] != "none":
        return losses
    # an unbatched input has a loss without dimensions, though the target may have size 1
    return losses.view(target.shape if input.dim() > 1 else ())


def by_shards(formula, scalars, input, target, weight, group, vocab_start, **options):
    """Losses and weights of rows (N, C) or (C) whose classes are spread over the processes of the group."""
    check_logits(input)
    if target.dtype not in (torch.int64, torch.uint8):
        raise NotImplementedError(f"group: target must hold class indices, int64 or uint8, got {target.dtype}")
    if input.dim() > 2 or target.shape != input.shape[:-1]:
        found = f"{tuple(input.shape)} and {tuple(target.shape)}"
        raise NotImplementedError(f"group: input and target must be (N, C) and (N), or (C) and (), got {found}")
    if weight is not None and weight.requires_grad:
        raise RuntimeError("the loss is not differentiable with respect to weight: it must not require grad")
    shard = shard_of(group, vocab_start, input.shape[-1])
    logits = input if input.dim() == 2 else input[None]  # a shard without classes cannot be reshaped
    rows = logits, None, None, target.reshape(-1).long(), weight
    found = sharded_rows(formula, rows, shard, scalars, **options)
    return found.losses, found.weights


def weight_of(input, target, weight, ignore_index):
    """The sum of the rows' weights, by which a mean divides."""
    wide = compute_dtype(input.dtype)
    if target.is_floating_point():
        return input.new_full((), input.numel() // input.shape[min(input.dim() - 1, 1)], dtype=wide)
    labels = target.long()
    kept = labels != ignore_index
    if weight is None:
        return kept.sum().to(wide)
    return torch.where(kept, weight.to(wide)[torch.where(kept, labels, 0)], 0).sum()


IN_CLASSES = Roles(logits=("input",), rows=("target",), shared=("weight",), images=True)


def weight_of_call(given):
    """The sum of the rows' weights of these arguments of cross_entropy."""
    return weight_of(given["input"], given["target"], given.get("weight"), given["ignore_index"])


def by_aten(name, input, target, weight, **options):
    """Call torch's function of that name, on a CPU, after our own checks, which raise our errors."""
    check_logits(input)
    check_labels(input, target, weight)
    weight = weight if weight is None else weight.to(input.dtype)
    input, target = input.contiguous(), target.long()  # nll_loss' backward needs this, and images refuse uint8
    return getattr(torch.nn.functional, name)(input, target, weight, **options)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``-w_t x_t``: negative log likelihood, of log-probabilities x.

    input: (C), (N, C) or (N, C, d1, ...), floating. target: class indices, int64 or uint8, the input's shape without C;
    those equal to ignore_index cost nothing, others outside [0, C) raise IndexError (a device assertion on a GPU).
    weight: (C,). reduction: "mean" divides by the sum of the targets' weights (nan when all are ignored), "sum",
    "none"; size_average and reduce are torch's older spelling of it. As ``torch.nn.functional.nll_loss``.

    >>> nll_loss(torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.tensor([0, 1]))
    tensor(2.5000)
    """
    reduction = reduction_of(reduction, size_average, reduce)
    check_types(input, target, ignore_index)
    # this loss is a gather, for which no code here is faster than ATen's loop, unless there are many rows on a GPU
    if input.device.type == "cpu" and not runs_kernels(input) or aten_gathers(input):
        return by_aten("nll_loss", input, target, weight, ignore_index=ignore_index, reduction=reduction)
    return by_rows(negative_log_likelihood, input, target, weight, ignore_index=int(ignore_index), reduction=reduction)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    out_dtype: torch.dtype | None = None,
    gradient_in_forward: bool = False,
    overwrite: bool = False,
    num_items: float | Tensor | None = None,
    process_group: Group | None = None,
    group: Group | None = None,
    vocab_start: int | None = None,
) -> Tensor:
    """``-(1-ε) w_t log p_t - ε/C Σ_j w_j log p_j + z lse²``, ``p = softmax(x)``: cross entropy, smoothed by ε, with a
    z-loss.

    input: logits, (C), (N, C) or (N, C, d1, ...), floating. target: class indices, int64 or uint8, the input's shape
    without C; those equal to ignore_index cost nothing, others outside [0, C) raise IndexError (a device assertion on a
    GPU). Or class probabilities: floating, of the input's shape. weight: (C,). reduction: "mean" divides by the sum of
    the targets' weights (nan when all are ignored), "sum", "none"; size_average and reduce are torch's older spelling
    of it. label_smoothing: ε in [0, 1], else RuntimeError. z_loss: factor of the squared log-sum-exp that keeps logits
    from drifting (PaLM, arXiv:2204.02311), >= 0, else ValueError. softcap: s > 0 makes x of the logits by ``s
    tanh(logit / s)`` (Gemma 2, arXiv:2408.00118), 0 leaves them; temperature: T > 0, x is then divided by it; else
    ValueError. out_dtype: of the result; torch.float32 keeps what bfloat16 would round away. As
    ``torch.nn.functional.cross_entropy``.

    gradient_in_forward: on a GPU, logits (N, C) are read once instead of twice, and the forward also makes their
    gradient. If the upstream gradient is not 1, as with a GradScaler or a factor after the loss, backward reads, scales
    and rounds it once more, and nothing is gained. No effect in float16, where small gradients would become 0.
    overwrite: the gradient also takes the place of the logits, whose values are lost, and needs no memory. Only the
    last use of logits may set it. RuntimeError for logits that are a leaf, for a second backward and for create_graph,
    and from autograd if another operation has saved the logits.

    Many processes (torch.distributed). num_items: what the mean divides by instead, a number or a tensor of one, such
    as the tokens of all processes or of all accumulated batches. process_group: the mean divides by the mean weight of
    its processes, so that averaging results and gradients over them, as DDP and FSDP do, gives the mean over all rows.
    group: each of its processes holds the logits (N, its classes) of consecutive classes, in the order of the ranks,
    and all have the same target, weight and result (vocabulary-parallel). vocab_start: the first class held; None: all
    hold as many. One all-gather of three numbers per row, in the forward. ValueError if classes overlap or lack,
    NotImplementedError for second derivatives.

    Label smoothing: arXiv:1512.00567.

    >>> cross_entropy(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    tensor(1.1269)
    """
    reduction = reduction_of(reduction, size_average, reduce)
    if has_dtensors(input, target):
        given: dict[str, Any] = {"input": input, "target": target, "weight": weight, "ignore_index": ignore_index}
        given |= {"reduction": reduction, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
        given |= {"temperature": temperature, "out_dtype": out_dtype, "num_items": num_items}
        given |= {"process_group": process_group, "group": group, "vocab_start": vocab_start}
        return over_mesh(cross_entropy, IN_CLASSES, weight_of_call, given)
    check_types(input, target, ignore_index)
    formula, scalars = cross_entropy_formula(label_smoothing, z_loss)
    check_shape_of_logits(temperature, softcap)
    if overwrite and not torch.compiler.is_compiling():
        check_overwrite(input)
    if out_dtype not in (None, *DTYPES):
        raise TypeError(f"out_dtype must be one of {DTYPES}, got {out_dtype!r}")
    check_divisor(reduction, num_items, process_group)
    options: dict[str, Any]
    if group is not None:
        options = {"ignore_index": int(ignore_index), "softcap": float(softcap), "scale": 1.0 / temperature}
        losses, weights = by_shards(formula, scalars, input, target, weight, group, vocab_start, **options)
        dtype = out_dtype or result_dtype(input)
        if reduction == "mean":
            return mean_of(losses.sum(), weights.sum(), num_items, process_group).to(dtype)
        return reduced(losses, reduction, dtype).view(() if reduction == "sum" else target.shape)
    if num_items is not None or process_group is not None:
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
        options |= {"softcap": softcap, "temperature": temperature, "reduction": "sum"}
        options |= {"gradient_in_forward": gradient_in_forward, "overwrite": overwrite}
        total = cross_entropy(input, target, weight, **options, out_dtype=compute_dtype(input.dtype))
        items = weight_of(input, target, weight, ignore_index)
        return mean_of(total, items, num_items, process_group).to(out_dtype or result_dtype(input))
    if target.is_floating_point() or target.shape == input.shape:
        check_logits(input)
        check_probabilities(input, target, weight, ignore_index)
        options = {"z_loss": float(z_loss), "scale": 1.0 / temperature, "reduction": reduction}
        return probability_cross_entropy(input, target, weight, label_smoothing, softcap, out_dtype, **options)
    if aten_serves(input) and not (z_loss or softcap) and temperature == 1:
        loss = by_aten(
            "cross_entropy",
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        return loss if out_dtype is None else loss.to(out_dtype)
    return by_rows(
        formula,
        input,
        target,
        weight,
        out_dtype,
        scalars=scalars,
        ignore_index=int(ignore_index),
        softcap=float(softcap),
        scale=1.0 / temperature,
        reduction=reduction,
        gradient_in_forward=gradient_in_forward or overwrite,
        overwrite=overwrite,
    )


def probability_cross_entropy(input, target, weight, label_smoothing, softcap, out_dtype, **options):
    """Cross entropy against class probabilities, which need not sum to 1; the mean divides by the number of rows."""
    classes = input.shape[min(input.dim() - 1, 1)]
    if input.dim() == 1:
        q, p = input[None], target[None]
    elif input.dim() == 2:
        q, p = input, target
    else:
        q, p = (x.movedim(1, -1).flatten(0, -2) for x in (input, target))
    dtype = promoted(input, target)
    if weight is not None and weight.is_floating_point():
        dtype = torch.promote_types(dtype, weight.dtype)
    result = out_dtype or result_dtype(input, dtype)
    if softcap:
        q = softcap * torch.tanh(q.to(compute_dtype(q.dtype)) / softcap)
    formula, scalars = of_probabilities(label_smoothing, classes)
    losses = distribution_rows(
        formula,
        p,
        q,
        weight,
        out_dtype=result,
        scalars=scalars,
        given=True,
        one_read=True,
        **options,
    )
    reduction = options["reduction"]
    if reduction == "none":
        return losses.view(input.shape[:1] + input.shape[2:] if input.dim() > 1 else ())
    # torch divides the number of elements by that of classes: without classes the mean is 0 / 0
    return losses if classes or reduction == "sum" else losses * float("nan")


def focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    gamma: float = 2.0,
    alpha: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    gradient_in_forward: bool = False,
    overwrite: bool = False,
    num_items: float | Tensor | None = None,
    process_group: Group | None = None,
) -> Tensor:
    """``-α w_t (1 - p_t)^γ log p_t``, ``p = softmax(x)``: cross entropy that weighs down rows it already gets right.

    input: logits, (C), (N, C) or (N, C, d1, ...), floating. target: class indices, int64 or uint8, the input's shape
    without C; those equal to ignore_index cost nothing, others outside [0, C) raise IndexError (a device assertion on a
    GPU). weight: (C,), α per class. gamma: >= 0, else ValueError; at 0, with alpha 1, this is ``cross_entropy``. alpha:
    a factor of every row, None for 1. reduction: "mean" divides by the sum of the targets' weights (nan when all are
    ignored), "sum", "none". gradient_in_forward, overwrite, num_items, process_group: as in ``cross_entropy``. Lin et
    al. 2017, arXiv:1708.02002.

    >>> focal_loss(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    tensor(0.8259)
    """
    check_types(input, target, ignore_index)
    if not gamma >= 0:
        raise ValueError(f"gamma must be >= 0, got {gamma}")
    if overwrite and not torch.compiler.is_compiling():
        check_overwrite(input)
    reduction = reduction_of(reduction)
    check_divisor(reduction, num_items, process_group)
    if num_items is not None or process_group is not None:
        more: dict[str, Any] = {"gradient_in_forward": gradient_in_forward, "overwrite": overwrite}
        total = focal_loss(input, target, weight, gamma, alpha, ignore_index, "sum", **more)
        items = weight_of(input, target, weight, ignore_index)
        return mean_of(total.to(items.dtype), items, num_items, process_group).to(total.dtype)
    formula, scalars = softmax_focal_formula(float(gamma), 1.0 if alpha is None else float(alpha))
    return by_rows(
        formula,
        input,
        target,
        weight,
        scalars=scalars,
        ignore_index=int(ignore_index),
        reduction=reduction,
        gradient_in_forward=gradient_in_forward or overwrite,
        overwrite=overwrite,
    )
