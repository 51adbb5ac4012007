"""What the readings of regions share: shares of pixels, and scores of the sums, in torch that autograd follows."""

import torch

from triton_losses.core.formula import FORMULAS
from triton_losses.core.reduction import cast


def activate(x, activation):
    return x.softmax(1) if activation == "softmax" else x.sigmoid() if activation == "sigmoid" else x


def share_of(t, smoothing):
    """How much of a pixel's row loss is each class's; the classes come last but one."""
    return t + smoothing * (1.0 / t.shape[-2] - t) if smoothing else t


def zero_where_no_share(share, losses):
    return torch.where(share == 0, 0, share * losses)  # 0 · inf would be nan


def takes_weight(formula, scalars):
    """Whether the class weight is an operand of the formula of an element; else it multiplies the loss."""
    return len(formula.parameters) - len(scalars) == 3


def shape_of_loss(problem, images, classes):
    """What `loss_of` returns."""
    if problem.reduction != "none":
        return ()
    count = classes - (not problem.background) if problem.average == "macro" else 1
    return (count,) if problem.batch else (images,) if problem.formula else (images, count)


def loss_of(sums, losses, tensors, problem):
    """The loss, of sums (images, 3, classes) and, where there is a formula, its losses (images,)."""
    _, targets, weights = tensors
    score = loss_of_scores(sums, weights, problem)
    if problem.formula:
        score = beside(score, losses, divisors(sums, targets, weights, problem), problem)
    return cast(score, problem.dtype)


def parts_of(sums, weights, problem):
    """Σ pt, Σ p and Σ t as the score takes them, factors of classes that are added up, and weights of classes; or None.

    Each (images or 1, classes or 1).
    """
    sums = sums if problem.background else sums[:, :, 1:]
    sums = sums.sum(0, keepdim=True) if problem.batch else sums
    parts, factors = sums.unbind(1), None
    if problem.average != "macro":
        factors = factors_of_classes(parts[2].detach(), problem.average)
        parts = [(part * factors).sum(1, keepdim=True) for part in parts]
    count = parts[2].shape[1]
    return parts, factors, None if weights is None or count == 1 else weights[-count:]


def loss_of_scores(sums, weights, problem):
    """The score's loss of each image and class, weighted and reduced. weights: of so many of the last classes."""
    parts, _, weights = parts_of(sums, weights, problem)
    score = FORMULAS[problem.score].value(*parts, *problem.score_scalars)
    losses = FORMULAS[problem.link].value(score, *problem.link_scalars)
    losses = losses if weights is None else losses * weights
    if problem.empty != "smooth":
        losses = torch.where(parts[2] > 0, losses, 0)
    if problem.reduction == "none":
        return losses.mean(1) if problem.formula else losses[0] if problem.batch else losses
    if problem.reduction == "sum":
        return losses.sum()
    if problem.empty == "exclude":  # each image's own mean first
        return (losses.sum(1) / present(parts[2], weights)).mean()
    return losses.sum() / losses.numel()


def present(wanted, weights):
    """How many classes an image has, or their weights; 1 where there is none."""
    count = ((wanted > 0) * (1.0 if weights is None else weights)).sum(1)
    return torch.where(count == 0, 1, count)


def factors_of_classes(volume, average):
    """What classes' sums are multiplied by before they are added up; an absent class gets the largest other one."""
    if average == "micro":
        return torch.ones_like(volume)
    absent = volume == 0
    factors = torch.where(absent, 0, 1 / torch.where(absent, 1, volume) ** (2 if average == "square" else 1))
    return torch.where(absent, factors.amax(1, keepdim=True), factors)


def divisors(sums, targets, weights, problem):
    """What the formula's losses of each image are divided by, (images,); targets: labels (images, pixels), or maps."""
    images, _, classes = sums.shape
    of_class = sums[:, 2].detach()  # how many pixels have each label: ones are their own squares
    labels = targets.dim() == 2
    if labels:
        numbers = of_class.sum(1, keepdim=True)
    elif problem.ignore_index is None:
        numbers = sums.new_full((images, 1), targets.shape[2])
    else:
        numbers = (targets != problem.ignore_index).sum(2).to(sums.dtype)
    numbers = numbers.expand(images, classes)
    if problem.reduction == "sum":
        return numbers.mean(1) if problem.means_of_space else torch.ones_like(numbers[:, 0])
    if problem.activation != "softmax":
        return numbers[:, int(problem.means_of_space and not problem.background) :].sum(1)
    return numbers[:, 0] if weights is None or not labels else (of_class * cast(weights, sums.dtype)).sum(1)


def beside(score, losses, divisors, problem):
    """λ₁ score + λ₂ Σ losses / Σ divisors; where nothing counts the second is 0."""
    if problem.reduction == "mean":
        losses, divisors = losses.sum(), divisors.sum()
    rest = losses / torch.where(divisors == 0, 1, divisors)
    rest = rest.sum() if problem.reduction == "sum" else rest
    of_score, of_formula = problem.lambdas
    return of_score * score + of_formula * rest
