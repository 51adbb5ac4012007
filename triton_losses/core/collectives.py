"""Collectives: what the processes of a group exchange, as operations that torch.compile can put into its graph.

Each takes the name of a group, a string, which a graph and an op can hold. `name_of` gives a ProcessGroup's name; all
processes of the group must call a collective, in the same order, with tensors of the same shape.

    all_gather, all_reduce, reduce_scatter, exchange    without gradient
    gather_with_grad, reduce_with_grad                  differentiable: the backward is a collective too
"""

from typing import Any, TypeAlias

import torch
import torch.distributed as dist

OPS = torch.ops._c10d_functional
Group: TypeAlias = Any  # a torch.distributed.ProcessGroup, which a torch without torch.distributed does not have


def name_of(group):
    """The group's name. An error says what is missing if there are no processes to talk to."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("a process group needs torch.distributed.init_process_group, which has not been called")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"a group must be a torch.distributed.ProcessGroup, got {group!r}")
    return str(group.group_name)


def size_of(name):
    """How many processes the group has."""
    return dist.distributed_c10d._get_group_size_by_name(name)


def rank_in(group):
    """This process' number in the group."""
    return dist.get_rank(group)


def all_gather(x, name):
    """(processes, *x.shape): the tensors of all processes of the group, in the order of their ranks."""
    size = size_of(name)
    found = OPS.wait_tensor(OPS.all_gather_into_tensor(x.reshape(1, *x.shape).contiguous(), size, name))
    return found.view(size, *x.shape)


def all_reduce(x, name):
    """The sum over all processes of the group."""
    return OPS.wait_tensor(OPS.all_reduce(x.contiguous(), "sum", name))


def reduce_scatter(x, name):
    """Of x (processes, ...) this process' part of the sum over all processes: (...)."""
    return OPS.wait_tensor(OPS.reduce_scatter_tensor(x.contiguous(), "sum", size_of(name), name))[0]


def exchange(x, name, rank, by):
    """The tensor of the process that is ``by`` ranks before this one, in a ring. rank: this process'."""
    size = size_of(name)
    sent, received = [0] * size, [0] * size
    sent[(rank + by) % size] = received[(rank - by) % size] = 1
    found = OPS.all_to_all_single(x.reshape(1, *x.shape).contiguous(), received, sent, name)
    return OPS.wait_tensor(found).view(x.shape)


class GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, name):
        ctx.name = name
        return all_gather(x, name)

    @staticmethod
    def backward(ctx, dout):
        return reduce_scatter(dout, ctx.name), None


class ReduceWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, name):
        ctx.name = name
        return all_reduce(x, name)

    @staticmethod
    def backward(ctx, dout):
        return all_reduce(dout, ctx.name), None


def gather_with_grad(x, name):
    """all_gather whose gradient is the sum of what all processes' results say of this process' x."""
    return GatherWithGrad.apply(x, name)


def reduce_with_grad(x, name):
    """all_reduce whose gradient is summed too: then a loss of x on every process counts as many times as there are
    processes, and the mean of gradients that DDP and FSDP take is right.
    """
    return ReduceWithGrad.apply(x, name)
