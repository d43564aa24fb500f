"""What engines cost beside their cells: `python -m tests.experiments.engine_cost --engines processes ray --turns 3`.

Each engine runs the same short trainings in a process of its own, the engines in turns. Counted are seconds by the clock and
processor seconds of the process and of all that come from it: for the start of the engine; for the cells, those that the cells
take themselves apart, so that what is left is the engine's, the start of its workers among it; and for the end.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.experiments.kills import REPOSITORY, SWEEPS
from tests.experiments.many_cells import children

PARTS = ("start", "cells", "end")
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: processes whose parents end become children of this one


class Processor:
    """Processor seconds of this process and of all that come from it, looked at twice a second while they live."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
        self._seen: dict[tuple[int, str], tuple[float, str]] = {}
        self._own = 0.0
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.seconds()
            time.sleep(0.5)

    def seconds(self) -> float:
        """Those until now, without those of looking."""
        with self._lock:
            begin = time.thread_time()
            self._look(os.getpid())
            self._own += time.thread_time() - begin
            return sum(seconds for seconds, _ in self._seen.values()) - self._own

    def by_process(self) -> str:
        """A line for each process of more than a tenth of a second."""
        lines = (f"{seconds:7.2f}  {command[:120]}" for seconds, command in sorted(self._seen.values(), reverse=True))
        return "\n".join(line for line in lines if float(line.split()[0]) > 0.1)

    def _look(self, process: int) -> None:
        try:
            # The name, in brackets, may hold anything.
            values = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            command = Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
            below = children(process)
        except OSError:
            return
        self._seen[process, values[19]] = (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK"), command
        for each in below:
            self._look(each)


def run(chosen: argparse.Namespace) -> None:
    """Run the cells by one engine, and print what each part took as JSON."""
    from experiments.runner import engines, registry
    from experiments.runner.run_cell import Context, one_thread

    processor = Processor()
    cells = registry.find("brief").plan(chosen, {})
    took: dict[str, tuple[float, float]] = {}
    clock, busy = time.perf_counter(), processor.seconds()

    def mark(part: str) -> None:
        nonlocal clock, busy
        now, used = time.perf_counter(), processor.seconds()
        took[part] = now - clock, used - busy
        clock, busy = now, used

    with tempfile.TemporaryDirectory() as store, one_thread():
        context = Context("cpu", None, False, store=store)
        with engines.create(chosen.engines[0], jobs=chosen.jobs, context=context) as engine:
            list(engine.run([], lambda *step: None))
            mark("start")
            outcomes = list(engine.run(cells, lambda *step: None))
            mark("cells")
        mark("end")
    if failures := [outcome.failure for outcome in outcomes if outcome.record is None]:
        raise RuntimeError(f"Expected {len(cells)} records, got {len(failures)} failures, the first:\n{failures[0]}")
    inside = sum(outcome.record["result"]["seconds"] for outcome in outcomes)
    took = {"start": took["start"], "cells": (*took["cells"], inside, took["cells"][1] - inside), "end": took["end"]}
    if chosen.detail:
        print(processor.by_process(), file=sys.stderr)
    print(json.dumps(took))


def main() -> int:
    """The command line: a line a turn, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=["processes", "ray"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cells", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--detail", action="store_true", help="the processor seconds of every process as well")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        run(chosen)
        return 0
    options = ["--jobs", str(chosen.jobs), "--cells", str(chosen.cells), "--steps", str(chosen.steps)]
    options += ["--detail"] * chosen.detail
    found: dict[str, list[dict]] = {name: [] for name in chosen.engines}
    for turn in range(chosen.turns):
        for name in chosen.engines:
            command = [sys.executable, "-m", "tests.experiments.engine_cost", "--one", "--engines", name, *options]
            environment = {**os.environ, "PYRO_AVI_SWEEPS": str(SWEEPS)}
            done = subprocess.run(
                command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            tell(f"{name}, turn {turn}", found[name][-1:])
    for name in chosen.engines:
        tell(f"{name}, medians", found[name])
    return 0


def tell(name: str, turns: list[dict]) -> None:
    """A line of a table: by the clock and by the processor for each part, and of the latter in the cells and beside them."""
    numbers = [
        f"{statistics.median(values):.1f}"
        for part in PARTS
        for values in zip(*(turn[part] for turn in turns), strict=True)
    ]
    print(f"| {name} | {' | '.join(numbers)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
