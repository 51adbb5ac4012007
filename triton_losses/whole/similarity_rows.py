"""Similarity rows on whole tensors: for second derivatives, torch.func and other devices."""

import torch

from triton_losses.core.compiler import compute_dtype
from triton_losses.core.rows import LOWEST
from triton_losses.core.similarities import NEGATIVES, POSITIVES, TINY


def statistics(tensors, problem):
    """Those of rows (least, rows) and of columns (4, columns), in operations that autograd can follow."""
    x, counts, match = similarities(tensors, problem)
    masks = {NEGATIVES: counts & ~match, POSITIVES: match}
    found = [log_total(f * x, masks.get(kind, counts)) for kind, f in zip(problem.sets, problem.factors)]
    signed = torch.where(counts, torch.nn.functional.softplus(torch.where(match, -x, x), threshold=50.0), 0)
    rest = [sums(x, match, problem.sums), sums(x, counts, problem.spread), signed.sum(1) if problem.signed else None]
    rest = [x.new_zeros(x.shape[0]) if value is None else value for value in rest]
    rows = torch.stack([total for total, _ in found] + [top for _, top in found] + rest)
    if not problem.columns:
        return rows, x[:0, :0].sum(0).expand(4, 0)
    total, top = log_total(x.t(), counts.t())
    rest = [sums(x.t(), match.t(), problem.sums), sums(x.t(), counts.t(), problem.spread)]
    return rows, torch.stack([total, top, *(x.new_zeros(x.shape[1]) if value is None else value for value in rest)])


def similarities(tensors, problem):
    """Their matrix, which of them count, and which are of positives."""
    a, b, scale, bias, row_ids, column_ids = tensors
    column_ids = row_ids if column_ids is None else column_ids
    wide = compute_dtype(problem.dtype)
    a = a.to(problem.dtype).to(wide)
    b = a if b is None else b.to(problem.dtype).to(wide)
    if problem.normalize:
        a, b = (torch.nn.functional.normalize(t, dim=1, eps=TINY) for t in (a, b))
    x = scale.to(wide) * (a @ b.t())
    x = x if bias is None else x + bias.to(wide)
    place = torch.arange(a.shape[0], device=x.device)[:, None] + problem.offset
    itself = place == torch.arange(b.shape[0], device=x.device)
    counts = torch.ones_like(itself)
    if row_ids is not None:
        counts = (row_ids != problem.ignore_index)[:, None] & (column_ids != problem.ignore_index)
    match = itself if problem.positives == "diagonal" else row_ids[:, None] == column_ids
    if problem.apart:
        counts = counts & ~itself
    return x, counts, match & counts


def log_total(x, mask):
    """log Σ exp(x - max x) of each row over the mask, and max x, without gradient; -inf and LOWEST if it is empty."""
    if not x.shape[1]:
        return x.sum(1) - torch.inf, x.new_full((x.shape[0],), LOWEST)
    x = x.masked_fill(~mask, -torch.inf)
    top = x.detach().amax(1).clamp(min=LOWEST)
    total = torch.exp(x - top[:, None]).sum(1)
    empty = ~mask.any(1)
    return torch.where(empty, -torch.inf, torch.log(torch.where(empty, 1, total))), top


def sums(x, mask, wanted):
    return torch.where(mask, x, 0).sum(1) if wanted else None
