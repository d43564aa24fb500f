"""Whether compiling saves more time than it takes, by a count of operations."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pyro_avi.tracing.operation_mode import OperationMode

__all__ = ["Work", "count_flops", "count_work", "saves_time"]

# Seconds that compiling saves of a training step: of handlers, of each operation, and of each element that it writes; roughly,
# on one core. Matrix products take as long in a graph.
_HANDLERS, _SAVED_PER_OPERATION, _SAVED_PER_ELEMENT = 3.2e-3, 8e-6, 8e-10
# So many operations take as long to compile as what compiling begins with.
_OPERATIONS_OF_A_START = 1_200

# Seconds that compiling saves for each operation; roughly, on one core.
_SAVED_PER_FLOP = 1e-11


def count_flops(function: Callable, *args, **kwargs) -> int:
    """The operations of the matrix products and convolutions in one call of a function."""
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


class Work(NamedTuple):
    """What a training step does.

    Attributes:
        operations: of torch, without views.
        elements: those that they write on a CPU. On CUDA writing them takes a hundredth of that.
    """

    operations: int
    elements: int

    def is_worth_compiling(self, steps: int, cost: float) -> bool:
        """Whether so many steps save more time than compiling them takes.

        Args:
            steps: the steps to go.
            cost: the seconds of compiling without what grows by the operations.
        """
        saved = _HANDLERS + _SAVED_PER_OPERATION * self.operations + _SAVED_PER_ELEMENT * self.elements
        return steps * saved > cost * (1 + self.operations / _OPERATIONS_OF_A_START)


class _Counter(OperationMode):
    """A context that counts operations below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.elements = 0

    def run(self, func, types, args, kwargs):
        result = func(*args, **kwargs)
        if not any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns):
            self.operations += 1
            parts = result if isinstance(result, tuple | list) else (result,)
            self.elements += sum(part.numel() for part in parts if isinstance(part, Tensor) and not part.is_cuda)
        return result


def count_work(function: Callable, *args: Any, **kwargs: Any) -> Work:
    """The operations in one call of a function, its gradient among them where it takes one.

    No time is measured, so that the same arguments always give the same answer: a graph rounds differently.
    """
    with _Counter() as counter:
        function(*args, **kwargs)
    return Work(counter.operations, counter.elements)


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
