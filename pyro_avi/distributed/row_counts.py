"""How many rows a batch has: the weight of its gradient among those of other processes."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["RowCounts"]


class RowCounts:
    """Counts the rows of calls.

    Args:
        guide: any guide. Of one that does not know the rows of a call, every call counts as one.
    """

    def __init__(self, guide: Callable):
        self._rows_of = getattr(guide, "rows_of", None)
        self._known: dict[tuple, int] = {}

    def __call__(self, call: tuple, kwargs: Mapping[str, Any]) -> int:
        """The number of rows of a call; of rows of several plates, that of their combinations."""
        if self._rows_of is None:
            return 1
        given = (*call, *kwargs.values())
        # The plates of a call are known by the shapes of its tensors; numbers may say how many rows there are.
        shapes = tuple(x.shape if isinstance(x, Tensor) else None for x in given)
        if shapes not in self._known:
            count = math.prod(len(rows) for rows in self._rows_of(*call, **kwargs).values())
            if not all(x is None or isinstance(x, Tensor) for x in given):
                return count
            self._known[shapes] = count
        return self._known[shapes]
