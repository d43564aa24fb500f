"""Engines run cells: one a file, one interface. The module path is the registry.

The engine `NAME` is the class `Name` of `experiments/engines/NAME.py`: a further one is one more file. It runs cells that
overlap in time in processes of their own, never in threads of one: torch's random state, its number of threads, and Pyro's
store of parameters and stack of handlers are the process's.
"""

import importlib
import math
import pkgutil
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

from experiments.runner.cell import Cell
from experiments.runner.record import Record
from experiments.runner.run_cell import Context, Progress, run_cell

__all__ = ["Engine", "EngineError", "Outcome", "Watch", "attempt", "create", "names", "now_and_then"]

Watch = Callable[[Cell, int, int, str], None]


class EngineError(Exception):
    """What the engine runs on cannot be used. The message says what to do."""


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: its record, or None and the text of the failure."""

    cell: Cell
    record: Record | None
    failure: str = ""


class Engine(ABC):
    """Runs cells, `jobs` at a time; a context manager that stops at once what still runs when it is left.

    Args:
        jobs: cells that run at a time, at least 1.
        context: what every cell is run with; the engine sets its `progress`.
        address: of the cluster, for engines that run `on_clusters`.

    Raises:
        ValueError: an address is given to an engine of one machine.
    """

    on_clusters = False

    def __init__(self, *, jobs: int | None, context: Context, address: str | None = None) -> None:
        if address is not None and not self.on_clusters:
            raise ValueError(
                f"The engine {type(self).__name__.lower()} runs on this machine, got the address {address!r} of a cluster. "
                "Use --engine ray, or leave --address out."
            )
        self.jobs = jobs
        self.context = context
        self.address = address

    @abstractmethod
    def run(self, cells: Iterable[Cell], watch: Watch) -> Iterator[Outcome]:
        """Run the cells and yield what became of each, in the order they end.

        A cell is taken from `cells` only when it can start at once, for taking it claims it. A cell that fails does not
        stop the others. One cell at a time is in a process.

        Args:
            cells: taken lazily.
            watch: told (cell, steps done, steps in all, note), once with 0 of 0 steps when the cell starts.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop at once what still runs."""

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def names() -> list[str]:
    """The names of all engines, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def create(name: str, *, jobs: int | None, context: Context, address: str | None = None) -> Engine:
    """The engine of that name.

    Raises:
        ValueError: the engine is unknown, lacks a package, cannot run that many jobs, or runs on no cluster.
    """
    if name not in names():
        raise ValueError(f'Unknown engine "{name}". Expected one of: {", ".join(names())}.')
    module = importlib.import_module(f"{__name__}.{name}")
    return getattr(module, name.capitalize())(jobs=jobs, context=context, address=address)


def now_and_then(tell: Progress, *, every: float = 0.2) -> Progress:
    """Passes the progress of a cell on, once in so many seconds at most."""
    last = -math.inf

    def progress(done: int, total: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every:
            last = now
            tell(done, total, note)

    return progress


def attempt(cell: Cell, context: Context) -> Outcome:
    """Run the cell in this process; a failure becomes the outcome's text, an interrupt passes."""
    record = None
    with _Kept() as kept:
        record = run_cell(cell, context)
    return Outcome(cell, record, kept.failure)


class _Kept(AbstractContextManager):
    """Keeps the traceback of a block that fails, whatever the error: a sweep's code is not ours."""

    failure = ""

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        # A cell that calls `sys.exit` has failed; the sweep goes on.
        kept = isinstance(error, (Exception, SystemExit))
        if kept:
            self.failure = "".join(traceback.format_exception(error))
        return kept
