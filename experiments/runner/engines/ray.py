"""Cells on a Ray cluster: on machines that Ray has started, or on this one."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.runner import registry
from experiments.runner.cell import Cell
from experiments.runner.engines import Engine, EngineError, Outcome, Watch, attempt, now_and_then
from experiments.runner.record import Record
from experiments.runner.run_cell import Context, one_thread

__all__ = ["Ray"]

_ATTEMPTS = 4  # times that a cell is started before its lost workers are its own fault
_POLL = 0.2  # seconds between looks at the progress of the cells
_PASSED_ON = ("PYRO_AVI_SWEEPS", "PYRO_AVI_DATA", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")


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
    attempts: int = 1


class Ray(Engine):
    """Runs each cell as a task of a Ray cluster, in a worker process that has no other cell at the time.

    Without an address a cluster of `jobs` cores starts on this machine and ends with the engine. The machines of a cluster see
    the checkout, its environment and the data under the same paths; records are written by this process alone. A cell whose
    worker or machine is lost is started again, elsewhere if need be, four times in all.

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
        self._running: dict[Any, _Task] = {}

    def run(self, cells: Iterable[Cell], watch: Watch) -> Iterator[Outcome]:
        self._connect()
        cells = iter(cells)
        while True:
            while len(self._running) < self._room() and (cell := next(cells, None)) is not None:
                self._submit(_Task(cell))
                watch(cell, 0, 0, "")
            if not self._running:
                return
            for reference in self._wait(watch):
                outcome = self._outcome(reference, watch)
                if outcome is not None:
                    yield outcome

    @_signals_later()
    def close(self) -> None:
        if self._board is None:
            return
        # A cluster that is lost has stopped them.
        with suppress(self._ray.exceptions.RayError):
            for reference in self._running:
                self._ray.cancel(reference, force=True)
            self._ray.kill(self._board)
        self._running.clear()
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
            with _without_statistics():
                try:
                    ray.init(
                        **(here if self.address is None else {"address": self.address}),
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
        # Where this process is, so that it is lost with no other machine.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self._board = ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()

    @_signals_later()
    def _room(self) -> int:
        if self.jobs is not None:
            return self.jobs
        resource = "GPU" if self.context.device == "cuda" else "CPU"
        return max(1, int(self._ray.cluster_resources().get(resource, 0)))

    @_signals_later()
    def _submit(self, task: _Task) -> None:
        # Ray itself would start a cell again without end where its worker runs out of memory.
        options = {
            "max_retries": 0,
            "runtime_env": {"env_vars": _variables()},
            **_demands(task.cell, self.context.device),
        }
        reference = self._ray.remote(**options)(_serve).remote(task.cell, self.context, self._board, os.getcwd())
        self._running[reference] = task

    @_signals_later()
    def _wait(self, watch: Watch) -> list[Any]:
        """Wait a moment, pass on what the cells have told, and return the tasks that have ended."""
        ended, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_POLL)
        # A task ends after all that it has told is on the board.
        cells = {task.cell.key: task.cell for task in self._running.values()}
        for key, step in self._ray.get(self._board.take.remote()).items():
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
                self._submit(_Task(task.cell, task.attempts + 1))
                watch(task.cell, 0, 1, "its worker was lost, starts again")
                return None
            text = f"{error}\nThe worker of this cell was lost {_ATTEMPTS} times. Where the system lacks memory it does this."
            return Outcome(task.cell, None, f"{text}\nTry fewer --jobs. ({type(error).__name__})\n")


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


def _variables() -> dict[str, str]:
    """What decides where a worker finds the code and the data."""
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path} | {name: os.environ[name] for name in _PASSED_ON if name in os.environ}


@contextmanager
def _without_statistics() -> Iterator[None]:
    """A cluster that starts here reports to nobody, unless the user has said otherwise."""
    name = "RAY_USAGE_STATS_ENABLED"
    said = name in os.environ
    os.environ.setdefault(name, "0")
    try:
        yield
    finally:
        if not said:
            del os.environ[name]


class _Board:
    """The last that each cell has told, until it is looked at."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[int, int, str]] = {}

    def tell(self, key: str, done: int, total: int, note: str) -> None:
        self._told[key] = (done, total, note)

    def take(self) -> dict[str, tuple[int, int, str]]:
        told, self._told = self._told, {}
        return told


def _serve(cell: Cell, context: Context, board: Any, folder: str) -> tuple[Record | None, str]:
    """Run a cell in a worker, which has no other task at the time: its record and the text of its failure."""
    import ray

    def tell(*step: int | str) -> None:
        # Waited for, so that it is there before the cell ends.
        ray.get(board.tell.remote(cell.key, *step))

    # Where this process is as well: the folder of the data may be a relative one.
    os.chdir(folder)
    with one_thread():
        outcome = attempt(cell, replace(context, progress=now_and_then(tell)))
    return outcome.record, outcome.failure
