"""Answers for minibatches, put together by the rows that they are about."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_avi.positions import Rows

__all__ = ["Merged"]


class Merged:
    """Values of sites in one plate, gathered batch by batch.

    A batch that says which of ``N`` rows it holds fills these rows; batches that do not follow one another.

    Args:
        plate: the name of the plate, for messages.
        sites: the names of the sites.
    """

    def __init__(self, plate: str, sites: Sequence[str]):
        self._plate = plate
        self._parts: dict[str, list[Tensor]] = {name: [] for name in sites}
        self._dims: dict[str, int] = {}
        self._whole: dict[str, Tensor] = {}
        self._seen: Tensor | None = None

    def add(self, rows: Rows, values: dict[str, tuple[Tensor, int]]) -> None:
        """Take the values of one batch.

        Args:
            rows: its rows.
            values: by site the value and the dimension of the rows in it.

        Raises:
            ValueError: if some batches say which rows they hold and others do not, or of another number of rows.
        """
        known = rows.index is not None
        if (self._seen is not None and (not known or len(self._seen) != rows.size)) or (
            known and any(self._parts.values())
        ):
            raise ValueError(
                f"Expected every batch to give the positions of its rows among the same number of rows of plate "
                f"{self._plate!r}, or none to, got both."
            )
        if not known:
            for name, (value, dim) in values.items():
                self._parts[name].append(value.movedim(dim, 0).cpu())
                self._dims[name] = dim
            return
        index = rows.index.cpu()
        if self._seen is None:
            self._seen = torch.zeros(rows.size, dtype=torch.bool)
        self._seen[index] = True
        for name, (value, dim) in values.items():
            if name not in self._whole:
                shape = list(value.shape)
                shape[dim] = rows.size
                self._whole[name] = torch.empty(shape, dtype=value.dtype)
            self._whole[name].index_copy_(dim, index, value.cpu())

    @property
    def complete(self) -> bool:
        """Whether every row has been seen; never so where batches follow one another."""
        return self._seen is not None and bool(self._seen.all())

    def result(self) -> dict[str, Tensor]:
        """The values of all rows by site.

        Raises:
            ValueError: if there was no batch, or rows are missing.
        """
        if not self._whole and not self._dims:
            raise ValueError("Expected at least one batch, got none.")
        if self._seen is None:
            return {name: torch.cat(parts).movedim(0, self._dims[name]) for name, parts in self._parts.items()}
        if not self.complete:
            missing = int((~self._seen).sum())
            raise ValueError(
                f"Expected batches with all {len(self._seen)} rows of plate {self._plate!r}, got none with {missing} of them.\n"
                "For a part of the rows call posterior(*args) with their arguments."
            )
        return self._whole
