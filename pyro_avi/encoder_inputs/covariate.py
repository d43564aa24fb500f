"""An argument of a model that its rows depend on, and how its rows are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_avi.encoder_inputs.arguments import Argument
from pyro_avi.rows.subsample import Subsample

__all__ = ["Covariate"]


@dataclass(frozen=True)
class Covariate:
    """An argument that the rows of a row set depend on.

    Attributes:
        argument: where it is found.
        dims: for each plate of the row set its dimension with the plate's rows, ``None`` if it has none.
        by_position: whether an argument of all rows is indexed by the positions of the call's rows where both are as many.
        transform: applied before it is standardized.
    """

    argument: Argument
    dims: tuple[int | None, ...]
    by_position: bool
    transform: str

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        own = {"dims": list(self.dims), "by_position": self.by_position, "transform": self.transform}
        return {"argument": self.argument.name, **own}

    def read(self, args: tuple, kwargs: Mapping[str, Any], rows: Sequence[Subsample]) -> Tensor:
        """The values of a call's rows, ``[*B, ...]``.

        Args:
            args, kwargs: the arguments of the model.
            rows: of each plate of the row set.
        """
        value, there = self.argument.value_in(args, kwargs), []
        for dim, subsample in zip(self.dims, rows, strict=True):
            if dim is None:
                continue
            size = value.shape[dim] if dim < value.dim() else None
            if subsample.index is not None and size == subsample.size and (self.by_position or size != len(subsample)):
                value = value.index_select(dim, subsample.index)
            elif size != len(subsample):
                raise ValueError(
                    f"Expected argument {self.argument.name} of the model with the {len(subsample)} rows of the call, or all "
                    f"{subsample.size}, in dimension {dim}, got shape {tuple(value.shape)}."
                )
            there.append(dim)
        value = value.movedim(there, tuple(range(len(there))))
        for position, (dim, subsample) in enumerate(zip(self.dims, rows, strict=True)):
            if dim is None:
                value = value.unsqueeze(position)
                value = value.expand(*value.shape[:position], len(subsample), *value.shape[position + 1 :])
        return value
