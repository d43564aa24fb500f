"""The parameters of all rows, where the model is or in host memory; on disk: see :mod:`~pyro_avi.rows.disk_table`."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_avi.rows.shard import Shard

__all__ = ["GatheredRows", "Table"]


class Table(nn.Module):
    """Parameters ``[N, P]`` of all rows; of several plates, the first one's rows outermost.

    Args:
        initial: ``[B, P]`` the first values of some rows, on the device of the model.
        sizes: the number of rows of each plate.
        rows_on: the device that the table stays on, ``None`` for that of the model.
        shard: which of the rows it holds, ``None`` for all.
    """

    place: Tensor

    def __init__(self, initial: Tensor, sizes: tuple[int, ...], rows_on: str | None, shard: Shard | None = None):
        super().__init__()
        self.sizes, self.stays = sizes, rows_on is not None
        if self.stays:
            # A buffer, which moves with the model, records the device of the model.
            self.register_buffer("place", initial.new_empty(0), persistent=False)
            initial = initial.to(rows_on)
        # A first call with a minibatch knows the initial values of its own rows only; the others take them in turn.
        size = torch.Size(sizes).numel()
        rows = torch.arange(size) if shard is None else shard.rows(size)
        self.table = nn.Parameter(initial[rows.to(initial.device) % len(initial)])

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.place.device if self.stays else self.table.device

    def read(self, index: Tensor | None) -> Tensor:
        """The rows ``[B, P]``, ``None`` for all in order, on the device of the model."""
        # Unlike indexing in brackets, `index_select` does not accept negative positions.
        return (self.table if index is None else self.table.index_select(0, index)).to(self.device)

    def read_to_move(self, index: Tensor | None) -> Tensor:
        """The same as :meth:`read`, of rows that an optimizer is going to move in the memory of :attr:`table`."""
        return self.read(index)

    def whole(self) -> nn.Parameter:
        """The parameters ``[N, P]`` of all rows."""
        return self.table

    def moments(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Where an optimizer is to keep its moments ``[N, P]`` and the visits ``[N, 1]`` of rows; ``None``: as it likes."""
        return None

    def append(self, start: Tensor) -> None:
        """Append rows with the parameters ``[M, P]``."""
        self.table = nn.Parameter(torch.cat([self.table.detach(), start]))
        self.sizes = (len(self.table),)

    def _apply(self, fn, recurse=True):
        def of_table(tensor: Tensor) -> Tensor:
            asked = fn(tensor.new_empty(0))
            return fn(tensor) if asked.device == tensor.device else tensor.to(asked.dtype)

        return super()._apply(lambda t: of_table(t) if self.stays and t is not self.place else fn(t), recurse)


class GatheredRows(NamedTuple):
    """The rows that a call reads of tables in host memory or on disk, copied to the device of the model before the call.

    Attributes:
        draws: by plate the rows ``[B]`` drawn by the guide, for plates that the model subsamples itself.
        indices: by table the rows ``[B]`` of this call, ``None`` for all in order, in host memory.
        rows: by table their parameters ``[B, P]``.
    """

    draws: dict[str, Tensor]
    indices: dict[str, Tensor | None]
    rows: dict[str, Tensor]
