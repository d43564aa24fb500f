"""The factorized guide: a factor for each row, with parameters of its own."""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from os import PathLike

import torch
from torch import Tensor

from pyro_avi.calls.call_reader import CallData, CallReader
from pyro_avi.factors.row_factor import RowFactor
from pyro_avi.guide_bases.description import check_description
from pyro_avi.guide_bases.table_guide import TableGuide
from pyro_avi.inspection.isolated_run import isolated_run
from pyro_avi.inspection.sites import row_plates
from pyro_avi.rows.data_recognizer import DataRecognizer
from pyro_avi.rows.disk_table import DiskTable
from pyro_avi.rows.refinement import Refinement
from pyro_avi.rows.subsample import Subsample
from pyro_avi.rows.table import Table

__all__ = ["FactorizedGuide"]


class FactorizedGuide(TableGuide):
    r"""A guide that gives every row a factor with parameters of its own, ``N * P`` in all (F-VI).

    .. math:: f(n, x_n) = \lambda_n

    The upper end of the comparison: no inference function does better, given the family. It answers for the rows it was
    fitted to; for others, see :func:`~pyro_avi.refine`.

    Where several plates hold both a latent and an observation, it takes them all.

    Args:
        model: any Pyro callable.
        same_rows: whether calls without row indices are about the same rows even where the observed values are not those
            of the first call, as with noise or binary images drawn anew. Otherwise they are refused: without indices a
            minibatch cannot be told from the data.
        rows_on: ``"cpu"`` to keep the table in host memory, whatever device the guide is moved to, and with it the state of
            :func:`~pyro_avi.fit`'s optimizer: ``N (3 P + 1)`` numbers in all. Every call brings the rows of its batch to
            the device of the model. ``None``: the table is where the model is. ``"disk"``: table and optimizer state are a
            file of ``N (3 P + 2)`` numbers that is mapped into memory: a step reads and writes the rows of its batch alone,
            and the number of rows is bounded by the disk. Such a guide is trained by :func:`~pyro_avi.fit`: other optimizers
            keep their gradients and moments of the whole table in memory.
        rows_path: the folder of tables on disk. A table that is there goes on as it is, with the parameters that it has.
            One guide uses it at a time.
        plate, family, global_guide, init_loc_fn, init_scale, create_plates: as for every guide, see
            :class:`~pyro_avi.guide_bases.local_guide.LocalGuide`.

    Raises:
        ValueError: if ``rows_on`` is none of ``None``, ``"cpu"`` and ``"disk"``, or does not go with ``rows_path``.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.FactorizedGuide(model).setup(x)
        >>> guide.table.shape
        torch.Size([20, 4])
    """

    def __init__(
        self,
        model: Callable,
        *,
        same_rows: bool = False,
        rows_on: str | None = None,
        rows_path: str | PathLike | None = None,
        **kwargs,
    ):
        super().__init__(model, rows_on=rows_on, rows_path=rows_path, **kwargs)
        self._same_rows = same_rows
        #: What :func:`~pyro_avi.refine` with ``tolerance=`` said of the rows; by plates where there are several row sets. It is
        #: no part of the file of a guide.
        self.refinement: Refinement | dict[tuple[str, ...], Refinement] | None = None
        # Set by setup(), which every other method calls first.
        self._recognizer: DataRecognizer = None  # type: ignore[assignment]

    def _default_plates(self, trace):
        return row_plates(trace)

    def _create_reader(self, structure):
        sites = (
            () if self._same_rows else tuple({name: None for rows in structure.row_sets for name in rows.observations})
        )
        self._recognizer = DataRecognizer(", ".join(map(str, structure.row_sets)))
        latents = [latent.name for latent in structure.global_latents + structure.local_latents]
        unobserved = not structure.observations
        return CallReader(self.model, tuple(structure.frames), sites, latents, optional=True, unobserved=unobserved)

    def describe(self):
        """The kind of this guide as plain data, with the numbers of rows of its tables."""
        if self._shard is not None:
            raise ValueError(
                f"Expected a guide with the parameters of all rows, got one with those of process {self._shard.rank} of "
                f"{self._shard.count}.\nCall avi.gather_tables(guide) on all processes first."
            )
        sizes = [list(row_factor.function.sizes) for row_factor in self.row_factors]
        result = {**super().describe(), "same_rows": self._same_rows, "rows_on": self._rows_on, "sizes": sizes}
        if self._rows_path is not None:
            tables = [row_factor.function for row_factor in self.row_factors]
            for table in tables:
                table.flush()
            result |= {"rows_path": str(self._rows_path), "rows_version": [table.version for table in tables]}
        return result

    def _check_expected(self):
        if self._expected is not None and self._rows_path is not None:
            found, saved = [r.function.version for r in self.row_factors], self._expected.description["rows_version"]
            if found != saved:
                raise ValueError(
                    f"Expected the rows in {self._rows_path} as the guide was saved with them, after {saved} moves, got "
                    f"them after {found}.\nTry one of the following fixes:\n"
                    "- a copy of the folder that was made when the guide was saved: avi.load(..., rows_path=...)\n"
                    "- the rows as they are now: save the guide at the end of its training"
                )
        super()._check_expected()

    def _held_elsewhere(self):
        files = [] if self._rows_path is None else [path for path in self._rows_path.rglob("*") if path.is_file()]
        # A number has at least two bytes.
        return sum(path.stat().st_size for path in files) // 2

    def _check_expected_rows(self, expected, data):
        sizes = [[data.rows[name].size for name in row_factor.row_set.plates] for row_factor in self.row_factors]
        check_description({"sizes": sizes}, expected.description)
        for row_factor, size in zip(self.row_factors, sizes, strict=True):
            expected.check_size(row_factor.row_set.plates, prod(size) * row_factor.factor.num_parameters)

    def _create_function(self, row_factor, initial, data, args, kwargs):
        sizes = tuple(data.rows[name].size for name in row_factor.row_set.plates)
        initial = initial.flatten(0, -2)
        if self._shard is not None:
            self._check_can_be_shared([row_factor])
        if self._rows_path is None:
            return Table(initial, sizes, self._rows_on, self._shard)
        number = sum(other.function is not None for other in self.row_factors)
        latents = [latent.name for latent in row_factor.row_set.latents]
        kind = {
            "plates": list(row_factor.row_set.plates),
            "latents": latents,
            "family": self.family.describe()["class"],
        }
        return DiskTable(initial, sizes, self._rows_path / f"table{number}", kind)

    def _infer(self, row_factor, data, args, kwargs):
        self._check_sizes(row_factor, data)
        if self._touched is None and not torch.jit.is_tracing():
            self._check_same_rows(data)
        shape = (*(len(data.rows[name]) for name in row_factor.row_set.plates), row_factor.factor.num_parameters)
        return self._read_rows(row_factor, data).reshape(shape)

    def _check_drawn(self, ignored):
        if ignored:
            name = ignored[0]
            raise ValueError(
                f"Expected a model that reads the rows it draws in plate {name!r}, got one that observes what it is given, "
                "whichever rows it draws: a table would train those rows on the data of others.\n"
                "Try one of the following fixes:\n"
                f"- pass the positions of the batch: pyro.plate({name!r}, size, subsample=index)\n"
                f"- or to this guide alone: create_plates=lambda x, index: pyro.plate({name!r}, size, subsample=index)\n"
                f"- pass all data, and read x[rows] in `with pyro.plate({name!r}, len(x), subsample_size=...) as rows:`"
            )

    def _check_sizes(self, row_factor: RowFactor, data: CallData) -> None:
        for name, size in zip(row_factor.row_set.plates, row_factor.function.sizes, strict=True):
            if data.rows[name].size != size:
                raise ValueError(
                    f'Expected all {size} rows of plate "{name}", got {data.rows[name].size}.\n'
                    "A FactorizedGuide has one row of parameters for each row it was fitted to.\n"
                    "Try one of the following fixes:\n"
                    "- for a minibatch, pass the positions of its rows, or let the model subsample its plate\n"
                    "- for held-out rows: avi.refine(model, guide, x_new, num_steps=...)"
                )
            if self._shard is not None:
                self._shard.check(name, data.rows[name])

    def check_rows(self, *args, **kwargs) -> None:
        """Raise an error if a call is about other rows than those of the tables.

        Args:
            *args, **kwargs: the arguments of the model.

        Raises:
            ValueError: if the plates have other sizes, or values without row indices are not those of the first call.
        """
        self.setup(*args, **kwargs)
        if self.create_plates is None:
            call = self._reader.call(args, kwargs)
            self._check_drawn(call.ignored)
            # The model draws its rows from those of the table.
            data = call.read(
                {name: torch.arange(count, device=self._device) for name, (_, count) in call.drawn.items()}
            )
        else:
            with isolated_run():
                data, _ = self._find(args, kwargs, self._given_plates(args, kwargs))
        for row_factor in self.row_factors:
            self._check_sizes(row_factor, data)
        self._check_same_rows(data)

    def knows_rows(self, *args, **kwargs) -> bool:
        """Whether :meth:`check_rows` can decide if a call is about the rows of the tables.

        It cannot if the call gives no positions and there was no earlier call without positions to compare it with.

        Args:
            *args, **kwargs: the arguments of the model.
        """
        if self._same_rows or self._recognizer.has_seen_rows:
            return True
        if self.create_plates is None and self._reader.draws_rows(args, kwargs):
            return True
        return any(rows.index is not None for rows in self.rows_of(*args, **kwargs).values())

    def _check_same_rows(self, data: CallData) -> None:
        if data.values and all(rows.index is None for rows in data.rows.values()):
            self._recognizer.check(data.values)

    def append_rows(self, count: int, start: Tensor | None = None) -> None:
        """Append new rows to the table of a guide; the parameters of the rows there are do not change.

        The model has to know of them too: its plate is larger from now on. To train the new rows and nothing else, call
        :func:`~pyro_avi.fit` with batches of them and ``lr={"local": ...}``.

        Args:
            count: the number of new rows.
            start: ``[count, P]`` or ``[P]`` their parameters; by default the mean over the table, its best constant guess.

        Raises:
            ValueError: if the guide has not been set up, has several sets of rows, or the start has another shape.

        Example::

            >>> import torch
            >>> import pyro_avi as avi
            >>> x = torch.rand(20, 1, 8, 8)
            >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
            >>> guide = avi.FactorizedGuide(model).setup(x)
            >>> model.size = 25
            >>> guide.append_rows(5)
            >>> guide.posterior(torch.rand(5, 1, 8, 8), torch.arange(20, 25)).batch_shape
            torch.Size([5])
        """
        self._require_setup()
        if self._shard is not None:
            raise ValueError("Expected the parameters of all rows, got a shard.\nCall avi.gather_tables(guide) first.")
        if [len(row_factor.row_set.plates) for row_factor in self.row_factors] != [1]:
            raise ValueError(
                f"Expected a guide for the rows of one plate, got {', '.join(map(repr, self.row_plates))}."
            )
        function = self.row_factors[0].function
        old = function.whole().detach()
        start = old.mean(0) if start is None else start.to(old)
        if count < 1 or start.shape not in (old.shape[1:], (count, old.shape[1])):
            raise ValueError(
                f"Expected at least one row and a start of shape ({count}, {old.shape[1]}) or ({old.shape[1]},), got {count} "
                f"rows and {tuple(start.shape)}."
            )
        function.append(start.expand(count, -1))
        # The readers are for the old size, and so is the table of this name in Pyro's store.
        self._reader = self._create_reader(self._structure)
        self._take_new_name()

    def _all_rows(self):
        data = super()._all_rows()
        if data is None:
            return None
        sizes = {
            name: size
            for row_factor in self.row_factors
            for name, size in zip(row_factor.row_set.plates, row_factor.function.sizes, strict=True)
        }
        return replace(data, rows={name: Subsample(size, None) for name, size in sizes.items()})
