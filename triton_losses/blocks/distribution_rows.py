"""Losses of two rows in blocks of rows that stay in a CPU's cache.

Nothing is saved. But the forward of a plain call has everything that the gradients need, so it computes them for an
upstream gradient of 1 and keeps them in scratch memory; the backward only multiplies them.
"""

import functools
import itertools

import torch

from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import shapes_only
from triton_losses.core.reduction import cast, given, widest
from triton_losses.core.threads import elements, share

SHORT = 1 << 10  # up to so many columns, the error of log Σ exp is about that of one rounding


def forward(tensors, problem, scratch=None):
    q = tensors[1]
    if shapes_only():
        return [q.new_empty(q.shape[:1] if problem.reduction == "none" else (), dtype=problem.dtype)], []
    grads, dropped, count = scratch or ((None, None), *counted(tensors, problem))
    return [reduced(sweep(tensors, problem, dropped, True, grads), problem, count)], []


def backward(tensors, saved, upstream, problem, wanted, scratch=None):
    pair = tensors[:2]
    grads, dropped, count = scratch or (room_for_gradients(pair, wanted), None, None)
    if shapes_only():
        return given(grads)
    if scratch is None:
        dropped, count = counted(tensors, problem)
    factor = cast(upstream[0], widest(pair))
    factor = factor if problem.factor == 1 else factor * problem.factor
    if problem.reduction == "mean":
        factor = factor / count
    elif problem.reduction == "none":
        factor = factor[:, None]
    if scratch is None:
        sweep(tensors, problem, dropped, False, grads, factor)
    else:
        multiply(grads, problem, factor, dropped)
    return given(grads)


def scratch(tensors, problem):
    """Memory for the wanted gradients, and what `counted` returns; None if a gradient would be rounded twice."""
    p, q = pair = tensors[:2]
    if p.dtype != q.dtype or p.dtype != widest(pair):
        return None
    return room_for_gradients(pair, (p.requires_grad, q.requires_grad)), *counted(tensors, problem)


def room_for_gradients(pair, wanted):
    return [x.new_empty(x.shape) if want else None for x, want in zip(pair, wanted)]


def counted(tensors, problem):
    """A mask of the rows that are ignored (None: no row), and the number of the others if the mean needs it."""
    rows, labels = tensors[1].shape[0], tensors[3]
    if labels is None:
        return None, rows
    dropped = labels == problem.ignore_index
    return dropped, rows - dropped.sum() if problem.reduction == "mean" else None


def reduced(losses, problem, count):
    if problem.reduction != "none":
        losses = losses.sum()
    if problem.reduction == "mean":
        losses = losses / count
    return cast(losses if problem.factor == 1 else losses * problem.factor, problem.dtype)


def small(tensors, problem):
    """(loss,) of a few rows that all count, if p is given and needs no gradient; autograd follows the formula."""
    p, q, weight, labels = tensors
    if not problem.given or labels is not None or p.requires_grad:
        return None
    wide = widest((p, q))
    a, b, lse = log_rows(p, q, problem, wide)
    f = FORMULAS[problem.formula].value(a, b, *problem.scalars)
    return (reduced(total(f, weight if weight is None else cast(weight, wide), lse, problem), problem, q.shape[0]),)


def walk(tensors, problem, task):
    """The losses of the rows; fills the gradients that the task asks for."""
    upstream = task.upstream
    if upstream is not None:
        upstream = cast(upstream, widest(tensors[:2]))[:, None]
        upstream = upstream if problem.factor == 1 else upstream * problem.factor
    dropped, count = counted(tensors, problem)
    return reduced(sweep(tensors, problem, dropped, True, task.grads, upstream), problem, count)


def sweep(tensors, problem, dropped, forward, grads, factor=None):
    """Read every block once, for the losses of its rows, their gradients, or both. Gradients may overwrite the rows.

    dropped: mask of the rows that are ignored, None if there are none. factor: of the gradients, () or (rows, 1); None
    if the backward will multiply them. If ``forward``, returns the losses without the problem's own factor.
    """
    p, q, weight, _ = tensors
    wide = widest((p, q))
    weight = weight if weight is None else cast(weight, wide)
    wanted = forward, grads[0] is not None, grads[1] is not None or forward and ruled(problem)
    whole, step = (p, q, *grads, factor, dropped), elements(wide) // max(q.shape[1], 1) or 1
    if q.shape[0] <= step:
        losses = visit(whole, problem, weight, wanted)
    else:
        blocks = list(zip(*(slices(t, step) for t in whole)))
        found = [None] * len(blocks)

        def work(i):
            found[i] = visit(blocks[i], problem, weight, wanted)

        share(work, len(blocks))
        losses = torch.cat(found) if forward else None
    return losses if dropped is None or not forward else losses.masked_fill_(dropped, 0)


def slices(tensor, step):
    """The tensor's rows, ``step`` at a time; None and 0-dim tensors go to every block as they are."""
    return itertools.repeat(tensor) if tensor is None or not tensor.dim() else tensor.split(step)


@functools.cache
def reading_of(formula, wanted):
    return FORMULAS[formula].reading(tuple(i for i, want in enumerate(wanted) if want), in_tuple=True)


def ruled(problem):
    """Whether ∂f/∂log q = -p, by the rule of one read."""
    return problem.one_read and not problem.given


def log_rows(p, q, problem, wide):
    """log p, or p itself if it is given; log q; and log Σ exp of q's logits, if there is a z-loss."""
    p, q, scale = cast(p, wide), cast(q, wide), problem.scale
    if scale != 1:
        q = q * scale
        p = p if problem.given else p * scale
    lse = q.logsumexp(1, keepdim=True) if problem.z_loss else None
    return p.contiguous() if problem.given else torch.log_softmax(p, 1), torch.log_softmax(q, 1), lse


def total(f, weight, lse, problem):
    """The losses of the rows: f summed over the columns, with their weights, plus the z-loss."""
    losses = f.sum(1) if weight is None else f.mv(weight)
    return losses if lse is None else losses + problem.z_loss * lse[:, 0].square()


def visit(block, problem, weight, wanted):
    """Compute one block. wanted: which outputs of the formula are needed."""
    p, q, grad_p, grad_q, factor, dropped = block
    wide, one_read = widest((p, q)), ruled(problem)
    a, b, lse = log_rows(p, q, problem, wide)
    found = iter(reading_of(problem.formula, wanted)(a, b, *problem.scalars))
    f, d_p, d_q = [next(found) if want else None for want in wanted]
    if d_q is not None:
        d_q, chances = d_q if weight is None else d_q * weight, b.exp_()
        if one_read:
            g_q = torch.add(d_q, chances, out=same_type(grad_q, wide))
        else:
            slope = d_q.sum(1, keepdim=True)
            slope = slope if lse is None else slope - 2 * problem.z_loss * lse
            g_q = torch.addcmul(d_q, chances, slope, value=-1, out=same_type(grad_q, wide))
    if f is not None and one_read:
        # log Σ exp is rounded, so p sums to 1 + ε and q to 1 + δ. By the rule of one read the loss is, to first order,
        # (Σ f + δ - ε) / (1 + ε). This matters for nearly equal rows, because their loss is no larger than δ - ε
        losses = f.add_(g_q).sum(1)
        losses = losses if b.shape[1] <= SHORT else losses / d_q.sum(1).neg_()
    else:
        losses = None if f is None else total(f, weight, lse, problem)
    if d_p is not None:
        g_p = d_p if weight is None else d_p * weight
        if not problem.given:
            slope, chances = g_p.sum(1, keepdim=True), a.exp_()
            slope = slope / chances.sum(1, keepdim=True) if one_read else slope  # exactly 1 for equal rows
            g_p = torch.addcmul(g_p, chances, slope, value=-1, out=same_type(grad_p, wide))
    made = (None if grad_p is None else g_p, None if grad_q is None else g_q)
    if factor is not None:
        multiply(made, problem, factor, dropped)
    for grad, g in zip((grad_p, grad_q), made):
        if grad is not g:
            grad.copy_(g)
    return losses


def same_type(grad, dtype):
    return grad if grad is not None and grad.dtype == dtype else None


def multiply(grads, problem, factor, dropped):
    of_logits = factor if problem.scale == 1 else factor * problem.scale
    for grad, of_this in zip(grads, (factor if problem.given else of_logits, of_logits)):
        if grad is not None:
            grad.mul_(of_this)
            if dropped is not None:
                grad.masked_fill_(dropped[:, None], 0)  # 0 · nan would be nan
