"""Whether compiling saves more time than it takes, by a count of operations."""

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops", "saves_time"]

# Seconds that compiling saves for each operation; roughly, on one core.
_SAVED_PER_FLOP = 1e-11


def count_flops(function: Callable, *args, **kwargs) -> int:
    """The operations of the matrix products and convolutions in one call of a function."""
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


def saves_time(flops: int, *, calls: int, overhead: float, cost: float) -> bool:
    """Whether compiling saves more time over so many calls than it takes.

    Operations are counted, and no time is measured, so that the same arguments always give the same answer: a graph rounds
    differently.

    Args:
        flops: the operations of one call, see :func:`count_flops`.
        calls: the number of calls.
        overhead: the seconds of a call beside its arithmetic that compiling saves; roughly, on one core.
        cost: the seconds of compiling.
    """
    return calls * (overhead + _SAVED_PER_FLOP * flops) > cost
