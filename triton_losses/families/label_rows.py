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

A formula that takes `picked` alone reads one number a row. Rows whose label is `ignore_index` cost nothing and get zeros.
"""

import torch

from triton_losses.compiler import compute_dtype, runs_kernels, triton
from triton_losses.device_math import as_scalars
from triton_losses.families.reduction import result_dtype
from triton_losses.formula import FORMULAS
from triton_losses.op import op, read_whole, shapes_only

if triton is not None:
    from triton_losses.families.label_rows_kernels import backward_launch, forward_launch, row_arguments

STATISTICS = ("picked", "log_p", "mean_log_p", "lse")
MOST_PADDING = 64  # a row's stride may exceed its length by less than this; beyond it rows are copied


def slots_of(formula):
    """Where each statistic's partial stands in what the formula returns, 0 where it is not taken; last: takes the weight."""
    taken = [name for name in (*STATISTICS, "weight") if name in formula.parameters]
    if list(formula.parameters[: len(taken)]) != taken:
        raise ValueError(f"formula {formula.name}: statistics come first, in the order {(*STATISTICS, 'weight')}")
    return tuple(taken.index(name) + 1 if name in taken else 0 for name in (*STATISTICS, "weight"))


def arguments_of(formula, statistics, weight):
    """The statistics (in STATISTICS' order, None where not taken) and the weight, as the formula takes them."""
    slots = slots_of(formula)
    return [s for s, slot in zip((*statistics, weight), slots) if slot]


def partials_of(formula, statistics, weight, scalars):
    """The loss's partial by each of STATISTICS; 0 by those not taken."""
    slots = slots_of(formula)[:4]
    found = formula.partials((True,) * sum(slot > 0 for slot in slots))(*arguments_of(formula, statistics, weight), *scalars)
    return [found[slot - 1] if slot else 0.0 for slot in slots]


def weights_of(labels, class_weights, ignore_index, dtype):
    """Each row's weight, 0 where ignored; which rows count; and labels that can index, whatever ignore_index is."""
    kept = labels != ignore_index
    safe = torch.where(kept, labels, 0).long()
    weights = kept.to(dtype) if class_weights is None else torch.where(kept, class_weights.to(dtype)[safe], 0)
    return weights, kept, safe


def reduced(losses, weights, reduction, dtype):
    if reduction == "none":
        return losses.to(dtype)
    total = losses.sum()
    return (total / weights.sum() if reduction == "mean" else total).to(dtype)


# PyTorch, whole: differentiable as often as one likes


def whole_loss(logits, labels, class_weights, formula, scalars, ignore_index, reduction, dtype):
    x = logits.to(compute_dtype(logits.dtype))
    weights, kept, safe = weights_of(labels, class_weights, ignore_index, x.dtype)
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
    losses = formula.value(*arguments_of(formula, (picked, log_p, mean_log_p, lse), weights), *scalars)
    return reduced(torch.where(kept, losses, 0), weights, reduction, dtype)


# PyTorch, in blocks of rows that stay in a CPU's cache


def row_blocks(kept, cols):
    """Runs of rows of at most 64k elements a thread: slices where every row counts, else the indices of those that do."""
    step = max(1, 65536 * torch.get_num_threads() // max(cols, 1))
    if kept.all():
        return [slice(start, start + step) for start in range(0, len(kept), step)]
    return list(kept.nonzero()[:, 0].split(step))


def forward_blocks(logits, labels, class_weights, formula, scalars, ignore_index, reduction, dtype):
    rows, cols = logits.shape
    wide = compute_dtype(logits.dtype)
    weights, kept, safe = weights_of(labels, class_weights, ignore_index, wide)
    slots = slots_of(formula)
    saved = logits.new_empty(3, rows, dtype=wide)
    class_weights = class_weights if class_weights is None else class_weights.to(wide)
    losses = saved.new_zeros(rows)
    for block in row_blocks(kept, cols):
        x = logits[block].to(wide)
        label = safe[block][:, None]
        picked = x.gather(1, label)[:, 0]
        log_p = mean_log_p = lse = None
        if any(slots[1:4]):
            highest = x.amax(1, keepdim=True)
            shifted = x - highest
            log_p = shifted.gather(1, label)[:, 0]
            if slots[2]:
                mean_log_p = (shifted if class_weights is None else shifted * class_weights).mean(1)
            log_total = shifted.exp_().sum(1).log_()
            log_p = log_p - log_total
            if slots[2]:
                mean_log_p = saved[2, block] = mean_log_p - log_total * (1.0 if class_weights is None else class_weights.mean())
            saved[0, block], saved[1, block] = highest[:, 0], log_total
            lse = highest[:, 0] + log_total
        losses[block] = formula.value(*arguments_of(formula, (picked, log_p, mean_log_p, lse), weights[block]), *scalars)
    return reduced(losses, weights, reduction, dtype), saved, weights.sum() if reduction == "mean" else saved.new_empty(0)


def backward_blocks(logits, labels, class_weights, saved, denominator, dout, formula, scalars, ignore_index, reduction):
    rows, cols = logits.shape
    wide = saved.dtype
    weights, kept, safe = weights_of(labels, class_weights, ignore_index, wide)
    slots = slots_of(formula)
    softmax = any(slots[1:4])
    grad = (torch.empty if softmax and kept.all() else torch.zeros)(logits.shape, dtype=logits.dtype)
    upstream = dout.to(wide).expand(rows)
    upstream = upstream / denominator if reduction == "mean" else upstream
    mean_weight = 1.0 if class_weights is None else class_weights.to(wide).mean()
    for block in row_blocks(kept, cols):
        label = safe[block][:, None]
        picked = logits[block].gather(1, label)[:, 0].to(wide)
        highest, log_total, mean_log_p = saved[:, block]
        statistics = (picked, (picked - highest) - log_total, mean_log_p, highest + log_total)
        d_picked, d_log_p, d_mean, d_lse = partials_of(formula, statistics, weights[block], scalars)
        at_label = ((d_log_p + d_picked) * upstream[block])[:, None]
        if not softmax:
            grad[block] = grad[block].scatter_(1, label, at_label.to(grad.dtype)) if isinstance(block, torch.Tensor) else grad[block]
            if isinstance(block, slice):
                grad[block].scatter_(1, label, at_label.to(grad.dtype))
            continue
        direct = isinstance(block, slice) and grad.dtype == wide
        g = torch.softmax(logits[block].to(wide), 1, out=grad[block] if direct else None)
        g.mul_(((d_lse - d_log_p - mean_weight * d_mean) * upstream[block])[:, None])
        if slots[2]:
            uniform = (d_mean / cols * upstream[block])[:, None]
            g.add_(uniform if class_weights is None else uniform * class_weights.to(wide))
        g.scatter_add_(1, label, at_label)
        if not direct:
            grad[block] = g.to(grad.dtype)
    return grad


# Ops: kernels on a GPU and in the interpreter, blocks on a CPU


def check_values(labels, cols, ignore_index):
    """On the host, so for CPU tensors alone; a GPU asserts inside the kernel."""
    if labels.numel() == 0:
        return
    low, high = (int(v) for v in labels.aminmax())
    if low < 0 or high >= cols:
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= cols))]
        if wrong.numel():
            raise IndexError(f"Target {int(wrong[0])} is out of bounds: it must be at least 0 and below {cols}, or ignore_index {ignore_index}")


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
    if logits.device.type == "cpu":
        check_values(labels, logits.shape[1], ignore_index)
    if not runs_kernels(logits):
        return forward_blocks(logits, labels, class_weights, FORMULAS[formula], scalars, ignore_index, reduction, dtype)
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
    def forward(logits, labels, class_weights, formula, scalars, ignore_index, reduction, dtype):
        return label_rows_forward(logits, labels, class_weights, formula, scalars, ignore_index, reduction, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, labels, class_weights, *ctx.options = inputs
        _, saved, denominator = output
        ctx.mark_non_differentiable(saved, denominator)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, class_weights, saved, denominator)

    @staticmethod
    def backward(ctx, dout, *_):
        logits, labels, class_weights, saved, denominator = ctx.saved_tensors
        formula, scalars, ignore_index, reduction, dtype = ctx.options
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # then it may be differentiated again
            loss = whole_loss(logits, labels, class_weights, FORMULAS[formula], scalars, ignore_index, reduction, dtype)
            grad = torch.autograd.grad(loss, logits, dout, create_graph=True)[0]
        else:
            grad = label_rows_backward(
                logits, labels, class_weights, saved, denominator, dout, formula, scalars, ignore_index, reduction
            )
        return grad, *[None] * 7


def label_rows(formula, logits, labels, class_weights=None, scalars=(), ignore_index=-100, reduction="mean", out_dtype=None):
    """``formula`` of every row of ``logits`` (rows, classes) whose label is not ``ignore_index``.

    The mean divides by the sum of the rows' weights. out_dtype: of the result; the logits', or float32 under autocast, when None.
    """
    options = ([float(s) for s in scalars], ignore_index, reduction, out_dtype or result_dtype(logits))
    if logits.device.type not in ("cpu", "cuda", "xpu") or read_whole():
        return whole_loss(logits, labels, class_weights, formula, *options)
    return LabelRows.apply(logits, labels, class_weights, formula.name, *options)[0]
