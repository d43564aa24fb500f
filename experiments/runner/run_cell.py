"""One cell, run in this process: its result, what it cost, and what it was run with."""

import copy
import functools
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.machine import device_name, peak_memory, processor_name, reset_peak_memory, usable_cores
from experiments.runner import registry
from experiments.runner.cell import JSON, Cell
from experiments.runner.compile_cache import keep_compiled
from experiments.runner.record import FORMAT, MOST_BYTES, Record
from experiments.runner.scratch import SCRATCH, Scratch

__all__ = ["Context", "Progress", "one_thread", "run_cell"]

Progress = Callable[[int, int, str], None]

# Held while a cell runs.
_RUNNING = threading.Lock()
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_NOTE_EVERY = 5.0  # seconds between notes of what a cell has cost
_PACKAGES = ("torch", "pyro-ppl", "pyro_avi", "numpy")


def _unwatched(done: int, total: int, note: str) -> None:
    """The progress of a cell that nobody watches."""


@dataclass
class Context:
    """What a cell is run with that does not decide its result.

    Args:
        device: "cpu" or "cuda".
        data_dir: folder of the data sets, None for the default places.
        download: whether missing data may be downloaded.
        progress: called by the cell with the steps done, the steps in all and a short note.
        command: the command line, without paths, kept in the record.
        store: the folder of the records that the cell is for, of all sweeps; it tells them from others.
        scratch: where the cell keeps what it goes on from when it is killed.
    """

    device: str
    data_dir: str | None
    download: bool
    progress: Progress = _unwatched
    command: str = ""
    store: str = ""
    scratch: Scratch = field(default_factory=Scratch)


def run_cell(cell: Cell, context: Context) -> Record:
    """Run the cell on one thread, whatever the caller has, and return its record. Seeds are the sweep's matter.

    `peak_memory_bytes` is the memory that torch allocated on CUDA; elsewhere the resident memory of the whole process,
    the interpreter and the libraries included: its peak since the cell began where the system can tell (Linux), else
    since the process began. `compiled` is what one graph evaluated, `fallbacks` what was to be one and was evaluated
    eagerly, and why: sums are rounded differently, so the last digits of such a cell may be no other machine's.

    Raises:
        RuntimeError: another cell is running in this process: they would draw each other's numbers.
        ValueError: the sweep is unknown, or its result is no JSON (a sweep gives None for a number that is not finite).
    """
    with _alone():
        return _run_cell(cell, context)


def _run_cell(cell: Cell, context: Context) -> Record:
    keep_compiled()
    sweep = registry.find(cell.sweep)
    reset_peak_memory(context.device)
    begin = time.perf_counter()
    versions = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    folder = Path(context.store) / cell.sweep / SCRATCH / cell.key if context.store else None
    scratch = Scratch(folder, {**_source(), **versions, "device": context.device})
    with one_thread(), _graphs() as graphs, closing(scratch):
        run_with = replace(context, scratch=scratch, progress=_noting(scratch, begin, graphs, context.progress))
        result = _as_json(sweep.run(copy.deepcopy(cell.settings), run_with), cell)
        threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 1
    before = scratch.before
    return {
        "format": FORMAT,
        "sweep": cell.sweep,
        "key": cell.key,
        "settings": cell.settings,
        "result": result,
        "provenance": {
            "started": before["started"],
            "seconds": before["seconds"] + time.perf_counter() - begin,
            "resumed": before["resumed"],
            "command": context.command,
            **_source(),
            "versions": versions,
            "machine": {
                "system": f"{platform.system()} {platform.machine()}",
                "processor": processor_name(),
                "cores": usable_cores(),
            },
            "threads": threads,
            "compiled": sorted({*before["compiled"], *graphs.compiled}),
            "fallbacks": sorted({*before["fallbacks"], *graphs.fallbacks}),
            "device": context.device,
            "device_name": device_name(context.device),
            "peak_memory_bytes": peak_memory(context.device),
        },
    }


@contextmanager
def _alone() -> Iterator[None]:
    if not _RUNNING.acquire(blocking=False):
        raise RuntimeError(
            "Expected one cell at a time in a process, got a second one while the first is running.\n"
            "An engine runs cells that overlap in processes of their own: see experiments.runner.engines."
        )
    try:
        yield
    finally:
        _RUNNING.release()


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block this process, and those it starts, are held to one thread of arithmetic.

    Cells run side by side; with more threads than cores a step was measured to take ten times as long, and the order of
    a sum, hence its last digits, would depend on the machine.
    """
    # The environment decides for libraries that are yet to be loaded. torch takes seconds to import and not every
    # process needs it, so it is told only where it is loaded; where the block loads it, it keeps one thread.
    environment = {name: os.environ.get(name) for name in _THREADS}
    torch = sys.modules.get("torch")
    threads = torch and torch.get_num_threads()
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    if torch:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        for name, value in environment.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        if torch:
            torch.set_num_threads(threads)


class _Graphs(logging.Handler):
    """What the library says of its compiled graphs, and of what it evaluates eagerly in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled: set[str] = set()
        self.fallbacks: set[str] = set()
        self.note: Callable[[], None] = lambda: None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it, and have it noted before anything that was computed so is."""
        if record.fallback is None:
            self.compiled.add(record.what)
        else:
            self.fallbacks.add(_without_paths(record.getMessage()))
        self.note()


@contextmanager
def _graphs() -> Iterator[_Graphs]:
    """What the library says of its graphs within the block."""
    told = _Graphs()
    logger = logging.getLogger("pyro_avi")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(told)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield told
    finally:
        logger.removeHandler(told)
        logger.setLevel(level)
        logger.propagate = propagate


def _without_paths(text: str) -> str:
    """Names of files without their folders: a record says nothing of the place.

    >>> _without_paths("Read-only file system: '/home/ada/.cache/pyro_avi/x.cpp', 1/2")
    "Read-only file system: 'x.cpp', 1/2"
    """
    return re.sub(r"(?<!\w)/(?:[^\s/'\":,]+/)+", "", text)


def _noting(scratch: Scratch, begin: float, graphs: _Graphs, tell: Progress) -> Progress:
    """Passes the progress of a cell on, and notes in its scratch what it has cost, now and then."""
    noted = begin

    def note() -> None:
        scratch.note(time.perf_counter() - begin, graphs.compiled, graphs.fallbacks)

    def progress(done: int, total: int, text: str) -> None:
        nonlocal noted
        now = time.perf_counter()
        if now - noted >= _NOTE_EVERY:
            noted = now
            note()
        tell(done, total, text)

    graphs.note = note
    return progress


def _as_json(result: JSON, cell: Cell) -> dict[str, JSON]:
    # Through text, so that a fresh record equals the one read back.
    try:
        text = json.dumps(result, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected the result of a cell of sweep {cell.sweep} as JSON, got a value that JSON lacks ({error}). "
            "Give plain numbers, and None for a number that is not finite."
        ) from error
    if len(text) > MOST_BYTES // 2:
        raise ValueError(
            f"Expected the result of a cell of sweep {cell.sweep} to take at most {MOST_BYTES // 2:,} bytes as JSON, got "
            f"{len(text):,}. Keep summaries in it."
        )
    result = json.loads(text)
    if not isinstance(result, dict):
        raise ValueError(f"Expected the result of a cell of sweep {cell.sweep} as a dict, got {type(result).__name__}.")
    return result


@functools.cache
def _version(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


@functools.cache
def _source() -> dict[str, JSON]:
    """The commit of this checkout, and whether the code differs from it; None where git cannot tell."""
    root = Path(__file__).parents[2]
    head = _git(root, "rev-parse", "--show-prefix", "HEAD")
    # A prefix means that the code lies within another project's repository, whose commit says nothing about it.
    if head is None or head[0]:
        return {"commit": None, "dirty": None}
    changes = _git(root, "status", "--porcelain", "--", "pyro_avi", "experiments")
    return {"commit": head[1], "dirty": None if changes is None else bool(changes)}


def _git(root: Path, *arguments: str) -> list[str] | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()
