"""Images and their labels in blocks of pixels that stay in a CPU's cache: logits (images, classes, pixels).

The backward computes the softmax of each pixel again from the logits, which it reads anyway. So nothing is saved per
pixel: with two classes, a saved maximum and logarithm would be as large as the logits. Or the forward keeps the log
softmax in the gradient's memory, and the backward turns it into the gradient in place.
"""

import torch

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import shapes_only
from triton_losses.core.rows import arguments_of, counted, slots_of, transform, wanted_of
from triton_losses.core.threads import elements, share


def scratch(tensors, problem):
    """Memory for the log softmax over the classes, which becomes the gradient's; None if the backward cannot use it."""
    logits = tensors[0]
    if (
        not any(slots_of(FORMULAS[problem.formula])[1:4])
        or logits.dtype != compute_dtype(logits.dtype)
        or not logits.is_contiguous()
    ):
        return None
    return torch.empty_like(logits)


def scratch_again(tensors, problem):
    """What the forward has filled that memory with, for a second backward."""
    found = scratch(tensors, problem)
    return found if found is None else log_softmax_of(tensors[0], problem, out=found)


def log_softmax_of(logits, problem, out):
    return torch.log_softmax(transform(logits, problem.softcap, problem.scale), 1, out=out)


def forward(tensors, problem, log_rows=None):
    """saved: the sum of the weights where the mean needs it; beside log_rows the labels' log p if the backward needs
    it."""
    logits, labels, _ = tensors
    none, wide = problem.reduction == "none", compute_dtype(logits.dtype)
    out = logits.new_empty(labels.shape if none else (), dtype=problem.dtype)
    if shapes_only():
        return [out], [logits.new_empty(() if problem.reduction == "mean" else (0,), dtype=wide)]
    formula, log_p = FORMULAS[problem.formula], []
    if log_rows is not None and "log_p" in formula.needs[wanted_of(formula)]:
        log_p = [log_rows.new_empty(labels.shape)]
    sums = forward_blocks(tensors, problem, out if none else None, log_rows, *log_p)
    nothing = sums.new_empty(0)
    if none:
        return [out], [nothing, *log_p]
    total, weight = sums.sum(1).unbind(0)
    if problem.reduction == "sum":
        return [total.to(problem.dtype, copy=True)], [nothing, *log_p]
    return [(total / weight).to(problem.dtype)], [weight.clone(), *log_p]


def backward(tensors, saved, upstream, problem, log_rows=None):
    logits = tensors[0]
    grad = logits.new_empty(logits.shape) if log_rows is None else log_rows
    if not shapes_only():
        factor = upstream[0].to(compute_dtype(logits.dtype))
        factor = factor / saved[0] if problem.reduction == "mean" else factor
        backward_blocks(tensors, problem, grad, factor, log_rows is not None, *saved[1:])
    return [grad]


def plane_blocks(logits):
    """Slices (images, pixels) of each block: whole images if they are small, otherwise a run of one image's pixels."""
    images, classes, pixels = logits.shape
    # pixels of a block: fewer, larger blocks than elsewhere, because each block also takes operations per pixel
    most = 6 * elements(compute_dtype(logits.dtype)) // (classes + 2)
    if pixels <= most:
        step = most // max(pixels, 1)
        return [(slice(i, i + step), slice(None)) for i in range(0, images if classes * pixels else 0, step)]
    step = max(most, 16)
    return [(slice(i, i + 1), slice(start, start + step)) for i in range(images) for start in range(0, pixels, step)]


def mean_over_classes(x, class_weights):
    return x.mean(1) if class_weights is None else torch.matmul(class_weights / len(class_weights), x)


OF_LOGITS, OF_LOG_SOFTMAX = {"picked", "lse"}, {"log_p", "mean_log_p", "lse"}


def statistics_of(x, log_softmax, at, class_weights, taken, log_p=None):
    """In the order of STATISTICS, those in ``taken``, from x and its log softmax; None for the others."""
    if log_p is None and "log_p" in taken:
        log_p = log_softmax.gather(1, at)[:, 0]
    return (
        x.gather(1, at)[:, 0] if "picked" in taken else None,
        log_p,
        mean_over_classes(log_softmax, class_weights) if "mean_log_p" in taken else None,
        # the largest of log_softmax is -log Σ exp(x - max)
        x.amax(1) - log_softmax.amax(1) if "lse" in taken else None,
        None,
    )


def forward_blocks(tensors, problem, out, log_rows=None, log_p=None):
    """Write losses to ``out``, or return sums (2, blocks) of losses and weights.

    log_rows: is filled with the log softmax, log_p with that of the labels, unless they are None.
    """
    logits, labels, class_weights = tensors
    formula, scalars, ignore_index, softcap, scale, *_ = problem
    formula = FORMULAS[formula]
    wide, taken, classes = compute_dtype(logits.dtype), set(formula.parameters), logits.shape[1]
    class_weights = class_weights if class_weights is None else class_weights.to(wide)
    parts = plane_blocks(logits)
    sums = logits.new_empty(2, max(len(parts), 1), dtype=wide)
    if not parts:  # no pixels, or no classes: then every label must be ignored
        counted(labels, None, classes, ignore_index, wide)
        (sums if out is None else out).zero_()
    whole_images = not parts or parts[0][1] == slice(None)
    if log_rows is not None and not whole_images:  # torch would copy a slice of pixels
        log_softmax_of(logits, problem, out=log_rows)

    def part(i):
        images, pixels = parts[i]
        x = log_softmax = None
        if log_rows is None or whole_images or taken & OF_LOGITS:
            x = transform(logits[images, :, pixels].to(wide), softcap, scale)
        if log_rows is not None:
            log_softmax = log_rows[images, :, pixels]
            if whole_images:
                torch.log_softmax(x, 1, out=log_softmax)
        elif taken & OF_LOG_SOFTMAX:
            log_softmax = x.log_softmax(1)
        kept, at, weights = counted(labels[images, pixels], class_weights, classes, ignore_index, wide)
        statistics = statistics_of(x, log_softmax, at, class_weights, taken)
        if log_p is not None:
            log_p[images, pixels] = statistics[1]
        losses = formula.value(*arguments_of(formula, statistics, 1.0 if weights is None else weights), *scalars)
        losses = losses if kept is None else torch.where(kept, losses, 0)
        if out is None:
            sums[0, i] = losses.sum()
            sums[1, i] = losses.numel() if weights is None else weights.sum()
        else:
            out[images, pixels] = losses

    share(part, len(parts))
    return sums


def backward_blocks(tensors, problem, grad, upstream, of_log_rows=False, log_p=None):
    """Write the gradient of Σ upstream · losses to ``grad``, which holds the log softmax if ``of_log_rows``.

    log_p: that of the labels, if known.
    """
    logits, labels, class_weights = tensors
    formula, scalars, ignore_index, softcap, scale, *_ = problem
    formula = FORMULAS[formula]
    wide, slots, classes = compute_dtype(logits.dtype), slots_of(formula), logits.shape[1]
    class_weights = class_weights if class_weights is None else class_weights.to(wide)
    mean_weight = 1.0 if class_weights is None or not slots[2] else class_weights.mean()
    wanted = wanted_of(formula)
    needs, parts = formula.needs[wanted], plane_blocks(logits)
    direct = grad.dtype == wide

    def part(i):
        images, pixels = parts[i]
        out, x = grad[images, :, pixels], None
        kept, at, weights = counted(labels[images, pixels], class_weights, classes, ignore_index, wide)
        if not of_log_rows or softcap or needs & OF_LOGITS:
            x = transform(logits[images, :, pixels].to(wide), softcap, scale)
        log_softmax = out if of_log_rows else x.log_softmax(1) if needs & OF_LOG_SOFTMAX else None
        # where a pixel has a nan or inf, its first class has a nan or -inf, and looking there alone takes less time
        finite = kept is None or of_log_rows and bool(log_softmax[:, 0].sum().isfinite())
        known = None if log_p is None else log_p[images, pixels]
        statistics = statistics_of(x, log_softmax, at, class_weights, needs, known)
        g = x.softmax(1) if log_softmax is None else torch.exp(log_softmax, out=out if direct else None)
        found = formula.partials(wanted)(
            *arguments_of(formula, statistics, 1.0 if weights is None else weights), *scalars
        )
        factor = upstream[images, pixels] if upstream.dim() else upstream
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
        if not finite and bool(g.sum().isnan()):  # nan times an ignored pixel's 0 is nan
            g.masked_fill_(~kept[:, None], 0)
        if g is not out:
            out.copy_(g)

    share(part, len(parts))
