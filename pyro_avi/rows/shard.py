"""The rows that belong to one of several processes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_avi.rows.subsample import Subsample, has_values

__all__ = ["Shard"]


@dataclass(frozen=True)
class Shard:
    """Every ``count``-th row of a plate: ``rank, rank + count, rank + 2 count, ...``.

    Attributes:
        rank: whose rows they are, from 0.
        count: the number of shards.

    Example::

        >>> from pyro_avi.rows.shard import Shard
        >>> Shard(1, 3).rows(8)
        tensor([1, 4, 7])
    """

    rank: int
    count: int

    def rows(self, size: int) -> Tensor:
        """The rows of the shard, of ``size`` rows of the plate.

        Raises:
            ValueError: if there are fewer rows than shards.
        """
        if size < self.count:
            raise ValueError(
                f"Expected at least one row for each of {self.count} processes, got {size} rows.\nStart fewer processes."
            )
        return torch.arange(self.rank, size, self.count)

    def check(self, plate: str, subsample: Subsample) -> None:
        """Refuse rows of a call that belong to other shards; where positions have no values yet, nothing is checked.

        Args:
            plate: the name of the plate.
            subsample: the rows of the call.

        Raises:
            ValueError: if they are not all of this shard.
        """
        index = subsample.index
        if index is not None and not (index.device.type == "cpu" and has_values(index)):
            return
        if index is None:
            found = f"all {subsample.size} in order"
        elif (index % self.count == self.rank).all():
            return
        else:
            found = f"row {int(index[index % self.count != self.rank][0])} among them"
        raise ValueError(
            f"Expected rows {self.rank}, {self.rank + self.count}, ... of plate {plate!r}, which process {self.rank} of "
            f"{self.count} holds the parameters of, got {found}.\nTry one of the following fixes:\n"
            "- in a training: batches=avi.minibatches(x, batch_size=..., distributed=True), or a loader of these rows\n"
            "- after it: avi.gather_tables(guide), on all processes, gives each of them all rows"
        )
