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

import numpy as np
import pytest

from experiments import sweep
from experiments.datasets import mnist
from experiments.runner.cell import Cell
from tests.experiments.test_datasets import idx_file, place

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
        draw=lambda name, out: (
            out / name / "report.html",
            f"table of {name}: {len(list((out / name / 'cells').glob('*.json')))}",
        ),
    )
    drawn.ReportError = type("ReportError", (ValueError,), {})
    monkeypatch.setitem(sys.modules, REPORT, drawn)
    code, out, _ = here("--kinds", "plain,plain")
    assert code == 0 and "table of tiny: 2" in out and f"Report: {bench.out / 'tiny' / 'report.html'}" in out

    def broken(name, out):
        raise drawn.ReportError("a field is missing")

    drawn.draw = broken
    code, out, err = here("--kinds", "plain,plain")
    assert code == 1 and "a field is missing" in err and "2 reused" in out


def test_a_failed_cell_stops_no_other_and_is_told_at_the_end(here, bench):
    code, out, err = here("--kinds", "plain,fail,plain")
    assert code == 1 and "2 run, 0 reused, 1 failed" in out
    assert "failed: tiny fail seed 1: RuntimeError: this cell always fails" in err and "Traceback" in err
    assert len(bench.records()) == 2 and bench.seeds("end") == [0, 2]


def test_a_data_file_that_was_cut_between_two_runs_fails_its_cells_and_keeps_the_others(here, bench, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    for part in ("TRAIN", "TEST"):
        monkeypatch.setattr(mnist, part, place(bench.data, getattr(mnist, part), idx_file(pixels)))
    path = bench.data / mnist.TRAIN.path
    whole = path.read_bytes()
    assert here("--kinds", "images,images")[0] == 0
    kept = results(bench)
    path.write_bytes(whole[:-20])

    code, out, err = here("--kinds", "images,images,images,plain")

    sizes = f"{len(whole):,}", f"{len(whole) - 20:,}"
    said = rf"DatasetError: {path}: expected the published file of {sizes[0]} bytes, md5 \w+; got {sizes[1]} bytes, "
    assert code == 1 and "4 cells: 1 run, 2 reused, 1 failed" in out
    assert re.search(rf"failed: tiny images seed 2: \S*{said}md5 \w+: truncated\.", err)
    _, status, _ = here("--kinds", "images,images,images,plain", "--status")
    assert "4 cells: 3 finished, 0 running, 1 failed" in status
    assert re.search(rf"failed  tiny images seed 2: \S*{said}", status)
    assert kept.items() <= results(bench).items() and len(bench.records()) == 3

    path.write_bytes(whole)
    code, out, err = here("--kinds", "images,images,images,plain")
    assert (code, err) == (0, "") and "4 cells: 1 run, 3 reused, 0 failed" in out
    # The cells differ in their seed alone, which the images know nothing of.
    assert len({result["value"] for result in results(bench).values()}) == 2


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
    "two things at once": (["tiny", "--status", "--verify"], "not allowed with argument --status"),
    "yes to nothing": (["tiny", "--yes"], "Expected --yes beside --prune"),
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


def test_a_damaged_record_is_set_aside_and_the_rest_goes_on(here, bench):
    here("--kinds", "plain,plain")
    broken, whole = bench.records()
    half = broken.read_text()[:40]
    broken.write_text(half)
    (broken.parent / "notes.json").write_text("mine")
    for look in ("--dry-run", "--status", "--verify", "--prune"):
        here("--kinds", "plain,plain,plain", look)
        assert broken.read_text() == half
    code, out, err = here("--kinds", "plain,plain,plain")
    aside = bench.out / "tiny" / "aside"
    assert code == 0 and "3 cells: 2 run, 1 reused, 0 failed" in out
    assert err.count("Set aside 2 damaged or foreign files") == 1 and str(aside) in err and "Traceback" not in err
    assert f"{broken.name}: its checksum is another" in err or f"{broken.name}: it is no valid JSON" in err
    assert (aside / broken.name).read_text() == half and (aside / "notes.json").read_text() == "mine"
    assert here("--kinds", "plain,plain,plain")[0::2] == (0, "")


def test_a_record_that_rots_while_the_sweep_runs_is_set_aside(here, bench, tiny, monkeypatch):
    here("--kinds", "plain,plain")
    kept = results(bench)
    last = max(bench.records(), key=lambda path: json.loads(path.read_text())["settings"]["seed"])
    content = last.read_text()
    last.unlink()
    run = tiny.run

    def rot(settings, context):
        if settings["seed"] == 7:
            last.write_text(content.replace("0.", "1."))
        return run(settings, context)

    monkeypatch.setattr(tiny, "run", rot)
    first = Cell("tiny", {"kind": "plain", "seed": 7})
    monkeypatch.setattr(tiny, "plan", lambda options, records: [first, *map(tiny_cell, range(2))])
    monkeypatch.setattr(tiny, "count", lambda options: 3)
    code, out, err = here()
    assert code == 0 and "3 cells: 2 run, 1 reused" in out and "set aside: " in err and "its checksum is another" in err
    assert kept.items() <= results(bench).items()


def tiny_cell(seed, kind="plain"):
    return Cell("tiny", {"kind": kind, "seed": seed})


ENDS = {
    "memory": "MemoryError: no memory for this cell",
    "huge": "RuntimeError: .*alloc",
    "diverge": "FloatingPointError: the loss is not finite at step 3",
    "exit": "SystemExit: 3",
}


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cell_that_ends_badly_is_marked_with_its_reason_and_the_rest_goes_on(here, bench, kind, jobs):
    kinds = f"plain,{kind},plain"
    code, out, err = here("--kinds", kinds, jobs=jobs)
    assert code == 1 and "2 run, 0 reused, 1 failed" in out and len(bench.records()) == 2
    for shown in (err, here("--kinds", kinds, "--status")[1]):
        assert re.search(f"failed.*tiny {kind} seed 1: .*{ENDS[kind]}", shown)


def test_the_status_tells_every_state_and_changes_nothing(here, bench):
    here("--kinds", "plain,fail,plain,plain")
    other = bench.start("--kinds", "wait")
    bench.until(lambda: len(bench.processes()) == 2)
    (bench.out / "tiny" / "cells" / f"{tiny_cell(3).key}.json").write_text("{")
    before = {path: path.read_bytes() for path in bench.out.rglob("*") if path.is_file()}
    code, out, err = here("--kinds", "wait,fail,plain,plain,plain", "--status")
    assert (code, err) == (0, "") and "5 cells: 1 finished, 1 running, 1 failed, 1 damaged, 1 missing." in out
    assert re.findall(r"^[0-9a-f]{16} +(\w+)  tiny \w+ seed (\d)", out, re.MULTILINE) == [
        ("running", "0"),
        ("failed", "1"),
        ("finished", "2"),
        ("damaged", "3"),
        ("missing", "4"),
    ]
    assert "seed 1: RuntimeError: this cell always fails\n" in out and "seed 3: it is no valid JSON" in out
    assert {path: path.read_bytes() for path in bench.out.rglob("*") if path.is_file()} == before
    bench.go()
    assert bench.ends(other)[0] == 0


def test_the_status_of_nothing_makes_nothing(here, bench):
    code, out, _ = here("--tuned", "--status")
    assert code == 0 and "missing  tiny plain seed -1" in out and "and 3 cells that are named when" in out
    assert here("--verify")[:2] == (0, "0 records are whole, 0 files are damaged or foreign.\n")
    assert here("--prune")[:2] == (0, "0 files would be removed by --prune --yes. Nothing was changed.\n")
    assert not bench.out.exists()


def test_verify_finds_what_is_damaged_and_says_what_it_cannot_find(here, bench):
    here("--kinds", "plain,plain,plain")
    assert here("--verify")[:2] == (0, "3 records are whole, 0 files are damaged or foreign.\n")
    first, second, third = bench.records()
    first.write_text(first.read_text().replace("2.5", "2.6"))
    record = json.loads(second.read_text())
    del record["checksum"]
    second.write_text(json.dumps({**record, "format": 1}))
    code, out, _ = here("--verify")
    assert (
        code == 1 and f"{first}: its checksum is another" in out and "2 records are whole, 1 files are damaged" in out
    )
    assert "1 of the records are of an earlier format" in out


def test_prune_lists_and_removes_what_nobody_needs(here, bench):
    here("--kinds", "plain,plain,fail,fail")
    _, extra = sorted(bench.records(), key=lambda path: json.loads(path.read_text())["settings"]["seed"])
    folder = extra.parent
    (folder / "0123456789abcdef.12.abcd.tmp").write_text("{")
    (bench.out / "tiny" / "aside").mkdir()
    (bench.out / "tiny" / "aside" / "old.json").write_text("{")
    failures = {
        json.loads(path.read_text())["settings"]["seed"]: path for path in folder.parent.glob("failures/*.json")
    }
    assert set(failures) == {2, 3}
    before = {path for path in bench.out.rglob("*") if path.suffix != ".lock"}
    expected = {extra, failures[3], folder / "0123456789abcdef.12.abcd.tmp", bench.out / "tiny" / "aside" / "old.json"}
    command = ("--kinds", "plain,fail,fail")
    # Seed 1 is of kind fail here, so the record of its plain cell and both marks of kind fail at 3 are of no cell.
    code, out, _ = here(*command, "--prune")
    assert code == 0 and "Nothing was changed" in out and all(str(path) in out for path in expected)
    assert {path for path in bench.out.rglob("*") if path.suffix != ".lock"} == before
    code, out, _ = here(*command, "--prune", "--yes")
    assert code == 0 and "4 files removed." in out
    assert before - {path for path in bench.out.rglob("*") if path.suffix != ".lock"} == expected
    assert here(*command, "--prune")[1].startswith("0 files")


def test_prune_keeps_records_as_long_as_later_stages_cannot_be_named(here, bench):
    here("--tuned", "--kinds", "plain,plain")
    first = Cell("tiny", {"kind": "plain", "seed": -1})
    (bench.out / "tiny" / "cells" / f"{first.key}.json").unlink()
    code, out, _ = here("--tuned", "--kinds", "plain,plain", "--prune", "--yes")
    assert code == 0 and "Every record is kept" in out and "0 files removed" in out and len(bench.records()) == 2


def test_what_another_sweep_is_at_is_not_pruned(here, bench):
    other = bench.start("--kinds", "wait")
    bench.until(lambda: bench.seeds("start") == [0])
    cell = tiny_cell(0, "wait")
    half = bench.out / "tiny" / "cells" / f"{cell.key}.1.ab.tmp"
    half.write_text("{")
    assert "0 files removed" in here("--kinds", "plain", "--prune", "--yes")[1] and half.exists()
    bench.go()
    assert bench.ends(other)[0] == 0


def test_a_sweep_that_waits_for_another_says_so(here, bench):
    first = bench.start("--kinds", "wait,wait")
    bench.until(lambda: bench.seeds("start") == [0])
    second = bench.start("--kinds", "wait,plain")
    waiting = [second.stderr.readline()]
    assert waiting == ["waiting for 1 cells that other processes run: tiny wait seed 0\n"]
    bench.go()
    code, out, err = bench.ends(second)
    assert code == 0 and "2 cells: 1 run, 1 reused" in out and "waiting" not in err
    assert bench.ends(first)[0] == 0


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
    from experiments.reporting.document import Document
    from experiments.reporting.tables import Column, Table

    found = sorted(records.values(), key=lambda record: record["settings"]["n"])
    columns = [Column("n", lambda record: record["settings"]["n"]), Column("square", lambda record: record["result"]["value"])]
    return Document("Squares", tables=[Table("Squares", columns, found, file="summary")])
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
    assert f"Report: {page}" in done.stdout and "Squares" in page.read_text() and "Made by" in page.read_text()
    assert (page.parent / "summary.csv").read_text() == "n,square\n0,0\n1,1\n2,4\n"
    page.unlink()
    again = run("experiments.report", "squares")
    assert again.returncode == 0 and page.exists(), again.stderr
    assert "squares" in run("experiments.sweep", "--list").stdout
