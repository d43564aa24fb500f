"""Rounds of training steps that a process takes when it is its turn, timed by the processor or the device."""

import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["Rounds"]

# Steps before the first round: they compile, and let allocators and caches settle.
_WARM_UP = 3


class Rounds:
    """In the process of an implementation: takes rounds of steps when it is its turn, and says how long they took.

    Times are processor times of the process: those of others on the machine do not count. On CUDA they are those of the clock,
    from an idle device to an idle device.

    Args:
        pipe: to the process that gives the turns.
        device: "cpu" or "cuda".
        by_clock: whether a CPU's times are of the clock too, as those of several threads have to be.
    """

    def __init__(self, pipe: Connection, device: str = "cpu", *, by_clock: bool = False):
        self._now = _time_of_device if device == "cuda" else time.perf_counter if by_clock else time.process_time
        self._pipe, self._left, self._began, self._started = pipe, _WARM_UP, None, time.perf_counter()

    def run(self, step: Callable[[], Any]) -> None:
        """Take steps until there are no more turns."""
        while not self.after_step():
            step()

    def run_many(self, steps: Callable[[int], Any]) -> None:
        """The same for a function that takes a number of steps at once; the first round of each number compiles."""
        steps(_WARM_UP)
        self._left = 0
        while not self.after_step():
            count, self._left = self._left + 1, 0
            if self._began is not None and self._compiled_for != count:
                self._compiled_for = count
                steps(count)
                self._began = self._now()
            steps(count)

    _compiled_for = 0

    def after_step(self, progress: Any = None) -> bool:
        """Whether to stop; waits for the next turn where a round is over. It is also a callback of ``fit``."""
        if self._left > 0:
            self._left -= 1
            return False
        if self._began is None:
            self._pipe.send(time.perf_counter() - self._started)
        else:
            self._pipe.send(self._now() - self._began)
        count = self._pipe.recv()
        if count is None:
            return True
        self._left = count - 1
        self._began = self._now()
        return False

    def next_call(self, steps: int) -> int:
        """After how many steps in all a round is over, where so many have been taken; ``fit`` calls then."""
        ahead, self._left = self._left, 0
        return steps + ahead + 1

    __call__ = after_step


def _time_of_device() -> float:
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()
