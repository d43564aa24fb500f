"""Tables of which every process holds the rows that it owns."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pyro_avi.distributed.ranks import Ranks
from pyro_avi.rows.shard import Shard

__all__ = ["HasSharedTables", "gather_tables", "hold_own_rows"]


@runtime_checkable
class HasSharedTables(Protocol):
    """A guide with parameters for each row, that can do with those of a part of the rows."""

    @property
    def shard(self) -> Shard | None:
        """The rows that it holds the parameters of, ``None`` for all."""
        ...

    def row_tables(self) -> Mapping[str, nn.Parameter]:
        """The tables by name."""
        ...

    def hold_shard(self, shard: Shard) -> None:
        """Hold the parameters of these rows and no others."""
        ...

    def hold_all_rows(self, tables: Mapping[str, Tensor]) -> None:
        """Hold these tables of all rows."""
        ...


def hold_own_rows(ranks: Ranks, guide: Callable, optimizer: Any) -> None:
    """Let a guide hold the parameters of the rows of this process, before a training.

    Args:
        ranks: the processes of the training.
        guide: any guide.
        optimizer: that of the user, if any.

    Raises:
        ValueError: if the guide's parameters by row are moved by an optimizer that knows no rows, or cannot be shared.
    """
    # Any guide may have tables: HasRowTables of the optimization says no more than this, and stands below.
    if ranks.shard is None or not hasattr(guide, "row_tables"):
        return
    if not isinstance(guide, HasSharedTables):
        raise ValueError(
            f"Expected a FactorizedGuide, or a guide without parameters for each row, got {type(guide).__name__}.\n"
            "Train it in one process."
        )
    if optimizer is not None:
        raise ValueError(
            "Expected optimizer=None for a FactorizedGuide trained by several processes, each of which moves the rows that it "
            "holds, got an optimizer of all parameters.\nLeave out optimizer=: it is Adam row by row."
        )
    guide.hold_shard(ranks.shard)


@torch.no_grad()
def gather_tables(guide: Any, *, distributed: Any = True) -> None:
    """Give every process the parameters of all rows, after a training with ``distributed=``; all processes call it.

    The guide is then one like any other, and can be saved. It needs the memory for all rows.

    Args:
        guide: a :class:`~pyro_avi.FactorizedGuide`; others are the same in all processes, and are left as they are.
        distributed: as it was for :func:`~pyro_avi.fit`.

    Raises:
        ValueError: if ``torch.distributed`` is not initialized, or the guide holds the rows of other processes.
    """
    ranks = Ranks(distributed)
    if not isinstance(guide, HasSharedTables):
        return
    held = ranks.gather(None if guide.shard is None else (guide.shard.rank, guide.shard.count))
    if held == [None] * ranks.count:
        return
    if held != [(rank, ranks.count) for rank in range(ranks.count)]:
        raise ValueError(
            f"Expected a guide that these {ranks.count} processes have trained, got the shards {held}.\n"
            "Pass distributed= as it was for avi.fit, on all processes."
        )
    tables = {}
    for name, own in guide.row_tables().items():
        sizes = ranks.gather(len(own))
        # Of equal shapes: the last rows of some processes are left out again.
        padded = own.new_zeros(max(sizes), own.shape[1])
        padded[: len(own)] = own
        parts = ranks.gather_tensor(padded)
        # Row n is row n // count of process n % count.
        tables[name] = torch.stack(parts, 1).flatten(0, 1)[: sum(sizes)]
    guide.hold_all_rows(tables)
