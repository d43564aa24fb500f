"""A guide whose parameters are tables with a row for each row of the plates: how calls and optimizers read them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_avi.calls.call_reader import CallData
from pyro_avi.factors.row_factor import RowFactor
from pyro_avi.guide_bases.local_guide import LocalGuide
from pyro_avi.rows.shard import Shard
from pyro_avi.rows.table import GatheredRows
from pyro_avi.rows.uniform_subsample import UniformSubsample

__all__ = ["TableGuide"]


class TableGuide(LocalGuide):
    """A guide with a table of parameters for each set of rows, whose inference functions are tables.

    A row-wise optimizer learns from it which rows a call has read, and moves no others.

    Args:
        model: any Pyro callable.
        rows_on, rows_path: as for :class:`~pyro_avi.FactorizedGuide`.
        **kwargs: as for every guide.
    """

    # None only with create_plates=.
    _reader: Any

    def __init__(
        self, model: Callable, *, rows_on: str | None = None, rows_path: str | PathLike | None = None, **kwargs
    ):
        super().__init__(model, **kwargs)
        if rows_on not in (None, "cpu", "disk"):
            raise ValueError(f"Expected rows_on to be None (where the model is), 'cpu' or 'disk', got {rows_on!r}.")
        if (rows_path is not None) != (rows_on == "disk"):
            raise ValueError(
                f"Expected rows_path=, a folder, with rows_on='disk' and nothing else, got {rows_path!r} and {rows_on!r}."
            )
        self._rows_on, self._rows_path = rows_on, None if rows_path is None else Path(rows_path).absolute()
        self._shard: Shard | None = None
        self._touched: list | None = None
        self._gathered: GatheredRows | None = None

    @property
    def rows_on(self) -> str | None:
        """``"cpu"`` or ``"disk"`` where tables are there whatever the device of the model, ``None`` where they are on it."""
        return self._rows_on

    @property
    def rows_path(self) -> Path | None:
        """The folder of tables on disk."""
        return self._rows_path

    @property
    def table(self) -> nn.Parameter | dict[tuple[str, ...], nn.Parameter]:
        """``[N, P]`` the parameters of all rows; by plates where there are several row sets.

        Of a table on disk it is the memory of the file: the first time, the initial values of rows that were never moved are
        written to it.
        """
        return self._by_row_set(lambda row_factor: row_factor.function.whole())

    @property
    def shard(self) -> Shard | None:
        """Which rows the table holds, of those that several processes share; ``None`` for all rows."""
        return self._shard

    def hold_shard(self, shard: Shard) -> None:
        """Hold the parameters of some rows and no others; :func:`~pyro_avi.fit` with ``distributed=`` calls it.

        Args:
            shard: the rows.

        Raises:
            ValueError: if the guide holds another shard, has rows in several plates, or fewer rows than shards.
        """
        if self._shard == shard:
            return
        if self._shard is not None:
            raise ValueError(
                f"Expected a guide with the parameters of all rows, or of those of process {shard.rank} of {shard.count}, got "
                f"one with those of process {self._shard.rank} of {self._shard.count}.\n"
                "Call avi.gather_tables(guide) on the processes that share it first."
            )
        if not self._is_set_up and self._pending_state is not None:
            raise ValueError(
                "Expected a new guide or one that has been set up, got one whose parameters were loaded and not used yet.\n"
                "Call guide.setup(*args) with the arguments of the model first."
            )
        if self._rows_path is not None:
            raise ValueError(
                "Expected a table in memory, to be shared by processes, got rows_on='disk': a table on disk belongs to one.\n"
                "Each process needs the memory of its own rows alone: leave out rows_on=, or pass rows_on='cpu'."
            )
        if self._is_set_up:
            self._check_can_be_shared(self.row_factors)
            for row_factor in self.row_factors:
                old = row_factor.function.table.detach()
                row_factor.function.table = nn.Parameter(old[shard.rows(len(old)).to(old.device)])
            # The table of this name in Pyro's store has other rows.
            self._take_new_name()
        self._shard = shard

    def hold_all_rows(self, tables: Mapping[str, Tensor]) -> None:
        """Hold the parameters of all rows again; :func:`~pyro_avi.gather_tables` calls it.

        Args:
            tables: ``[N, P]`` by name, as in :meth:`row_tables`.
        """
        for row_factor in self.row_factors:
            row_factor.function.table = nn.Parameter(tables[self._table_name(row_factor)])
        self._shard = None
        self._take_new_name()

    @staticmethod
    def _check_can_be_shared(row_factors: Iterable[RowFactor]) -> None:
        for row_factor in row_factors:
            if len(row_factor.row_set.plates) > 1:
                raise ValueError(
                    f"Expected rows of one plate, to be shared by processes, got those of {row_factor.row_set.plates}.\n"
                    "Train this guide in one process, or choose by plate=..."
                )

    @staticmethod
    def _table_name(row_factor: RowFactor) -> str:
        return " x ".join(row_factor.row_set.plates)

    def row_tables(self) -> Mapping[str, nn.Parameter]:
        """The parameters with one row for each row of the plates, by name; what a row-wise optimizer updates."""
        return {self._table_name(row_factor): row_factor.function.table for row_factor in self.row_factors}

    def row_moments(self, name: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """The memory of a new training's moments of the table of a name, as the table itself has it; ``None`` for none."""
        return next(r for r in self.row_factors if self._table_name(r) == name).function.moments()

    def _read_rows(self, row_factor: RowFactor, data: CallData) -> Tensor:
        """The parameters ``[B, P]`` of the rows of a call, those of several plates flattened."""
        name = self._table_name(row_factor)
        index = self._position(row_factor, data) if self._gathered is None else self._gathered.indices[name]
        if self._touched is None:
            # For optimizers that move the rows of the batch alone, as Pyro's DCTAdam(subsample_aware=True).
            row_factor.function.table._pyro_subsample = {} if index is None else {-2: index}
            return row_factor.function.read(index)
        for touched, known, rows in self._touched:
            if touched == name and (index is known or (index is not None and known is not None and index.equal(known))):
                return rows
        rows = row_factor.function.read_to_move(index) if self._gathered is None else self._gathered.rows[name]
        rows = rows.detach().requires_grad_()
        self._touched.append((name, index, rows))
        return rows

    def _position(self, row_factor: RowFactor, data: CallData) -> Tensor | None:
        """The positions of the rows of a call in the table, where the table is; ``None`` for all in order."""
        rows = [data.rows[name] for name in row_factor.row_set.plates]
        if all(each.index is None for each in rows):
            return None
        position: Any = None
        for each in rows:
            index = torch.arange(each.size, device=self._device) if each.index is None else each.index
            position = index if position is None else (position.unsqueeze(-1) * each.size + index).flatten()
        if self._shard is not None:
            position = position // self._shard.count
        return position.to(row_factor.function.table.device)

    def _drawn_rows(self, name, size, count):
        if self._shard is not None:
            raise ValueError(
                f"Expected batches with the positions of their rows, got a model that draws the rows of plate {name!r} itself, "
                "from those of all processes.\nPass the positions: pyro.plate(name, size, subsample=index), and "
                "batches=avi.minibatches(x, batch_size=..., distributed=True)."
            )
        gathered = {} if self._gathered is None else self._gathered.draws
        return UniformSubsample(size, count, self._depth, self._device, gathered.get(name))

    @property
    def _device(self):
        # That of the model, which tables in host memory are not on.
        tables = [row_factor.function for row_factor in self.row_factors if row_factor.function is not None]
        return tables[0].device if tables else super()._device

    def gather_rows(self, *args, **kwargs) -> GatheredRows:
        """The rows of the tables that a call reads, for a step that cannot read them itself.

        Args:
            *args, **kwargs: the arguments of the model. Where it draws its rows itself, they are drawn here.

        Raises:
            NotImplementedError: if the model draws its rows in plates that ``create_plates`` makes, anew for every call.
        """
        call = self._reader.call(args, kwargs, self._counts(self._given_plates(args, kwargs)))
        if call.drawn and self.create_plates is not None:
            raise NotImplementedError("create_plates= draws rows whose parameters are in host memory")
        draws = {name: self._drawn_rows(name, *counts).sample() for name, counts in call.drawn.items()}
        data = call.read(draws)
        indices = {self._table_name(row_factor): self._position(row_factor, data) for row_factor in self.row_factors}
        with torch.no_grad():
            rows = {
                name: row_factor.function.read_to_move(indices[name])
                for row_factor in self.row_factors
                for name in [self._table_name(row_factor)]
            }
        return GatheredRows(draws, indices, rows)

    @contextmanager
    def touched_rows(self, gathered: GatheredRows | None = None) -> Iterator[list[tuple[str, Tensor | None, Tensor]]]:
        """A context that gives a list, filled by every call with ``(name, index, rows)``.

        ``rows [B, P]`` is a leaf of the graph that stands for the rows ``index`` of the table, ``None`` for all in order.
        Calls are not checked by :meth:`check_rows` in it.

        Args:
            gathered: what :meth:`gather_rows` gave for all calls in the context.
        """
        self._touched, self._gathered = [], gathered
        try:
            yield self._touched
        finally:
            self._touched = self._gathered = None
