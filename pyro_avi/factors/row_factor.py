"""The factor of one set of rows."""

from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from pyro_avi.factors.factor import Factor
from pyro_avi.families import Family
from pyro_avi.inspection.structure import RowSet

__all__ = ["RowFactor", "RowFactors"]


class RowFactor(nn.Module):
    """The factor of one set of rows and the inference function that gives its parameters.

    Attributes:
        row_set: the rows and their latents.
        factor: what samples the latents from parameters ``[*B, P]``.
        function: the inference function.
    """

    def __init__(self, row_set: RowSet, family: Family, *, most: int | None = None):
        super().__init__()
        self.row_set = row_set
        name = f"_{'_'.join(row_set.plates)}_latents"
        self.factor = Factor(name, row_set.latents, row_set.frames, family, most=most)
        # Of another class in each guide.
        self.function: Any = None


class RowFactors(nn.ModuleList):
    """The factors of all sets of rows of a guide."""

    def __iter__(self) -> Iterator[RowFactor]:
        return cast(Iterator[RowFactor], super().__iter__())

    def __getitem__(self, position: int) -> RowFactor:  # type: ignore[override]  # no slices are asked for
        return cast(RowFactor, super().__getitem__(position))
