"""Rows and their labels by kernels: long_rows.py or short_rows.py. Images go to label_planes.py.

The forward saves one tensor for the backward, ``state``. It holds six arrays of one number per row: the loss, its
weight, max x, log Σ exp(x - max), mean_log_p and the entropy. The sum of the weights follows them.
"""

from typing import NamedTuple

import torch

from triton_losses.core.compiler import INTERPRET, compute_dtype
from triton_losses.core.device_math import as_scalars
from triton_losses.core.formula import FORMULAS
from triton_losses.core.launch import Launch
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import planned
from triton_losses.core.rows import Pass, counted, empty_with_strides, readable, slots_of
from triton_losses.kernels import label_planes, short_rows
from triton_losses.kernels.elementwise import triton_type
from triton_losses.kernels.finish import finish
from triton_losses.kernels.gradient_in_forward import mean_factor, scale_rows
from triton_losses.kernels.long_rows import rows_launch
from triton_losses.kernels.rows import Kind


class Task(NamedTuple):
    """What a pass does: the fields of Kind of the same names."""

    forward: bool = False
    backward: bool = False
    reduced: bool = True
    mean: bool = False
    entropy: bool = False
    likeliest: bool = False
    ahead: int = 0
    in_turn: bool = False


class RowsPlan(NamedTuple):
    readable: bool  # logits, labels and class weights have the layout that the kernel reads
    wide: torch.dtype
    mean_weight: bool  # whether the kernel needs the mean of the class weights
    launch: Launch | None


@planned
def plan(tensors, problem, task):
    logits, labels, class_weights, upstream, *operands = tensors
    wide, weighted = compute_dtype(logits.dtype), class_weights is not None
    if readable(logits) is not logits or not labels.is_contiguous() or weighted and not class_weights.is_contiguous():
        return RowsPlan(False, wide, False, None)
    formula, (rows, cols) = FORMULAS[problem.formula], logits.shape
    slots, vec = slots_of(formula), 16 // logits.element_size()
    stride = logits.stride(0) if rows > 1 else cols
    state = logits.new_empty(6 * rows + 1, dtype=wide)
    softcap, scale = problem.softcap, problem.scale
    kind = Kind(
        triton_type(wide),
        vec,
        edge=cols % vec != 0 or stride % vec != 0,
        slots=slots,
        weighted=weighted,
        capped=softcap > 0,
        scaled=scale != 1,
        **task._replace(entropy=task.entropy or slots[4] > 0)._asdict(),
    )
    short = short_rows.serves(cols, kind)
    launch = (short_rows.short_rows_launch if short else rows_launch).bind(
        logits=logits,
        labels=labels,
        weights=(class_weights if weighted else logits, state if weighted and slots[2] else logits),
        operands=tuple(operands),
        losses=state if task.reduced or not task.forward else logits.new_empty(rows, dtype=problem.dtype),
        saved=state,
        likeliest=labels.new_empty(rows, dtype=torch.int64) if task.likeliest else labels,
        grad=empty_with_strides(logits) if task.backward else logits,
        upstream=state if upstream is None else upstream,
        rows=rows,
        cols=cols,
        stride=stride,
        upstream_stride=upstream.stride(0) if upstream is not None and upstream.dim() else 0,
        ignore_index=problem.ignore_index,
        scalars=as_scalars(problem.scalars, wide),
        scaling=as_scalars((softcap, scale), wide),
        FORMULA=formula.kernel,
        KIND=kind,
    )
    return RowsPlan(True, wide, weighted and slots[2] > 0, launch)


def prepared(tensors, problem, task, upstream=None, operands=()):
    """The plan; logits and labels in the layout that its kernel reads; the class weights and their mean."""
    logits, labels, class_weights = tensors
    found = plan((*tensors, upstream, *operands), problem, task)
    if not found.readable:
        logits, labels = readable(logits), labels.contiguous()
        class_weights = class_weights if class_weights is None else class_weights.contiguous()
        found = plan((logits, labels, class_weights, upstream, *operands), problem, task)
    if INTERPRET:
        # raises for a label that is no class; on a GPU the kernel asserts
        counted(labels, None, logits.shape[1], problem.ignore_index, torch.float32)
    mean_weight = class_weights.to(found.wide).mean() if found.mean_weight else logits
    return found, logits, labels, (logits if class_weights is None else class_weights, mean_weight)


OF_REDUCED = Task(forward=True, ahead=2)
OF_EACH = Task(forward=True, reduced=False, ahead=2)
BACKWARD = Task(backward=True, ahead=2)
BACKWARD_OF_MEAN = Task(backward=True, mean=True, ahead=2)


def scratch(tensors, problem):
    """Memory for the gradient of rows, if the forward is to make it: the logits' own if they may be overwritten.

    A gradient of float16 would underflow before the backward multiplies it by the factor of a GradScaler.
    """
    logits = tensors[0]
    if logits.dim() == 3 or logits.dtype == torch.float16 or not any(slots_of(FORMULAS[problem.formula])[1:5]):
        return None
    if readable(logits) is not logits:
        return logits.new_empty(logits.shape)
    if not problem.overwrite:
        return empty_with_strides(logits)
    torch.autograd.graph.increment_version(logits)  # then autograd refuses a backward that needs the logits' values
    return logits.detach()


def forward(tensors, problem, grad=None):
    """grad: memory for the gradient of the mean, the sum or each loss, which the same pass then writes."""
    logits = tensors[0]
    if logits.dim() == 3:
        return label_planes.forward(tensors, problem)
    rows, none = logits.shape[0], problem.reduction == "none"
    out = logits.new_empty(rows if none else (), dtype=problem.dtype)
    if shapes_only():
        return [out], [logits.new_empty(6 * rows + 1, dtype=compute_dtype(logits.dtype))]
    task, upstream = OF_EACH if none else OF_REDUCED, None
    if grad is not None:
        task, upstream = task._replace(backward=True, in_turn=True), factor_of_reduction(tensors, problem)
    found, logits, labels, weights = prepared(tensors, problem, task, upstream)
    state = logits.new_empty(6 * rows + 1, dtype=found.wide)
    losses = out if none else state
    gradient = logits if grad is None else grad
    found.launch(
        logits, labels, weights, (), losses, state, labels, gradient, state if upstream is None else upstream, rows
    )
    if not none:
        finish(state, out, rows, weights_at=6, mean=problem.reduction == "mean")
    return [out], [state]


def factor_of_reduction(tensors, problem):
    """What the reduction multiplies each loss by: 1, or for the mean 1 / Σ weights, which depends on labels only."""
    logits, labels, class_weights = tensors
    wide = compute_dtype(logits.dtype)
    if problem.reduction != "mean":
        return torch.ones((), dtype=wide, device=logits.device)
    class_weights = class_weights if class_weights is None else class_weights.contiguous()
    return mean_factor(labels.contiguous(), class_weights, problem.ignore_index, wide)


def backward(tensors, saved, upstream, problem, wanted, grad=None):
    """grad: the gradient that the forward made, still without the upstream one."""
    logits = tensors[0]
    if logits.dim() == 3:
        return label_planes.backward(tensors, saved, upstream, problem)
    if grad is not None:
        scale_rows(grad, upstream[0])
        return [grad]
    if shapes_only():
        return [logits.new_empty(logits.shape)]
    (state,), (dout,) = saved, upstream
    task = BACKWARD_OF_MEAN if problem.reduction == "mean" else BACKWARD
    found, logits, labels, weights = prepared(tensors, problem, task, dout)
    grad = empty_with_strides(logits)
    found.launch(logits, labels, weights, (), state, state, labels, grad, dout, logits.shape[0])
    return [grad]


def walk(tensors, problem, task):
    """Run one Pass. The rows of the logits must not need a copy."""
    saved, forward, entropy, likeliest, grad, upstream, operands, _ = task
    kind = Task(forward, grad is not None, True, False, entropy, likeliest is not None)
    found, logits, labels, weights = prepared(tensors, problem, kind, upstream, operands)
    rows = logits.shape[0]
    losses = saved.new_empty(2, rows) if forward else saved
    found.launch(
        logits,
        labels,
        weights,
        tuple(operands),
        losses,
        saved,
        labels if likeliest is None else likeliest,
        logits if grad is None else grad,
        saved if upstream is None else upstream,
        rows,
    )
    return losses.unbind(0) if forward else (None, None)


def statistics_forward(tensors, problem):
    logits, labels = tensors
    saved = logits.new_empty(4, logits.shape[0], dtype=compute_dtype(logits.dtype))
    if shapes_only():
        return [torch.empty_like(saved[0]), torch.empty_like(saved[0])], [saved]
    log_p, _ = walk((*tensors, None), problem, Pass(saved, forward=True))
    return [log_p.clone(), torch.where(labels != problem.ignore_index, saved[3], 0)], [saved]


def statistics_backward(tensors, saved, upstream, problem, wanted):
    logits = tensors[0]
    if shapes_only():
        return [logits.new_empty(logits.shape)]
    logits = readable(logits)
    grad = empty_with_strides(logits)
    task = Pass(saved[0], grad=grad, upstream=torch.ones_like(upstream[0]), operands=upstream)
    walk((logits, tensors[1], None), problem._replace(formula="along"), task)
    return [grad]
