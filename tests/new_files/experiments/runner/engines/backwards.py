"""An engine of a newcomer's: one cell after another in this process, the last one first."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

from experiments.runner.cell import Cell
from experiments.runner.engines import Engine, Outcome, Watch, attempt

__all__ = ["Backwards"]


class Backwards(Engine):
    """Runs the cells in this process, the last one first."""

    def run(self, cells: Iterable[Cell], watch: Watch) -> Iterator[Outcome]:
        for cell in reversed(list(cells)):
            watch(cell, 0, 0, "")
            yield attempt(cell, replace(self.context, progress=partial(watch, cell)))

    def close(self) -> None:
        """Nothing runs when nothing is asked of it."""
