"""The arguments of the next steps, where they are known before these are taken."""

import itertools
import operator
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["KnowsBatches", "same_call"]


@runtime_checkable
class KnowsBatches(Protocol):
    """An iterator of batches ``(x[index], ..., index)`` that can tell the positions of many at once."""

    @property
    def batch_size(self) -> int:
        """The number of rows in a batch."""
        ...

    @property
    def rows(self) -> tuple[Tensor, ...] | None:
        """``[N, ...]`` each, of which a batch is a copy of some rows; ``None`` where it is not."""
        ...

    def positions_ahead(self, most: int) -> Tensor:
        """``[M, B]`` the positions of the next batches, which are passed over: of those that have ``B`` rows, up to so many."""
        ...


def same_call(calls: Iterator[tuple]) -> tuple | None:
    """The arguments of all steps from now on, where they are the same; ``None`` elsewhere."""
    if type(calls) is itertools.repeat and operator.length_hint(calls, -1) == -1:
        return next(calls)
    return None
