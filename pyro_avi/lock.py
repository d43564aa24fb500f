"""One thread at a time: Pyro's handlers and parameters, and torch's random state, belong to the whole process."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

__all__ = ["in_turn", "turn"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
# A callback of a training may measure: the same thread comes in again.
_LOCK = threading.RLock()


@contextmanager
def turn() -> Iterator[None]:
    """A context that one thread is in at a time, however often it enters; others wait."""
    with _LOCK:
        yield


def in_turn(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a second thread that calls this or another such function wait until the first has its answer.

    Two trainings at once would run each other's handlers and draw from each other's seeds: some fail, others come to other
    numbers.
    """

    @wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _LOCK:
            return function(*args, **kwargs)

    return alone
