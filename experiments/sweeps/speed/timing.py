"""Times the implementations of a training step, each in a process of its own, in turns."""

import importlib.util
import multiprocessing
import os
import statistics
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from experiments.runner.run_cell import Context
from experiments.sweeps.speed.rounds import Rounds

__all__ = ["time_implementations"]

_THREADS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # jax counts its threads by itself.
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "NPROC": "1",
}


def time_implementations(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Milliseconds of a step in every round, by implementation; the seconds until it was ready; what is not installed.

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
            process = spawn.Process(target=_take_steps, args=(way, dict(settings), there), daemon=False)
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
        "median_ms": {way: statistics.median(rounds) for way, rounds in times.items()},
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


def _take_steps(way: str, settings: dict[str, Any], pipe: Connection) -> None:
    """What the process of an implementation does."""
    import torch

    torch.set_num_threads(1)
    from experiments.sweeps.speed.implementations import IMPLEMENTATIONS, Workload

    # Making the workload is part of getting ready.
    rounds = Rounds(pipe)
    IMPLEMENTATIONS[way](Workload(settings), rounds)
