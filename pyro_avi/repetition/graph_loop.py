"""A compiled graph whose steps are taken by a loop, and whether the loop does what single calls do."""

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_avi.native.draws import NativeDraws
from pyro_avi.optimization.traced_step import TracedStep
from pyro_avi.repetition.entry_loop import (
    CannotRepeat,
    Entry,
    Loop,
    Number,
    Rows,
    check_is_built,
    delete_handles,
    delete_memory,
    entry_of,
    new_handle,
    new_memory,
    take_turns,
)
from pyro_avi.seeds import seeded

__all__ = ["Batch", "GraphLoop", "Schedule"]

# Steps by which a loop is compared with single calls: the first one makes the tensors that the others are given again.
_TRIAL = 3
# Bytes of what a graph may change, which is copied once.
_MOST = 2**28


class Batch(NamedTuple):
    """The tensors of a call whose content the loop writes before every step.

    Attributes:
        rows: pairs of a tensor ``[B, ...]`` and of the one ``[N, ...]`` that its rows are taken from.
        positions: ``[B]`` those of the rows, ``None`` in a call that is the same at every step.
    """

    rows: Sequence[tuple[Tensor, Tensor]]
    positions: Tensor | None

    def fill(self, positions: Tensor) -> None:
        """Write the rows of one batch.

        Args:
            positions: ``[B]`` of its rows.
        """
        for to, every in self.rows:
            torch.index_select(every, 0, positions, out=to)
        if self.positions is not None:
            self.positions.copy_(positions)


class Schedule(NamedTuple):
    """A tensor of one number that graphs read, and the number at each step ``[K]``."""

    tensor: Tensor
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor, values: Sequence[float]) -> "Schedule":
        """Numbers of double precision, rounded as ``fill_`` rounds them."""
        return cls(tensor, torch.tensor(values, dtype=torch.double).to(tensor.dtype))


class GraphLoop:
    """Takes steps of a compiled graph in C++, one as the other to the last bit.

    Args:
        compiled: the graph, which returns the loss alone.
        traced: the step that it was compiled from.
        tensors: those of a call, in the memory that all calls have.
        batch: what of the call differs from step to step.

    Raises:
        CannotRepeat: if it cannot, or a few steps give other bits than single calls.
    """

    def __init__(self, compiled: Callable, traced: TracedStep, tensors: Sequence[Tensor], batch: Batch):
        if not traced.drawn or traced.tables:
            raise CannotRepeat("the graph draws itself, or leaves tables to be moved")
        if not isinstance(traced.draws, NativeDraws):
            raise CannotRepeat("a step draws other than normal and uniform numbers")
        check_is_built()
        own, draw = [x for x in traced.own if _may_be_written(x)], traced.draws
        if sum(x.numel() * x.element_size() for x in own) > _MOST:
            raise CannotRepeat("a step changes too much to be compared with another one first")
        # What is drawn is drawn into memory of theirs.
        self._batch, self._draws = batch, draw
        saved = [x.clone() for x in own]
        with torch.no_grad(), seeded(0):
            try:
                positions = self._trial_positions()
                # In the memory that all calls have.
                inputs = [*traced.own, *tensors, *draw()]
                self._loop = self._make(entry_of(compiled), inputs, compiled(*inputs)[0].dtype)
                self._compare(lambda: compiled(*traced.own, *tensors, *draw())[0], own, saved, positions)
            finally:
                _restore(own, saved)

    def take(self, steps: int, positions: Tensor | None, schedules: Sequence[Schedule], losses: Tensor) -> int:
        """Take steps until one has a loss that is not finite; their number, with that one.

        Args:
            steps: how many.
            positions: ``[steps, B]`` of the rows of each.
            schedules: of as many steps.
            losses: ``[steps]`` of double precision, where the losses are written.
        """
        numbers = [Number(to.data_ptr(), values.data_ptr(), to.element_size()) for to, values in schedules]
        with torch.no_grad():
            return take_turns(self._loop, steps, positions, numbers, losses)

    def _make(self, entry: Entry, inputs: Sequence[Tensor], dtype: torch.dtype) -> Loop:
        if dtype not in (torch.float32, torch.float64):
            raise CannotRepeat(f"the loss is of {dtype}")
        own = [new_handle(x) for x in inputs]
        handles = (ctypes.c_void_p * len(own))(*own)
        weakref.finalize(self, delete_handles, own)
        memory = new_memory(entry, handles)
        weakref.finalize(self, delete_memory, memory)
        rows = [
            Rows(to.data_ptr(), every.data_ptr(), to[0].numel() * to.element_size()) for to, every in self._batch.rows
        ]
        index = self._batch.positions
        return Loop(
            entry=entry.address,
            memory=memory,
            inputs=handles,
            num_inputs=len(own),
            rows=(Rows * len(rows))(*rows),
            num_rows=len(rows),
            index=None if index is None else index.data_ptr(),
            batch=0 if index is None else len(index),
            draw_all=self._draws.function,
            draws=self._draws.draws,
            num_draws=len(self._draws.draws),
            loss_is_double=dtype == torch.float64,
        )

    def _trial_positions(self) -> Tensor | None:
        """``[3, B]`` those of some batches, of which the first is written."""
        if self._batch.positions is None:
            return None
        size, count = len(self._batch.positions), len(self._batch.rows[0][1])
        positions = (torch.arange(_TRIAL * size) % count).view(_TRIAL, size)
        self._batch.fill(positions[0])
        return positions

    def _compare(
        self, step: Callable[[], Tensor], own: Sequence[Tensor], saved: Sequence[Tensor], positions: Tensor | None
    ) -> None:
        """Take some steps by single calls and by the loop, from the same state.

        Raises:
            CannotRepeat: if a bit differs.
        """
        _restore(own, saved)
        torch.manual_seed(0)
        expected = []
        for turn in range(_TRIAL):
            if positions is not None:
                self._batch.fill(positions[turn])
            expected.append(step().double())
        expected += [x.clone() for x in own]
        _restore(own, saved)
        torch.manual_seed(0)
        losses = torch.empty(_TRIAL, dtype=torch.double)
        taken = self.take(_TRIAL, positions, [], losses)
        if taken != _TRIAL or not all(
            torch.equal(one, two) for one, two in zip(expected, [*losses, *own], strict=True)
        ):
            raise CannotRepeat("the loop gives other numbers than single calls")


def _may_be_written(x: Tensor) -> bool:
    """Whether every element has memory of its own; an expanded tensor that a model holds has not."""
    return not any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))


def _restore(own: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    for tensor, values in zip(own, saved, strict=True):
        tensor.copy_(values)
