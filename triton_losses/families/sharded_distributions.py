"""Divergences of a student's and a teacher's logits whose classes are spread over the processes of a group.

Each process holds the same classes of both. The student's logits are given, or they are hidden @ weight.T with the
process' rows of weight; the teacher's are given or products too, as in linear_distribution_rows.

    statistics  each process reads its logits for max and log Σ exp of both; one all-gather puts whole rows' together
    sums        each process reads its logits again for its part of Σ_j f(log p_j, log q_j) and of Σ_j ∂f/∂(the
                student's log); one all-reduce. For a relative entropy both follow from the first read alone
    gradient    each process writes its own, in the backward. Only the hidden states' gradient is exchanged

All of it runs in chunks of rows, in plain PyTorch.
"""

from typing import NamedTuple

import torch

from triton_losses.core.collectives import all_gather, all_reduce
from triton_losses.core.compiler import compute_dtype
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import differentiated_again, is_plain, problem_op, shapes_only
from triton_losses.families import linear_rows
from triton_losses.families.linear_distribution_rows import product_rows, stored_rows
from triton_losses.families.linear_rows import dtype_of_product, in_dtype, rows_of_chunk, sweep


class Problem(NamedTuple):
    kind: str  # what the teacher provides: "products" or "logits"
    formula: str
    group: str  # the process group's name
    scalars: tuple[float, ...] = ()
    scale: float = 1.0  # 1 / temperature
    student_first: bool = False  # whether the student is the formula's p; if not, its q
    one_read: bool = False  # a relative entropy
    ignore_index: int = -100
    chunk_bytes: int = 0  # as in linear_rows
    kept_tokens: int = 0
    dtype: torch.dtype = torch.float32  # of the student's products
    teacher_dtype: torch.dtype = torch.float32

    @property
    def wide(self):
        """The type that losses are computed in."""
        return compute_dtype(torch.promote_types(self.dtype, self.teacher_dtype))

    def pair(self, student, teacher):
        return (student, teacher) if self.student_first else (teacher, student)


def for_each_chunk(visit, tensors, teacher, problem, wanted=(False, False, False)):
    """Call ``visit(rows, student's logits, teacher's)`` for each chunk, both in the wide type and scaled.

    If a gradient is wanted, visit returns it; then this returns the gradients by hidden states (or logits), weight and
    bias. Without classes there is nothing to visit.
    """
    first, weight, bias, labels = tensors
    products = problem.kind == "products"
    rows_of = product_rows(*in_dtype(problem.teacher_dtype, *teacher)) if products else stored_rows(*teacher)

    def wider(x):
        return x.to(problem.wide) * problem.scale

    if weight is None:
        rows, classes = first.shape
        grad = torch.empty_like(first) if wanted[0] else first.new_empty(0)
        size = rows_of_chunk(max(1, classes) * problem.wide.itemsize, first.device, problem.chunk_bytes)
        for start in range(0, 0 if shapes_only() else rows, size):
            part = slice(start, start + size)
            found = visit(part, wider(first[part]), wider(rows_of(part)))
            if wanted[0]:
                grad[part] = found
        return [grad, first.new_empty(0), first.new_empty(0)]

    def of_chunk(part, label, logits, _):
        found = visit(part, wider(logits), wider(rows_of(part)))
        if any(wanted):
            logits.copy_(found)

    return sweep(of_chunk, tensors, wanted, problem)


def none_here(tensors):
    first, weight, *_ = tensors
    return (first.shape[1] if weight is None else weight.shape[0]) == 0


@problem_op("Tensor?[] tensors, Tensor[] teacher", Problem)
def sharded_distribution_statistics(tensors, teacher, problem):
    """(5, rows): max and log Σ exp (x - max) of student and teacher; the divergence of this process' distributions.

    Without classes here, or with logits that are all -inf, (-inf, 0); rows that are left out keep it too.
    """
    found = tensors[0].new_zeros(5, tensors[0].shape[0], dtype=problem.wide)
    found[0:3:2] = -torch.inf

    def visit(part, *both):
        logs = []
        for i, x in enumerate(both):
            top = x.amax(1)
            finite = torch.where(top == -torch.inf, 0, top)
            total = (x - finite[:, None]).exp().sum(1).log()
            found[2 * i, part] = top
            found[2 * i + 1, part] = torch.where(top == -torch.inf, 0, total)
            logs.append((x - finite[:, None]) - found[2 * i + 1, part][:, None])
        if problem.one_read:
            p, q = problem.pair(*logs)
            found[4, part] = FORMULAS[problem.formula].value(p, q, *problem.scalars).sum(1)

    if not none_here(tensors):
        for_each_chunk(visit, tensors, teacher, problem)
    return [found]


def logs_of(part, student, teacher, whole, problem):
    """log p and log q of a chunk, normalised over all classes. whole: (4, rows), of student and teacher."""
    tops, totals = whole[0:4:2, part, None], whole[1:4:2, part, None]
    return problem.pair(*((x - tops[i]) - totals[i] for i, x in enumerate((student, teacher))))


@problem_op("Tensor?[] tensors, Tensor[] teacher, Tensor whole", Problem)
def sharded_distribution_sums(tensors, teacher, whole, problem):
    """(2, rows): this process' part of Σ f, and of Σ ∂f/∂(log of the student)."""
    found, formula = whole.new_zeros(2, whole.shape[1]), FORMULAS[problem.formula]

    def visit(part, student, theirs):
        logs = logs_of(part, student, theirs, whole, problem)
        found[0, part] = formula.value(*logs, *problem.scalars).sum(1)
        wanted = problem.pair(True, False)
        found[1, part] = formula.partials(wanted)(*logs, *problem.scalars)[0].sum(1)

    if not none_here(tensors):
        for_each_chunk(visit, tensors, teacher, problem)
    return [found]


@problem_op("Tensor?[] tensors, Tensor[] teacher, Tensor whole, Tensor slope, Tensor upstream, bool[] wanted", Problem)
def sharded_distribution_gradient(tensors, teacher, whole, slope, upstream, wanted, problem):
    """The gradients of Σ upstream · loss by hidden states (or logits), weight and bias."""
    formula, labels = FORMULAS[problem.formula], tensors[3]

    def visit(part, student, theirs):
        logs = logs_of(part, student, theirs, whole, problem)
        (d,) = formula.partials(problem.pair(True, False))(*logs, *problem.scalars)
        p = logs[0 if problem.student_first else 1].exp()
        grad = (d - p * slope[part, None]) * (upstream[part, None] * problem.scale)
        return grad if labels is None else torch.where((labels[part] != problem.ignore_index)[:, None], grad, 0)

    return for_each_chunk(visit, tensors, teacher, problem, wanted)


def combined(found, problem):
    """(4, rows) of whole rows; the relative entropy, if that is what is computed."""
    everyone = all_gather(found, problem.group)
    tops, totals, divergences = everyone[:, 0:4:2], everyone[:, 1:4:2], everyone[:, 4]
    highest = tops.amax(0)
    masses = torch.where(tops == -torch.inf, 0, torch.exp(tops - highest + totals))
    total = masses.sum(0).log()
    whole = torch.stack([highest[0], total[0], highest[1], total[1]])
    if not problem.one_read:
        return whole, None
    below = (tops - highest) + (totals - total)  # log of each process' part of the student's and teacher's mass
    p, q = problem.pair(below[:, 0], below[:, 1])
    part = p.exp()
    return whole, torch.where(part == 0, 0, part * (divergences + p - q)).sum(0)


class ShardedDistributions(torch.autograd.Function):
    """One loss per row, 0 where ignored."""

    @staticmethod
    def forward(ctx, first, weight, bias, labels, theirs, their_weight, their_bias, problem):
        tensors, teacher = (
            (first, weight, bias, labels),
            [t for t in (theirs, their_weight, their_bias) if t is not None],
        )
        whole, losses = combined(sharded_distribution_statistics(tensors, teacher, problem)[0], problem)
        if losses is None:
            losses, slope = all_reduce(sharded_distribution_sums(tensors, teacher, whole, problem)[0], problem.group)
        else:
            slope = losses + 1 if problem.student_first else -torch.ones_like(losses)
        ctx.problem = problem
        ctx.save_for_backward(*tensors, whole, slope, *teacher)
        return losses.clone() if labels is None else torch.where(labels != problem.ignore_index, losses, 0)

    @staticmethod
    def backward(ctx, dout):
        if differentiated_again():
            raise NotImplementedError("a loss of classes that are spread over processes has no second derivative")
        *tensors, whole, slope = ctx.saved_tensors[:6]
        teacher, wanted = list(ctx.saved_tensors[6:]), list(ctx.needs_input_grad[:3])
        if none_here(tensors):
            grads = [torch.zeros_like(t) if want else None for t, want in zip(tensors, wanted)]
        else:
            upstream = dout.to(whole.dtype).contiguous()
            grads = sharded_distribution_gradient(tensors, teacher, whole, slope, upstream, wanted, ctx.problem)
        if tensors[1] is not None and wanted[0]:
            grads = [all_reduce(grads[0].to(whole.dtype), ctx.problem.group), *grads[1:]]
        return *linear_rows.cast(grads, tensors[:3], wanted), *[None] * 5


def sharded_distributions(formula, tensors, kind, teacher, group, **options):
    """``formula`` of every row of the student's logits and the teacher's, 0 where ignored.

    tensors: hidden states and weight and bias of this process' classes, or logits and None, None; labels or None. kind:
    what the teacher provides. group: the process group's name. options: fields of Problem.
    """
    first, weight, *_ = tensors
    if is_plain(first):
        raise NotImplementedError(
            f"classes spread over processes are for plain calls on a CPU or GPU, not on {first.device} or within "
            "torch.func's transforms"
        )
    if kind == "top_k":
        raise NotImplementedError("group: the teacher's ids and log-probabilities are of all classes; pass its logits")
    dtype = first.dtype if weight is None else dtype_of_product(first, weight)
    teacher_dtype = dtype_of_product(*teacher[:2]) if kind == "products" else teacher[0].dtype
    problem = Problem(kind, formula.name, group, dtype=dtype, teacher_dtype=teacher_dtype, **options)
    teacher = *teacher, *[None] * (3 - len(teacher))
    return ShardedDistributions.apply(*tensors, *teacher, problem)
