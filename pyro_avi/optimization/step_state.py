"""The state of a compiled step: what its graph reads and writes, how gradients move it, and how a trial is rolled back."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_avi.optimization.adam import Adam, Moments
from pyro_avi.optimization.gradient import LossAndGrads, RowGrads, clipped

__all__ = ["StepState", "StepTensors", "Update"]


@dataclass(frozen=True)
class Update:
    """The optimizer of one parameter, and the learning rate that it takes.

    Attributes:
        adam: the optimizer of this parameter alone.
        group: the position of its learning rate.
    """

    adam: Adam
    group: int


class StepTensors(NamedTuple):
    """The tensors that a graph reads and writes.

    Attributes:
        values: the memory of each parameter, of at least one dimension, tables last.
        moments: those of each parameter; empty where the graph moves none.
        rates: the learning rate of each group ``[1]``.
    """

    values: list[Tensor]
    moments: list[Moments]
    rates: list[Tensor]


class _Moved(NamedTuple):
    """What a step changes of one parameter: all of its rows (``positions`` is ``None``), or those of a batch."""

    values: Tensor
    moments: Moments
    positions: Tensor | None


class StepState:
    """Parameters, moments and learning rates of a compiled step.

    Args:
        parameters: what a gradient is taken of, tables aside.
        updates: the optimizer of each of them, ``None`` where the graph returns gradients and moves nothing.
        tables: the optimizer of each table in the graph, by name.
        clip_norm: the largest norm of the gradient, ``None`` for any.

    Attributes:
        parameters: all that is trained in the graph, tables last.
        moves: whether the graph moves the parameters itself.
        tensors: what the graph reads and writes.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        updates: Sequence[Update] | None,
        tables: Mapping[str, Update],
        clip_norm: float | None,
    ):
        self.parameters = [*parameters, *(update.adam.parameter for update in tables.values())]
        self.moves, self._tables, self._clip_norm = updates is not None, dict(tables), clip_norm
        # In the order of the parameters.
        self._updates = [*updates, *tables.values()] if updates is not None else []
        values = [torch.atleast_1d(parameter.detach()) for parameter in self.parameters]
        self.tensors = StepTensors(values, [update.adam.moments for update in self._updates], [])
        self._rates: Sequence[float] = ()

    def set_rates(self, rates: Sequence[float]) -> None:
        """Write the learning rate of each group where graphs read it."""
        if not self.tensors.rates:
            # The graph may hold no parameter at all, where every table is outside of it.
            like = next(iter(self.tensors.values), torch.zeros(()))
            self.tensors.rates.extend(like.new_tensor([rate]) for rate in rates)
        elif rates != self._rates:
            for tensor, rate in zip(self.tensors.rates, rates, strict=True):
                tensor.fill_(rate)
        self._rates = rates

    def flat(self) -> list[Tensor]:
        """The tensors that the graph reads and writes, as a list."""
        return tree_flatten(self.tensors)[0]

    def move_to(self, tensors: Sequence[Tensor]) -> None:
        """Use other memory from now on, which holds the same values.

        Args:
            tensors: in the order of :meth:`flat`.
        """
        self.tensors = tree_unflatten(list(tensors), tree_flatten(self.tensors)[1])
        for parameter, values in zip(self.parameters, self.tensors.values, strict=True):
            parameter.data = values.view(parameter.shape)
        for i, update in enumerate(self._updates):
            update.adam.values, update.adam.moments = self.tensors.values[i], self.tensors.moments[i]
        if not self.moves:
            # Of tables that the caller moves.
            for update, values in zip(reversed(self._tables.values()), reversed(self.tensors.values), strict=False):
                update.adam.values = values

    @torch.no_grad()
    def move(self, result: LossAndGrads, tensors: StepTensors) -> list[RowGrads]:
        """Move parameters by a gradient.

        Args:
            result: a loss and its gradient; tables among its rows that are not in the graph are left as they are.
            tensors: changed in place: :attr:`tensors`, or others in their place while a graph is traced.

        Returns:
            The gradients of the tables that are not in the graph, clipped.
        """
        result, finite = clipped(result, self._clip_norm), result.loss.isfinite()
        # A loss that is not finite moves nothing, so that its cause can still be found afterwards.
        rates = [rate * finite for rate in tensors.rates]
        positions = {name: len(self._updates) - len(self._tables) + i for i, name in enumerate(self._tables)}
        moves: list[tuple[int, Tensor | None, Tensor | None]]
        moves = [(i, None, grad) for i, grad in enumerate(result.grads or ())]
        moves += [(positions[table], index, grad) for table, index, grad in result.rows if table in positions]
        moved = [(i, index, torch.where(finite, grad, 0.0)) for i, index, grad in moves if grad is not None]
        scales = self._scales([i for i, *_ in moved if not self._updates[i].adam.rows], tensors, rates)
        for i, index, grad in moved:
            update, values, moments = self._updates[i], tensors.values[i], tensors.moments[i]
            if i in scales:
                update.adam.move(values, moments.first, moments.second, grad, scales[i])
            else:
                update.adam.update(values, moments, index, grad, rates[update.group])
        return [rows for rows in result.rows if rows.table not in self._tables]

    def _scales(self, moved: Sequence[int], tensors: StepTensors, rates: Sequence[Tensor]) -> dict[int, Tensor]:
        """The scales of parameters that are moved as a whole, computed at once: apart they are a fifth of a small graph.

        Args:
            moved: the positions of these parameters, whose visits are counted.
            tensors: what the graph reads and writes.
            rates: the learning rate of each group.
        """
        kinds: dict[tuple, list[int]] = {}
        for i in moved:
            visits = tensors.moments[i].visits
            visits.add_(1)
            kinds.setdefault((visits.dtype, visits.device, self._updates[i].adam.betas), []).append(i)
        found: dict[int, Tensor] = {}
        for alike in kinds.values():
            visits = torch.cat([tensors.moments[i].visits for i in alike])
            lr = torch.cat([rates[self._updates[i].group] for i in alike])
            found |= zip(alike, self._updates[alike[0]].adam.scales(visits, lr).unbind(1), strict=True)
        return found

    def _moved(self, result: LossAndGrads) -> list[_Moved]:
        """What a step with these gradients changes."""
        if not self.moves:
            return []
        indices = {rows.table: rows.positions for rows in result.rows}
        tables = [None] * (len(self._updates) - len(self._tables)) + list(self._tables)
        return [
            _Moved(update.adam.values, update.adam.moments, None if table is None else indices.get(table))
            for update, table in zip(self._updates, tables, strict=True)
        ]

    @contextmanager
    def rolled_back(self, result: LossAndGrads) -> Iterator[None]:
        """A context for a trial step: all that a step with these gradients changes has its old values afterwards."""
        places = [(tensor, index) for values, moments, index in self._moved(result) for tensor in (values, *moments)]
        saved = [(tensor if index is None else tensor[index]).clone() for tensor, index in places]
        try:
            yield
        finally:
            with torch.no_grad():
                for (tensor, index), value in zip(places, saved, strict=True):
                    tensor.copy_(value) if index is None else tensor.index_copy_(0, index, value)

    def outcome(self, eager: LossAndGrads, taken: LossAndGrads) -> list[Tensor]:
        """Copies of the loss and the gradient of a step that was taken just now.

        Args:
            eager: the result of the eager step, which says what was moved.
            taken: the result of the step.
        """
        parts = [taken.loss.reshape(1)]
        if self.moves:
            # First moments grow by the gradients. The change of a parameter is no measure: of a gradient that is all but
            # zero its sign alone.
            parts += [x.first if index is None else x.first[index] for _, x, index in self._moved(eager)]
        grads = [*(() if self.moves else taken.grads or ()), *(rows.grad for rows in taken.rows)]
        return [part.clone() for part in (*parts, *grads) if part is not None]
