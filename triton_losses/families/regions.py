"""Sums over the regions of an image, from one read of its logits: what Dice and its kin are made of.

    p = softmax, sigmoid or identity of the logits x;   t = 1 for a pixel's own class, else 0; or a map of the logits' shape

    sums[b]   = Σ p t,  Σ p,  Σ t  over the pixels of image b, by class;  Σ p², Σ t² where squared;  Σ min(p, t) where smaller
    losses[b] = Σ L  of a formula of the same pixels. Beside softmax that is a row formula of log_p and weight,
                Σ_j t_j f(log p_j, w_j), with (1 - ε) t + ε/C in place of t where smoothed; else f(x, t) of each element.

    softmax   ∂/∂x_j = p_j (g_j - Σ_c p_c g_c - Σ_c t_c f'_c) + t_j f'_j,     g_c = d(Σpt) t_c + d(Σp)

    forward   reads the logits once; each program writes one row of sums, and the rows are added in a fixed order
    backward  reads the logits once and writes their gradient once; only the inputs are saved

What follows, on (images, classes), is plain torch: options never reach a kernel, and an all-reduce fits between.
"""

import torch

from triton_losses.core.compiler import compute_dtype, runs_kernels, triton
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import differentiated_again, is_plain, keeps_for_backward, op, read_whole, shapes_only
from triton_losses.families.regions_blocks import Blocks, takes_weight, whole_sums

MOST_CLASSES = 0
if triton is not None:
    from triton_losses.kernels.regions import MOST_CLASSES, arguments, backward_launch, forward_launch


def check_labels(targets, ignore_index, classes):
    """Host check for the interpreter, where labels lie in a CPU's memory; a GPU asserts."""
    if targets.device.type == "cpu" and targets.dim() == 2:
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= classes))] if targets.numel() else targets
        if wrong.numel():
            ignored = "" if ignore_index is None else f", or ignore_index, {ignore_index}"
            raise IndexError(f"Target {wrong.flatten()[0].item()} is out of bounds: it must be in [0, {classes}){ignored}")


def launched(logits, targets, class_weights, activation, ignore_index, squared, smaller, formula, scalars, smoothing):
    operand = formula is not None and activation != "softmax" and takes_weight(formula, scalars)
    return arguments(logits, targets, class_weights, activation, ignore_index, squared, smaller, formula, scalars, smoothing, operand)


@op
def regions_forward(
    logits: torch.Tensor, targets: torch.Tensor, class_weights: torch.Tensor | None, activation: str, ignore_index: int | None,
    squared: bool, smaller: bool, formula: str, scalars: list[float], smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    images, classes, _ = logits.shape
    dtype = compute_dtype(logits.dtype)
    if shapes_only() or not logits.numel():
        return logits.new_zeros(images, 3, classes, dtype=dtype), logits.new_zeros(images, dtype=dtype)
    options = activation, ignore_index, squared, smaller, FORMULAS.get(formula), scalars, smoothing
    if not runs_kernels(logits):
        return Blocks(logits, targets, class_weights, *options).forward()[:2]
    check_labels(targets, ignore_index, classes)
    given = launched(logits, targets, class_weights, *options)
    partial_sums = logits.new_empty(images, given["splits"], 3, classes, dtype=dtype)
    partial_losses = logits.new_empty(images, given["splits"], dtype=dtype)
    forward_launch(partial_sums=partial_sums, partial_losses=partial_losses, **given)
    return partial_sums.sum(1), partial_losses.sum(1) if formula else logits.new_zeros(images, dtype=dtype)


@op
def regions_backward(
    logits: torch.Tensor, d_sums: torch.Tensor, d_losses: torch.Tensor, targets: torch.Tensor, class_weights: torch.Tensor | None,
    activation: str, ignore_index: int | None, squared: bool, smaller: bool, formula: str, scalars: list[float], smoothing: float,
) -> torch.Tensor:  # fmt: skip
    if shapes_only() or not logits.numel():
        return torch.empty_like(logits)
    options = activation, ignore_index, squared, smaller, FORMULAS.get(formula), scalars, smoothing
    if not runs_kernels(logits):
        return Blocks(logits, targets, class_weights, *options).backward(d_sums, d_losses)
    grad, d_sums, d_losses = torch.empty_like(logits), d_sums.contiguous(), d_losses.contiguous()
    backward_launch(d_sums=d_sums, d_losses=d_losses, grad=grad, **launched(logits, targets, class_weights, *options))
    return grad


def blocks(logits, targets, class_weights, activation, ignore_index, squared, smaller, formula, scalars, smoothing):
    return Blocks(logits, targets, class_weights, activation, ignore_index, squared, smaller, FORMULAS.get(formula), scalars, smoothing)


class Regions(torch.autograd.Function):
    """In blocks, and where nobody watches, no op stands between: a backward that overwrites what forward kept is none for a graph."""

    @staticmethod
    def forward(ctx, logits, targets, class_weights, keep, activation, ignore_index, squared, smaller, formula, scalars, smoothing):
        ctx.options = activation, ignore_index, squared, smaller, formula, scalars, smoothing
        ctx.save_for_backward(logits, targets, class_weights)
        ctx.probabilities = None
        if keep:
            with torch.autocast("cpu", enabled=False):
                sums, losses, ctx.probabilities = blocks(logits, targets, class_weights, *ctx.options).forward(keep=True)
            return sums, losses
        return regions_forward(logits, targets, class_weights, *ctx.options)

    @staticmethod
    def backward(ctx, d_sums, d_losses):
        logits, targets, class_weights = ctx.saved_tensors
        again = differentiated_again()
        if again or read_whole(d_sums, d_losses):
            *options, formula, scalars, smoothing = ctx.options
            with torch.enable_grad():
                results = whole_sums(logits, targets, class_weights, *options, FORMULAS.get(formula), scalars, smoothing)
                results = [(r, d) for r, d in zip(results, (d_sums, d_losses), strict=True) if r.requires_grad]
            grad = torch.autograd.grad([r for r, _ in results], logits, [d for _, d in results], create_graph=again)[0]
        elif ctx.probabilities is not None:
            probabilities, ctx.probabilities = ctx.probabilities, None  # a second backward computes its own
            with torch.autocast("cpu", enabled=False):
                grad = blocks(logits, targets, class_weights, *ctx.options).backward(d_sums, d_losses, probabilities)
        else:
            grad = regions_backward(logits, d_sums, d_losses, targets, class_weights, *ctx.options)
        return grad, *[None] * 10


def regions(
    logits, targets, activation, class_weights=None, ignore_index=None, squared=False, smaller=False, formula=None, scalars=(), smoothing=0.0
):  # fmt: skip
    """Sums (images, 3, classes) of pt, p and t over the pixels of ``logits`` (images, classes, pixels), and the formula's (images,).

    targets: labels (images, pixels), integers or integral floats, or a map of the logits' shape. ignore_index: pixels with this
    label, or elements of the map with this value, count nowhere. The sums are float32, or float64 for float64 logits.
    """
    logits, targets = logits.contiguous(), targets.contiguous()
    class_weights = class_weights if class_weights is None else class_weights.contiguous()
    targets = targets.view(torch.uint8) if targets.dtype == torch.bool else targets
    given = [float(s) for s in scalars], float(smoothing)
    too_many = runs_kernels(logits) and logits.shape[1] > MOST_CLASSES
    if too_many or is_plain(logits):
        return whole_sums(logits, targets, class_weights, activation, ignore_index, squared, smaller, formula, *given)
    name = "" if formula is None else formula.name
    return Regions.apply(logits, targets, class_weights, keeps_for_backward(logits), activation, ignore_index, squared, smaller, name, *given)
