"""Rows of one batch that several processes hold, gathered."""

from typing import NamedTuple

import torch
from torch import Tensor

from triton_losses.core.collectives import all_gather, gather_with_grad, name_of, rank_in, size_of


class Across(NamedTuple):
    """The processes of a group, each of which has as many rows."""

    name: str
    size: int
    rank: int

    def gathered(self, x, gradient=True, own=False):
        """The rows of all processes. own: this process' own with their gradient, if the others' come without."""
        if gradient and x.is_floating_point():
            return gather_with_grad(x, self.name).flatten(0, 1)
        found = all_gather(x.detach(), self.name)
        if own:
            found = torch.cat([found[: self.rank], x[None], found[self.rank + 1 :]])
        return found.flatten(0, 1)

    def offset(self, x):
        """The number of the first of this process' rows x, among those of all."""
        return self.rank * x.shape[0]

    def share(self, counts):
        """How many rows of all processes count, per process. counts: of all rows, or of how many there are."""
        return (counts.sum() if isinstance(counts, Tensor) else counts) / self.size


def across(process_group):
    """What is known of a group; None for None."""
    if process_group is None:
        return None
    name = name_of(process_group)
    return Across(name, size_of(name), rank_in(process_group))
