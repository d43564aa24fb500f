"""Schedules the cells of one sweep on one store: plan, claim, run, save, until nothing is missing."""

import argparse
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from types import ModuleType

from experiments.runner.cell import Cell
from experiments.runner.engines import Engine, Outcome
from experiments.runner.progress import Display
from experiments.runner.record import Record, interned
from experiments.runner.store import DamagedRecordError, Store

__all__ = ["Scheduler", "reason_of"]

_POLL = 0.5  # seconds between looks at cells that other processes run


def reason_of(failure: str) -> str:
    """The line of a failure that says what happened: of a traceback that of the error, whose message may have more lines."""
    *_, last = failure.rpartition("Traceback (most recent call last):\n")
    # The frames are indented.
    return next((line for line in last.splitlines() if line.strip() and not line.startswith(" ")), "")


class Scheduler:
    """What a sweep with these options has done and has to do on a store.

    Args:
        module: the sweep, a module as `experiments.sweeps` describes.
        options: its options.
        store: where its records are.

    Raises:
        StoreError: a record cannot be read, or a later version of this code wrote it.
        ValueError: the options are bad.
    """

    def __init__(self, module: ModuleType, options: argparse.Namespace, store: Store) -> None:
        self.module = module
        self.name = module.__name__.rpartition(".")[2]
        self.options = options
        self.store = store
        self.contents = store.read(self.name)
        self.records: dict[str, Record] = self.contents.records
        self.total: int = module.count(options)
        self.ran: set[Cell] = set()
        self.failures: dict[Cell, str] = {}
        self._claims: dict[Cell, ExitStack] = {}
        self._awaited: list[Cell] = []

    def planned(self) -> list[Cell]:
        """All cells that can be named now, each once."""
        return list(dict.fromkeys(self.module.plan(self.options, self.records)))

    def finished(self) -> int:
        """How many of the planned cells have a record."""
        return sum(cell.key in self.records for cell in self.planned())

    def describe(self, cell: Cell) -> str:
        """A label of the cell, of one that another version of the sweep has named as well."""
        # The settings of such a one may lack what the sweep describes a cell by.
        with suppress(AttributeError, LookupError, TypeError, ValueError):
            return self.module.describe(cell)
        return f"{cell.sweep} {cell.key}"

    def not_compiled(self) -> list[Cell]:
        """The finished cells with numbers that were evaluated eagerly though they were to be compiled."""
        finished = [cell for cell in self.planned() if cell.key in self.records]
        return [cell for cell in finished if self.records[cell.key]["provenance"].get("fallbacks")]

    def run(self, engine: Engine, display: Display) -> None:
        """Run what is missing, save each record as it comes, and wait for the cells that other processes run.

        Raises:
            StoreError: a record cannot be written or read.
        """
        try:
            while missing := self._missing():
                known = len(self.records) + len(self.failures)
                for outcome in engine.run(self._claimed(missing, display), display.watch):
                    self._keep(outcome, display)
                if len(self.records) + len(self.failures) == known:
                    self._wait(missing, display)
        finally:
            for claim in self._claims.values():
                claim.close()

    def _missing(self) -> list[Cell]:
        return [cell for cell in self.planned() if cell.key not in self.records and cell not in self.failures]

    def _claimed(self, cells: list[Cell], display: Display) -> Iterator[Cell]:
        """Of these cells those to be run here: nobody else is at them, and nobody has finished them."""
        for cell in cells:
            with ExitStack() as stack:
                if not stack.enter_context(self.store.claim(cell)):
                    continue
                # Looked up under the claim: whoever ran it saved it before giving the claim back.
                record = self._load(cell, display)
                if record is None:
                    self._claims[cell] = stack.pop_all()
                    yield cell
                else:
                    self.records[cell.key] = record
                    display.end(cell)

    def _load(self, cell: Cell, display: Display) -> Record | None:
        try:
            return self.store.load(cell)
        except DamagedRecordError as error:
            # Since the sweep began: what was damaged before has been set aside.
            moved = self.store.set_aside(self.name, [error.path])
            display.say(f"set aside: {moved.get(error.path, error.path)}: {error.reason}")
            return None

    def _wait(self, cells: list[Cell], display: Display) -> None:
        """Wait a moment for cells that other processes run, and say so once for as long as they are the same."""
        if cells != self._awaited:
            self._awaited = cells
            first = ", ".join(map(self.describe, cells[:3])) + (", ..." if len(cells) > 3 else "")
            display.say(f"waiting for {len(cells)} cells that other processes run: {first}")
        time.sleep(_POLL)

    def _keep(self, outcome: Outcome, display: Display) -> None:
        cell = outcome.cell
        if outcome.record is None:
            self.failures[cell] = outcome.failure
            self.store.save_failure(cell, outcome.failure)
            display.end(cell, failed=reason_of(outcome.failure))
        else:
            self.store.save(outcome.record)
            self.records[cell.key] = interned(outcome.record)
            self.ran.add(cell)
            display.end(cell, fallbacks=outcome.record["provenance"]["fallbacks"])
        self._claims.pop(cell).close()
