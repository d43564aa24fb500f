"""What a sweep leaves on a Ray cluster while its cells run there: their tasks, and the last that each has told."""

import os
from dataclasses import replace
from typing import Any

from experiments.runner.cell import Cell
from experiments.runner.engines import attempt, now_and_then
from experiments.runner.record import Record
from experiments.runner.run_cell import Context, one_thread

__all__ = ["Board", "serve"]

_TELL = 1.0  # seconds between calls of the board: each costs both processes some milliseconds


class Board:
    """The cells that a process has begun on a cluster, until it has kept what became of them, and the last that each has told.

    Their tasks are this actor's: on a cluster with an address they end neither with the process nor with its connection.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, Any] = {}
        self._told: dict[str, tuple[int, int, str]] = {}

    def begin(self, cell: Cell, context: Context, folder: str, options: dict[str, Any], *, again: bool) -> list[Any]:
        """The task of the cell, which is started unless there is one; in a list, for Ray would wait for it otherwise."""
        import ray

        if again or cell.key not in self._tasks:
            board = ray.get_runtime_context().current_actor
            self._tasks[cell.key] = ray.remote(**options)(serve).remote(cell, context, board, folder)
        return [self._tasks[cell.key]]

    def held(self) -> list[str]:
        return list(self._tasks)

    def forget(self, key: str) -> None:
        self._tasks.pop(key, None)

    def tell(self, key: str, done: int, total: int, note: str) -> None:
        self._told[key] = (done, total, note)

    def take(self) -> dict[str, tuple[int, int, str]]:
        # One by one: others tell meanwhile.
        return {key: self._told.pop(key) for key in list(self._told)}


def serve(cell: Cell, context: Context, board: Any, folder: str) -> tuple[Record | None, str]:
    """Run a cell in a worker, which has no other task at the time: its record and the text of its failure."""
    import ray

    told: list[Any] = []

    def tell(*step: int | str) -> None:
        # In turn, and not waited for: a task that waits gives its core to another, for which Ray starts a worker.
        ray.get(told)
        told[:] = [board.tell.remote(cell.key, *step)]

    # Where this process is as well: the folder of the data may be a relative one.
    os.chdir(folder)
    with one_thread():
        outcome = attempt(cell, replace(context, progress=now_and_then(tell, every=_TELL)))
    # So that it is there before the cell ends.
    ray.get(told)
    return outcome.record, outcome.failure
