"""Σ_j softplus of each row's similarities with the columns of all processes, which go round a ring.

A process holds the columns of two processes at a time, its own and those that come by. In the backward the columns go
round once more, and with them the sum of their gradients, which after the last step is where the columns came from:
four products, any upstream gradient on each process, and memory for no more columns than in the forward.
"""

import torch

from triton_losses.core.collectives import exchange
from triton_losses.core.compiler import compute_dtype
from triton_losses.core.op import differentiated_again, is_plain
from triton_losses.core.similarities import Problem, inverse_lengths
from triton_losses.families.linear_rows import dtype_of_product
from triton_losses.families.similarity_rows import (
    WANTED,
    cast_back,
    similarity_rows_backward,
    similarity_rows_forward,
)


def around(tensors, ring, problem):
    """Yield the family's tensors and problem, with the columns of each process: first this one's."""
    a, b, scale, bias, ids = tensors
    name, size, rank = ring
    columns, column_ids = b, ids
    for step in range(size):
        yield [a, columns, scale, bias, ids, column_ids], problem
        problem = problem._replace(offset=a.shape[0])  # a neighbour's row i is no pair of this row i
        if step < size - 1:
            columns = exchange(columns, name, rank, 1)
            column_ids = ids if ids is None else exchange(column_ids, name, rank, 1)


class SimilarityRing(torch.autograd.Function):
    """One sum per row of a."""

    @staticmethod
    def forward(ctx, a, b, scale, bias, ids, ring, problem):
        ctx.ring, ctx.problem = ring, problem
        ctx.save_for_backward(a, b, scale, bias, ids)
        total = a.new_zeros(a.shape[0], dtype=compute_dtype(problem.dtype))
        for tensors, own in around((a, b, scale, bias, ids), ring, problem):
            total = total + similarity_rows_forward(tensors, None, [False] * WANTED, own)[0][-1]
        return total

    @staticmethod
    def backward(ctx, dout):
        if differentiated_again():
            raise NotImplementedError("a loss whose columns go round a ring has no second derivative: gather them")
        saved, problem, wanted = ctx.saved_tensors, ctx.problem, list(ctx.needs_input_grad[:WANTED])
        name, size, rank = ctx.ring
        a, wide = saved[0], dout.dtype
        upstream = torch.cat([dout.new_zeros(problem.least - 1, a.shape[0]), dout[None]])
        nothing, found = dout.new_zeros(4, 0), None
        for tensors, own in around(saved, ctx.ring, problem):
            lengths = [inverse_lengths(t, wide) if problem.normalize else nothing[0] for t in tensors[:2]]
            kept = [torch.zeros_like(upstream), nothing, *lengths]
            part = similarity_rows_backward(tensors, kept, [upstream, nothing], wanted, own)
            found = part if found is None else [total + own_part for total, own_part in zip(found, part)]
            if wanted[1]:
                found = [found[0], exchange(found[1], name, rank, 1), *found[2:]]
        return *cast_back(found, saved, wanted), None, None, None


def similarity_ring(tensors, everyone, **options):
    """(rows,): of each row of a the sum over the columns of all processes.

    tensors: a (rows, features), b (rows, features), scale (), bias () or None, ids (rows,) or None. everyone: the
    group's name, size, and this process' rank. options: fields of Problem, signed.
    """
    a, b = tensors[:2]
    if is_plain(a):
        raise NotImplementedError("rows of several processes are for plain calls, not for torch.func's transforms")
    problem = Problem(dtype=dtype_of_product(a, b), **options)
    return SimilarityRing.apply(*tensors, tuple(everyone), problem)
