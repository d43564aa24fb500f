"""Ways of taking one training step, each in a process of its own, timed in turns."""

import importlib.util
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from experiments.run import Context

__all__ = ["Rounds", "time_ways"]

_THREADS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # jax counts its threads by itself.
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "NPROC": "1",
}
# Steps before the first round: they compile, and let allocators and caches settle.
_WARM_UP = 3


class Rounds:
    """In a way's process: takes rounds of steps as it is told, and says how long they took.

    Times are processor times of the process: those of others on the machine do not count.

    Args:
        pipe: to the process that gives the turns.
    """

    def __init__(self, pipe: Connection):
        self._pipe, self._left, self._began, self._started = pipe, _WARM_UP, None, time.perf_counter()

    def run(self, step: Callable[[], Any]) -> None:
        """Take steps until there are no more turns."""
        while not self.after_step():
            step()

    def run_many(self, steps: Callable[[int], Any]) -> None:
        """The same for a function that takes a number of steps at once; the first round of each number compiles."""
        steps(_WARM_UP)
        self._left = 0
        while not self.after_step():
            count, self._left = self._left + 1, 0
            if self._began is not None and self._compiled_for != count:
                self._compiled_for = count
                steps(count)
                self._began = time.process_time()
            steps(count)

    _compiled_for = 0

    def after_step(self, course: Any = None) -> bool:
        """Whether to stop; waits for the next turn where a round is over. It is also a callback of ``fit``."""
        if self._left > 0:
            self._left -= 1
            return False
        if self._began is None:
            self._pipe.send(time.perf_counter() - self._started)
        else:
            self._pipe.send(time.process_time() - self._began)
        count = self._pipe.recv()
        if count is None:
            return True
        self._left = count - 1
        self._began = time.process_time()
        return False

    __call__ = after_step


def time_ways(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Milliseconds of a step in every round, by way; the seconds until it was ready; what is not installed.

    Args:
        settings: of a cell of the sweep ``speed``.
        context: what the cell is run with.
    """
    ways = [way for way in settings["ways"] if way != "numpyro" or importlib.util.find_spec("numpyro")]
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(_THREADS)
    workers, times, ready = {}, {way: [] for way in ways}, {}
    spawn = multiprocessing.get_context("spawn")
    try:
        for way in ways:
            # One after another, so that they do not compile at the expense of each other.
            here, there = spawn.Pipe()
            process = spawn.Process(target=_work, args=(way, dict(settings), there), daemon=False)
            process.start()
            there.close()
            workers[way] = process, here
            ready[way] = _receive(way, here)
            context.progress(0, settings["rounds"], f"{way} is ready")
        for done in range(settings["rounds"]):
            for way, (_, pipe) in workers.items():
                pipe.send(settings["steps"])
                times[way].append(_receive(way, pipe) / settings["steps"] * 1e3)
            context.progress(done + 1, settings["rounds"], "")
        for _, pipe in workers.values():
            pipe.send(None)
        for process, _ in workers.values():
            process.join(timeout=30)
    finally:
        for process, _ in workers.values():
            if process.is_alive():
                process.kill()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return {
        "ms": times,
        "median_ms": {way: statistics.median(of) for way, of in times.items()},
        "seconds_until_ready": ready,
        "not_installed": [way for way in settings["ways"] if way not in ways],
    }


def _receive(way: str, pipe: Connection) -> float:
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(
            f"Expected steps of the way {way!r}, got the end of its process; it says why above."
        ) from None


def _work(way: str, settings: dict[str, Any], pipe: Connection) -> None:
    """What a process does."""
    import torch

    torch.set_num_threads(1)
    from experiments import ways

    ways.take(way, settings, Rounds(pipe))
