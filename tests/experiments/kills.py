"""A sweep that is killed at random moments, again and again: `python -m tests.experiments.kills --engine NAME --kills 200`.

Each round is a sweep of cheap cells on a store of its own. It is killed (SIGKILL, its process alone or all that the terminal
would reach), started again by the same command, and killed again, until it has finished before its moment came. Counted are
cells with a record that a later start had lost or changed, cells with a record that were run again all the same, and cells
whose numbers are not those of a sweep that nobody disturbed.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SWEEPS = Path(__file__).parent / "own_sweeps"
LONGEST = 600.0  # seconds that one start of the sweep may take


@dataclass
class Tally:
    """What became of the cells of a sweep that was killed."""

    kills: int = 0
    rounds: int = 0
    finished: int = 0  # cells that had a record at the moment of a kill, summed over the kills
    lost: int = 0
    doubled: int = 0
    different: int = 0
    aside: int = 0
    repeated: int = 0  # starts of a cell beyond its first; where its end is that of its sweep, no fault

    def __str__(self) -> str:
        return ", ".join(f"{part.name} {getattr(self, part.name)}" for part in fields(self))


@dataclass
class Sweep:
    """The command and what it works on."""

    folder: Path
    engine: str
    cells: int
    options: list[str] = field(default_factory=list)

    def start(self) -> subprocess.Popen:
        """In a process group of its own, as a terminal starts it."""
        self.data.mkdir(parents=True, exist_ok=True)
        kinds = ",".join(["short"] * self.cells)
        engine = ["--engine", self.engine, "--device", "cpu", *self.options]
        where = ["--out", str(self.folder / "results"), "--data-dir", str(self.data)]
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.sweep", "tiny", "--kinds", kinds, *engine, *where],
            cwd=REPOSITORY,
            env={**os.environ, "PYRO_AVI_SWEEPS": str(SWEEPS)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def records(self) -> dict[int, dict]:
        """The records by the seeds of their cells, as they lie there."""
        found = [json.loads(path.read_text()) for path in self.folder.glob("results/tiny/cells/*.json")]
        return {record["settings"]["seed"]: record for record in found}

    def starts(self) -> list[int]:
        """The seeds of the cells in the order they were started."""
        log = self.data / "log"
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return [int(seed) for event, seed, _ in lines if event == "start"]


def results(records: dict[int, dict]) -> dict[int, dict]:
    """What of the records must not depend on when they were made."""
    return {seed: record["result"] for seed, record in records.items()}


def finish(sweep: Sweep, seconds: float | None = None) -> bool:
    """Start the sweep and let it run so long, by default to its end. Whether it has ended by itself."""
    process = sweep.start()
    try:
        _, errors = process.communicate(timeout=seconds or LONGEST)
    except subprocess.TimeoutExpired:
        return False
    else:
        if process.returncode != 0:
            raise RuntimeError(f"Expected the sweep to finish, got exit code {process.returncode}:\n{errors}")
        return True
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """The process by the one half of the time, all that the terminal would reach by the other."""
    if process.poll() is None:
        (os.kill if random.random() < 0.5 else os.killpg)(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()


def survive(
    folder: Path, engine: str, *, kills: int, cells: int, options: list[str], seed: int = 0, told=lambda tally: None
) -> Tally:
    """Kill sweeps of that many cells so many times, and count what should not be there."""
    random.seed(seed)
    begin = time.monotonic()
    undisturbed = Sweep(folder / "undisturbed", engine, cells, options)
    finish(undisturbed)
    usual, expected = time.monotonic() - begin, results(undisturbed.records())
    if sorted(expected) != list(range(cells)):
        raise RuntimeError(f"Expected {cells} records of the undisturbed sweep, got those of {sorted(expected)}.")
    tally = Tally()
    while tally.kills < kills:
        sweep = Sweep(folder / f"round{tally.rounds}", engine, cells, options)
        tally.rounds += 1
        kept, begun, ended = {}, len(sweep.starts()), False
        while not ended:
            # Not beyond the asked number, and to the end after that.
            ended = finish(sweep, random.uniform(0, usual) if tally.kills < kills else None)
            now = sweep.records()
            tally.lost += sum(now.get(seed) != record for seed, record in kept.items())
            tally.doubled += sum(seed in kept for seed in sweep.starts()[begun:])
            if not ended:
                tally.kills += 1
                tally.finished += len(now)
                told(tally)
            # Workers end a moment after their sweep: what they still log is no cell of the next start.
            kept, begun = now, len(sweep.starts())
        tally.different += sum(results(now).get(seed) != result for seed, result in expected.items())
        tally.repeated += len(sweep.starts()) - len(set(sweep.starts()))
        tally.aside += len(list(sweep.folder.glob("results/tiny/aside/*")))
    return tally


def main() -> int:
    """The command line; the exit code is 1 where anything was lost, doubled or different."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="serial")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--cells", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="further options of the sweep, after --")
    chosen = parser.parse_args()
    begin = time.monotonic()

    def tell(tally: Tally) -> None:
        if tally.kills % 20 == 0:
            print(f"{time.monotonic() - begin:.0f} s: {tally}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        tally = survive(
            Path(folder),
            chosen.engine,
            kills=chosen.kills,
            cells=chosen.cells,
            options=chosen.options,
            seed=chosen.seed,
            told=tell,
        )
    print(f"{chosen.engine}: {tally}; {time.monotonic() - begin:.0f} s, Python {platform.python_version()}")
    return 1 if tally.lost or tally.doubled or tally.different or tally.aside else 0


if __name__ == "__main__":
    sys.exit(main())
