"""Regions in blocks of pixels that stay in a CPU's cache."""

import torch

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import shapes_only
from triton_losses.core.regions import (
    activate,
    divisors,
    loss_of,
    parts_of,
    present,
    shape_of_loss,
    share_of,
    takes_weight,
    zero_where_no_share,
)
from triton_losses.core.threads import elements, share

CERTAIN = 1e-30  # below this, the probability of a pixel's own class has lost digits; its log softmax has not
FEW = 1 << 17  # elements of the smallest block
# up to so many bytes of logits, blocks run in the calling thread; beyond, waiting for torch's own threads costs too
# much if another process occupies a core
ALONE = 64 << 20
SHARE = 10.5  # beyond FEW, all buffers of a block take 1/10.5 of the logits: less than a tenth of the gradient


def forward(tensors, problem, probabilities=None):
    """saved: the sums."""
    (sums, losses), _ = sums_forward(tensors, problem, probabilities)
    if shapes_only():
        out = sums.new_empty(shape_of_loss(problem, sums.shape[0], sums.shape[2]), dtype=problem.dtype)
    else:
        out = loss_of(sums, losses, tensors, problem)
    return [out], [sums]


def backward(tensors, saved, upstream, problem, wanted, probabilities=None):
    if shapes_only():
        return [torch.empty_like(tensors[0])]
    slopes = slopes_of(saved[0], tensors, problem, upstream[0].to(saved[0].dtype))
    return sums_backward(tensors, [], slopes, problem, wanted, probabilities)


def slopes_of(sums, tensors, problem, upstream):
    """The derivatives of `loss_of` with respect to the sums and the formula's losses, times the upstream gradient."""
    _, targets, weights = tensors
    (overlap, predicted, wanted), factors, class_weights = parts_of(sums, weights, problem)
    of_score, of_formula = problem.lambdas if problem.formula else (1.0, 0.0)
    slope, none = upstream * of_score, problem.reduction == "none"
    if problem.formula and none:
        slope = slope[:, None] / wanted.shape[1]
    elif problem.reduction == "mean" and problem.empty == "exclude":
        slope = slope / (present(wanted, class_weights) * len(wanted))[:, None]
    elif problem.reduction == "mean":
        slope = slope / wanted.numel()
    score = FORMULAS[problem.score].value(overlap, predicted, wanted, *problem.score_scalars)
    slope = slope * FORMULAS[problem.link].partials((True,))(score, *problem.link_scalars)[0]
    slope = slope if class_weights is None else slope * class_weights
    slope = slope if problem.empty == "smooth" else torch.where(wanted > 0, slope, 0)
    slope = slope if factors is None else slope * factors
    d_sums, first = torch.zeros_like(sums), int(not problem.background)
    by_each = FORMULAS[problem.score].partials((True, True, False))(overlap, predicted, wanted, *problem.score_scalars)
    for i, partial in enumerate(by_each):
        d_sums[:, i, first:] = partial * slope
    d_losses = sums.new_zeros(len(sums))
    if problem.formula:
        number = divisors(sums, targets, weights, problem)
        number = number.sum() if problem.reduction == "mean" else number
        d_losses += upstream * of_formula / torch.where(number == 0, 1, number)
    return d_sums, d_losses


def sums_forward(tensors, problem, probabilities=None):
    """Sums (images, 3, classes) and losses (images,). probabilities: to fill with the probabilities of all pixels."""
    logits = tensors[0]
    images, classes, _ = logits.shape
    if shapes_only() or not logits.numel():
        sums = logits.new_zeros(images, 3, classes, dtype=compute_dtype(logits.dtype))
        return [sums, sums.new_zeros(images)], []
    return Blocks(tensors, problem).forward(probabilities), []


def sums_backward(tensors, saved, upstream, problem, wanted, probabilities=None):
    """The gradient; it overwrites the probabilities, if these are given."""
    if shapes_only() or not tensors[0].numel():
        return [torch.empty_like(tensors[0])]
    return [Blocks(tensors, problem).backward(*upstream, probabilities)]


def scratch(tensors, problem):
    """The gradient's memory, where the forward may keep the probabilities; None if they do not fit there."""
    return torch.empty_like(tensors[0]) if may_hold_probabilities(tensors[0], problem) else None


def may_hold_probabilities(grad, problem):
    return problem.activation != "none" and grad.dtype == compute_dtype(grad.dtype)


class Blocks:
    """Blocks (images, classes, pixels): runs of pixels of one image, or several small images.

    The probabilities of all pixels are stored in the gradient's memory: a forward that will be differentiated computes
    them once, and the backward turns them into the gradient in place.
    """

    def __init__(self, tensors, problem):
        self.logits, self.targets, class_weights = tensors
        self.problem, self.activation, self.ignore_index = problem, problem.activation, problem.ignore_index
        self.squared, self.formula, self.scalars = problem.squared, FORMULAS.get(problem.formula), problem.scalars
        images, classes, pixels = self.logits.shape
        self.dtype, self.labels = compute_dtype(self.logits.dtype), self.targets.dim() == 2
        self.by_label = self.activation == "softmax" and self.labels and not problem.smoothing
        self.weights = None if class_weights is None or self.formula is None else class_weights.to(self.dtype)[:, None]
        operand = self.formula is not None and self.activation != "softmax" and takes_weight(self.formula, self.scalars)
        self.weight_operand = [1.0 if self.weights is None else self.weights] * operand
        self.index = torch.arange(classes, dtype=self.dtype, device=self.logits.device)[:, None]
        self.ones = self.logits.new_ones(classes, dtype=self.dtype)

        buffers = (
            1
            + self.labels * 3 / classes
            + (self.formula is not None) * (1 if self.by_label else 2)
            + self.squared
            + 3 * problem.smaller
        )
        most = max(64, min(2 * elements(self.dtype), max(FEW, int(self.logits.numel() / buffers / SHARE))) // classes)
        self.runs_of_image = -(-pixels // most)
        self.pixels = -(-pixels // self.runs_of_image)  # runs are of about one size
        self.images = most // pixels if self.runs_of_image == 1 else 1
        self.count = -(-images // self.images) * self.runs_of_image
        self.alone = ALONE // (self.images * self.pixels * classes * self.dtype.itemsize)
        self.logits_of, self.targets_of, self.probabilities_of = (
            self.blocks(self.logits),
            self.blocks(self.targets),
            None,
        )
        self.sigmoid_is_due = False

    def blocks(self, tensor):
        """The blocks of a tensor (images, ..., pixels)."""
        return [run for some in tensor.split(self.images) for run in some.split(self.pixels, -1)]

    def begin_probabilities(self, probabilities):
        """Fill the probabilities now (softmax), or let `read` fill them block by block (sigmoid)."""
        if self.activation == "softmax":
            torch.softmax(self.logits, 1, out=probabilities)  # whole, because it would copy a slice of pixels
        else:
            self.sigmoid_is_due = True
        self.probabilities_of = self.blocks(probabilities)

    def read(self, i):
        """x, p, t, and a mask of what counts (None: all); p and t are 0 elsewhere. With labels it has one class."""
        x, raw, kept = self.logits_of[i].to(self.dtype), self.targets_of[i], None
        raw = raw[:, None] if self.labels else raw
        if self.ignore_index is not None:
            kept = raw != self.ignore_index
            kept = None if kept.all() else kept
        raw = raw.to(self.dtype) if kept is None else raw.to(self.dtype).masked_fill(~kept, -1 if self.labels else 0)
        # a comparison that writes floats is ten times as fast as one that writes booleans
        t = (
            torch.eq(raw, self.index, out=torch.empty_like(x, memory_format=torch.contiguous_format))
            if self.labels
            else raw
        )
        if self.sigmoid_is_due:
            p = torch.sigmoid(x, out=self.probabilities_of[i])
        else:
            p = activate(x, self.activation) if self.probabilities_of is None else self.probabilities_of[i]
        if kept is not None:
            finite = x.sum().isfinite()
            # ten times as fast as masked_fill, but nan stays nan
            p = p * kept if self.activation == "none" else p.mul_(kept)
            if not finite:
                x, p = x.masked_fill(~kept, 0), p.masked_fill_(~kept, 0)
        return x, p, t, kept

    def times(self, t, factor):
        """t · factor, in place unless t belongs to the caller."""
        return t.mul_(factor) if self.labels else t * factor

    def check_labels(self, i, pixels, kept):
        """Raise an IndexError if a label that counts is no class. pixels: how many pixels each class has."""
        raw, classes = self.targets_of[i], self.logits.shape[1]
        if pixels.sum() != (raw.numel() if kept is None else kept.sum()):
            raw = raw if kept is None else raw[kept[:, 0]]
            wrong = raw[(raw < 0) | (raw >= classes)]
            if wrong.numel():
                ignored = "" if self.ignore_index is None else f", or ignore_index, {self.ignore_index}"
                raise IndexError(f"Target {wrong[0].item()} is out of bounds: it must be in [0, {classes}){ignored}")

    def log_p_of_label(self, i, x, pt, kept):
        """log p of each pixel's own class."""
        own = over_classes(self.ones, pt)
        if kept is not None:
            own += ~kept[:, 0]
        if own.amin() > CERTAIN:
            return own.log_()
        labels = self.targets_of[i][:, None].long()
        return x.log_softmax(1).gather(1, labels if kept is None else labels.masked_fill(~kept, 0))[:, 0]

    def weight_of_label(self, t):
        return self.ones[0] if self.weights is None else over_classes(self.weights[:, 0], t)

    def losses_of_labels(self, log_p, weight, kept):
        losses = self.formula.value(log_p, weight, *self.scalars)
        return (losses if kept is None else losses.masked_fill(~kept[:, 0], 0)).sum(1)

    def losses_of_elements(self, x, t, kept):
        if self.activation == "softmax":
            weights = (1.0 if self.weights is None else self.weights) + 0 * t
            losses = zero_where_no_share(
                share_of(t, self.problem.smoothing), self.formula.value(x.log_softmax(1), weights, *self.scalars)
            )
        else:
            losses = self.formula.value(x, t, *self.weight_operand, *self.scalars)
            losses = losses if self.weights is None or self.weight_operand else losses * self.weights
        return (losses if kept is None else losses.masked_fill(~kept, 0)).sum((1, 2))

    def forward(self, probabilities):
        """Sums and losses."""
        images, classes, _ = self.logits.shape
        if probabilities is not None:
            self.begin_probabilities(probabilities)
        partial_sums = self.logits.new_empty(images * self.runs_of_image, 3, classes, dtype=self.dtype)
        partial_losses = partial_sums.new_zeros(len(partial_sums))
        sums_of, losses_of = partial_sums.split(self.images), partial_losses.split(self.images)

        def add(i):
            x, p, t, kept = self.read(i)
            overlap, predicted, wanted = sums_of[i].unbind(1)
            torch.sum(p.square() if self.squared else p, 2, out=predicted)
            torch.sum(t.square() if self.squared else t, 2, out=wanted)
            if self.labels:
                self.check_labels(i, wanted, kept)
            if self.formula is not None and not self.by_label:
                losses_of[i].copy_(self.losses_of_elements(x, t, kept))
            weight = self.weight_of_label(t) if self.by_label else None
            pt = torch.minimum(p, t) if self.problem.smaller else self.times(t, p)
            torch.sum(pt, 2, out=overlap)
            if self.formula is not None and self.by_label:
                losses_of[i].copy_(self.losses_of_labels(self.log_p_of_label(i, x, pt, kept), weight, kept))

        share(add, self.count, self.alone)
        return [partial_sums.view(images, -1, 3, classes).sum(1), partial_losses.view(images, -1).sum(1)]

    def backward(self, d_sums, d_losses, probabilities):
        """The gradient; it overwrites the probabilities, if these are given."""
        grad = torch.empty_like(self.logits) if probabilities is None else probabilities
        grad_of = self.blocks(grad)
        if probabilities is not None:
            self.probabilities_of = grad_of
        elif may_hold_probabilities(grad, self.problem):
            self.begin_probabilities(grad)
        d_overlaps, d_predictions, _ = (d[:, :, None].split(self.images) for d in d_sums.unbind(1))
        d_losses_of = d_losses[:, None, None].split(self.images)

        def write(i):
            images, out = i // self.runs_of_image, grad_of[i]
            x, p, t, kept = self.read(i)
            step = torch.where(p < t, 1.0, torch.where(p > t, 0.0, 0.5)).to(p.dtype) if self.problem.smaller else t
            dx = self.times(step, d_overlaps[images]) if self.formula is None else step * d_overlaps[images]
            dx = dx.addcmul_(p, d_predictions[images], value=2) if self.squared else dx.add_(d_predictions[images])
            dx = self.through_activation(
                i, dx, x, p, t, kept, d_losses_of[images], out if out.dtype == dx.dtype else dx
            )
            if kept is not None and not self.by_label:  # by label, p and t are 0 and make it 0
                dx.masked_fill_(~kept, 0)
            if dx is not out:
                out.copy_(dx)

        share(write, self.count, self.alone)
        return grad

    def through_activation(self, i, dp, x, p, t, kept, upstream, out):
        """Turn ∂/∂p into ∂/∂x and add the formula's; the result is in ``out``, which may be the memory of p."""
        if self.activation == "softmax":
            return self.through_softmax(i, dp.mul_(p), x, p, t, kept, upstream, out)
        own = None if self.formula is None else self.slope(x, p, t)
        if self.activation == "sigmoid":
            torch.ops.aten.sigmoid_backward.grad_input(dp, p, grad_input=out)  # overwrites p
        else:
            out = dp
        return out if own is None else out.addcmul_(own, upstream)

    def through_softmax(self, i, dp_p, x, p, t, kept, upstream, out):
        formula, scalars, own, wanted = self.formula, self.scalars, None, (True,)
        dot = over_classes(self.ones, dp_p)[:, None]
        if formula is not None and self.by_label:
            needs_log_p = formula.parameters[0] in formula.needs[wanted]
            log_p = self.log_p_of_label(i, x, p * t, kept) if needs_log_p else self.ones[0]
            (slope,) = formula.partials(wanted)(log_p, self.weight_of_label(t), *scalars)
            own = (slope[:, None] if slope.dim() else slope) * upstream
            dot += own
        elif formula is not None:
            weights = (1.0 if self.weights is None else self.weights) + 0 * t
            (slope,) = formula.partials(wanted)(x.log_softmax(1), weights, *scalars)
            own = zero_where_no_share(share_of(t, self.problem.smoothing), slope * upstream)
            dot += own.sum(1, keepdim=True)
            t = self.ones[0]
        torch.addcmul(dp_p, p, dot, value=-1, out=out)
        return out if own is None else out.addcmul_(t, own)

    def slope(self, x, p, t):
        """∂L/∂x of each element."""
        given = p if self.activation == "sigmoid" else x.sigmoid()
        slope = self.formula.slope_given("sigmoid(x)")(given, x, t, *self.weight_operand, *self.scalars)
        return slope if self.weights is None or self.weight_operand else slope * self.weights


def over_classes(factors, x):
    """Σ_c factors_c x_c of factors (classes,) and x (images, classes, pixels)."""
    return (factors @ x[0])[None] if len(x) == 1 else torch.matmul(factors, x)
