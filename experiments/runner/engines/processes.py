"""Several cells at a time on one machine: worker processes that live as long as the engine."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from tqdm import tqdm

from experiments.runner.cell import Cell
from experiments.runner.engines import Engine, Outcome, Watch, attempt, now_and_then
from experiments.runner.run_cell import Context, one_thread

__all__ = ["Processes"]

_PATIENCE = 5.0  # seconds until a worker that does not stop is killed


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    # A pipe of its own: a queue shared by all stays locked for ever when a worker is killed while it writes.
    connection: Connection
    cell: Cell | None = None


class Processes(Engine):
    """Runs the cells in `jobs` worker processes, each on one thread.

    Workers are started when first needed, by spawning (CUDA does not survive a fork), and kept across cells and calls,
    for importing torch takes seconds. A worker that is killed fails its cell alone and is replaced; a worker whose
    engine is killed ends.
    """

    def __init__(self, *, jobs: int, context: Context, address: str | None = None) -> None:
        super().__init__(jobs=jobs, context=context, address=address)
        self._workers: list[_Worker] = []

    def run(self, cells: Iterable[Cell], watch: Watch) -> Iterator[Outcome]:
        cells = iter(cells)
        while True:
            while len(self._busy()) < self.jobs and (cell := next(cells, None)) is not None:
                self._assign(cell)
                watch(cell, 0, 0, "")
            busy = self._busy()
            if not busy:
                return
            # The time limit is for a killed worker whose pipe a process of its own still holds open.
            wait([worker.connection for worker in busy], timeout=1.0)
            for worker in busy:
                # Asked before its pipe: what a dead worker has sent lies there already.
                alive = worker.process.is_alive()
                outcome = None
                if worker.connection.poll():
                    outcome = _hear(worker, watch)
                elif not alive:
                    outcome = _lost(worker)
                if outcome is not None:
                    worker.cell = None
                    yield outcome

    def close(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        deadline = time.monotonic() + _PATIENCE
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.cell is not None]

    def _assign(self, cell: Cell) -> None:
        idle = [worker for worker in self._workers if worker.cell is None]
        living = [worker for worker in idle if worker.process.is_alive()]
        for worker in set(idle) - set(living):
            worker.connection.close()
            self._workers.remove(worker)
        worker = living[0] if living else self._start()
        worker.cell = cell
        # A worker that has died since is met when it is listened to.
        with suppress(ConnectionError):
            worker.connection.send(cell)

    def _start(self) -> _Worker:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(theirs, self.context))
        # Ctrl-C reaches every process of the terminal. A worker inherits that it is held back, from its first
        # instruction on: the parent alone answers.
        # The tracker of multiprocessing lets the signal through again when it starts, so it starts first.
        resource_tracker.ensure_running()
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        worker = _Worker(process, ours)
        try:
            process.start()
            self._workers.append(worker)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        theirs.close()
        return worker


def _hear(worker: _Worker, watch: Watch) -> Outcome | None:
    try:
        message = worker.connection.recv()
    except (EOFError, OSError):
        return _lost(worker)
    if isinstance(message, Outcome):
        return message
    watch(worker.cell, *message)
    return None


def _lost(worker: _Worker) -> Outcome:
    worker.process.join(_PATIENCE)
    worker.process.kill()
    worker.process.join()
    code = worker.process.exitcode
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        advice = "Where the system lacks memory it does this: try fewer --jobs."
    else:
        how = f"ended with exit code {code}"
        advice = "What it wrote to standard error says more."
    return Outcome(worker.cell, None, f"The worker process of this cell {how}. {advice}\n")


def _serve(connection: Connection, context: Context) -> None:
    """The life of a worker: cells in, progress and outcomes out, until nobody is at the other end."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # tqdm would make a lock for all processes, which a worker that is ended leaves behind with a warning.
    tqdm.set_lock(threading.RLock())
    with one_thread(), suppress(EOFError, ConnectionError):
        while True:
            cell = connection.recv()
            progress = now_and_then(lambda *step: connection.send(step))
            connection.send(attempt(cell, replace(context, progress=progress)))


def _end_with_parent() -> None:
    # The claim of the running cell ended with the parent: another process may already run it.
    multiprocessing.parent_process().join()
    os._exit(1)
