"""Times the implementations of a training step, each in a process of its own, in turns."""

import fcntl
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from experiments.machine import peak_memory, reset_peak_memory
from experiments.runner.run_cell import Context
from experiments.sweeps.speed.rounds import Rounds

__all__ = ["time_implementations"]


# Seconds in which a way beside a device has to be ready, so that one that is not costs the others no more.
_READY_WITHIN = 180.0


def _variables(threads: int, device: str) -> dict[str, str]:
    """What libraries read of the environment."""
    one = threads == 1
    if device == "cuda":
        return {
            "OMP_NUM_THREADS": "1",
            # Else JAX takes most of a device's memory at once.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            # All ways compile at once, and each would take every core.
            "TORCHINDUCTOR_COMPILE_THREADS": "2",
        }
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # jax counts its threads by itself.
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" if one else "",
        "NPROC": str(threads),
    }


def time_implementations(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Milliseconds of a step in every round, by way; the seconds until it was ready; the most memory it took, in bytes.

    A way that cannot be taken here, as one whose package is not installed, is ``left_out``, with the reason; of the others
    there are ``warnings``.

    Args:
        settings: of a cell of the sweep ``speed``.
        context: what the cell is run with.

    Raises:
        RuntimeError: if none of the ways can be taken.
    """
    steps, rounds, together = settings["steps"], settings["rounds"], context.device == "cuda"
    variables = _variables(settings.get("threads", 1), context.device)
    with _environment(variables), _Turns(settings, context.device) as turns, _Alone(together) as alone:
        ready: dict[str, float] = {}
        for way in settings["ways"]:
            turns.start(way)
            # On a CPU one after another, so that they do not compile at the expense of each other. Beside a device there are
            # many cores, and its time is dear.
            if not together:
                ready |= turns.answers([way])
                context.progress(0, rounds, f"{way} is ready")
        ready |= turns.answers(turns.workers, within=_READY_WITHIN) if together else {}
        alone.begin()
        times: dict[str, list[float]] = {way: [] for way in ready}
        for done in range(rounds):
            for way in list(turns.workers):
                turns.ask([way], steps)
                for seconds in turns.answers([way]).values():
                    times[way].append(seconds / steps * 1e3)
            context.progress(done + 1, rounds, "")
        turns.ask(turns.workers, None)
        ends = turns.answers(turns.workers)
    if not ends:
        raise RuntimeError(f"Expected a way of taking a step that can be taken here, got none: {turns.left_out}.")
    return {
        "ms": {way: times[way] for way in ends},
        "median_ms": {way: statistics.median(times[way]) for way in ends},
        "seconds_until_ready": {way: ready[way] for way in ends},
        "peak_memory_bytes": {way: memory for way, (memory, _) in ends.items()},
        "warnings": {way: told for way, (_, told) in ends.items() if told},
        "left_out": turns.left_out,
    }


class _Turns:
    """The processes of all ways; they end with the block.

    Args:
        settings: of the cell.
        device: "cpu" or "cuda".

    Attributes:
        workers: a process and its pipe by way, without those that have failed.
        left_out: the ways that have failed, and why.
    """

    def __init__(self, settings: Mapping[str, Any], device: str):
        self._settings, self._device = dict(settings), device
        self.workers: dict[str, tuple[Any, Connection]] = {}
        self.left_out: dict[str, str] = {}

    def start(self, way: str) -> None:
        """Start the process of a way, which says when it is ready."""
        spawn = multiprocessing.get_context("spawn")
        here, there = spawn.Pipe()
        process = spawn.Process(target=_take_steps, args=(way, self._settings, self._device, there), daemon=False)
        process.start()
        there.close()
        self._all.callback(self._end, process)
        self.workers[way] = process, here

    def ask(self, ways: Iterable[str], steps: int | None) -> None:
        """For so many steps; ``None`` for no more."""
        for way in ways:
            # Of a process that has ended the answer says so.
            with suppress(OSError):
                self.workers[way][1].send(steps)

    def answers(self, ways: Iterable[str], *, within: float | None = None) -> dict[str, Any]:
        """What these say in so many seconds, without those that fail, which are left out from now on."""
        told, began = {}, time.monotonic()
        for way in list(ways):
            process, pipe = self.workers[way]
            try:
                if within is None or pipe.poll(max(0.0, began + within - time.monotonic())):
                    failure, told[way] = pipe.recv()
                else:
                    process.kill()
                    failure = f"it was not ready within {within:g} s"
            except (EOFError, OSError):
                failure = "its process ended without a word"
            if failure is not None:
                self.left_out[way] = failure
                told.pop(way, None)
                self._end(self.workers.pop(way)[0])
        return told

    def _end(self, process: Any) -> None:
        # One that was told to end has nothing left to do.
        process.join(timeout=10)
        if process.is_alive():
            process.kill()

    def __enter__(self) -> "_Turns":
        self._all = ExitStack()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            for process, _ in self.workers.values():
                process.kill()
        self._all.close()


class _Alone:
    """A block whose second part nothing of the other cells on this machine runs beside: they may get ready together.

    Args:
        asked: whether that matters; times of a processor's own clock do not count what runs beside them.
    """

    def __init__(self, asked: bool):
        self._path = Path(tempfile.gettempdir()) / f"pyro_avi-speed-{os.getuid()}.lock" if asked else None

    def __enter__(self) -> "_Alone":
        if self._path is not None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_SH)
        return self

    def begin(self) -> None:
        """Begin the second part: waits until no other block is in its first one, or its second."""
        if self._path is not None:
            # In one step it would wait for others who wait for it.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *error: object) -> None:
        if self._path is not None:
            os.close(self._file)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class _Pipe:
    """The end of the pipe in the process of a way: what it sends are answers."""

    def __init__(self, pipe: Connection):
        self._pipe = pipe
        self.recv = pipe.recv

    def send(self, told: Any, failure: str | None = None) -> None:
        self._pipe.send((failure, told))


def _take_steps(way: str, settings: dict[str, Any], device: str, connection: Connection) -> None:
    """What the process of an implementation does."""
    pipe = _Pipe(connection)
    try:
        import torch

        threads = settings.get("threads")
        torch.set_num_threads(threads or 1)
        from experiments.sweeps.speed.implementations import IMPLEMENTATIONS, Workload

        reset_peak_memory(device)
        # Making the workload is part of getting ready.
        rounds = Rounds(pipe, device, by_clock=threads is not None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            # Times would be those of other steps.
            warnings.filterwarnings("error", "The (training step is taken eagerly|replicas take their steps one after)")
            memory = IMPLEMENTATIONS[way](Workload(settings, device), rounds)
        told = sorted(
            {str(warning.message).partition("\n")[0] for warning in caught if warning.category is UserWarning}
        )
        pipe.send((memory or peak_memory(device), told))
    # Whatever a way fails with, on a device or without it, the others are still timed.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        pipe.send(None, failure=f"{type(error).__name__}: {reason}")
