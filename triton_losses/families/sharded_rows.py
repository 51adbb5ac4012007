"""Row losses of logits whose classes are spread over the processes of a group: each holds some columns of every row.

Every process has all rows and all labels, and a *shard*: consecutive classes, in the order of the ranks; shards may
differ in size, and may be empty. The logits are given, or they are hidden @ weight.T with the shard's rows of weight.

    forward    each process reads its shard: max x, log Σ exp(x - max), log p of the label if it is here, and what else
               the formula takes. One all-gather of these few numbers per row, from which each process computes the
               statistics of whole rows (`combined`), in plain PyTorch
    backward   each process writes the gradient of its shard, from the statistics of whole rows. Nothing is exchanged,
               but for the sum of the hidden states' gradient, of which each process has a part

The formula itself runs in plain PyTorch on one number per row, so the same on every process.
"""

from typing import NamedTuple

import torch

from triton_losses.core.collectives import all_gather, all_reduce, name_of, rank_in
from triton_losses.core.compiler import compute_dtype
from triton_losses.core.op import differentiated_again, is_plain, problem_op, shapes_only
from triton_losses.core.rows import Pass, arguments_of, empty_with_strides, readable, slots_of
from triton_losses.families import label_rows, linear_rows
from triton_losses.families.label_rows import walk
from triton_losses.families.linear_rows import Rows, dtype_of_product, linear_rows_backward, linear_rows_forward

IGNORED = -100  # within this file: the caller's ignore_index may be the index of a class in a shard
ELSEWHERE = torch.inf  # log p of a label that is in another process' shard; a log p is at most 0, or nan


class Shard(NamedTuple):
    """This process' part of the classes."""

    group: str  # the process group's name
    start: int  # the first class of the shard


def shard_of(group, start, classes):
    """The shard of this process; if start is None all processes hold as many classes, which `combined` checks."""
    return Shard(name_of(group), rank_in(group) * classes if start is None else start)


class Problem(NamedTuple):
    mean: bool = False  # whether the mean of log p over all classes is taken
    entropy: bool = False
    softcap: float = 0.0
    scale: float = 1.0
    likeliest: bool = False

    def forward_formula(self):
        return "log_p_beside_mean" if self.mean else "log_p_beside_entropy" if self.entropy else "chosen_log_p"

    def backward_formula(self):
        ends = "_with_mean" if self.mean else "_with_entropy" if self.entropy else ""
        return f"along_part{ends}"

    def of_rows(self, formula, dtype):
        return label_rows.Problem(formula, (), IGNORED, self.softcap, self.scale, "none", dtype)

    def of_products(self, formula, dtype, options):
        shaping = {"softcap": self.softcap, "scale": self.scale, "dtype": dtype, "stats": self.likeliest}
        return linear_rows.Problem(formula, ignore_index=IGNORED, **shaping, **options)


@problem_op("Tensor?[] tensors", Problem)
def sharded_rows_forward(tensors, problem):
    """log p of the labels within this shard, saved (4, rows), the likeliest column. tensors: logits, labels, weights"""
    logits, labels, _ = tensors
    rows, wide = logits.shape[0], compute_dtype(logits.dtype)
    saved, log_p = logits.new_empty(4, rows, dtype=wide), logits.new_empty(rows, dtype=wide)
    best = labels.new_empty(rows if problem.likeliest else 0)
    if not shapes_only():
        formula = problem.of_rows(problem.forward_formula(), wide)
        likeliest = best if problem.likeliest else None
        task = Pass(saved, forward=True, entropy=problem.likeliest, likeliest=likeliest)
        log_p.copy_(walk((readable(logits), *tensors[1:]), formula, task)[0])
    return [log_p, saved, best]


@problem_op("Tensor?[] tensors, Tensor saved, Tensor[] operands", Problem)
def sharded_rows_backward(tensors, saved, operands, problem):
    """The gradient by the logits of Σ operands · statistics."""
    logits = readable(tensors[0])
    grad = empty_with_strides(logits)
    if not shapes_only():
        task = Pass(saved, grad=grad, upstream=torch.ones_like(operands[0]), operands=operands)
        walk((logits, *tensors[1:]), problem.of_rows(problem.backward_formula(), saved.dtype), task)
    return [grad]


class Call(NamedTuple):
    """What a call is, besides its tensors."""

    problem: Problem
    shard: Shard
    ignore_index: int
    options: tuple  # of linear_rows, as pairs


class Own(NamedTuple):
    """Which labels are in this process' shard, and what its shard has."""

    columns: torch.Tensor  # labels as columns of the shard: 0 if elsewhere, IGNORED if ignored
    found: torch.Tensor  # whether the label is in the shard
    kept: torch.Tensor  # whether the row counts
    classes: int
    weights: torch.Tensor | None  # of the shard's classes; None if the formula takes none, or all are 1
    weighed: int | None  # how many classes have a weight; None: all have weight 1


def own_part(labels, class_weights, classes, call, dtype):
    kept = labels != call.ignore_index
    columns = labels - call.shard.start
    found = kept & (columns >= 0) & (columns < classes)
    columns = torch.where(kept, torch.where(found, columns, 0), IGNORED)
    weights = None
    if class_weights is not None and call.problem.mean:
        weights = class_weights[call.shard.start : call.shard.start + classes].to(dtype).contiguous()
    return Own(columns, found, kept, classes, weights, None if class_weights is None else class_weights.shape[0])


class Whole(NamedTuple):
    """The statistics of whole rows; and what a process needs to turn their gradients into its shard's."""

    log_p: torch.Tensor
    mean_log_p: torch.Tensor | None
    lse: torch.Tensor
    entropy: torch.Tensor | None
    likeliest: torch.Tensor | None  # the class, of all
    saved: torch.Tensor  # (4, rows): max x, log Σ exp(x - max), unused, the entropy
    share: torch.Tensor | None  # of the mean over classes: this shard's part of the classes
    rest: torch.Tensor | None  # and the sum of the other shards' class weights, divided by the number of classes


def combined(log_p, saved, best, own, call):
    """Exchange what each process found in its shard (one all-gather), and put whole rows' statistics together."""
    (problem, shard, *_), (_, found, kept, classes, weights, _) = call, own
    weight_sum = None if weights is None else weights.sum()
    top, log_total, mean, entropy = saved
    nothing = (top == -torch.inf) | (log_total == -torch.inf)  # all of the shard's logits are -inf
    top, log_total = torch.where(nothing, -torch.inf, top), torch.where(nothing, 0, log_total)
    log_p = torch.where(found, torch.where(nothing, -torch.inf, log_p), ELSEWHERE)
    told = [top, log_total, log_p]
    told += [torch.where(nothing, -torch.inf, mean)] if problem.mean else []
    told += [torch.where(nothing, 0, entropy)] if problem.entropy or problem.likeliest else []
    told += [best.to(top.dtype)] if problem.likeliest else []
    # one more column: the shard's start, its number of classes and the sum of their weights
    layout = [top.new_full((), value) for value in (shard.start, classes, *[0.0] * (len(told) - 2))]
    if weight_sum is not None:
        layout[2] = weight_sum
    everyone = all_gather(torch.cat([torch.stack(told), torch.stack(layout)[:, None]], 1), shard.group)
    tops, log_totals, log_ps, *others = everyone[:, :, :-1].unbind(1)
    starts, sizes, weight_sums = everyone[:, :3, -1].unbind(1)
    check_layout(starts, sizes, log_ps, own)
    count = sizes.sum()
    highest = tops.amax(0)
    masses = torch.where(tops == -torch.inf, 0, torch.exp(tops - highest + log_totals))  # nan if highest is infinite
    total = masses.sum(0).log()
    below = (tops - highest) + (log_totals - total)  # log of each shard's part of the probability
    owned = log_ps != ELSEWHERE
    log_p = torch.where(owned, log_ps + below, 0).sum(0)
    log_p = torch.where(kept, log_p, 0)
    mean_log_p = entropies = likeliest = share = rest = None
    if problem.mean:
        sums = sizes if weight_sum is None else weight_sums
        held = sizes[:, None] > 0
        mean_log_p = torch.where(held, sizes[:, None] * others[0] + sums[:, None] * below, 0).sum(0) / count
        mean_log_p = torch.where(kept, mean_log_p, 0)
        share = classes / count
        rest = (sums.sum() - (classes if weight_sum is None else weight_sum)) / count
    if problem.entropy or problem.likeliest:
        parts = below.exp()
        each = others[1 if problem.mean else 0]
        entropies = torch.where(parts > 0, parts * (each - below), torch.where(parts == 0, 0, parts)).sum(0)
        entropies = torch.where(kept, entropies, 0)
    if problem.likeliest:
        first = (tops == highest).to(torch.int8).argmax(0)
        likeliest = (starts[:, None] + others[-1]).gather(0, first[None])[0].long()
        likeliest = torch.where(kept, likeliest, -1)
    saved = torch.stack([highest, total, torch.zeros_like(total), total if entropies is None else entropies])
    lse = torch.where(kept, highest + total, 0)
    return Whole(log_p, mean_log_p, lse, entropies, likeliest, saved, share, rest)


def check_layout(starts, sizes, log_ps, own):
    """Check that the shards follow one another, that each label is in one, and that each class has a weight."""
    follows = starts == sizes.cumsum(0) - sizes
    owners = (log_ps != ELSEWHERE).sum(0)
    valid = (owners == 1) | ~own.kept
    if torch.compiler.is_compiling() or starts.device.type != "cpu":
        torch._assert_async(follows.all())
        torch._assert_async(valid.all())
        if own.weighed is not None:
            torch._assert_async(sizes.sum() == own.weighed)
        return
    if not follows.all():
        found = [(int(start), int(size)) for start, size in zip(starts, sizes)]
        raise ValueError(
            "the shards of the classes must follow one another in the order of the ranks: "
            f"(vocab_start, classes) are {found}"
        )
    if own.weighed is not None and int(sizes.sum()) != own.weighed:
        raise RuntimeError(
            f"weight must have shape ({int(sizes.sum())},), of all processes' classes, got ({own.weighed},)"
        )
    if not valid.all():
        raise IndexError(
            f"Target of row {int((~valid).nonzero()[0])} is out of bounds: it must be in [0, "
            f"{int(sizes.sum())}), or ignore_index"
        )


class ShardedRows(torch.autograd.Function):
    """log_p, mean_log_p, lse, entropy of whole rows (empty if not taken), and the likeliest class.

    With a weight the logits are first @ weight.T + bias; without one, first.
    """

    @staticmethod
    def forward(ctx, first, weight, bias, labels, class_weights, call):
        dtype = first.dtype if weight is None else dtype_of_product(first, weight)
        classes = first.shape[1] if weight is None else weight.shape[0]
        wide, rows, problem = compute_dtype(dtype), first.shape[0], call.problem
        own = own_part(labels, class_weights, classes, call, wide)
        if classes == 0:
            saved = first.new_zeros(4, rows, dtype=wide)
            saved[0] = -torch.inf
            log_p, best = saved[1], labels.new_zeros(rows if problem.likeliest else 0)
        elif weight is None:
            log_p, saved, best = sharded_rows_forward([first, own.columns, own.weights], problem)
        else:
            of_products = problem.of_products(problem.forward_formula(), dtype, dict(call.options))
            tensors = first, weight, bias, own.columns, own.weights
            log_p, _, saved, best, *_ = linear_rows_forward(tensors, None, [False] * 3, of_products)
        whole = combined(log_p, saved, best, own, call)
        ctx.call, ctx.classes, ctx.dtype = call, classes, dtype
        tensors = first, weight, bias, own.columns, own.weights
        ctx.save_for_backward(*tensors, own.found, whole.saved, whole.share, whole.rest)
        nothing = log_p.new_empty(0)
        likeliest = labels.new_empty(0) if whole.likeliest is None else whole.likeliest
        ctx.mark_non_differentiable(likeliest)
        mean_log_p, entropy = (nothing.clone() if v is None else v for v in (whole.mean_log_p, whole.entropy))
        return whole.log_p, mean_log_p, whole.lse, entropy, likeliest

    @staticmethod
    def backward(ctx, d_log_p, d_mean, d_lse, d_entropy, _):
        if differentiated_again():
            raise NotImplementedError("a loss of classes that are spread over processes has no second derivative")
        *tensors, found, saved, share, rest = ctx.saved_tensors
        first, weight, bias, columns, weights = tensors
        problem, wanted = ctx.call.problem, list(ctx.needs_input_grad[:3])
        at_label = torch.where(found, d_log_p, 0)
        # the gradient has p_j (d_lse - d_log_p - ...) in every shard, and the label's part in one
        d_lse = d_lse - d_log_p + at_label
        operands = [at_label, d_lse]
        if problem.mean:
            operands = [at_label, d_mean * share, d_lse - d_mean * rest]
        elif problem.entropy:
            operands = [at_label, d_lse, d_entropy]
        operands = [v.contiguous() for v in operands]
        if ctx.classes == 0:
            grads = [torch.zeros_like(t) if want else None for t, want in zip((first, weight, bias), wanted)]
        elif weight is None:
            grads = [*sharded_rows_backward([first, columns, weights], saved, operands, problem), None, None]
        else:
            of_products = problem.of_products(problem.backward_formula(), ctx.dtype, dict(ctx.call.options))
            ones = torch.ones_like(operands[0])
            grads = linear_rows_backward(tensors, saved, ones, operands, wanted, of_products._replace(stats=False))
        if weight is not None and wanted[0]:
            grads = [all_reduce(grads[0].to(saved.dtype), ctx.call.shard.group), *grads[1:]]
        return *linear_rows.cast(grads, (first, weight, bias), wanted), None, None, None


def sharded_rows(
    formula, tensors, shard, scalars=(), ignore_index=-100, softcap=0.0, scale=1.0, stats=False, **options
):
    """``formula`` of every row, as Rows without a total; classes are spread over the processes of the shard's group.

    tensors: logits or hidden states (rows, ...), weight and bias of this shard or None, labels (rows,) that are indices
    of all classes, weights of all classes or None. stats: entropies and likeliest classes too. options: of
    linear_rows, chunk_bytes and kept_tokens.
    """
    first, weight, bias, labels, class_weights = tensors
    if is_plain(first):
        raise NotImplementedError(
            f"classes spread over processes are for plain calls on a CPU or GPU, not on {first.device} or within "
            "torch.func's transforms"
        )
    _, log_p, mean, _, entropy, *_ = (slot > 0 for slot in slots_of(formula))
    problem = Problem(mean, entropy, softcap, scale, stats)
    found = ShardedRows.apply(*tensors, Call(problem, shard, ignore_index, tuple(options.items())))
    log_p, mean_log_p, lse, entropies, likeliest = found
    kept = labels != ignore_index
    if class_weights is None:
        weights = kept.to(log_p.dtype)
    else:
        weights = torch.where(kept, class_weights.to(log_p.dtype)[torch.where(kept, labels, 0)], 0)
    statistics = None, log_p, mean_log_p, lse, entropies
    losses = formula.value(*arguments_of(formula, statistics, weights), *scalars)
    losses = torch.where(kept, losses, 0)
    saved = torch.stack([lse, torch.zeros_like(lse), torch.zeros_like(lse), entropies]).detach() if stats else None
    return Rows(None, losses, entropies if entropy else None, weights, saved, likeliest if stats else None)
