"""Plans: what all calls of one kind share is computed at the first of them, and cached.

A kernel's configuration, compiled code, constants and strides depend neither on the values or addresses of the tensors
nor on the number of rows. A reading computes them in a function that is decorated with ``planned``.
"""

import functools

import torch

MOST = 4096  # plans of one function; when there are more kinds of calls, its cache is cleared

found: list[dict] = []  # the caches of all planned functions


def kinds_of(tensors):
    """What a plan may depend on: everything but the values, the addresses and the number of rows.

    It may depend on whether an address is a multiple of 16, and whether there are 0, 1 or more rows.
    """
    return [
        None
        if t is None
        else (t.dtype, (shape := t.shape)[1:], min(shape[0], 2) if shape else None, t.stride(), t.data_ptr() % 16 == 0)
        for t in tensors
    ]


def flat_kinds_of(tensors):
    """The same, for a reading that treats tensors as one-dimensional."""
    return [None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors]


def planned(make=None, *, kinds=kinds_of):
    """Cache what ``make(tensors, *options)`` returns, by the kinds of the tensors and the hashable options.

    tensors: some may be None. A plan with a launch that is not settled (`Tuned.choice`) is used only for this call.
    """
    if make is None:
        return functools.partial(planned, kinds=kinds)
    plans = {}
    found.append(plans)

    @functools.wraps(make)
    def find(tensors, *options):
        key = (
            options,
            tensors[0].device,
            torch.are_deterministic_algorithms_enabled(),
            *kinds(tensors),
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
    """Clear all cached plans, because the choice of configurations has changed."""
    for plans in found:
        plans.clear()
