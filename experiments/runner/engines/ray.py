"""Cells on a Ray cluster: on machines that Ray has started, or on this one."""

import itertools
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.machine import environment_defaults
from experiments.runner import registry
from experiments.runner.board import Board
from experiments.runner.cell import Cell
from experiments.runner.engines import Engine, EngineError, Outcome, Watch
from experiments.runner.run_cell import Context
from experiments.shared_folder import SHARED

__all__ = ["Ray"]

_ATTEMPTS = 4  # times that a cell is started before its lost workers are its own fault
_POLL = 0.2  # seconds that a signal waits at most
_LOOK = 1.0  # seconds between looks at the progress of the cells: each is a call of every board
_TELLERS = 32  # threads of the actor that the cells tell their progress
_NAMESPACE = "pyro_avi"
# Of a cluster that starts here: it reports to nobody, keeps no statistics of tasks that nobody could look at, and starts no
# workers before there are cells, whose environment those would not have.
_FRUGAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_prestart_worker_first_driver": "0",
}
_PASSED_ON = ("PYRO_AVI_SWEEPS", "PYRO_AVI_DATA", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME", SHARED)


@contextmanager
def _signals_later() -> Iterator[None]:
    """Within the block signals that stop a sweep wait for its end, and Ray takes none of them for itself.

    What a handler raises while Ray looks at its signals, Ray turns into a SystemError.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


@dataclass
class _Task:
    cell: Cell
    board: Any
    attempts: int = 1


class Ray(Engine):
    """Runs each cell as a task of a Ray cluster, in a worker process that has no other cell at the time.

    Without an address a cluster of `jobs` cores starts on this machine and ends with the engine. The machines of a cluster see
    the checkout, its environment and the data under the same paths; records are written by this process alone. A cell whose
    worker or machine is lost is started again, elsewhere if need be, four times in all.

    On a cluster with an address cells go on when this process ends before them, however it ends. An engine for the same
    records takes up those it is given: it waits for the one that runs, and has the outcome of the one that ended meanwhile.

    Args:
        jobs: cells that run at a time, None for as many as the cluster has cores (on CUDA: GPUs) at the moment.
        context: as for every engine.
        address: of the cluster, as `ray.init` takes it.

    Raises:
        ValueError: Ray is not installed, or neither `jobs` nor `address` is given.
    """

    on_clusters = True

    def __init__(self, *, jobs: int | None, context: Context, address: str | None = None) -> None:
        super().__init__(jobs=jobs, context=context, address=address)
        self._ray = _import_ray()
        if jobs is None and address is None:
            raise ValueError("Expected a number of jobs for a cluster on this machine (no address), got None.")
        self._owns_cluster = False
        self._board: Any = None
        # Boards of processes that have ended, by the cells that they still hold, and those that cells were taken up from.
        self._left: dict[str, Any] = {}
        self._emptied: set[Any] = set()
        self._running: dict[Any, _Task] = {}
        self._looked = 0.0

    def run(self, cells: Iterable[Cell], watch: Watch) -> Iterator[Outcome]:
        self._connect()
        cells = iter(cells)
        while True:
            while len(self._running) < self._room() and (cell := next(cells, None)) is not None:
                self._submit(_Task(cell, self._take_up(cell)))
                watch(cell, 0, 0, "")
            if not self._running:
                return
            for reference in self._wait(watch):
                task = self._running[reference]
                outcome = self._outcome(reference, watch)
                if outcome is not None:
                    yield outcome
                    # Not before: whoever ends while its record is written has it taken up as well.
                    self._forget(task)

    def _take_up(self, cell: Cell) -> Any:
        """The board of the cell: one that holds it already, else that of this process."""
        if cell.key not in self._left:
            return self._board
        board = self._left.pop(cell.key)
        self._emptied.add(board)
        return board

    @_signals_later()
    def _forget(self, task: _Task) -> None:
        # A board that is lost holds nothing.
        with suppress(self._ray.exceptions.RayError):
            self._ray.get(task.board.forget.remote(task.cell.key))

    @_signals_later()
    def close(self) -> None:
        if self._board is None:
            return
        # A cluster that is lost has stopped them.
        with suppress(self._ray.exceptions.RayError):
            for board in {self._board, *self._emptied}:
                if self.address is None or not self._ray.get(board.held.remote()):
                    self._ray.kill(board)
        self._running.clear()
        self._left.clear()
        self._emptied.clear()
        self._board = None
        if self._owns_cluster:
            self._owns_cluster = False
            self._ray.shutdown()

    @_signals_later()
    def _connect(self) -> None:
        if self._board is not None:
            return
        ray = self._ray
        if not ray.is_initialized():
            here = {"address": "local", "num_cpus": self.jobs, "include_dashboard": False}
            with environment_defaults(_FRUGAL):
                try:
                    ray.init(
                        **(here if self.address is None else {"address": self.address}),
                        namespace=_NAMESPACE,
                        log_to_driver=False,
                        logging_level="ERROR",
                    )
                # Ray raises what comes to hand, `Exception` itself among it.
                except Exception as error:
                    where = self.address or "this machine"
                    raise EngineError(f"Cannot use a Ray cluster at {where}: {error}\n{_START}") from error
            self._owns_cluster = True
        if self.context.device == "cuda" and not ray.cluster_resources().get("GPU"):
            if self._owns_cluster:
                ray.shutdown()
            raise EngineError("Expected GPUs in the Ray cluster (--device cuda), got none. Use --device cpu.")
        self._set_up_board()

    def _set_up_board(self) -> None:
        """A board for the cells of this process, and those that still hold cells of processes that have ended."""
        ray = self._ray
        # Where this process is, so that it is lost with no other machine.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        options = {
            "num_cpus": 0,
            "max_concurrency": _TELLERS,
            "scheduling_strategy": here,
            "runtime_env": _environment(),
        }
        if self.address is not None:
            before = [name for name in ray.util.list_named_actors() if name.startswith(f"{self.context.store} ")]
            for name in before:
                # One that ends at this moment holds nothing.
                with suppress(ValueError, ray.exceptions.RayError):
                    board = ray.get_actor(name)
                    self._left |= dict.fromkeys(ray.get(board.held.remote()), board)
            options |= {"lifetime": "detached", "name": f"{self.context.store} {uuid.uuid4().hex}"}
        self._board = ray.remote(**options)(Board).remote()

    @_signals_later()
    def _room(self) -> int:
        if self.jobs is not None:
            return self.jobs
        resource = "GPU" if self.context.device == "cuda" else "CPU"
        return max(1, int(self._ray.cluster_resources().get(resource, 0)))

    @_signals_later()
    def _submit(self, task: _Task) -> None:
        # Ray itself would start a cell again without end where its worker runs out of memory.
        options = {"max_retries": 0, "runtime_env": _environment(), **_demands(task.cell, self.context.device)}
        begin = task.board.begin.remote(task.cell, self.context, os.getcwd(), options, again=task.attempts > 1)
        try:
            (reference,) = self._ray.get(begin)
        except self._ray.exceptions.RayActorError as error:
            if task.board is self._board:
                raise EngineError(f"{_LOST}: {error}") from error
            # The process that it was left by has ended it.
            self._submit(replace(task, board=self._board))
            return
        self._running[reference] = task

    @_signals_later()
    def _wait(self, watch: Watch) -> list[Any]:
        """Wait a moment, pass on what the cells have told, and return the tasks that have ended."""
        ended, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_POLL)
        if not ended and time.monotonic() - self._looked < _LOOK:
            return ended
        self._looked = time.monotonic()
        # A task ends after all that it has told is on the board.
        cells = {task.cell.key: task.cell for task in self._running.values()}
        try:
            told = self._ray.get([board.take.remote() for board in {task.board for task in self._running.values()}])
        except self._ray.exceptions.RayActorError as error:
            raise EngineError(f"{_LOST}: {error}") from error
        for key, step in itertools.chain.from_iterable(part.items() for part in told):
            if key in cells:
                watch(cells[key], *step)
        return ended

    @_signals_later()
    def _outcome(self, reference: Any, watch: Watch) -> Outcome | None:
        """What became of the cell; None where its worker was lost and it was started again."""
        task = self._running.pop(reference)
        try:
            record, failure = self._ray.get(reference)
            return Outcome(task.cell, record, failure)
        except self._ray.exceptions.RayTaskError as error:
            return Outcome(task.cell, None, f"{error}\n")
        except self._ray.exceptions.RayError as error:
            if task.attempts < _ATTEMPTS:
                self._submit(replace(task, attempts=task.attempts + 1))
                watch(task.cell, 0, 1, "its worker was lost, starts again")
                return None
            text = f"{error}\nThe worker of this cell was lost {_ATTEMPTS} times. Where the system lacks memory it does this."
            return Outcome(task.cell, None, f"{text}\nTry fewer --jobs. ({type(error).__name__})\n")


_LOST = "The process that keeps the cells on the cluster is lost. The finished cells are kept: the same command resumes"
_START = (
    "Try one of the following fixes:\n"
    "- start one: ray start --head, or leave --address out for one on this machine\n"
    "- where the cluster asks for a token: RAY_AUTH_MODE=token, and its token in ~/.ray/auth_token"
)


def _import_ray() -> ModuleType:
    with _signals_later():
        try:
            import ray
            import ray.util.scheduling_strategies
        except ModuleNotFoundError as error:
            raise ValueError(
                f"The engine ray needs Ray, which is not installed ({error}).\n"
                "Try one of the following fixes:\n"
                '- python -m pip install -c constraints.txt -e ".[cluster]"\n'
                "- on one machine: --engine processes"
            ) from error
    return ray


def _demands(cell: Cell, device: str) -> dict[str, float]:
    usual = {"num_cpus": 1, "num_gpus": int(device == "cuda")}
    sweep = registry.find(cell.sweep)
    return usual | (sweep.demands(cell, device=device) if hasattr(sweep, "demands") else {})


def _environment() -> dict[str, dict[str, str]]:
    """What decides where a worker finds the code and the data."""
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {"env_vars": {"PYTHONPATH": path} | {name: os.environ[name] for name in _PASSED_ON if name in os.environ}}
