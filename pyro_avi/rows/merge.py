"""Values for the rows of minibatches, merged into values for all rows."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_avi.rows.subsample import Subsample

__all__ = ["MergedBatches"]


class MergedBatches:
    """Values of the sites of one set of rows, gathered batch by batch.

    A batch that says which of ``N`` rows of a plate it holds fills these rows; batches that do not follow one another.

    Args:
        plates: the names of the plates of the rows.
        dims: by site the dimensions of its value that hold these rows, from the right.
        device: of the result.
    """

    def __init__(self, plates: Sequence[str], dims: Mapping[str, Sequence[int]], device: torch.device | str = "cpu"):
        self._plates, self._dims, self._device = tuple(plates), dict(dims), torch.device(device)
        self._parts: dict[str, list[Tensor]] = {name: [] for name in dims}
        self._whole: dict[str, Tensor] = {}
        self._seen: Tensor | None = None

    def add(self, rows: Mapping[str, Subsample], values: Mapping[str, Tensor]) -> None:
        """Add the values of one batch.

        Args:
            rows: its rows, by plate. If one plate gives positions, the batch holds all rows of plates that give none.
            values: the values by site.

        Raises:
            ValueError: if some batches say which rows they hold and others do not, or of another number of rows.
        """
        subsamples = [rows[plate] for plate in self._plates]
        sizes = tuple(each.size for each in subsamples)
        known = len(subsamples) > 1 or any(each.index is not None for each in rows.values())
        if (self._seen is not None and (not known or self._seen.shape != sizes)) or (
            known and any(self._parts.values())
        ):
            raise ValueError(
                f"Expected every batch to give the positions of its rows among the same number of rows of {self}, or none to, "
                "got both."
            )
        if not known:
            for name in self._parts:
                self._parts[name].append(values[name].to(self._device))
            return
        if self._seen is None:
            self._seen = torch.zeros(sizes, dtype=torch.bool)
        indices = [torch.arange(each.size) if each.index is None else each.index.cpu() for each in subsamples]
        at = torch.meshgrid(*indices, indexing="ij")
        self._seen[at] = True
        front = list(range(len(sizes)))
        for name, dims in self._dims.items():
            value = values[name].movedim(list(dims), front).to(self._device)
            if name not in self._whole:
                self._whole[name] = value.new_empty(*sizes, *value.shape[len(sizes) :])
            self._whole[name][at] = value

    def __str__(self) -> str:
        return f"plate{'s' if len(self._plates) > 1 else ''} {' x '.join(map(repr, self._plates))}"

    @property
    def complete(self) -> bool:
        """Whether every row has been seen; always false if batches give no positions."""
        return self._seen is not None and bool(self._seen.all())

    def result(self) -> dict[str, Tensor]:
        """The values of all rows by site.

        Raises:
            ValueError: if rows are missing.
        """
        if self._seen is None:
            return {name: torch.cat(parts, self._dims[name][0]) for name, parts in self._parts.items()}
        if not self.complete:
            missing = int((~self._seen).sum())
            raise ValueError(
                f"Expected batches with all {self._seen.numel()} rows of {self}, got none with {missing} of them.\n"
                "For a part of the rows call posterior(*args) with their arguments."
            )
        front = list(range(self._seen.dim()))
        return {name: self._whole[name].movedim(front, list(dims)) for name, dims in self._dims.items()}
