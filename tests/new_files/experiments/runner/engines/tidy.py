"""An engine of a newcomer's: one cell after another in this process, which is swept of garbage behind each."""

import gc
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

from experiments.runner.cell import Cell
from experiments.runner.engines import Engine, Outcome, Watch, attempt
from experiments.runner.run_cell import Context

__all__ = ["Tidy"]


class Tidy(Engine):
    """Runs the cells in this process, one after another, and collects garbage behind each.

    Raises:
        ValueError: `jobs` is not 1.
    """

    def __init__(self, *, jobs: int | None, context: Context, address: str | None = None) -> None:
        super().__init__(jobs=jobs, context=context, address=address)
        if jobs != 1:
            raise ValueError(f"The engine tidy runs one cell at a time, got {jobs} jobs.")

    def run(self, cells: Iterable[Cell], watch: Watch) -> Iterator[Outcome]:
        for cell in cells:
            watch(cell, 0, 0, "")
            yield attempt(cell, replace(self.context, progress=partial(watch, cell)))
            gc.collect()

    def close(self) -> None:
        """Nothing runs when nothing is asked of it."""
