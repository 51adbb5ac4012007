"""Reductions of losses (none, sum, mean) with torch's names and its older flags, and the dtypes of the results."""

import functools
import numbers

import torch

from triton_losses.core.collectives import name_of, reduce_with_grad, size_of

REDUCTIONS = ("none", "mean", "sum")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def reduction_of(reduction, size_average=None, reduce=None, more=()):
    """The reduction's name; `size_average` and `reduce` override it, as in torch. more: other names a loss accepts."""
    if size_average is not None or reduce is not None:
        return torch.nn._reduction.legacy_get_string(size_average, reduce)
    if reduction not in (*REDUCTIONS, *more):
        raise ValueError(f"{reduction} is not a valid value for reduction: it must be one of {(*REDUCTIONS, *more)}")
    return reduction


def under_autocast(x):
    """Whether autocast is on for x's device; torch raises an error if asked that of the device "meta"."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def result_dtype(x, dtype=None):
    """The dtype of a loss, as in torch: that of the operands, but at least float32 under autocast."""
    dtype = dtype or x.dtype
    if dtype not in DTYPES:
        raise NotImplementedError(f"a loss takes float64, float32, bfloat16 or float16 tensors, got {dtype}")
    return torch.float32 if dtype.itemsize < 4 and under_autocast(x) else dtype


def cast(x, dtype):
    """x in this dtype; no operation at all if it already has it.

    `x.to(x.dtype)` returns x itself. If an autograd.Function's forward returns that, a graph compiled by torch 2.11
    silently loses the gradient; tests/test_compile.py checks the gradient of every compiled loss.
    """
    return x if x.dtype == dtype else x.to(dtype)


def promoted(a, b):
    """The dtype in which torch computes a loss of two tensors; a 0-dim tensor does not widen one with dimensions."""
    dtype = a.dtype
    if b.dtype != dtype:
        dtypes = [v.dtype for v in (a, b) if v.dim() > 0 or a.dim() == b.dim() == 0]
        dtype = functools.reduce(torch.promote_types, dtypes)  # torch.result_type would break torch.compile's graph
        if not dtype.is_floating_point:  # a floating scalar does widen integers
            dtype = torch.promote_types(a.dtype, b.dtype)
    if not dtype.is_floating_point:
        raise NotImplementedError(f"a loss takes floating-point tensors, got {a.dtype} and {b.dtype}")
    return dtype


def given(tensors):
    """The tensors that are not None."""
    return [t for t in tensors if t is not None]


def widest(tensors):
    """The type that a loss of these tensors is computed in."""
    for t in tensors:
        if t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def divisor_of(x, reduction):
    return x.numel() if reduction == "mean" else 1


def reduced(losses, reduction, dtype):
    if reduction != "none":
        losses = losses.mean() if reduction == "mean" else losses.sum()
    return cast(losses, dtype)


def check_divisor(reduction, num_items, process_group):
    """Check the two options that replace the divisor of a mean."""
    if num_items is not None and process_group is not None:
        raise ValueError("num_items and process_group both say what a mean divides by: give one of them")
    if reduction != "mean" and not (num_items is None and process_group is None):
        given = "num_items" if process_group is None else "process_group"
        raise ValueError(f"{given} is for reduction='mean', got reduction={reduction!r}")


def mean_of(total, weight, num_items=None, process_group=None):
    """total / weight; nan if no row counts, with gradients of 0 and not 0 · inf.

    num_items: divide by it instead. process_group: divide by the mean of the weights of all processes of the group, so
    that the mean of all their results is that of all their rows.
    """
    if isinstance(num_items, numbers.Number):
        return total / num_items
    if num_items is not None:
        weight = num_items
    if process_group is not None:
        name = name_of(process_group)
        weight = reduce_with_grad(weight, name) / size_of(name)
    if not isinstance(weight, torch.Tensor):  # a number, or a size of an exported graph
        if weight:
            return total / weight
        weight = total.new_zeros(())
    nothing = weight == 0
    return torch.where(nothing, (total / weight).detach(), total / torch.where(nothing, 1, weight))
