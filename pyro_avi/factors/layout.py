"""The layout of a site's values in rows of coordinates."""

from collections.abc import Sequence
from math import prod

from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_avi.inspection.structure import Latent

__all__ = ["Layout", "spread"]


def spread(rows: Tensor, frames: Sequence[CondIndepStackFrame], depth: int, lead: int = 0) -> Tensor:
    """Rows ``[..., *B, K]`` with ``depth`` dimensions for plates, each where its plate says, behind ``lead`` others."""
    sizes = dict(zip((-frame.dim for frame in frames), rows.shape[lead:], strict=False))
    return rows.reshape(*rows.shape[:lead], *(sizes.get(depth - i, 1) for i in range(depth)), rows.shape[-1])


class Layout:
    """The layout of a latent's tensor, with batch and event dimensions, in the rows ``[*B, K]``.

    Args:
        latent: the latent.
        frames: the plates of the rows, the one with the leftmost dimension first.

    Attributes:
        size: ``K``, the number of elements in one row.
        inner: the sizes of the dimensions of plates that are not those of the rows, 1 elsewhere.
        row_shape: the shape of the elements in one row: other plates, then event dimensions.
        is_rows: whether the site has the shape of the rows: a vector in one plate.
    """

    def __init__(self, latent: Latent, frames: Sequence[CondIndepStackFrame]):
        shape = latent.initial.shape
        split = latent.initial.dim() - latent.unconstrained_event_dim
        batch, self._event = shape[:split], tuple(shape[split:])
        self._frames = tuple(frames)
        self._rows = {-frame.dim for frame in frames}
        self._depth = len(batch)
        self.inner = tuple(1 if len(batch) - i in self._rows else size for i, size in enumerate(batch))
        self.size = prod(self.inner) * prod(self._event)
        self.row_shape = [*self.inner, *self._event]
        # A vector in one plate needs no reshaping, in the most frequent case and the one with the least to do.
        self.is_rows = self._depth == len(self._frames) == len(self._event) == 1

    def to_rows(self, value: Tensor) -> Tensor:
        """``[*B, K]`` of a tensor in the site's shape."""
        positions = [self._depth + frame.dim for frame in self._frames]
        value = value.movedim(positions, list(range(len(positions))))
        return value.reshape((*value.shape[: len(positions)], -1))

    def from_rows(self, rows: Tensor, extra: int | None = None) -> Tensor:
        """The site's shape of ``[..., *B, K]``, or of ``[..., *B, K * extra]`` with ``extra`` elements in each."""
        if self.is_rows and extra is None:
            return rows
        lead = rows.dim() - 1 - len(self._frames)
        return self.from_spread(spread(rows, self._frames, self._depth, lead), extra)

    def from_spread(self, rows: Tensor, extra: int | None = None) -> Tensor:
        """The site's shape of rows whose plates' dimensions stand where the plates say, behind any others."""
        event = self._event if extra is None else (*self._event, extra)
        batch = tuple(rows.shape[:-1])
        batch = (1,) * (self._depth - len(batch)) + batch
        lead, batch = batch[: len(batch) - self._depth], batch[len(batch) - self._depth :]
        if prod(self.inner) == 1:
            return rows.reshape((*lead, *batch, *event))
        rows = rows.reshape((*lead, *batch, *self.inner, *event))
        # In each dimension either the rows or the other plate has size 1.
        pairs = [len(lead) + x for i in range(self._depth) for x in (i, self._depth + i)]
        tail = range(len(lead) + 2 * self._depth, rows.dim())
        merged = [a * b for a, b in zip(batch, self.inner, strict=True)]
        return rows.permute(*range(len(lead)), *pairs, *tail).reshape((*lead, *merged, *event))
