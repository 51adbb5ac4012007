"""What the readings of similarity rows share: the problem, and what decides which pairs count."""

from typing import NamedTuple

import torch

from triton_losses.core.rows import LOWEST

# sets of columns, for each row
ALL, NEGATIVES, POSITIVES = 0, 1, 2
TINY = 1e-12  # the least length that a vector is divided by, as torch.nn.functional.normalize has it


class Problem(NamedTuple):
    sets: tuple[int, ...] = ()  # for each log-sum-exp of a row: the columns that it is over
    factors: tuple[float, ...] = ()  # and what it multiplies the similarities by
    columns: bool = False  # whether columns have statistics too: a log-sum-exp over all rows, and the sums
    positives: str = "diagonal"  # row i's is column i + offset; or "ids": those with the row's id
    offset: int = 0
    apart: bool = False  # column i + offset is row i itself, and does not count
    sums: bool = False  # whether the similarities of the positives are added up
    spread: bool = False  # whether those of all columns are
    signed: bool = False  # whether softplus of the similarities is, of those of positives with the sign changed
    normalize: bool = False  # whether vectors are divided by their lengths
    ignore_index: int = -100  # rows and columns with this id do not count
    chunk_bytes: int = 0  # of similarities at a time; 0: `rows_of_chunk` decides
    dtype: torch.dtype = torch.float32  # of the products

    @property
    def least(self):
        """Rows of the row statistics: log-sum-exps, their maxima, sums of positives, of all, and of softplus."""
        return 2 * len(self.sets) + 3


class Sides(NamedTuple):
    """What similarities are made of, beside the products.

    scale: (). bias: () or None. row_scales: (rows,), one over the length of each row's vector, or None. column_scales:
    (columns,), likewise. row_ids, column_ids: integers, or None.
    """

    scale: torch.Tensor
    bias: torch.Tensor | None
    row_scales: torch.Tensor | None
    column_scales: torch.Tensor | None
    row_ids: torch.Tensor | None
    column_ids: torch.Tensor | None


def empty_statistics(x, rows, columns, problem):
    """Statistics before anything has been read: totals of exponentials, maxima and sums; (least, rows), (4, columns).

    The columns' are laid out as if they had a single set, without softplus.
    """
    sets = len(problem.sets)
    of_rows = x.new_zeros(problem.least, rows)
    of_rows[sets : 2 * sets] = LOWEST
    of_columns = x.new_zeros(4, columns if problem.columns else 0)
    of_columns[1] = LOWEST
    return of_rows, of_columns


def inverse_lengths(x, wide):
    return torch.linalg.vector_norm(x, dim=1, dtype=wide).clamp_(min=TINY).reciprocal_()
