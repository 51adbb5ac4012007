"""regions in PyTorch: whole, differentiable as often as one likes; and in blocks of pixels that stay in a CPU's cache."""

import torch

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.reduction import cast
from triton_losses.core.threads import elements, share

CERTAIN = 1e-30  # a smaller probability of a pixel's own class has lost digits, or all of itself; its logarithm has not


def takes_weight(formula, scalars):
    """Whether the class weight is an operand of the formula of an element; else it multiplies the loss."""
    return len(formula.parameters) - len(scalars) == 3


def activate(x, activation):
    return x.softmax(1) if activation == "softmax" else x.sigmoid() if activation == "sigmoid" else x


def share_of(t, smoothing):
    """How much of a pixel's row loss is each class's; the classes come last but one."""
    return t + smoothing * (1.0 / t.shape[-2] - t) if smoothing else t


def zero_where_no_share(share, losses):
    return torch.where(share == 0, 0, share * losses)  # 0 · inf would be nan



# Whole


def whole_sums(logits, targets, class_weights, activation, ignore_index, squared, smaller, formula, scalars, smoothing):
    """(images, 3, classes) sums and (images,) losses."""
    x = cast(logits, compute_dtype(logits.dtype))
    kept = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
    t = torch.where(kept, targets, 0)
    if targets.dim() == 2:
        t, kept = t[:, None] == torch.arange(x.shape[1], device=x.device)[:, None], kept[:, None].expand(x.shape)
        x = torch.where(kept, x, 0)  # or a nan there would be the gradient's too
    t = t.to(x.dtype) * kept
    p = torch.where(kept, activate(x, activation), 0)
    overlap = torch.minimum(p, t) if smaller else p * t
    sums = torch.stack([overlap.sum(2), (p * p if squared else p).sum(2), (t * t if squared else t).sum(2)], 1)
    if formula is None:
        return sums, x.new_zeros(x.shape[0])
    weights = (x.new_ones(x.shape[1]) if class_weights is None else cast(class_weights, x.dtype))[:, None].expand(x.shape)
    if activation == "softmax":
        losses = zero_where_no_share(share_of(t, smoothing), formula.value(x.log_softmax(1), weights, *scalars))
    elif takes_weight(formula, scalars):
        losses = formula.value(x, t, weights, *scalars)
    else:
        losses = formula.value(x, t, *scalars) * weights
    return sums, torch.where(kept, losses, 0).sum((1, 2))


# In blocks


FEW = 1 << 16  # elements of the smallest block
ALONE = 64 << 20  # bytes of logits that the calling thread reads without help: beyond, another process on a core costs too much
SHARE = 10.5  # of the logits that a block's buffers may be together beyond that: less than a tenth of the gradient


class Blocks:
    """Runs of pixels of an image, or several small images at a time: (images, classes, pixels) each.

    The probabilities of all pixels lie where their gradient is to lie: a forward that is to be differentiated computes them once,
    and the backward turns them into the gradient in place.
    """

    def __init__(self, logits, targets, class_weights, activation, ignore_index, squared, smaller, formula, scalars, smoothing):
        self.logits, self.targets, self.activation, self.ignore_index = logits, targets, activation, ignore_index
        self.squared, self.smaller, self.formula, self.scalars, self.smoothing = squared, smaller, formula, scalars, smoothing
        images, classes, pixels = logits.shape
        self.dtype, self.labels = compute_dtype(logits.dtype), targets.dim() == 2
        self.by_label = activation == "softmax" and self.labels and not smoothing
        self.weights = class_weights if class_weights is None else class_weights.to(self.dtype)[:, None]
        operand = formula is not None and activation != "softmax" and takes_weight(formula, scalars)
        self.weight_operand = [1.0 if self.weights is None else self.weights] * operand
        self.index = torch.arange(classes, dtype=self.dtype)[:, None]
        self.ones = torch.ones(classes, dtype=self.dtype)

        buffers = 1 + self.labels * 3 / classes + (formula is not None) * (1 if self.by_label else 2) + squared + 3 * smaller
        most = max(64, min(2 * elements(self.dtype), max(FEW, int(logits.numel() / buffers / SHARE))) // classes)
        self.runs_of_image = -(-pixels // most)
        self.pixels = -(-pixels // self.runs_of_image)  # runs are of about one size
        self.images = most // pixels if self.runs_of_image == 1 else 1
        self.count = -(-images // self.images) * self.runs_of_image
        self.alone = ALONE // (self.images * self.pixels * classes * self.dtype.itemsize)
        self.logits_of, self.targets_of, self.probabilities_of = self.blocks(logits), self.blocks(targets), None
        self.sigmoid_is_due = False

    def blocks(self, tensor):
        """Those of a tensor (images, ..., pixels)."""
        return [run for some in tensor.split(self.images) for run in some.split(self.pixels, -1)]

    def begin_probabilities(self):
        """A tensor for all probabilities, which `read` fills; None if they are not of the gradient's type."""
        if self.activation == "none" or self.logits.dtype != self.dtype:
            return None
        if self.activation == "softmax":  # whole: of a slice of pixels it would make a copy
            return self.logits.softmax(1)
        self.sigmoid_is_due = True
        return torch.empty_like(self.logits)

    def read(self, i):
        """x, p, t and which of them count, None where all do; else p and t are 0. Of labels the last has one class."""
        x, raw, kept = self.logits_of[i].to(self.dtype), self.targets_of[i], None
        raw = raw[:, None] if self.labels else raw
        if self.ignore_index is not None:
            kept = raw != self.ignore_index
            kept = None if kept.all() else kept
        raw = raw.to(self.dtype) if kept is None else raw.to(self.dtype).masked_fill(~kept, -1 if self.labels else 0)
        # a comparison that writes floats is ten times as fast as one that writes truth values
        t = torch.eq(raw, self.index, out=torch.empty_like(x, memory_format=torch.contiguous_format)) if self.labels else raw
        if self.sigmoid_is_due:
            p = torch.sigmoid(x, out=self.probabilities_of[i])
        else:
            p = activate(x, self.activation) if self.probabilities_of is None else self.probabilities_of[i]
        if kept is not None:
            finite = x.sum().isfinite()
            p = p * kept if self.activation == "none" else p.mul_(kept)  # ten times as fast as masked_fill, but nan stays nan
            if not finite:
                x, p = x.masked_fill(~kept, 0), p.masked_fill_(~kept, 0)
        return x, p, t, kept

    def times(self, t, factor):
        """t · factor, in place of t where that is no tensor of the caller's."""
        return t.mul_(factor) if self.labels else t * factor

    def check_labels(self, i, pixels, kept):
        """Every label that counts hit a class; pixels: how many hit each."""
        raw, classes = self.targets_of[i], self.logits.shape[1]
        if pixels.sum() != (raw.numel() if kept is None else kept.sum()):
            raw = raw if kept is None else raw[kept[:, 0]]
            wrong = raw[(raw < 0) | (raw >= classes)]
            if wrong.numel():
                ignored = "" if self.ignore_index is None else f", or ignore_index, {self.ignore_index}"
                raise IndexError(f"Target {wrong[0].item()} is out of bounds: it must be in [0, {classes}){ignored}")

    def log_p_of_label(self, i, x, pt, kept):
        """Of each pixel's own class."""
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
            losses = zero_where_no_share(share_of(t, self.smoothing), self.formula.value(x.log_softmax(1), weights, *self.scalars))
        else:
            losses = self.formula.value(x, t, *self.weight_operand, *self.scalars)
            losses = losses if self.weights is None or self.weight_operand else losses * self.weights
        return (losses if kept is None else losses.masked_fill(~kept, 0)).sum((1, 2))

    def forward(self, keep=False):
        """Sums, losses, and all probabilities if they are to be kept and are of the gradient's type."""
        images, classes, _ = self.logits.shape
        probabilities = self.begin_probabilities() if keep else None
        if probabilities is not None:
            self.probabilities_of = self.blocks(probabilities)
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
            pt = torch.minimum(p, t) if self.smaller else self.times(t, p)
            torch.sum(pt, 2, out=overlap)
            if self.formula is not None and self.by_label:
                losses_of[i].copy_(self.losses_of_labels(self.log_p_of_label(i, x, pt, kept), weight, kept))

        share(add, self.count, self.alone)
        return partial_sums.view(images, -1, 3, classes).sum(1), partial_losses.view(images, -1).sum(1), probabilities

    def backward(self, d_sums, d_losses, probabilities=None):
        """The gradient; in place of the probabilities, where these are given."""
        probabilities = self.begin_probabilities() if probabilities is None else probabilities
        grad = torch.empty_like(self.logits) if probabilities is None else probabilities
        grad_of = self.blocks(grad)
        if probabilities is not None:
            self.probabilities_of = grad_of
        d_overlaps, d_predictions, _ = (d[:, :, None].split(self.images) for d in d_sums.unbind(1))
        d_losses_of = d_losses[:, None, None].split(self.images)

        def write(i):
            images, out = i // self.runs_of_image, grad_of[i]
            x, p, t, kept = self.read(i)
            step = torch.where(p < t, 1.0, torch.where(p > t, 0.0, 0.5)).to(p.dtype) if self.smaller else t
            dx = self.times(step, d_overlaps[images]) if self.formula is None else step * d_overlaps[images]
            dx = dx.addcmul_(p, d_predictions[images], value=2) if self.squared else dx.add_(d_predictions[images])
            dx = self.through_activation(i, dx, x, p, t, kept, d_losses_of[images], out if out.dtype == dx.dtype else dx)
            if kept is not None and not self.by_label:  # there p and t make it 0
                dx.masked_fill_(~kept, 0)
            if dx is not out:
                out.copy_(dx)

        share(write, self.count, self.alone)
        return grad

    def through_activation(self, i, dp, x, p, t, kept, upstream, out):
        """∂/∂p becomes ∂/∂x, the formula's with it; in ``out``, which may be where p lies."""
        if self.activation == "softmax":
            return self.through_softmax(i, dp.mul_(p), x, p, t, kept, upstream, out)
        own = None if self.formula is None else self.slope(x, p, t)
        if self.activation == "sigmoid":
            torch.ops.aten.sigmoid_backward.grad_input(dp, p, grad_input=out)  # from here on p is no more
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
            own = zero_where_no_share(share_of(t, self.smoothing), slope * upstream)
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
    """Σ_c factors_c x_c; (classes,) and (images, classes, pixels)."""
    return (factors @ x[0])[None] if len(x) == 1 else torch.matmul(factors, x)
