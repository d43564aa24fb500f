"""Memory and open files of a sweep of many cells: `python -m tests.experiments.many_cells --engine NAME --cells 1000`.

The cells do next to nothing, so that what grows is the machinery's. Looked at are the process of the sweep and, of the engine
`processes`, its workers together, each time that a tenth of the cells has its record.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.experiments.kills import REPOSITORY, SWEEPS


def state(process: int) -> tuple[float, int]:
    """Resident memory in MiB and the number of open files."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(list(Path(f"/proc/{process}/fd").iterdir()))


def children(process: int) -> list[int]:
    """The processes that it has started."""
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(each) for each in found]


def main() -> int:
    """The command line: a line of a table for each look."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="serial")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cells", type=int, default=1000)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        kinds = ",".join(["plain"] * chosen.cells)
        options = ["--engine", chosen.engine, "--jobs", str(chosen.jobs), "--device", "cpu", "--kinds", kinds]
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.sweep", "tiny", *options]
            + ["--out", str(folder / "results"), "--data-dir", str(folder / "data")],
            cwd=REPOSITORY,
            env={**os.environ, "PYRO_AVI_SWEEPS": str(SWEEPS)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        following = chosen.cells // 10
        while process.poll() is None:
            done = len(list(folder.glob("results/tiny/cells/*.json")))
            if done >= following:
                look(process.pid, done)
                following = done + chosen.cells // 10
            time.sleep(0.02)
        return process.returncode


def look(process: int, done: int) -> None:
    """Print what the sweep and its workers have at the moment."""
    states = []
    for each in (process, *children(process)):
        try:
            states.append(state(each))
        except OSError:
            continue
    if states:
        (memory, files), rest = states[0], states[1:]
        workers = f"{len(rest)} | {sum(each[0] for each in rest):.1f} | {sum(each[1] for each in rest)}"
        print(f"| {done} | {memory:.1f} | {files} | {workers} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
