"""After which steps of a training something else happens."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

__all__ = ["CHECK_EVERY", "KnowsNextCall", "Stops"]

#: Steps between two times that the losses are read from the device and checked, and that the clock is read.
CHECK_EVERY = 100


@runtime_checkable
class KnowsNextCall(Protocol):
    """A callback that need not be called after every step."""

    def next_call(self, steps: int) -> int:
        """After how many steps in all it has to be called next, where so many have been taken."""
        ...


class Stops:
    """The steps after which losses are checked, the clock is read, callbacks are called and files are written.

    Args:
        callbacks: called after every step, or when they want to be, and after the last step.
        start: the number of steps that were taken before.
        num_steps: the number of steps in all.
        every: the number of steps between two files, ``None`` for none.
    """

    def __init__(self, callbacks: Sequence[Callable[[Any], Any]], start: int, num_steps: int, every: int | None):
        self._callbacks, self._num_steps, self._every = callbacks, num_steps, every
        self._due = [_next_call(callback, start) for callback in callbacks]

    def next(self, taken: int) -> int:
        """The number of steps at the next stop, where so many have been taken."""
        found = [self._num_steps, taken + CHECK_EVERY - taken % CHECK_EVERY, *self._due]
        if taken < CHECK_EVERY:
            found.append(1 << taken.bit_length())
        if self._every is not None:
            found.append(taken + self._every - taken % self._every)
        return max(taken + 1, min(found))

    def is_last(self, taken: int) -> bool:
        """Whether these are all steps."""
        return taken == self._num_steps

    def checks(self, taken: int) -> bool:
        """Whether all losses are checked now."""
        return taken % CHECK_EVERY == 0 or self.is_last(taken)

    def laps(self, taken: int) -> bool:
        """Whether the clock is read now: also after 1, 2, 4, ... of the first steps."""
        return self.checks(taken) or (taken < CHECK_EVERY and not taken & (taken - 1))

    def writes(self, taken: int) -> bool:
        """Whether a file is written now."""
        return self._every is not None and not self.is_last(taken) and taken % self._every == 0

    def calls(self, taken: int) -> bool:
        """Whether a callback is called now."""
        return any(due <= taken for due in self._due) or (bool(self._due) and self.is_last(taken))

    def call(self, taken: int, result: Any) -> bool:
        """Call the callbacks whose turn it is; whether one of them ends the training.

        Args:
            taken: the number of steps.
            result: of the training so far.
        """
        ends = False
        for position, callback in enumerate(self._callbacks):
            if self._due[position] <= taken or self.is_last(taken):
                ends = (callback(result) is True) or ends
                self._due[position] = _next_call(callback, taken)
        return ends


def _next_call(callback: Callable, taken: int) -> int:
    return callback.next_call(taken) if isinstance(callback, KnowsNextCall) else taken + 1
