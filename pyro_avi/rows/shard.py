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

    def share(self, drawn: int, size: int) -> int:
        r"""How many of so many rows drawn one after another are this shard's, where every row is drawn as often as any other.

        .. math:: s_k(d) \approx d\, N_k / N, \qquad \sum_k s_k(d) = d

        As ``d`` grows by equal steps, the ``s_k`` do too, up to one row.

        Args:
            drawn: ``d``, of all shards together; whole batches of one size.
            size: ``N``, the number of rows of the plate.

        Example::

            >>> from pyro_avi.rows.shard import Shard
            >>> [[Shard(k, 2).share(4 * batch, 7) for batch in range(6)] for k in range(2)]
            [[0, 2, 4, 6, 9, 11], [0, 2, 4, 6, 7, 9]]
        """
        each, larger = divmod(size, self.count)
        # The first shards have a row more. What all of these have, and all others, is dealt out in turn.
        to_larger = drawn * larger * (each + 1) // size
        if self.rank < larger:
            return (to_larger + self.rank) // larger
        return (drawn - to_larger + self.rank - larger) // (self.count - larger)

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
