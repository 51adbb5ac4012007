"""regions in PyTorch: whole, differentiable as often as one likes; and in blocks of pixels that stay in a CPU's cache."""

import torch

from triton_losses.blocks import elements, share
from triton_losses.compiler import compute_dtype

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
    x = logits.to(compute_dtype(logits.dtype))
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
    weights = (x.new_ones(x.shape[1]) if class_weights is None else class_weights.to(x.dtype))[:, None].expand(x.shape)
    if activation == "softmax":
        losses = zero_where_no_share(share_of(t, smoothing), formula.value(x.log_softmax(1), weights, *scalars))
    elif takes_weight(formula, scalars):
        losses = formula.value(x, t, weights, *scalars)
    else:
        losses = formula.value(x, t, *scalars) * weights
    return sums, torch.where(kept, losses, 0).sum((1, 2))


# In blocks


FEW = 1 << 16  # elements of the smallest block
SHARE = 56  # of the logits that a block may be beyond that: a handful of buffers of it stay below a tenth of the gradient


class Blocks:
    """Runs of pixels of one image, (classes, n) each."""

    def __init__(self, logits, targets, class_weights, activation, ignore_index, squared, smaller, formula, scalars, smoothing):
        self.logits, self.targets, self.activation, self.ignore_index = logits, targets, activation, ignore_index
        self.squared, self.smaller, self.formula, self.scalars, self.smoothing = squared, smaller, formula, scalars, smoothing
        images, classes, pixels = logits.shape
        self.dtype, self.labels = compute_dtype(logits.dtype), targets.dim() == 2
        self.weights = class_weights if class_weights is None else class_weights.to(self.dtype)[:, None]
        self.index = torch.arange(classes, dtype=self.dtype)[:, None]
        most = min(elements(self.dtype), max(FEW, logits.numel() // SHARE))
        step = max(64, most // max(classes, 1))
        self.bytes = step * classes * self.dtype.itemsize
        self.parts = [(b, slice(i, min(i + step, pixels))) for b in range(images) for i in range(0, pixels, step)]

    def read(self, i):
        """x, p, t and which of them count, (n,) of labels or (classes, n) of a map, None where all do; else p and t are 0."""
        image, run = self.parts[i]
        x, raw, kept = self.logits[image, :, run].to(self.dtype), self.targets[image, ..., run], None
        if self.ignore_index is not None:
            kept = raw != self.ignore_index
            kept = None if kept.all() else kept
        raw = raw.to(self.dtype) if kept is None else raw.to(self.dtype).masked_fill(~kept, -1 if self.labels else 0)
        # a comparison that writes floats is ten times as fast as one that writes truth values
        t = torch.eq(raw, self.index, out=torch.empty_like(x)) if self.labels else raw
        p = activate(x[None], self.activation)[0]
        if kept is not None:
            p = p * kept  # ten times as fast as masked_fill, but nan stays nan
            if p.sum().isnan():
                x, p = (v.masked_fill(~kept, 0) for v in (x, p))
        return x, p, t, kept

    def check_labels(self, i, t, kept):
        """Every label that counts hit a class."""
        image, run = self.parts[i]
        if t.sum() != (t.shape[1] if kept is None else kept.sum()):
            raw, classes = self.targets[image, run], t.shape[0]
            raw = raw if kept is None else raw[kept]
            wrong = raw[(raw < 0) | (raw >= classes)]
            if wrong.numel():
                ignored = "" if self.ignore_index is None else f", or ignore_index, {self.ignore_index}"
                raise IndexError(f"Target {wrong[0].item()} is out of bounds: it must be in [0, {classes}){ignored}")

    def of_label(self, x, p, t, pt, kept):
        """log p of each pixel's own class, and that class's weight."""
        ones = p.new_ones(len(p))
        own = ones @ pt
        if kept is not None:
            own = own + ~kept
        log_p = own.log() if own.amin() > CERTAIN else (x.log_softmax(0).clamp_(min=torch.finfo(x.dtype).min) * t).sum(0)
        return log_p, own.new_ones(()) if self.weights is None else self.weights[:, 0] @ t

    def losses(self, x, p, t, pt, kept):
        formula, scalars, weights = self.formula, self.scalars, 1.0 if self.weights is None else self.weights
        if self.activation != "softmax":
            losses = formula.value(x, t, weights, *scalars) if takes_weight(formula, scalars) else formula.value(x, t, *scalars) * weights
        elif self.labels and not self.smoothing:
            losses = formula.value(*self.of_label(x, p, t, pt, kept), *scalars)
        else:
            losses = zero_where_no_share(share_of(t, self.smoothing), formula.value(x.log_softmax(0), weights + 0 * t, *scalars))
        return (losses if kept is None else losses.masked_fill(~kept, 0)).sum()

    def forward(self):
        images, classes, _ = self.logits.shape
        partial_sums = self.logits.new_empty(len(self.parts), 3, classes, dtype=self.dtype)
        partial_losses = partial_sums.new_zeros(len(self.parts))

        def add(i):
            x, p, t, kept = self.read(i)
            ones = p.new_ones(p.shape[1])
            if self.labels:
                self.check_labels(i, t, kept)
            pt = torch.minimum(p, t) if self.smaller else p * t
            torch.mv(pt, ones, out=partial_sums[i, 0])
            if self.formula is not None:
                partial_losses[i] = self.losses(x, p, t, pt, kept)
            for k, v in ((1, p), (2, t)):
                torch.mv(v.square() if self.squared else v, ones, out=partial_sums[i, k])

        share(add, len(self.parts), self.bytes)
        if not self.parts:
            return partial_sums.new_zeros(images, 3, classes), partial_losses.new_zeros(images)
        return partial_sums.view(images, -1, 3, classes).sum(1), partial_losses.view(images, -1).sum(1)

    def backward(self, grad, d_sums, d_losses):
        def write(i):
            image, run = self.parts[i]
            x, p, t, kept = self.read(i)
            d_overlap, d_predicted = d_sums[image, 0, :, None], d_sums[image, 1, :, None]
            step = torch.where(p < t, 1.0, torch.where(p > t, 0.0, 0.5)).to(p.dtype) if self.smaller else t
            dx = step * d_overlap
            dx.add_(2 * d_predicted * p if self.squared else d_predicted)
            if self.activation == "softmax":
                self.through_softmax(dx, x, p, t, kept, d_losses[image])
            elif self.activation == "sigmoid":
                dx.mul_(torch.addcmul(p, p, p, value=-1))
            if self.formula is not None and self.activation != "softmax":
                dx.add_(self.slope(x, t) * d_losses[image])
            if kept is not None and not (self.activation == "softmax" and self.labels and not self.smoothing):  # there p and t make it 0
                dx.masked_fill_(~kept, 0)
            grad[image, :, run] = dx

        share(write, len(self.parts), self.bytes)

    def through_softmax(self, dx, x, p, t, kept, upstream):
        """∂/∂p becomes ∂/∂x, and the row loss's joins it."""
        formula, scalars, own = self.formula, self.scalars, None
        dx.mul_(p)
        dot = dx.new_ones(len(dx)) @ dx
        if formula is not None:
            wanted = (True,)
            if self.labels and not self.smoothing:
                (own,) = formula.partials(wanted)(*self.of_label(x, p, t, p * t, kept), *scalars)
                own = own * upstream
                dot += own
                own = t * own
            else:
                weights = (1.0 if self.weights is None else self.weights) + 0 * t
                (slope,) = formula.partials(wanted)(x.log_softmax(0), weights, *scalars)
                own = zero_where_no_share(share_of(t, self.smoothing), slope * upstream)
                dot += own.sum(0)
        dx.addcmul_(p, dot, value=-1)
        if own is not None:
            dx.add_(own)

    def slope(self, x, t):
        """∂L/∂x of each element."""
        formula, scalars, weights = self.formula, self.scalars, 1.0 if self.weights is None else self.weights
        wanted = (True, *[False] * (len(next(iter(formula.cuts))) - 1))
        if takes_weight(formula, scalars):
            return formula.partials(wanted)(x, t, weights, *scalars)[0]
        return formula.partials(wanted)(x, t, *scalars)[0] * weights
