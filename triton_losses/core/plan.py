"""Plans: what the calls of one kind share is found at the first of them, and remembered.

Which configuration a kernel runs with, its compiled form, its constants and strides depend on neither the values nor
the addresses of the tensors, nor on how many rows there are. A reading finds them in a function that is marked
``planned``.
"""

import functools

import torch

MOST = 4096  # plans of one function; a program with more kinds of calls than that finds them anew

found: list[dict] = []  # the plans of every such function


def kind_of(tensor):
    """What a plan may depend on: everything but the values, the address, and how many rows there are beyond none and
    one.
    """
    shape = tensor.shape
    return tensor.dtype, shape[1:], min(shape[0], 2) if shape else None, tensor.stride(), tensor.data_ptr() % 16 == 0


def flat_kind_of(tensor):
    """The same, for a reading that sees a tensor as numbers in a row."""
    return tensor.dtype, tensor.data_ptr() % 16 == 0


def planned(make=None, *, kind=kind_of):
    """Remember what ``make(tensors, *options)`` returns, by the kinds of the tensors and the options, which are
    hashable.

    tensors: some may be None. A plan with a launch that is not settled is for this call only.
    """
    if make is None:
        return functools.partial(planned, kind=kind)
    plans = {}
    found.append(plans)

    @functools.wraps(make)
    def find(tensors, *options):
        key = (
            options,
            tensors[0].device,
            torch.are_deterministic_algorithms_enabled(),
            *[None if tensor is None else kind(tensor) for tensor in tensors],
        )
        plan = plans.get(key)
        if plan is None:
            plan = make(tensors, *options)
            if all(getattr(part, "settled", True) for part in (plan if isinstance(plan, tuple) else (plan,))):
                if len(plans) >= MOST:
                    plans.clear()
                plans[key] = plan
        return plan

    return find


def forget():
    """Find all plans anew: the choice of configurations has changed."""
    for plans in found:
        plans.clear()
