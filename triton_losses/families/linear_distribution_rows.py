"""distribution_rows of a student's logits, hidden @ weight.T + bias, and a teacher's, in chunks of rows.

The student's logits of all rows never exist at once.

linear_rows computes the student's logits for one chunk of rows at a time, and from the chunk's gradient the gradients
of hidden, weight and bias. For the same rows the teacher, which gets no gradient, provides one of these:

    "products"  its own hidden states, weight and optionally bias: a second GEMM per chunk, into a second buffer
    "logits"    all its logits, computed by the caller: they are read where they are, if their strides allow it
    "top_k"     ids and log-probabilities of its most likely classes: see top_k_rows

For a sum of losses the forward computes the gradient too, as in LinearSum: three GEMMs and the teacher's. For one loss
per row the backward runs the same op again, with the upstream gradient, because the forward keeps nothing for it.
"""

import math
from typing import NamedTuple

import torch

from triton_losses.core.compiler import compute_dtype, runs_kernels
from triton_losses.core.op import differentiated_again, is_plain, problem_op, read_whole
from triton_losses.families import distribution_rows, top_k_rows
from triton_losses.families.distribution_rows import Pass, in_plain_torch, walk
from triton_losses.families.linear_rows import (
    cast,
    dtype_of_product,
    in_dtype,
    keep_gradients,
    kept_gradients,
    padded,
    product,
    sweep,
)

VECTOR = 16  # elements: if the row strides of two tensors are multiples of it, their rows have the same alignment


class Problem(NamedTuple):
    kind: str  # what the teacher provides
    formula: str
    scalars: tuple[float, ...] = ()
    scale: float = 1.0  # 1 / temperature
    student_first: bool = False  # whether the student is the formula's p; if not, its q
    one_read: bool = False  # as in distribution_rows
    tail: bool = False  # top_k: all other classes count, as one bin
    ignore_index: int = -100
    chunk_bytes: int = 0  # as in linear_rows
    kept_tokens: int = 0
    dtype: torch.dtype = torch.float32  # of the student's products
    teacher_dtype: torch.dtype = torch.float32

    @property
    def wide(self):
        """The type that losses are computed in."""
        return compute_dtype(torch.promote_types(self.dtype, self.teacher_dtype))

    def of_rows(self):
        """The problem of a chunk's rows: one loss per row."""
        one_read, ignore_index = self.one_read, self.ignore_index
        return distribution_rows.Problem(
            self.formula, self.scalars, False, one_read, self.scale, 0.0, 1.0, ignore_index, "none", self.wide
        )


def stored_rows(stored):
    """For stored logits (..., classes): a function from rows to their logits, which copies them only if it must."""
    where, classes = stored.shape[:-1], stored.shape[-1]
    count = math.prod(where)  # where.numel() would be a constant of an exported graph
    everything = torch.arange(count, device=stored.device)
    try:
        flat = stored.view(count, classes)
    except RuntimeError:  # the strides do not allow a view, for example after slicing a sequence
        flat = None

    def rows_of(part):
        found = stored[torch.unravel_index(everything[part], where)] if flat is None else flat[part]
        if not runs_kernels(found) or (found.stride(1) == 1 and found.stride(0) % VECTOR == 0):
            return found  # kernels read both rows of a pair in vectors of the same columns
        return found.new_empty(len(found), padded(classes))[:, :classes].copy_(found)

    return rows_of


def product_rows(hidden, weight, bias=None):
    """The same for logits that are hidden @ weight.T + bias; all chunks share one buffer."""
    buffers = []

    def rows_of(part):
        x = hidden[part]
        if not buffers:  # no other chunk is larger than the first
            buffers.append(x.new_empty(len(x), padded(len(weight))))
        return product(x, weight, bias, buffers[0][: len(x), : len(weight)])

    return rows_of


@problem_op("Tensor?[] tensors, Tensor[] teacher, Tensor? upstream, bool[] wanted", Problem)
def linear_distribution_rows_pass(tensors, teacher, upstream, wanted, problem):
    """Losses, 0 where ignored; then the gradients of Σ upstream · loss by hidden, weight and bias.

    tensors: hidden, weight, bias, labels. A gradient that is not wanted is empty.
    """
    losses, of_rows = tensors[0].new_zeros(tensors[0].shape[0], dtype=problem.wide), problem.of_rows()
    kind, student_first = problem.kind, problem.student_first
    if kind != "top_k":
        products = kind == "products"
        rows_of = product_rows(*in_dtype(problem.teacher_dtype, *teacher)) if products else stored_rows(*teacher)

    def visit(part, label, logits, _):
        factors = upstream[part] if any(wanted) else None
        if kind == "top_k":
            own = [t[part] for t in teacher]
            found = top_k_rows.walk(logits, *own, label, of_rows, student_first, problem.tail, factors)
        else:
            pair, grads = (logits, rows_of(part)), (logits if any(wanted) else None, None)
            pair, grads = (pair, grads) if student_first else (pair[::-1], grads[::-1])
            found = walk((*pair, None, label), of_rows, Pass(grads, factors))
        losses[part] = found

    return [losses, *sweep(visit, tensors, wanted, problem)]


def whole(tensors, teacher, problem):
    """Losses in plain torch, all logits at once."""
    *tensors, labels = tensors
    wide, of_rows = problem.wide, problem.of_rows()
    ours = torch.nn.functional.linear(*in_dtype(problem.dtype, *tensors))
    if problem.kind == "top_k":
        options = problem.ignore_index, problem.tail, problem.scale, wide
        ours, theirs = top_k_rows.whole_bins(ours, *teacher, labels, *options)
        of_rows = of_rows._replace(scale=1.0)
    elif problem.kind == "products":
        theirs = torch.nn.functional.linear(*in_dtype(problem.teacher_dtype, *teacher))
    else:
        theirs = teacher[0].reshape(ours.shape)
    pair = (ours, theirs) if problem.student_first else (theirs, ours)
    return in_plain_torch(of_rows, *pair, None, labels)


class LinearDistributionRows(torch.autograd.Function):
    """One loss per row, or their sum; then the forward also computes those gradients of the sum that are ``wanted``."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, first, second, third, wanted, total, problem):
        # by name: without gradients, torch.compile counts a parameter *teacher wrongly
        tensors, teacher = (hidden, weight, bias, labels), [t for t in (first, second, third) if t is not None]
        upstream = hidden.new_ones(hidden.shape[0], dtype=problem.wide) if any(wanted) else None
        losses, *grads = linear_distribution_rows_pass(tensors, teacher, upstream, wanted, problem)
        ctx.total, ctx.problem, ctx.wanted = total, problem, wanted
        keep_gradients(ctx, (*tensors, first, second, third), grads if total else ())
        return losses.sum() if total else losses

    @staticmethod
    def backward(ctx, dout):
        saved, problem, wanted = ctx.saved_tensors, ctx.problem, list(ctx.needs_input_grad[:3])
        tensors, teacher = saved[:4], [t for t in saved[4:7] if t is not None]

        def gradients(upstream, wanted):
            return linear_distribution_rows_pass(tensors, teacher, upstream, wanted, problem)[1:]

        if differentiated_again() or read_whole(dout):
            with torch.enable_grad():
                losses = whole(tensors, teacher, problem)
                result = losses.sum() if ctx.total else losses
            leaves = [t for t, want in zip(tensors, wanted) if want]
            found = iter(torch.autograd.grad(result, leaves, dout, create_graph=differentiated_again()))
            grads = [next(found) if want else None for want in wanted]
        elif ctx.total:
            ones = dout.new_ones(tensors[0].shape[0], dtype=problem.wide)
            grads = kept_gradients(ctx, saved[7:], dout, lambda: gradients(ones, ctx.wanted))
        else:
            grads = gradients(dout.contiguous(), wanted)
        return *cast(grads, tensors[:3], wanted), *[None] * 7


def linear_distribution_rows(formula, tensors, kind, teacher, total=False, **options):
    """``formula`` of every row of logits and the teacher's, 0 where ignored.

    tensors: hidden (rows, features), weight (classes, features), bias, labels (rows,) or None. kind: what the teacher
    provides for every row. teacher: its tensors. total: return the sum of the losses, which takes one GEMM less.
    options: fields of Problem.
    """
    hidden, weight, bias, _ = tensors
    dtype = dtype_of_product(hidden, weight)
    teacher_dtype = dtype_of_product(*teacher[:2]) if kind == "products" else teacher[-1].dtype
    problem = Problem(kind, formula.name, dtype=dtype, teacher_dtype=teacher_dtype, **options)
    if is_plain(hidden):
        losses = whole(tensors, teacher, problem)
        return losses.sum() if total else losses
    wanted = [total and t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias)]
    teacher = *teacher, *[None] * (3 - len(teacher))
    return LinearDistributionRows.apply(*tensors, *teacher, wanted, total, problem)
