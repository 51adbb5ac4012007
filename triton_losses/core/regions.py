"""What the readings of regions share: pixels' shares and scores of sums, in operations that autograd can follow."""

import torch

from triton_losses.core.formula import FORMULAS
from triton_losses.core.reduction import cast


def activate(x, activation):
    return x.softmax(1) if activation == "softmax" else x.sigmoid() if activation == "sigmoid" else x


def share_of(t, smoothing):
    """The factor of each class's loss in a pixel's loss: t, or smoothed t. Dimension -2 is that of the classes."""
    return t + smoothing * (1.0 / t.shape[-2] - t) if smoothing else t


def zero_where_no_share(share, losses):
    return torch.where(share == 0, 0, share * losses)  # 0 · inf would be nan


def takes_weight(formula, scalars):
    """Whether an elementwise formula takes the class weight as an operand; if not, the weight multiplies the loss."""
    return len(formula.parameters) - len(scalars) == 3


def shape_of_loss(problem, images, classes):
    """What `loss_of` returns."""
    if problem.reduction != "none":
        return ()
    count = classes - (not problem.background) if problem.average == "macro" else 1
    return (count,) if problem.batch else (images,) if problem.formula else (images, count)


def loss_of(sums, losses, tensors, problem):
    """The loss, from the sums (images, 3, classes) and, if there is a formula, its losses (images,)."""
    _, targets, weights = tensors
    score = loss_of_scores(sums, weights, problem)
    if problem.formula:
        score = beside(score, losses, divisors(sums, targets, weights, problem), problem)
    return cast(score, problem.dtype)


def parts_of(sums, weights, problem):
    """Σ pt, Σ p and Σ t as the score takes them, the factors they were multiplied by, and the weights of the classes.

    Each sum is (images or 1, classes or 1). Factors are None unless classes are added up; weights may be None.
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
    """The score's loss of each image and class, weighted and reduced. weights: at least of the classes that count."""
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
    if problem.empty == "exclude":  # first the mean of each image
        return (losses.sum(1) / present(parts[2], weights)).mean()
    return losses.sum() / losses.numel()


def present(wanted, weights):
    """The number of classes present in each image, or the sum of their weights; 1 if there is none."""
    count = ((wanted > 0) * (1.0 if weights is None else weights)).sum(1)
    return torch.where(count == 0, 1, count)


def factors_of_classes(volume, average):
    """Factors for adding up the classes' sums; an absent class gets the largest factor of the others."""
    if average == "micro":
        return torch.ones_like(volume)
    absent = volume == 0
    factors = torch.where(absent, 0, 1 / torch.where(absent, 1, volume) ** (2 if average == "square" else 1))
    return torch.where(absent, factors.amax(1, keepdim=True), factors)


def divisors(sums, targets, weights, problem):
    """The divisor of each image's formula losses, (images,); targets: labels (images, pixels), or maps."""
    images, _, classes = sums.shape
    of_class = sums[:, 2].detach()  # how many pixels have each label; squaring t does not change it
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
    """λ₁ score + λ₂ Σ losses / Σ divisors; the second term is 0 if no pixel counts."""
    if problem.reduction == "mean":
        losses, divisors = losses.sum(), divisors.sum()
    rest = losses / torch.where(divisors == 0, 1, divisors)
    rest = rest.sum() if problem.reduction == "sum" else rest
    of_score, of_formula = problem.lambdas
    return of_score * score + of_formula * rest
