"""Whether compiling saves more time than it takes, counted and not timed."""

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops", "saves_time"]

# The share of the arithmetic that compiling saves, in seconds. Roughly those of one core.
_SAVED_PER_FLOP = 1e-11


def count_flops(function: Callable, *args, **kwargs) -> int:
    """The operations of the matrix products and convolutions in one call of a function."""
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


def saves_time(flops: int, *, calls: int, overhead: float, cost: float) -> bool:
    """Whether so many calls save more time than compiling takes.

    Counted and not timed, so that the numbers are decided by the arguments alone.

    Args:
        flops: those of one call, see :func:`count_flops`.
        calls: how often it is to be called.
        overhead: what a call takes beside its arithmetic, and compiled does not: seconds, roughly those of one core.
        cost: the seconds of compiling.
    """
    return calls * (overhead + _SAVED_PER_FLOP * flops) > cost
