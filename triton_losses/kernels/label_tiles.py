"""Functions of kernels for a block of an image's pixels and their labels: tiles, statistics, gradients."""

from typing import NamedTuple

import triton
import triton.language as tl

from triton_losses.core.device_math import exact, exp
from triton_losses.kernels.rows import LOWEST, LOWEST_DOUBLE, read_formula, transform


class Kind(NamedTuple):
    """Compile-time parameters of the kernels of images, besides the formula."""

    compute: tl.dtype
    vec: int  # numbers that a thread loads at once: at most 16 bytes
    slots: tuple  # the statistics that the formula takes: see core/rows.slots_of
    weighted: bool  # there are class weights
    capped: bool  # there is a softcap
    scaled: bool  # there is a scale other than 1
    held: int  # the number of classes if a thread holds those of all its pixels, otherwise 0
    saved: bool  # the forward saves the pixels' statistics for the backward
    reduced: bool  # the forward sums up losses and weights
    same: bool  # one upstream gradient for all pixels
    mean: bool  # the upstream gradient is divided by the sum of the weights


@triton.jit
def load_tiles(planes, c, scaling, COUNT: tl.constexpr, EVICT: tl.constexpr, KIND: tl.constexpr):
    """Load COUNT classes of a block of pixels, from class c on. Nothing waits in between, so the loads overlap."""
    at, stride, mask = planes
    at += c * stride
    tiles = ()
    for i in tl.static_range(COUNT):
        x = tl.load(at + i * stride, mask=mask, other=0.0, eviction_policy=EVICT).to(KIND.compute)
        tiles += (transform(x, scaling, KIND),)
    return tiles


@triton.jit
def take_classes(tiles, c, running, pivot, class_weights, KIND: tl.constexpr):
    """Fold classes from c on into the pixels' running maximum, Σ exp(x - maximum) and Σ w_j (x_j - pivot)."""
    highest, total, spread = running
    higher = highest
    for i in tl.static_range(len(tiles)):
        higher = tl.maximum(higher, tiles[i])
    total *= exp(highest - higher)
    for i in tl.static_range(len(tiles)):
        total += exp(tiles[i] - higher)
        if KIND.slots[2]:
            d = tiles[i] - pivot
            spread += d * tl.load(class_weights + c + i).to(d.dtype) if KIND.weighted else d
    return higher, total, spread


@triton.jit
def statistics_of(
    planes, tiles, picked, classes, weights, scaling, UNROLL: tl.constexpr, EVICT: tl.constexpr, KIND: tl.constexpr
):
    """Each pixel's max x, log Σ exp(x - max) and mean_log_p: from the tiles if KIND.held, otherwise from one read."""
    class_weights, mean_weight = weights
    pivot = tl.where(tl.abs(picked) < float("inf"), picked, 0.0).to(KIND.compute)
    highest = tl.full(pivot.shape, LOWEST_DOUBLE if KIND.compute == tl.float64 else LOWEST, KIND.compute)
    total = tl.zeros(pivot.shape, KIND.compute)
    spread = tl.zeros(pivot.shape, KIND.compute)
    if KIND.held:
        highest, total, spread = take_classes(tiles, 0, (highest, total, spread), pivot, class_weights, KIND)
    else:
        together = classes // UNROLL * UNROLL
        for c in range(0, together, UNROLL):
            loaded = load_tiles(planes, c, scaling, UNROLL, EVICT, KIND)
            highest, total, spread = take_classes(loaded, c, (highest, total, spread), pivot, class_weights, KIND)
        for c in range(together, classes):
            loaded = load_tiles(planes, c, scaling, 1, EVICT, KIND)
            highest, total, spread = take_classes(loaded, c, (highest, total, spread), pivot, class_weights, KIND)
    log_total = tl.log(total)
    if KIND.slots[2]:
        rest = pivot - highest - log_total
        if KIND.weighted:
            rest *= tl.load(mean_weight).to(KIND.compute)
        spread = spread / classes + rest
    return highest, log_total, spread


@triton.jit
def formula_of(picked, statistics, label, kept, class_weights, scalars, FORMULA: tl.constexpr, KIND: tl.constexpr):
    """Each pixel's loss, its partial derivatives and its class's weight. No formula of images takes the entropy."""
    highest, log_total, mean_log_p = statistics
    weight = tl.where(kept, 1.0, 0.0).to(KIND.compute)
    if KIND.weighted:
        weight = tl.load(class_weights + label, mask=kept, other=0.0).to(KIND.compute)
    read = (picked, (picked - highest) - log_total, mean_log_p, highest + log_total, highest)
    loss, partials = read_formula(FORMULA, read, weight, (), exact(scalars, KIND.compute), KIND)
    return loss, partials, weight


@triton.jit
def block_of(pixels, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """A program's block of pixels: image, first pixel, lanes, mask of those that exist, offsets in (images, pixels)."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(pixels, BLOCK)
    image = program // blocks
    first = (program - image * blocks) * BLOCK
    lanes = tl.arange(0, BLOCK)
    mask = lanes < tl.minimum(pixels - first, BLOCK).to(tl.int32) // KIND.vec * KIND.vec
    return image, first, lanes, mask, (image * (pixels // KIND.vec * KIND.vec) + first) + lanes


@triton.jit
def labels_of(at, mask, classes, ignore_index):
    """Whether each pixel's label counts, and its class, or class 0 if the label is no class."""
    label = tl.load(at, mask=mask, other=0).to(tl.int64)
    kept = mask & (label != ignore_index)
    fits = (label >= 0) & (label < classes)
    tl.device_assert(fits | ~kept, "a target is out of bounds: it is no class and not ignore_index")
    return kept, tl.where(fits, label, 0).to(tl.int32)


@triton.jit
def picked_of(planes, label, classes, scaling, KIND: tl.constexpr):
    """The logit of each pixel's label."""
    at, stride, mask = planes
    picked = tl.load(at + label.to(tl.int64) * stride, mask=mask & (label < classes), other=0.0).to(KIND.compute)
    return transform(picked, scaling, KIND)


@triton.jit
def gradient_of(x, c, of_pixels, class_weights, scaling, KIND: tl.constexpr):
    """∂L/∂x of class c; x is already transformed."""
    statistics, factors, label, kept = of_pixels
    softmax_factor, label_factor, uniform_factor, _ = factors
    g = tl.where(label == c, label_factor, 0.0).to(KIND.compute)
    if KIND.slots[1] or KIND.slots[2] or KIND.slots[3]:
        g += exp((x - statistics[0]) - statistics[1]) * softmax_factor
    if KIND.slots[2]:
        g += uniform_factor * tl.load(class_weights + c).to(g.dtype) if KIND.weighted else uniform_factor
    if KIND.capped:
        slope = x / (scaling[0] * scaling[1])  # tanh(logit / softcap)
        g *= 1.0 - slope * slope
    return tl.where(kept, g, 0.0)  # ignored pixels get 0 even if their logits are nan


@triton.jit
def write_tiles(out, tiles, c, of_pixels, class_weights, scaling, KIND: tl.constexpr):
    at, stride, mask = out
    at += c * stride
    for i in tl.static_range(len(tiles)):
        g = gradient_of(tiles[i], c + i, of_pixels, class_weights, scaling, KIND)
        tl.store(at + i * stride, g.to(at.dtype.element_ty), mask=mask, eviction_policy="evict_first")
