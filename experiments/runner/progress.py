"""What a running sweep shows on standard error: bars on a terminal, now and then a line elsewhere."""

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from tqdm import tqdm

from experiments.runner.cell import Cell

__all__ = ["Display"]

_LINE_EVERY = 10.0  # seconds between lines where there is no terminal

_SWEEP_BAR = "{l_bar}{bar}| {n:.1f}/{total} cells [{elapsed}<{remaining}]"
_CELL_BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"


class Display:
    """One bar for the sweep and one for each running cell, each with the time left.

    Args:
        name: the sweep.
        total: its cells over all stages.
        finished: those that were finished before.
        describe: the label of a cell.
    """

    def __init__(self, name: str, *, total: int, finished: int, describe: Callable[[Cell], str]) -> None:
        self._name = name
        self._total = total
        self._finished = finished
        self._describe = describe
        self._cells: dict[Cell, tqdm] = {}
        self._bars = sys.stderr.isatty()
        self._printed = time.monotonic()
        self._sweep = tqdm(
            desc=name,
            total=total,
            initial=finished,
            position=0,
            smoothing=0,
            disable=not self._bars,
            dynamic_ncols=True,
            bar_format=_SWEEP_BAR,
        )

    def watch(self, cell: Cell, done: int, total: int, note: str) -> None:
        """A cell has started (0 of 0 steps) or gone on."""
        if cell not in self._cells:
            taken = {-bar.pos for bar in self._cells.values()} if self._bars else set()
            self._cells[cell] = tqdm(
                desc=self._describe(cell),
                position=min(set(range(1, len(self._cells) + 2)) - taken),
                leave=False,
                disable=not self._bars,
                dynamic_ncols=True,
                bar_format=_CELL_BAR,
            )
        bar = self._cells[cell]
        if self._bars and total:
            bar.total = total
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)
            self._advance()

    def end(self, cell: Cell, *, failed: str = "", fallbacks: Sequence[str] = ()) -> None:
        """A cell has ended here or was finished by another process.

        Args:
            cell: the cell.
            failed: the last line of its error.
            fallbacks: what of it was evaluated eagerly though it was to be compiled, and why.
        """
        bar = self._cells.pop(cell, None)
        if bar is not None:
            bar.close()
        if failed:
            self.say(f"failed: {self._describe(cell)}: {failed}")
        else:
            self._finished += 1
            for fallback in fallbacks:
                self.say(f"not compiled: {self._describe(cell)}: {fallback}")
        if self._bars:
            self._advance()
        elif time.monotonic() - self._printed >= _LINE_EVERY:
            self._printed = time.monotonic()
            self.say(f"{self._name}: {self._finished} of {self._total} cells finished")

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for bar in (*self._cells.values(), self._sweep):
            bar.close()

    def _advance(self) -> None:
        # The running cells count by their shares, or a sweep of few long cells would show no time left for long.
        shares = sum(bar.n / bar.total for bar in self._cells.values() if bar.total)
        self._sweep.n = self._finished + shares
        self._sweep.update(0)
