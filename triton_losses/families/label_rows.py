"""Losses of a row of numbers and the index of its class: L_r = f(statistics of the row, weight of its class).

A row formula names the statistics it takes, in this order, then perhaps the weight, then scalars:

    picked      x_t, the label's own input                     log_p   x_t - log Σ_j exp x_j
    mean_log_p  Σ_j w_j log p_j / C                            lse     log Σ_j exp x_j
    weight      w_t, the weight of the label's class: 1 where there are no class weights

and returns the loss, then its partial by each statistic it took. From those, with p = softmax(x) and w̄ = Σ_j w_j / C,

    ∂L/∂x_j = p_j (f_lse - f_log_p - w̄ f_mean_log_p)  +  [j = t] (f_log_p + f_picked)  +  f_mean_log_p w_j / C

    forward   reads a row once; writes its loss and saves max x and log Σ exp(x - max x). Apart: their sum would round away
              the digits that a common offset of the logits leaves
    backward  reads a row once and writes its gradient

A formula that takes `picked` alone reads one number a row (on a CPU that is for ATen: no blocks). Rows whose label is `ignore_index` cost nothing and get zeros.
"""

import functools

import torch

from triton_losses.compiler import compute_dtype, runs_kernels, triton
from triton_losses.families.reduction import result_dtype
from triton_losses.formula import FORMULAS
from triton_losses.op import op, read_whole, shapes_only

if triton is not None:
    from triton_losses.families.label_rows_kernels import backward_launch, forward_launch, row_arguments

STATISTICS = ("picked", "log_p", "mean_log_p", "lse")
MOST_PADDING = 64  # a row's stride may exceed its length by less than this; beyond it rows are copied


@functools.cache
def slots_of(formula):
    """Where each statistic's partial stands in what the formula returns, 0 where it is not taken; last: takes the weight."""
    taken = [name for name in (*STATISTICS, "weight") if name in formula.parameters]
    if list(formula.parameters[: len(taken)]) != taken:
        raise ValueError(f"formula {formula.name}: statistics come first, in the order {(*STATISTICS, 'weight')}")
    return tuple(taken.index(name) + 1 if name in taken else 0 for name in (*STATISTICS, "weight"))


def arguments_of(formula, statistics, weight):
    """The statistics (in STATISTICS' order) and the weight, those alone that the formula takes."""
    return [s for s, slot in zip((*statistics, weight), slots_of(formula)) if slot]


def partials_of(formula, statistics, weight, scalars):
    """The loss's partial by each of STATISTICS; 0 by those not taken."""
    slots = slots_of(formula)[:4]
    found = formula.partials(tuple(True for slot in slots if slot))(*arguments_of(formula, statistics, weight), *scalars)
    return [found[slot - 1] if slot else 0.0 for slot in slots]


# PyTorch, whole: differentiable as often as one likes


def whole_loss(logits, labels, class_weights, formula, scalars, ignore_index, reduction, dtype):
    x = logits.to(compute_dtype(logits.dtype))
    kept = labels != ignore_index
    safe = torch.where(kept, labels, 0).long()
    weights = kept.to(x.dtype) if class_weights is None else torch.where(kept, class_weights.to(x.dtype)[safe], 0)
    slots = slots_of(formula)
    picked = x.gather(1, safe[:, None])[:, 0]
    log_p = mean_log_p = lse = None
    if any(slots[1:4]):
        log_rows = x.log_softmax(1)
        log_p = log_rows.gather(1, safe[:, None])[:, 0]
        if slots[2]:
            mean_log_p = (log_rows if class_weights is None else log_rows * class_weights.to(x.dtype)).mean(1)
        if slots[3]:
            lse = x.logsumexp(1)
    losses = torch.where(kept, formula.value(*arguments_of(formula, (picked, log_p, mean_log_p, lse), weights), *scalars), 0)
    if reduction == "none":
        return losses.to(dtype)
    return (losses.sum() / weights.sum() if reduction == "mean" else losses.sum()).to(dtype)


# PyTorch, in blocks of rows that stay in a CPU's cache


def counted(labels, class_weights, cols, ignore_index, dtype):
    """Which rows count (None: all), labels (rows, 1) that can index, and the rows' weights (None: all 1)."""
    kept = None
    if labels.numel():
        low, high = torch.aminmax(labels)
        if low < 0 or high >= cols or low <= ignore_index <= high:
            kept = labels != ignore_index
            wrong = labels[kept & ((labels < 0) | (labels >= cols))]
            if wrong.numel():
                raise IndexError(f"Target {int(wrong[0])} is out of bounds: it must be in [0, {cols}), or ignore_index, {ignore_index}")
            labels = torch.where(kept, labels, 0)
    labels = labels.long()
    weights = None
    if class_weights is not None:
        weights = class_weights.to(dtype)[labels]
        weights = weights if kept is None else torch.where(kept, weights, 0)
    elif kept is not None:
        weights = kept.to(dtype)
    return kept, labels[:, None], weights


def row_blocks(rows, cols):
    """Runs of rows of at most 64k elements a thread; none where there are no columns."""
    step = max(1, 65536 * torch.get_num_threads() // max(cols, 1))
    return [slice(start, start + step) for start in range(0, rows if cols else 0, step)]


def forward_blocks(logits, labels, class_weights, formula, scalars, ignore_index, reduction, dtype):
    rows, cols = logits.shape
    wide, slots = compute_dtype(logits.dtype), slots_of(formula)
    kept, labels, weights = counted(labels, class_weights, cols, ignore_index, wide)
    if class_weights is not None:
        class_weights = class_weights.to(wide)
        mean_weight = class_weights.mean()
    found, saved = [logits.new_empty(0, dtype=wide)], [logits.new_empty(3, 0, dtype=wide)]
    for block in row_blocks(rows, cols):
        x = logits[block].to(wide)
        highest = x.amax(1, keepdim=True)
        x = x - highest
        log_p = x.gather(1, labels[block])[:, 0]
        if slots[2]:
            mean_log_p = x.mean(1) if class_weights is None else x.mv(class_weights).div_(cols)
        log_total = x.exp_().sum(1).log_()
        log_p -= log_total
        mean_log_p = mean_log_p - log_total * (1.0 if class_weights is None else mean_weight) if slots[2] else log_total
        highest = highest[:, 0]
        statistics = (None, log_p, mean_log_p, highest + log_total if slots[3] else None)
        found.append(formula.value(*arguments_of(formula, statistics, 1.0 if weights is None else weights[block]), *scalars))
        saved.append(torch.stack([highest, log_total, mean_log_p]))
    losses, saved = (parts[1] if len(parts) == 2 else torch.cat(parts, -1) for parts in (found, saved))
    if cols == 0:  # every row is ignored, or its label would have been refused
        losses, saved = saved.new_zeros(rows), saved.new_zeros(3, rows)
    losses = losses if kept is None else torch.where(kept, losses, 0)
    if reduction == "none":
        return losses.to(dtype), saved, saved.new_empty(0)
    total = losses.sum()
    if reduction == "sum":
        return total.to(dtype), saved, saved.new_empty(0)
    weight = total.new_full((), rows) if weights is None else weights.sum()
    return (total / weight).to(dtype), saved, weight


def backward_blocks(logits, labels, class_weights, saved, denominator, dout, formula, scalars, ignore_index, reduction):
    rows, cols = logits.shape
    wide, slots = saved.dtype, slots_of(formula)
    kept, labels, weights = counted(labels, class_weights, cols, ignore_index, wide)
    grad = torch.empty(logits.shape, dtype=logits.dtype)
    upstream = dout.to(wide) / denominator if reduction == "mean" else dout.to(wide)
    if class_weights is not None:
        class_weights = class_weights.to(wide)
        mean_weight = class_weights.mean()
    for block in row_blocks(rows, cols):
        x = logits[block].to(wide)
        highest, log_total, mean_log_p = saved[:, block]
        log_p = (x.gather(1, labels[block])[:, 0] - highest) - log_total
        statistics = (None, log_p, mean_log_p, highest + log_total if slots[3] else None)
        factor = upstream if upstream.dim() == 0 else upstream[block]
        partials = partials_of(formula, statistics, 1.0 if weights is None else weights[block], scalars)
        _, d_log_p, d_mean, d_lse = (d * factor if kept is None else torch.where(kept[block], d * factor, 0) for d in partials)
        slope = d_lse - d_log_p
        if slots[2]:
            slope = slope - d_mean * (1.0 if class_weights is None else mean_weight)
        g = torch.sub(x, highest[:, None], out=grad[block] if grad.dtype == wide else None).exp_()
        g.mul_((slope * torch.exp(-log_total))[:, None])
        if slots[2]:
            uniform = (d_mean / cols).expand(len(g))[:, None]
            g.add_(uniform if class_weights is None else uniform * class_weights)
        g.scatter_add_(1, labels[block], d_log_p.expand(len(g))[:, None])
        if grad.dtype != wide:
            grad[block] = g
    if kept is not None:  # whatever stood in them, nan too
        grad.index_fill_(0, (~kept).nonzero()[:, 0], 0)
    return grad


# Ops: kernels on a GPU and in the interpreter, blocks on a CPU


def readable(logits):
    """Rows that lie one after another, with little between them."""
    rows, cols = logits.shape
    if logits.stride(1) == 1 and (rows == 1 or 0 <= logits.stride(0) - cols < MOST_PADDING):
        return logits
    return logits.contiguous()


@op
def label_rows_forward(
    logits: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None, formula: str, scalars: list[float],
    ignore_index: int, reduction: str, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The reduced loss; max, log Σ exp and mean_log_p of each row; the sum of the rows' weights where the mean needs it."""
    rows = logits.shape[0]
    wide, mean = compute_dtype(logits.dtype), reduction == "mean"
    if shapes_only():
        out = logits.new_empty(rows if reduction == "none" else (), dtype=dtype)
        return out, logits.new_empty(3, rows, dtype=wide), logits.new_empty(() if mean else (0,), dtype=wide)
    if not runs_kernels(logits):
        return forward_blocks(logits, labels, class_weights, FORMULAS[formula], scalars, ignore_index, reduction, dtype)
    if logits.device.type == "cpu":
        counted(labels, None, logits.shape[1], ignore_index, wide)  # refuses labels that are no class; a GPU asserts in the kernel
    logits = readable(logits)
    saved = logits.new_empty(3, rows, dtype=wide)
    losses = logits.new_empty(2, rows, dtype=dtype if reduction == "none" else wide)
    forward_launch(
        losses=losses, saved=saved, **row_arguments(logits, labels, class_weights, FORMULAS[formula], scalars, ignore_index, slots_of)
    )  # fmt: skip
    if reduction == "none":
        return losses[0].clone(), saved, saved.new_empty(0)
    total, weight = losses.sum(1)
    return (total / weight if mean else total).to(dtype), saved, weight.clone() if mean else saved.new_empty(0)


@op
def label_rows_backward(
    logits: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None, saved: torch.Tensor, denominator: torch.Tensor,
    dout: torch.Tensor, formula: str, scalars: list[float], ignore_index: int, reduction: str,
) -> torch.Tensor:  # fmt: skip
    if shapes_only():
        return logits.new_empty(logits.shape)
    if not runs_kernels(logits):
        return backward_blocks(
            logits, labels, class_weights, saved, denominator, dout, FORMULAS[formula], scalars, ignore_index, reduction
        )
    logits = readable(logits)
    grad = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
    backward_launch(
        saved=saved, grad=grad, dout=dout if reduction == "none" else dout.contiguous(), denominator=denominator,
        dout_stride=dout.stride(0) if reduction == "none" else 0, MEAN=reduction == "mean",
        **row_arguments(logits, labels, class_weights, FORMULAS[formula], scalars, ignore_index, slots_of),
    )  # fmt: skip
    return grad


class LabelRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, class_weights, formula, scalars, ignore_index, reduction, dtype):
        ctx.options = formula, scalars, ignore_index, reduction
        ctx.dtype = dtype
        loss, saved, denominator = label_rows_forward(logits, labels, class_weights, *ctx.options, dtype)
        ctx.save_for_backward(logits, labels, class_weights, saved, denominator)
        return loss

    @staticmethod
    def backward(ctx, dout):
        logits, labels, class_weights, saved, denominator = ctx.saved_tensors
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # then it may be differentiated again
        if again or read_whole(dout):
            formula, *options = ctx.options
            with torch.enable_grad():
                loss = whole_loss(logits, labels, class_weights, FORMULAS[formula], *options, ctx.dtype)
            grad = torch.autograd.grad(loss, logits, dout, create_graph=again)[0]
        else:
            grad = label_rows_backward(logits, labels, class_weights, saved, denominator, dout, *ctx.options)
        return grad, *[None] * 7


def label_rows(formula, logits, labels, class_weights=None, scalars=(), ignore_index=-100, reduction="mean", out_dtype=None):
    """``formula`` of every row of ``logits`` (rows, classes) whose label is not ``ignore_index``.

    The mean divides by the sum of the rows' weights. out_dtype: of the result; the logits', or float32 under autocast, when None.
    """
    options = ([float(s) for s in scalars], ignore_index, reduction, out_dtype or result_dtype(logits))
    if logits.device.type not in ("cpu", "cuda", "xpu") or read_whole():
        return whole_loss(logits, labels, class_weights, formula, *options)
    return LabelRows.apply(logits, labels, class_weights, formula.name, *options)
