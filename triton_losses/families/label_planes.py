"""label_rows' other layout: logits (images, classes, pixels), whose classes are strided and whose pixels lie side by side.

A row is a pixel: its formula, statistics and gradient are those of label_rows.py, and nothing is permuted or copied.

    forward   reads the logits once; writes each pixel's loss, or one partial sum per tile of pixels
    backward  reads the logits once and writes the gradient

Of few classes the backward computes the softmax of a pixel anew, from the values it has read anyhow, so nothing is saved: at two
classes a saved maximum and logarithm would be as large as the logits. Of many, kernels save both. On a CPU the forward leaves
log softmax where the gradient is to lie, and the backward makes it of that, in place.
"""

import torch

from triton_losses.core.compiler import compute_dtype, runs_kernels, triton
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import shapes_only
from triton_losses.core.threads import elements, share
from triton_losses.families.label_rows_blocks import arguments_of, counted, slots_of, transform

if triton is not None:
    from triton_losses.kernels.label_planes import SPAN, backward_launch, few, forward_launch, shared_arguments


def readable(logits):
    """Pixels side by side; planes and images may lie anywhere."""
    return logits if logits.stride(2) == 1 or logits.shape[2] == 1 else logits.contiguous()


def saved_of(logits, formula):
    """Room for each pixel's max x, log Σ exp(x - max) and, where the formula takes it, mean_log_p: for kernels, of many classes."""
    images, _, pixels = logits.shape
    taken = slots_of(formula)
    count = 0 if not runs_kernels(logits) or few(logits) or not any(taken[1:4]) else 3 if taken[2] else 2
    return logits.new_empty((count, images, pixels) if count else (0,), dtype=compute_dtype(logits.dtype))


def log_rows_of(logits, formula, softcap, scale):
    """log softmax over the classes, in what is to become the gradient; None where that does not serve."""
    if not any(slots_of(FORMULAS[formula])[1:4]) or logits.dtype != compute_dtype(logits.dtype) or not logits.is_contiguous():
        return None
    return transform(logits, softcap, scale).log_softmax(1)


def planes_forward(logits, labels, class_weights, formula, scalars, ignore_index, softcap, scale, reduction, dtype, log_rows=None):
    """The body of label_rows_forward for this layout."""
    formula = FORMULAS[formula]
    saved, whole = saved_of(logits, formula), reduction == "none"
    out = logits.new_empty(labels.shape if whole else (), dtype=dtype)
    denominator = saved.new_empty(() if reduction == "mean" else (0,))
    if shapes_only():
        return out, saved, denominator
    if not runs_kernels(logits):
        options = scalars, ignore_index, softcap, scale
        sums = forward_blocks(logits, labels, class_weights, formula, *options, out if whole else None, log_rows)
    else:
        if logits.device.type == "cpu":
            counted(labels, None, logits.shape[1], ignore_index, torch.float32)  # refuses a label that is no class; a GPU asserts
        images, _, pixels = logits.shape
        sums = None if whole else saved.new_empty(2, images, -(-pixels * logits.element_size() // SPAN))
        forward_launch(
            **shared_arguments(readable(logits), labels, class_weights, formula, slots_of(formula), scalars, ignore_index, softcap, scale, saved),
            out=out if whole else sums, REDUCE=not whole,
        )  # fmt: skip
    if whole:
        return out, saved, denominator
    total, weight = sums.flatten(1).sum(1).unbind(0)
    if reduction == "sum":
        return total.to(dtype, copy=True), saved, denominator
    return (total / weight).to(dtype), saved, weight.clone()


def planes_backward(
    logits, labels, class_weights, saved, denominator, dout, formula, scalars, ignore_index, softcap, scale, reduction, log_rows=None
):  # fmt: skip
    """The body of label_rows_backward for this layout."""
    grad = logits.new_empty(logits.shape) if log_rows is None else log_rows
    if shapes_only():
        return grad
    formula, denominator = FORMULAS[formula], denominator if reduction == "mean" else None
    options = scalars, ignore_index, softcap, scale
    if not runs_kernels(logits):
        backward_blocks(logits, labels, class_weights, formula, *options, grad, dout, denominator, log_rows is not None)
        return grad
    same = not any(dout.stride())  # one value, or one value expanded: what loss.sum().backward() sends
    backward_launch(
        **shared_arguments(readable(logits), labels, class_weights, formula, slots_of(formula), *options, saved),
        grad=grad, upstream=dout if same else dout.contiguous(), denominator=saved if denominator is None else denominator,
        SAME=same, MEAN=denominator is not None,
    )  # fmt: skip
    return grad


# In blocks that stay in a CPU's cache


def plane_blocks(logits):
    """(images, pixels) of each block: whole images while they are small, else a run of one image's pixels."""
    images, classes, pixels = logits.shape
    most = 4 * elements(compute_dtype(logits.dtype)) // (classes + 2)  # pixels, which have operations of their own: fewer, larger blocks
    if pixels <= most:
        step = most // max(pixels, 1)
        return [(slice(i, i + step), slice(None)) for i in range(0, images if classes * pixels else 0, step)]
    step = max(most, 16)
    return [(slice(i, i + 1), slice(start, start + step)) for i in range(images) for start in range(0, pixels, step)]


def mean_over_classes(x, class_weights):
    return x.mean(1) if class_weights is None else torch.matmul(class_weights / len(class_weights), x)


OF_LOGITS, OF_LOG_SOFTMAX = {"picked", "lse"}, {"log_p", "mean_log_p", "lse"}


def statistics_of(x, log_softmax, at, class_weights, taken):
    """In STATISTICS' order, those taken of x and of its log softmax, else None."""
    return (
        x.gather(1, at)[:, 0] if "picked" in taken else None,
        log_softmax.gather(1, at)[:, 0] if "log_p" in taken else None,
        mean_over_classes(log_softmax, class_weights) if "mean_log_p" in taken else None,
        x.amax(1) - log_softmax.amax(1) if "lse" in taken else None,  # the largest of log_softmax is -log Σ exp(x - max)
        None,
    )


def forward_blocks(logits, labels, class_weights, formula, scalars, ignore_index, softcap, scale, out, log_rows=None):
    """Losses into ``out``, or, where that is None, the sums (2, blocks) of losses and weights. log_rows: log softmax, if known."""
    wide, taken, classes = compute_dtype(logits.dtype), set(formula.parameters), logits.shape[1]
    class_weights = class_weights if class_weights is None else class_weights.to(wide)
    parts = plane_blocks(logits)
    sums = logits.new_empty(2, max(len(parts), 1), dtype=wide)
    if not parts:  # no pixels, or no classes: then every label is ignored
        counted(labels, None, classes, ignore_index, wide)
        (sums if out is None else out).zero_()

    def part(i):
        images, pixels = parts[i]
        x = log_softmax = None
        if log_rows is None or taken & OF_LOGITS:
            x = transform(logits[images, :, pixels].to(wide), softcap, scale)
        if taken & OF_LOG_SOFTMAX:
            log_softmax = x.log_softmax(1) if log_rows is None else log_rows[images, :, pixels]
        kept, at, weights = counted(labels[images, pixels], class_weights, classes, ignore_index, wide)
        statistics = statistics_of(x, log_softmax, at, class_weights, taken)
        losses = formula.value(*arguments_of(formula, statistics, 1.0 if weights is None else weights), *scalars)
        losses = losses if kept is None else torch.where(kept, losses, 0)
        if out is None:
            sums[0, i] = losses.sum()
            sums[1, i] = losses.numel() if weights is None else weights.sum()
        else:
            out[images, pixels] = losses

    share(part, len(parts))
    return sums


def backward_blocks(
    logits, labels, class_weights, formula, scalars, ignore_index, softcap, scale, grad, upstream, denominator, of_log_rows=False
):  # fmt: skip
    """The gradient of Σ upstream · losses / denominator into ``grad``, which may hold log softmax before."""
    wide, slots, classes = compute_dtype(logits.dtype), slots_of(formula), logits.shape[1]
    class_weights = class_weights if class_weights is None else class_weights.to(wide)
    mean_weight = 1.0 if class_weights is None or not slots[2] else class_weights.mean()
    wanted = tuple(True for slot in slots[:5] if slot)
    needs, parts = formula.needs[wanted], plane_blocks(logits)
    direct = grad.dtype == wide

    def part(i):
        images, pixels = parts[i]
        out, x = grad[images, :, pixels], None
        kept, at, weights = counted(labels[images, pixels], class_weights, classes, ignore_index, wide)
        if not of_log_rows or softcap or needs & OF_LOGITS:
            x = transform(logits[images, :, pixels].to(wide), softcap, scale)
        log_softmax = out if of_log_rows else x.log_softmax(1) if needs & OF_LOG_SOFTMAX else None
        statistics = statistics_of(x, log_softmax, at, class_weights, needs)
        g = x.softmax(1) if log_softmax is None else torch.exp(log_softmax, out=out if direct else None)
        found = formula.partials(wanted)(*arguments_of(formula, statistics, 1.0 if weights is None else weights), *scalars)
        factor = upstream[images, pixels].to(wide) if upstream.dim() else upstream.to(wide)
        factor = factor if denominator is None else factor / denominator
        factor = factor if scale == 1 else factor * scale
        partials = [found[slot - 1] * factor if slot else 0.0 for slot in slots[:4]]
        if kept is not None:
            partials = [torch.where(kept, d, 0) if slot else 0.0 for slot, d in zip(slots[:4], partials)]
        d_picked, d_log_p, d_mean, d_lse = partials
        slope = d_lse - d_log_p - d_mean * mean_weight
        g.mul_(slope[:, None] if slope.dim() else slope)
        if slots[2]:
            uniform = (d_mean / classes).expand(at[:, 0].shape)[:, None]
            g.add_(uniform if class_weights is None else uniform * class_weights[:, None])
        if slots[0] or slots[1]:
            g.scatter_add_(1, at, (d_log_p + d_picked).expand(at[:, 0].shape)[:, None])
        if softcap:
            g.mul_(1 - (x / (softcap * scale)).square_())
        if kept is not None and bool(g.sum().isnan()):  # whose product with an ignored pixel's 0 is nan
            g.masked_fill_(~kept[:, None], 0)
        if g is not out:
            out.copy_(g)

    share(part, len(parts))
