"""A cell that is killed in the middle goes on from there, to the numbers of one that nobody disturbed."""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.runner import registry
from experiments.runner.cell import Cell
from experiments.runner.run_cell import Context, run_cell
from experiments.runner.scratch import Scratch
from experiments.runner.store import Store
from experiments.sweeps import images, suboptimality
from experiments.sweeps.images import evaluation, model
from experiments.sweeps.suboptimality import training
from pyro_avi.training import training as of_library
from tests.experiments.sweeps.test_suboptimality import TINY

REPOSITORY = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """The end of a process, as far as a cell can tell."""


def planned(sweep, line):
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    return sweep.plan(parser.parse_args(line.split(), argparse.Namespace(data_dir=None, download=False)), {})


def small(purpose, **settings):
    line = "--num-train 40 --batch-size 15 --steps 24 --seeds 0 --guides amortized --widths 3 --noise learned"
    (cell,) = planned(images, f"{line} --protocol fair")
    common = cell.settings | {"latent_dim": 2, "hidden_dim": 6, "compile": False}
    if purpose == "tuning":
        return Cell("images", common | {"steps": 6, "grid": [[0.01, 0.01], [0.1, 0.01]], "ladder": [0.01, 0.1]})
    result = {name: value for name, value in common.items() if name not in ("grid", "ladder")}
    rates = {"lr_local": 0.01, "lr_global": 0.01}
    result |= {"purpose": "result", "steps": 24, "seed": 0, "share": 1e-9, "continued": rates, **rates}
    return Cell("images", result | settings)


CELLS = {
    "tuning": lambda: small("tuning"),
}
FURTHER = {
    "rounds, and on as F-VI": lambda: small("result"),
    "published": lambda: small("result", protocol="published", guide="factorized", width=None, continued=None),
    "suboptimality": lambda: planned(
        suboptimality, f"--dataset digits --num-train 60 --batch-size 20 {TINY} --seeds 0"
    )[0],
}


def numbers(result):
    """What of a result must not depend on when it was made."""
    if isinstance(result, dict):
        return {name: numbers(value) for name, value in result.items() if "seconds" not in name}
    return [numbers(value) for value in result] if isinstance(result, list) else result


@pytest.fixture
def often(monkeypatch):
    """Trainings are written often, and a test is told of each time."""
    monkeypatch.setattr(model, "EVERY", 2)
    monkeypatch.setattr(training, "_EVERY", 7)
    monkeypatch.setattr("experiments.runner.run_cell._NOTE_EVERY", 0.0)
    # What is measured is the same with fewer steps of it.
    monkeypatch.setattr(evaluation, "_FINAL_REFINEMENT", 2)
    heard, write = [], of_library.write

    def told(path, saved):
        write(path, saved)
        for hear in heard:
            hear(path, saved)

    monkeypatch.setattr(of_library, "write", told)
    return heard


@pytest.mark.parametrize("case", [*CELLS, *(pytest.param(name, marks=pytest.mark.slow) for name in FURTHER)])
def test_a_cell_that_is_stopped_again_and_again_comes_to_the_same_numbers(case, often, tmp_path):
    cell = (CELLS | FURTHER)[case]()
    undisturbed = run_cell(cell, Context("cpu", None, False))
    (tmp_path / cell.sweep).mkdir()
    writes, steps, kills = [], [], 0

    def kill(path, saved):
        writes.append(path.name)
        steps.append(saved.steps)
        # Each training once, when it has been written twice.
        if writes.count(path.name) == 2:
            raise Killed

    often.append(kill)
    while True:
        try:
            record = run_cell(cell, Context("cpu", None, False, store=str(tmp_path)))
        except Killed:
            kills += 1
            continue
        break
    assert kills == record["provenance"]["resumed"] >= (1 if case in ("published", "suboptimality") else 2)
    assert numbers(record["result"]) == numbers(undisturbed["result"])
    # What was written once was not computed again: the steps of each training rise.
    for name in set(writes):
        own = [step for step, written in zip(steps, writes, strict=True) if written == name]
        assert own == sorted(set(own)), name
    assert record["provenance"]["compiled"] == undisturbed["provenance"]["compiled"]
    Store(tmp_path).save(record)
    assert not list((tmp_path / cell.sweep / "scratch").iterdir())


KILLED = """
import os, signal, sys
from experiments import sweep
from experiments.sweeps.images import evaluation, model
from pyro_avi.training import training

model.EVERY, left = 10, int(sys.argv[1])
write = training.write

def told(path, saved):
    global left
    write(path, saved)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

training.write = told
sys.exit(sweep.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_in_the_middle_of_its_cell(tmp_path):
    line = "images --num-train 60 --batch-size 20 --steps 60 --seeds 0 --guides amortized --widths 4 --noise learned"
    command = [*line.split(), "--protocol", "published", "--no-compile", "--device", "cpu", "--jobs", "1"]

    def run(kill_at, out):
        arguments = [sys.executable, "-c", KILLED, str(kill_at), *command, "--out", str(out)]
        return subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True)

    assert run(0, tmp_path / "whole").returncode == 0
    for _ in range(2):
        ended = run(2, tmp_path / "killed")
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        (kept,) = (tmp_path / "killed" / "images" / "scratch").iterdir()
        assert {path.name for path in kept.iterdir()} >= {"attempt0.safetensors", "journal"}
    # Nobody needs it to be removed: the cell is not finished.
    ended = run(0, tmp_path / "killed")
    assert ended.returncode == 0, ended.stderr
    assert not list((tmp_path / "killed" / "images" / "scratch").iterdir())
    whole, killed = (
        json.loads(next((tmp_path / name / "images" / "cells").glob("*.json")).read_text())
        for name in ("whole", "killed")
    )
    assert numbers(killed["result"]) == numbers(whole["result"])
    assert killed["provenance"]["resumed"] == 2 and whole["provenance"]["resumed"] == 0
    assert killed["result"]["curve"]["seconds"] == sorted(killed["result"]["curve"]["seconds"])


# --- the folder of a cell


def opened(folder, made_by="this"):
    scratch = Scratch(folder / "tiny" / "scratch" / "key", made_by)
    scratch.checkpoint("training")
    return scratch


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny").mkdir()
    return tmp_path


def test_what_is_computed_once_is_kept_with_every_bit(folder):
    first, calls = opened(folder), []

    def compute():
        calls.append(1)
        return {"value": 0.1 + 0.2, "none": None, "pair": (1, 2.5)}

    first.checkpoint("part").write_text("a training")
    assert first.once("part", compute) == {"value": 0.1 + 0.2, "none": None, "pair": [1, 2.5]}
    assert not first.checkpoint("part").exists()
    first.close()
    again = opened(folder)
    kept = again.once("part", compute)
    assert kept == {"value": 0.1 + 0.2, "none": None, "pair": [1, 2.5]} and len(calls) == 1
    # What is damaged is computed again.
    path = folder / "tiny" / "scratch" / "key" / "part.json"
    path.write_text(path.read_text().replace("null", "true"))
    assert again.once("part", compute)["none"] is None and len(calls) == 2
    # Where nothing is kept the numbers are the same.
    assert Scratch().once("part", compute) == kept and Scratch().checkpoint("part") is None


def test_what_other_code_has_kept_is_not_gone_on_from(folder):
    first = opened(folder)
    first.checkpoint("training").write_text("a training")
    first.note(2.5, ["The step"], ["no compiler"])
    first.close()
    same = opened(folder)
    assert same.before["resumed"] == 1 and same.before["seconds"] == 2.5
    assert same.before["compiled"] == ["The step"] and same.before["fallbacks"] == ["no compiler"]
    same.note(1.0, ["Another"], [])
    same.close()
    assert opened(folder).before["seconds"] == 3.5
    other = opened(folder, "other code")
    assert other.before["resumed"] == 0 and not other.checkpoint("training").exists()


def test_one_process_at_a_time_has_it(folder):
    first, second = opened(folder), opened(folder)
    assert first.checkpoint("training") is not None and second.checkpoint("training") is None
    first.close()
    assert opened(folder).checkpoint("training") is not None


def test_nothing_is_made_where_the_store_is_not(tmp_path):
    assert opened(tmp_path).checkpoint("training") is None and not list(tmp_path.iterdir())


def test_prune_removes_what_finished_and_unnamed_cells_have_kept(tiny, bench, capsys):
    from experiments import sweep

    def here(*arguments):
        code = sweep.main(bench.arguments(*arguments))
        return code, capsys.readouterr().out

    here("--kinds", "plain,fail")
    (record,) = bench.records()
    (failure,) = (bench.out / "tiny" / "failures").iterdir()
    for key in (record.stem, failure.stem, "0123456789abcdef"):
        (bench.out / "tiny" / "scratch" / key).mkdir(parents=True)
        (bench.out / "tiny" / "scratch" / key / "training.safetensors").write_text("")
    code, out = here("--kinds", "plain,fail", "--prune", "--yes")
    assert code == 0 and "2 files removed" in out and "of an unfinished cell that is not named" in out
    # That of the failed one serves when it is tried again.
    assert [path.name for path in (bench.out / "tiny" / "scratch").iterdir()] == [failure.stem]


def test_a_sweep_that_keeps_nothing_leaves_nothing(tiny, bench):
    from experiments import sweep

    assert sweep.main(bench.arguments("--kinds", "plain")) == 0
    assert not (bench.out / "tiny" / "scratch").exists() and registry.find("tiny") is tiny
