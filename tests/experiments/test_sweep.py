"""The command: killed, doubled, stopped, misused. Sweeps that are killed are processes of their own."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from experiments import sweep

REPOSITORY = Path(__file__).resolve().parents[2]

REPORT = "experiments.report"


def results(bench):
    return {path.stem: json.loads(path.read_text())["result"] for path in bench.records()}


@pytest.fixture
def here(tiny, bench, capsys):
    """here(*arguments): the command in this process; its exit code, output and errors."""

    def run(*arguments, jobs=1):
        code = sweep.main(bench.arguments(*arguments, jobs=jobs))
        return code, *capsys.readouterr()

    return run


def test_a_sweep_runs_and_a_second_run_repeats_nothing(here, bench):
    code, out, err = here("--kinds", "plain,plain,plain")
    assert (code, err) == (0, "")
    assert "3 cells: 3 run, 0 reused, 0 failed" in out and "The sweep tiny has no report" in out
    first = results(bench)
    code, out, err = here("--kinds", "plain,plain,plain,plain")
    assert code == 0 and "4 cells: 1 run, 3 reused, 0 failed" in out
    assert bench.seeds("start") == [0, 1, 2, 3]
    assert first.items() <= results(bench).items()


def test_later_stages_are_planned_from_the_records_of_earlier_ones(here, bench):
    code, out, _ = here("--tuned", "--kinds", "plain,plain", jobs=2)
    assert code == 0 and "3 cells: 3 run" in out
    assert [seed for event, seed, _ in bench.log() if event == "start"][0] == -1
    assert len(bench.records()) == 3


def test_records_keep_the_command_without_paths(here, bench):
    here("--kinds", "plain")
    (path,) = bench.records()
    command = json.loads(path.read_text())["provenance"]["command"]
    assert command == "python -m experiments.sweep tiny --kinds plain --jobs 1 --device cpu"
    assert str(bench.out) not in path.read_text() and str(bench.data) not in path.read_text()


def test_the_report_is_drawn_at_the_end(here, bench, monkeypatch):
    drawn = types.SimpleNamespace(
        has_report=lambda name: name == "tiny",
        write=lambda name, out: out / name / "report.html",
        table_text=lambda name, out: f"table of {name}: {len(list((out / name / 'cells').glob('*.json')))}",
    )
    drawn.ReportError = type("ReportError", (ValueError,), {})
    monkeypatch.setitem(sys.modules, REPORT, drawn)
    code, out, _ = here("--kinds", "plain,plain")
    assert code == 0 and "table of tiny: 2" in out and f"Report: {bench.out / 'tiny' / 'report.html'}" in out

    def broken(name, out):
        raise drawn.ReportError("a field is missing")

    drawn.write = broken
    code, out, err = here("--kinds", "plain,plain")
    assert code == 1 and "a field is missing" in err and "2 reused" in out


def test_a_failed_cell_stops_no_other_and_is_told_at_the_end(here, bench):
    code, out, err = here("--kinds", "plain,fail,plain")
    assert code == 1 and "2 run, 0 reused, 1 failed" in out
    assert "failed: tiny fail seed 1: RuntimeError: this cell always fails" in err and "Traceback" in err
    assert len(bench.records()) == 2 and bench.seeds("end") == [0, 2]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cell_that_was_to_be_compiled_and_was_not_is_told(here, bench, jobs):
    code, out, err = here("--kinds", "plain,eager,plain", jobs=jobs)
    told = "not compiled: tiny eager seed 1: The step is evaluated eagerly, not compiled: no compiler today."
    assert code == 0 and told in err and "3 cells: 3 run, 0 reused, 0 failed" in out
    (eager,) = (path for path in bench.records() if json.loads(path.read_text())["provenance"]["fallbacks"])
    told = "1 of the cells were to be compiled and were not"
    assert told in out and eager.name in out
    # As long as its record is used.
    _, out, err = here("--kinds", "plain,eager,plain", jobs=jobs)
    assert err == "" and told in out and "0 run, 3 reused" in out
    eager.unlink()
    assert told not in here("--kinds", "plain")[1]


def test_a_failed_first_stage_ends_the_sweep(here, bench, tiny, monkeypatch):
    def fail(settings, context):
        raise RuntimeError("no tuning today")

    monkeypatch.setattr(tiny, "run", fail)
    code, out, err = here("--tuned")
    assert code == 1 and "4 cells: 0 run, 0 reused, 1 failed" in out and err.count("Traceback") == 1


def test_a_killed_worker_is_told_and_the_rest_goes_on(here, bench):
    code, out, err = here("--kinds", "die,plain,plain", jobs=2)
    assert code == 1 and "2 run, 0 reused, 1 failed" in out and "was killed by SIGKILL" in err
    assert len(bench.records()) == 2


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_in_the_middle_of_a_cell(bench, jobs):
    command = ("--kinds", "plain,plain,wait,plain")
    process = bench.start(*command, jobs=jobs)
    bench.until(lambda: 2 in bench.seeds("start") and {0, 1} <= set(bench.seeds("end")) and len(bench.records()) >= 2)
    process.send_signal(signal.SIGKILL)
    bench.ends(process)
    # Workers end with their parent: the cell that one was at must not go on beside its successor.
    bench.until(lambda: not bench.living())
    kept = results(bench)
    before = bench.seeds("start")
    bench.go()
    code, out, err = bench.ends(bench.start(*command, jobs=jobs))
    assert code == 0, err
    assert f"{4 - len(kept)} run, {len(kept)} reused" in out
    finished = results(bench)
    assert len(finished) == 4 and kept.items() <= finished.items()
    # Finished cells were not repeated, the others were run once more at most.
    assert len(bench.seeds("start")) == len(before) + 4 - len(kept)
    assert sorted(bench.out.glob("tiny/cells/*")) == bench.records()


def test_killed_in_the_middle_of_a_write(bench):
    command = ("--kinds", "plain,write,plain")
    process = bench.start(*command)
    bench.until(lambda: bench.seeds("writing") == [1])
    process.send_signal(signal.SIGKILL)
    bench.ends(process)
    folder = bench.out / "tiny" / "cells"
    assert len(list(folder.glob("*.tmp"))) == 1 and len(bench.records()) == 1
    bench.go()
    code, out, err = bench.ends(bench.start(*command))
    assert code == 0, err
    assert "2 run, 1 reused" in out
    assert bench.seeds("start") == [0, 1, 1, 2]
    assert len(bench.records()) == 3 and sorted(folder.iterdir()) == bench.records()


def test_two_processes_on_one_store_run_every_cell_once(bench):
    command = ("--kinds", ",".join(["wait"] * 8))
    processes = [bench.start(*command), bench.start(*command)]
    # Nothing goes on until both are at a cell.
    bench.until(lambda: len(bench.processes()) == 2)
    assert bench.seeds("start") == [0, 1]
    bench.go()
    outputs = [bench.ends(process) for process in processes]
    assert [code for code, _, _ in outputs] == [0, 0], outputs
    assert bench.seeds("start") == bench.seeds("end") == list(range(8))
    counts = [tuple(map(int, re.search(r"8 cells: (\d) run, (\d) reused", out).groups())) for _, out, _ in outputs]
    assert sum(run for run, _ in counts) == 8 and all(run + reused == 8 and run >= 1 for run, reused in counts)
    assert len(bench.records()) == 8


def test_a_cell_of_a_killed_process_is_taken_over(bench):
    first = bench.start("--kinds", "wait,plain")
    bench.until(lambda: bench.seeds("start") == [0])
    second = bench.start("--kinds", "wait,plain")
    bench.until(lambda: bench.seeds("end") == [1])
    first.send_signal(signal.SIGKILL)
    bench.until(lambda: bench.seeds("start") == [0, 0, 1])
    bench.go()
    code, out, err = bench.ends(second)
    assert code == 0 and "2 run, 0 reused" in out, err


def test_alone_in_a_pool_and_after_a_resume_the_numbers_are_the_same(here, bench):
    kinds = "plain,plain,plain"
    here("--kinds", kinds)
    alone = results(bench)
    for path in bench.records()[1:]:
        path.unlink()
    here("--kinds", kinds)
    resumed = results(bench)
    for path in bench.records():
        path.unlink()
    here("--kinds", kinds, jobs=2)
    assert alone == resumed == results(bench) and len(alone) == 3


@pytest.mark.parametrize(
    ("number", "code", "jobs"), [(signal.SIGINT, 130, 2), (signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2)]
)
def test_stopping(bench, number, code, jobs):
    process = bench.start("--kinds", "plain,wait,wait", jobs=jobs)
    bench.until(lambda: len(bench.seeds("start")) >= (2 if jobs == 1 else 3) and len(bench.records()) == 1)
    # Ctrl-C reaches the whole group, in any order; a SIGTERM the process it is sent to.
    if number == signal.SIGINT:
        for worker in bench.processes() - {process.pid}:
            os.kill(worker, number)
        time.sleep(0.3)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    ended, out, err = bench.ends(process)
    assert ended == code
    assert f"Stopped by {number.name}. 1 of 3 cells are finished and kept: the same command resumes." in err
    assert "Traceback" not in err and "failed" not in err
    assert not bench.living()
    bench.go()
    code, out, err = bench.ends(bench.start("--kinds", "plain,wait,wait", jobs=jobs))
    assert code == 0 and "2 run, 1 reused" in out, err


def test_a_dry_run_lists_the_cells_and_runs_none(here, bench):
    code, out, _ = here("--kinds", "plain,plain,plain", "--dry-run")
    assert code == 0 and not bench.out.exists() and bench.log() == []
    assert out.count("~10 s") == 3 and "3 cells, 0 finished, 3 to run." in out
    assert "Estimate: 30 s on cpu, jobs: 1." in out
    here("--kinds", "plain")
    _, out, _ = here("--kinds", "plain,plain,plain", "--dry-run", jobs=2)
    assert re.search(r"finished  tiny plain seed 0\n", out) and "3 cells, 1 finished, 2 to run." in out
    assert "Estimate: 10 s on cpu, jobs: 2." in out


def test_a_dry_run_counts_the_cells_of_later_stages(here):
    _, out, _ = here("--tuned", "--kinds", "plain,plain", "--dry-run")
    assert "and 2 cells that are named when these are finished" in out and "Estimate: 30 s on cpu" in out


def test_the_list_and_the_help(here, capsys, tiny):
    code, out, _ = here("--list")
    assert code == 0 and re.search(r"^tiny +numbers, for tests$", out, re.MULTILINE)
    with pytest.raises(SystemExit) as end:
        sweep.main(["tiny", "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "--kinds" in out and "--dry-run" in out and "numbers, for tests" in out


BAD = {
    "unknown sweep": (["tinny"], 'Unknown sweep "tinny". Expected one of: .*tiny'),
    "bad option of the sweep": (["tiny", "--kinds", "odd"], "Unknown kinds"),
    "serial with jobs": (["tiny", "--engine", "serial", "--jobs", "2"], "one cell at a time, got 2 jobs"),
    "unknown option": (["tiny", "--widths", "0"], "unrecognized arguments: --widths 0"),
    "no jobs": (["tiny", "--jobs", "0"], "expected a whole number of at least 1, got '0'"),
    "unknown device": (["tiny", "--device", "tpu"], "invalid choice: 'tpu'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_commands_are_refused_before_any_work(tiny, bench, capsys, case):
    arguments, message = BAD[case]
    try:
        code = sweep.main(
            [*arguments, "--out", str(bench.out), *(["--device", "cpu"] if "tpu" not in arguments else [])]
        )
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and re.search(message, err) and "Traceback" not in err
    assert not bench.out.exists()


def test_cuda_that_is_not_there_is_refused(tiny, bench, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = sweep.main(["tiny", "--out", str(bench.out), "--device", "cuda"])
    assert code == 2 and "Expected a CUDA device" in capsys.readouterr().err and not bench.out.exists()


def test_a_corrupt_record_stops_the_sweep_and_nothing_is_lost(here, bench):
    here("--kinds", "plain,plain")
    broken, whole = bench.records()
    broken.write_text(broken.read_text()[:40])
    code, _, err = here("--kinds", "plain,plain,plain")
    assert code == 1 and str(broken) in err and "delete it" in err and "Traceback" not in err
    assert len(bench.seeds("start")) == 2
    broken.unlink()
    code, out, _ = here("--kinds", "plain,plain,plain")
    assert code == 0 and "2 run, 1 reused" in out


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(here, bench):
    bench.out.touch()
    code, _, err = here("--kinds", "plain")
    assert code == 1 and "Cannot write records below" in err and "--out" in err and bench.log() == []


def test_a_disk_that_fills_up_keeps_what_is_finished(here, bench, monkeypatch):
    replace = os.replace

    def full(source, target):
        if len(bench.records()) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        code, _, err = here("--kinds", "plain,plain,plain")
    assert code == 1 and os.strerror(errno.ENOSPC) in err and "the same command resumes" in err
    assert sorted((bench.out / "tiny" / "cells").iterdir()) == bench.records() and len(bench.records()) == 1
    code, out, _ = here("--kinds", "plain,plain,plain")
    assert code == 0 and "2 run, 1 reused" in out


def test_finding_the_sweeps_loads_nothing_that_trains_or_draws():
    code = (
        "import sys\n"
        "from experiments.runner import registry\n"
        "assert len([registry.find(name) for name in registry.names()]) >= 4\n"
        "sys.exit(', '.join({'torch', 'pyro', 'matplotlib'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SQUARES = """
from experiments.runner.cell import Cell

summary = "squares"

def add_arguments(parser):
    pass

def plan(options, records):
    return [Cell("squares", {"n": n}) for n in range(3)]

def count(options):
    return 3

def describe(cell):
    return str(cell.settings["n"])

def estimate(cell, *, device):
    return 1.0

def run(settings, context):
    return {"value": settings["n"] ** 2}
"""
REPORT_OF_SQUARES = """
def document(records):
    from experiments.reporting.document import Document, Section, Table, made_by

    rows = sorted([str(r["settings"]["n"]), str(r["result"]["value"])] for r in records.values())
    table = Table("Squares", ["n", "square"], rows)
    section = Section("all", "All", "", tables=[table])
    return Document("Squares", "", [], table, [section], [], made_by(records), {})
"""
IMPORTED = "from experiments.sweeps.squares.report import document\n"


@pytest.mark.parametrize(
    "files",
    [
        {"squares.py": SQUARES + REPORT_OF_SQUARES},
        {"squares/__init__.py": SQUARES + IMPORTED, "squares/report.py": REPORT_OF_SQUARES},
    ],
    ids=["a file", "a folder"],
)
def test_a_sweep_of_ones_own_brings_its_own_report(tmp_path, files):
    own = tmp_path / "own"
    for name, text in files.items():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text(text)

    def run(*line):
        return subprocess.run(
            [sys.executable, "-m", *line, "--out", str(tmp_path / "results")],
            cwd=REPOSITORY,
            env={**os.environ, "PYRO_AVI_SWEEPS": str(own)},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("experiments.sweep", "squares", "--device", "cpu", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    assert "Squares\nn  square\n0  0\n1  1\n2  4\n" in done.stdout and "3 cells: 3 run" in done.stdout
    page = tmp_path / "results" / "squares" / "report" / "report.html"
    assert f"Report: {page}" in done.stdout and "Squares" in page.read_text()
    page.unlink()
    again = run("experiments.report", "squares")
    assert again.returncode == 0 and page.exists(), again.stderr
    assert "squares" in run("experiments.sweep", "--list").stdout
