"""Sweeps run in processes of their own or in this one, with the sweep `tiny` among them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyro
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
SWEEPS = Path(__file__).parent / "own_sweeps"
PATIENCE = 60.0  # seconds for what takes one on an idle machine


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # An orphan that nobody has waited for has ended all the same.
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


class Bench:
    """A store, a data folder for the sweep `tiny`, and commands on them."""

    def __init__(self, folder):
        self.out = folder / "results"
        self.data = folder / "data"
        self.data.mkdir()
        self.started = []

    def arguments(self, *arguments, jobs=1):
        return ["tiny", *arguments, "--jobs", str(jobs), "--device", "cpu", "--out", str(self.out), *self.where()]

    def where(self):
        return ["--data-dir", str(self.data)]

    def start(self, *arguments, jobs=1):
        """The command in a process group of its own, as a terminal starts it."""
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.sweep", *self.arguments(*arguments, jobs=jobs)],
            cwd=REPOSITORY,
            env={**os.environ, "PYRO_AVI_SWEEPS": str(SWEEPS)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def log(self):
        """What the cells did: (event, seed, process) each."""
        path = self.data / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(event, int(seed), int(process)) for event, seed, process in map(str.split, lines)]

    def seeds(self, event):
        return sorted(seed for kind, seed, _ in self.log() if kind == event)

    def processes(self):
        return {process for _, _, process in self.log()}

    def living(self):
        """The processes of the cells that have not ended."""
        return set(filter(alive, self.processes()))

    def go(self):
        (self.data / "go").touch()

    def records(self):
        return sorted((self.out / "tiny" / "cells").glob("*.json"))

    def until(self, condition):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"waited {PATIENCE} s in vain; log: {self.log()}"
            time.sleep(0.02)

    def ends(self, process):
        """Exit code, standard output and error."""
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err


@pytest.fixture(autouse=True)
def surroundings():
    """Cells seed torch and may fill Pyro's store: both are given back."""
    random_state = torch.get_rng_state()
    yield
    torch.set_rng_state(random_state)
    pyro.clear_param_store()


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    for process in bench.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.fixture
def tiny(monkeypatch):
    """The sweep `tiny` is among the sweeps of this process and of the workers it starts."""
    from experiments import sweeps
    from experiments.runner import registry

    monkeypatch.setenv("PYRO_AVI_SWEEPS", str(SWEEPS))
    monkeypatch.setattr(sweeps, "__path__", [*sweeps.__path__, str(SWEEPS)])
    yield registry.find("tiny")
    sys.modules.pop("experiments.sweeps.tiny")
