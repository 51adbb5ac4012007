"""Similarity rows in blocks of a chunk's rows that stay in a CPU's cache."""

import torch

from triton_losses.core.rows import LOWEST
from triton_losses.core.similarities import NEGATIVES, POSITIVES
from triton_losses.core.threads import row_blocks, share


def shape(products, part, sides, problem):
    """Make similarities of products, in place: -inf where a pair does not count."""
    scale, bias, row_scales, column_scales, row_ids, column_ids = sides
    if row_ids is not None:
        ignored_rows = (row_ids[part] == problem.ignore_index)[:, None]
        ignored_columns = column_ids == problem.ignore_index

    def work(block):
        x = products[block]
        at = within(part, block)
        x.mul_(scale if row_scales is None else (scale * row_scales[at])[:, None])
        if column_scales is not None:
            x.mul_(column_scales)
        if bias is not None:
            x.add_(bias)
        if row_ids is not None:
            x.masked_fill_(ignored_rows[block] | ignored_columns, -torch.inf)
        if problem.apart:
            rows, columns = places(at, problem.offset, x)
            x[rows, columns] = -torch.inf

    in_blocks(work, products)


def in_blocks(work, x):
    """Call ``work`` with each block of rows, in threads of our own: torch's would wait for one another each time."""
    parts = row_blocks(*x.shape, x.dtype)
    found = [None] * len(parts)

    def one(i):
        found[i] = work(parts[i])

    share(one, len(parts), alone=1)
    return found


def statistics(x, part, sides, found, problem):
    """Fill a chunk's own statistics, with totals in place of their logarithms, and add to those of the columns."""
    rows, columns = found
    sets = len(problem.sets)

    def work(block):
        y, at = x[block], within(part, block)
        match = matches(y, at, sides, problem)
        for k, (kind, factor) in enumerate(zip(problem.sets, problem.factors)):
            z = chosen(y, match, kind, at, problem)
            z = z if factor == 1 else z * factor
            top = z.amax(1).clamp_(min=LOWEST)
            rows[sets + k, at] = top
            rows[k, at] = torch.sub(z, top[:, None]).exp_().sum(1)
        if problem.sums:
            rows[-3, at] += picked(y, match, at, problem)
        if problem.spread:
            rows[-2, at] += counted(y).sum(1)
        if problem.signed:
            rows[-1, at] += softplus(turned(y, match, at, problem)).sum(1)
        if not problem.columns:
            return None
        own = columns.new_zeros(columns.shape)
        torch.amax(y, 0, out=own[1]).clamp_(min=LOWEST)
        torch.sum(torch.sub(y, own[1]).exp_(), 0, out=own[0])
        if problem.sums and match is None:
            down, beside = places(at, problem.offset, y)
            own[2, beside] = y[down, beside]
        elif problem.sums:
            torch.sum(torch.where(match, y, 0), 0, out=own[2])
        if problem.spread:
            torch.sum(counted(y), 0, out=own[3])
        return own

    made = in_blocks(work, x)
    if problem.columns and made:  # all at once: few operations, for which torch's threads would wait
        every = torch.stack([columns, *made])
        top = every[:, 1].amax(0)
        columns[0] = (every[:, 0] * torch.exp(every[:, 1] - top)).sum(0)
        columns[1] = top
        columns[2:] = every[:, 2:].sum(0)


def gradient(x, part, sides, slopes, made, problem):
    """Write G · row_scales · column_scales into ``made[0]``, which may be x, and the rows' sums of G into made[1]."""
    of_rows, of_columns = slopes
    grad, sums = made
    sets, same = len(problem.sets), of_columns is of_rows
    # columns of a itself have softplus as its rows have; other columns have none
    column_slopes = None if of_columns is None else of_columns[-3:] if same else of_columns[2:]

    def work(block):
        y, at = x[block], within(part, block)
        match = matches(y, at, sides, problem)
        out = None
        own = of_rows[:, at]
        for k, (kind, factor) in enumerate(zip(problem.sets, problem.factors)):
            z = chosen(y, match, kind, at, problem)
            z = z if factor == 1 else z * factor
            out = plus(out, torch.sub(z, own[sets + k][:, None]).exp_().mul_(own[k][:, None]))
            if same:
                out = plus(out, torch.sub(z, of_rows[sets + k]).exp_().mul_(of_rows[k]))
        if problem.columns:
            out = plus(out, torch.sub(y, of_columns[1]).exp_().mul_(of_columns[0]))
        out = torch.zeros_like(y) if out is None else out
        of_positives, of_all, of_signed = own[-3:].unsqueeze(2)
        if problem.signed:
            slope = of_signed + column_slopes[2] if same else of_signed
            chance = torch.sigmoid(turned(y, match, at, problem))
            out.add_(turned(chance, match, at, problem).mul_(slope))
        if problem.sums and match is None:
            rows, columns = places(at, problem.offset, y)
            slope = of_positives[rows, 0]
            out[rows, columns] += slope if column_slopes is None else slope + column_slopes[0][columns]
        elif problem.sums:
            out.add_(torch.where(match, beside(of_positives, column_slopes, 0), 0))
        if problem.spread:
            out.add_(torch.where(y == -torch.inf, 0, beside(of_all, column_slopes, 1)))
        if len(sums):
            sums[at] = out.sum(1)
        if sides.row_scales is not None:
            out.mul_(sides.row_scales[at][:, None]).mul_(sides.column_scales)
        grad[block] = out

    in_blocks(work, x)


def beside(of_rows, of_columns, k):
    return of_rows if of_columns is None else of_rows + of_columns[k]


def within(part, block):
    """The rows of a block of a chunk, among all rows."""
    return slice(part.start + block.start, min(part.start + block.stop, part.stop))


def plus(total, term):
    return term if total is None else total.add_(term)


def places(at, offset, x):
    """The rows of a block whose own column exists, and that column."""
    columns = torch.arange(at.start + offset, at.stop + offset, device=x.device)
    rows = torch.arange(at.stop - at.start, device=x.device)
    if columns.numel() and columns[-1] >= x.shape[1]:
        rows, columns = (t[columns < x.shape[1]] for t in (rows, columns))
    return rows, columns


def matches(x, at, sides, problem):
    """Which pairs are positives; None if each row has one, on the diagonal."""
    if problem.positives == "diagonal":
        return None
    return (sides.row_ids[at][:, None] == sides.column_ids) & (x != -torch.inf)


def chosen(x, match, kind, at, problem):
    """x, with -inf outside the set."""
    if kind not in (NEGATIVES, POSITIVES):
        return x
    if match is None:
        match = torch.zeros_like(x, dtype=torch.bool)
        match[places(at, problem.offset, x)] = True
    return x.masked_fill(match if kind == NEGATIVES else ~match, -torch.inf)


def picked(x, match, at, problem):
    """Σ x over each row's positives."""
    if match is not None:
        return torch.where(match, x, 0).sum(1)
    rows, columns = places(at, problem.offset, x)
    return x.new_zeros(len(x)).index_put_((rows,), x[rows, columns])


def turned(x, match, at, problem):
    """x, with the sign of positives changed, in new memory."""
    if match is not None:
        return torch.where(match, -x, x)
    x = x.clone()
    rows, columns = places(at, problem.offset, x)
    x[rows, columns] *= -1
    return x


def counted(x):
    return torch.where(x == -torch.inf, 0, x)


def softplus(x):
    return torch.nn.functional.softplus(x, threshold=50.0)
