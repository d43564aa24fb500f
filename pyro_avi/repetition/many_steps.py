"""Many steps of a training in one call, on a CPU: those until the next time that something else happens."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from pyro_avi.optimization.compiled_step import CompiledStep
from pyro_avi.optimization.step import TrainingStep
from pyro_avi.repetition.calls_ahead import KnowsBatches, same_call
from pyro_avi.repetition.entry_loop import CannotRepeat
from pyro_avi.repetition.graph_loop import Batch, GraphLoop, Schedule

__all__ = ["ManySteps"]


class ManySteps:
    """Takes steps by a loop in C++, which are to the last bit those that :class:`TrainingStep` takes one by one.

    A small step takes less time than it takes Python to call it. The loop takes the steps of compiled graphs that return
    their loss alone, with draws of normal and uniform numbers, of batches of :func:`~pyro_avi.minibatches` or of whole data.
    All others are single steps.

    Args:
        training_step: takes single steps.
        calls: the arguments of the steps to go.
        kwargs: those by keyword.
        alone: whether no other process takes the same steps.

    Attributes:
        call: the arguments of the last step that was taken.
    """

    # Seconds that a call takes at most, roughly: an interrupt waits for its end.
    longest = 0.1
    # Steps to go, of fewer of which making a loop takes longer than it saves.
    fewest = 500

    def __init__(self, training_step: TrainingStep, calls: Iterator[tuple], kwargs: Mapping[str, Any], *, alone: bool):
        self._step, self._kwargs = training_step, kwargs
        self._seconds = math.inf
        self._loop: GraphLoop | None = None
        self._batches = calls if isinstance(calls, KnowsBatches) else None
        self._batch, self.call = _fixed_call(calls, self._batches)
        self._compiled: CompiledStep | None = None
        compiled = training_step.compiled
        if compiled is not None and alone and training_step.device.type == "cpu" and self.call is not None:
            self._compiled = compiled if compiled.state.moves and not compiled.gathers else None

    def single(self, step: int, call: tuple) -> Tensor:
        """Take one step; return the loss before it."""
        began = time.perf_counter()
        loss = self._step.step(step, call, self._kwargs)
        self._seconds = min(self._seconds, time.perf_counter() - began)
        return loss

    def take(self, step: int, most: int, losses: Tensor) -> int:
        """Take steps until one has a loss that is not finite.

        Args:
            step: the number of the first one.
            most: how many at most.
            losses: ``[num_steps]`` those of the training, among which theirs are written.

        Returns:
            How many were taken; 0 where the next step has to be a single one.
        """
        if self._seconds * most > self.longest:
            most = int(self.longest / self._seconds)
        if self._compiled is None or most < 2 or (self._loop is None and len(losses) - step < self.fewest):
            return 0
        loop = self._ready_loop(self._compiled)
        if loop is None:
            return 0
        rates, weights = self._numbers(range(step, step + most))
        positions = None if self._batches is None else self._batches.positions_ahead(len(rates))
        count = len(rates) if positions is None else len(positions)
        if count == 0:
            return 0
        if positions is not None:
            self._batch.fill(positions[0])
        # The next calls differ from this one in the positions of their rows alone.
        self._step.check_rows(*(self.call or ()), **self._kwargs)
        state, weight = self._compiled.state, self._step.kl_weight
        state.set_rates(rates[0])
        by_group = zip(*rates[:count], strict=True)
        schedules = [Schedule.of(x, values) for x, values in zip(state.tensors.rates, by_group, strict=True)]
        schedules += [] if weight is None else [Schedule.of(weight.tensor, weights[:count])]
        taken = loop.take(count, positions, schedules, losses[step : step + count])
        state.set_rates(rates[taken - 1])
        return taken

    def _numbers(self, steps: Iterable[int]) -> tuple[list[list[float]], list[float]]:
        """The learning rates and the weight of each step, up to the first one at which they cannot be computed."""
        rates, weights = [], []
        # What is raised comes again at that step, which is a single one then.
        with suppress(Exception):
            for step in steps:
                now, weight = self._step.rates(step), self._step.kl_weight
                if weight is not None:
                    weights.append(weight.at(step))
                rates.append(now)
        return rates, weights

    def _ready_loop(self, compiled: CompiledStep) -> GraphLoop | None:
        """The loop of the graph for these calls; ``None`` where there is no graph yet, or no loop of it."""
        if self._loop is None and (found := compiled.graph_of(self.call or (), self._kwargs)) is not None:
            try:
                self._loop = GraphLoop(*found, self._batch)
            # The state is as it was before, whatever has failed: single steps go on from it.
            except (CannotRepeat, RuntimeError):
                self._compiled = None
        return self._loop


def _fixed_call(calls: Iterator[tuple], batches: KnowsBatches | None) -> tuple[Batch, tuple | None]:
    """The call that all steps of a loop have, and what of it differs from step to step; no call where there can be none."""
    if batches is None:
        return Batch([], None), same_call(calls)
    if batches.rows is None:
        return Batch([], None), None
    index = torch.empty(batches.batch_size, dtype=torch.int64)
    rows = [(every.new_empty(len(index), *every.shape[1:]), every) for every in batches.rows]
    return Batch(rows, index), (*(own for own, _ in rows), index)
