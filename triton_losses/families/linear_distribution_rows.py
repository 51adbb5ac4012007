"""Losses of two rows of logits that are never whole: distribution_rows of a student's hidden @ weight.T + bias and a
teacher's.

linear_rows makes the student's logits a chunk of rows at a time, and of a chunk's gradient that of hidden, weight and
bias. Of the same rows the teacher, which takes no gradient, has

    "products"  hidden states, weight and perhaps bias of its own: a second GEMM a chunk, into a second buffer
    "logits"    whole, from elsewhere: read where they lie
    "top_k"     ids and log-probabilities of its likeliest classes: see top_k_rows

For a sum of losses the forward makes the gradient too, as LinearSum does: three GEMMs and the teacher's. For a loss of
each row the backward runs the same op once more, now with the upstream gradient: nothing is kept of the forward.
"""

import torch

from triton_losses.core.compiler import compute_dtype, runs_kernels
from triton_losses.core.op import differentiated_again, is_plain, op, read_whole
from triton_losses.families import top_k_rows
from triton_losses.families.distribution_rows import Pass, Problem, in_plain_torch, walk
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

VECTOR = 16  # numbers: rows of two tensors whose strides are multiples of it start at the same place within a vector


def stored_rows(stored):
    """Of logits (..., classes): a function from rows to their logits, without a copy where they are a slice that can be
    read.
    """
    where, classes = stored.shape[:-1], stored.shape[-1]
    everything = torch.arange(where.numel(), device=stored.device)
    try:
        flat = stored.view(where.numel(), classes)
    except RuntimeError:  # of such strides that no view can be: what a slice of a sequence leaves, for one
        flat = None

    def rows_of(part):
        found = stored[torch.unravel_index(everything[part], where)] if flat is None else flat[part]
        if not runs_kernels(found) or (found.stride(1) == 1 and found.stride(0) % VECTOR == 0):
            return found  # kernels walk both rows of a pair in the same vectors
        return found.new_empty(len(found), padded(classes))[:, :classes].copy_(found)

    return rows_of


def product_rows(hidden, weight, bias=None):
    """The same of logits that are products; all chunks share one buffer."""
    buffers = []

    def rows_of(part):
        x = hidden[part]
        if not buffers:  # the first chunk is as large as any
            buffers.append(x.new_empty(len(x), padded(len(weight))))
        return product(x, weight, bias, buffers[0][: len(x), : len(weight)])

    return rows_of


@op
def linear_distribution_rows_pass(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher: list[torch.Tensor],
    labels: torch.Tensor | None,
    upstream: torch.Tensor | None,
    wanted: list[bool],
    kind: str,
    formula: str,
    scalars: list[float],
    student_first: bool,
    one_read: bool,
    tail: bool,
    ignore_index: int,
    chunk_bytes: int,
    kept_tokens: int,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, 0 where ignored; where wanted, the gradients of Σ upstream · loss by hidden, weight and bias (else
    empty).
    """
    losses = hidden.new_zeros(hidden.shape[0], dtype=wide_dtype(dtype, teacher_dtype))
    problem = problem_of(formula, scalars, one_read, ignore_index, losses.dtype)
    if kind != "top_k":
        rows_of = product_rows(*in_dtype(teacher_dtype, *teacher)) if kind == "products" else stored_rows(*teacher)

    def visit(part, label, logits, _):
        factors = upstream[part] if any(wanted) else None
        if kind == "top_k":
            found = top_k_rows.walk(logits, *(t[part] for t in teacher), label, problem, student_first, tail, factors)
        else:
            pair, grads = (logits, rows_of(part)), (logits if any(wanted) else None, None)
            pair, grads = (pair, grads) if student_first else (pair[::-1], grads[::-1])
            found = walk((*pair, None, label), problem, Pass(grads, factors))
        losses[part] = found

    return losses, *sweep(visit, hidden, weight, bias, labels, wanted, dtype, ignore_index, chunk_bytes, kept_tokens)


def wide_dtype(dtype, teacher_dtype):
    return compute_dtype(torch.promote_types(dtype, teacher_dtype))


def problem_of(formula, scalars, one_read, ignore_index, dtype):
    """A loss of each row. scalars: 1 / T, then the formula's."""
    scale, *scalars = scalars
    return Problem(formula, tuple(scalars), False, one_read, scale, 0.0, 1.0, ignore_index, "none", dtype)


def whole(
    hidden,
    weight,
    bias,
    teacher,
    labels,
    kind,
    formula,
    scalars,
    student_first,
    one_read,
    tail,
    ignore_index,
    _,
    __,
    dtype,
    teacher_dtype,
):
    """Losses in plain torch, all logits at once."""
    wide = wide_dtype(dtype, teacher_dtype)
    ours = torch.nn.functional.linear(*in_dtype(dtype, hidden, weight, bias))
    problem = problem_of(formula, scalars, one_read, ignore_index, wide)
    if kind == "top_k":
        ours, theirs = top_k_rows.whole_bins(ours, *teacher, labels, ignore_index, tail, problem.scale, wide)
        problem = problem._replace(scale=1.0)
    elif kind == "products":
        theirs = torch.nn.functional.linear(*in_dtype(teacher_dtype, *teacher))
    else:
        theirs = teacher[0].reshape(ours.shape)
    pair = (ours, theirs) if student_first else (theirs, ours)
    return in_plain_torch(problem, *pair, None, labels)


class LinearDistributionRows(torch.autograd.Function):
    """The loss of each row, or their sum with its gradient made in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, first, second, third, total, wanted, options):
        # by name: torch.compile without gradients miscounts *teacher
        teacher = [t for t in (first, second, third) if t is not None]
        upstream = hidden.new_ones(hidden.shape[0], dtype=wide_dtype(*options[-2:])) if any(wanted) else None
        losses, *grads = linear_distribution_rows_pass(
            hidden, weight, bias, teacher, labels, upstream, wanted, *options
        )
        ctx.total, ctx.options, ctx.wanted = total, options, wanted
        keep_gradients(ctx, (hidden, weight, bias, labels, first, second, third), grads if total else ())
        return losses.sum() if total else losses

    @staticmethod
    def backward(ctx, dout):
        saved = ctx.saved_tensors
        hidden, weight, bias, labels, *teacher = saved[:7]
        teacher = [t for t in teacher if t is not None]
        wanted = list(ctx.needs_input_grad[:3])

        def gradients(upstream, wanted):
            return linear_distribution_rows_pass(hidden, weight, bias, teacher, labels, upstream, wanted, *ctx.options)[
                1:
            ]

        if differentiated_again() or read_whole(dout):
            with torch.enable_grad():
                losses = whole(hidden, weight, bias, teacher, labels, *ctx.options)
                result = losses.sum() if ctx.total else losses
            leaves = [t for t, want in zip((hidden, weight, bias), wanted) if want]
            found = iter(torch.autograd.grad(result, leaves, dout, create_graph=differentiated_again()))
            grads = [next(found) if want else None for want in wanted]
        elif ctx.total:
            ones = dout.new_ones(hidden.shape[0], dtype=wide_dtype(*ctx.options[-2:]))
            grads = kept_gradients(ctx, saved[7:], dout, lambda: gradients(ones, ctx.wanted))
        else:
            grads = gradients(dout.contiguous(), wanted)
        return *cast(grads, (hidden, weight, bias), wanted), *[None] * 7


def linear_distribution_rows(
    formula,
    hidden,
    weight,
    kind,
    teacher,
    *,
    bias=None,
    labels=None,
    scalars=(),
    student_first=False,
    one_read=False,
    tail=False,
    temperature=1.0,
    ignore_index=-100,
    total=False,
    chunk_bytes=0,
    kept_tokens=0,
):
    """``formula`` of every row of logits and the teacher's, 0 where ignored; ``total``: their sum, which takes one
    product less.

    hidden: (rows, features). weight: (classes, features). kind, teacher: what the teacher has of every row, and the
    tensors. labels: (rows,) or None. student_first: the student is the formula's p, else its q.
    """
    dtype = dtype_of_product(hidden, weight)
    teacher_dtype = dtype_of_product(*teacher[:2]) if kind == "products" else teacher[-1].dtype
    scalars = [1.0 / temperature, *(float(s) for s in scalars)]
    options = (
        kind,
        formula.name,
        scalars,
        student_first,
        one_read,
        tail,
        ignore_index,
        chunk_bytes,
        kept_tokens,
        dtype,
        teacher_dtype,
    )
    if is_plain(hidden):
        losses = whole(hidden, weight, bias, teacher, labels, *options)
        return losses.sum() if total else losses
    wanted = [total and t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias)]
    teacher = *teacher, *[None] * (3 - len(teacher))
    return LinearDistributionRows.apply(hidden, weight, bias, labels, *teacher, total, wanted, options)
