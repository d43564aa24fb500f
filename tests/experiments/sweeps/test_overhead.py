"""The sweep `overhead`: what it times, and what its report says."""

import argparse

import pytest

from experiments.reporting.pages import data, terminal
from experiments.reporting.records import ReportError
from experiments.runner.run_cell import Context, run_cell
from experiments.sweeps import overhead
from experiments.sweeps.overhead import report
from experiments.sweeps.overhead.timing import time_steps


def options(*argv):
    parser = argparse.ArgumentParser()
    overhead.add_arguments(parser)
    return parser.parse_args(argv)


def context():
    return Context("cpu", None, False)


def test_every_guide_is_timed_on_every_workload():
    cells = overhead.plan(options(), {})

    assert len(set(cells)) == len(cells) == overhead.count(options()) == 9
    assert len({overhead.describe(cell) for cell in cells}) == 9
    assert all(overhead.estimate(cell, device="cpu") > 0 for cell in cells)
    assert {cell.settings["workload"] for cell in overhead.plan(options("--workloads", "tiny"), {})} == {"tiny"}


PAIRS = [("tiny", rows, guide) for rows in ("given", "drawn") for guide in ("constant", "amortized", "factorized")]


@pytest.mark.parametrize("workload, rows, guide", [*PAIRS, ("image", "given", "amortized")])
def test_a_pair_is_timed(workload, rows, guide):
    settings = {"workload": workload, "guide": guide, "rows": rows, "rounds": 3, "steps": 1, "seed": 0}

    result = time_steps(settings, context())

    low, high = result["ratio_quartiles"]
    assert 0 < low <= result["ratio"] <= high
    assert result["guide_ms"] > 0 and result["by_hand_ms"] > 0


def record(workload, guide, ratio):
    cell = next(c for c in overhead.plan(options("--guides", guide, "--workloads", workload), {}))
    result = {"guide_ms": ratio, "by_hand_ms": 1.0, "ratio": ratio, "ratio_quartiles": [ratio, ratio]}
    provenance = {
        "commit": "a" * 40,
        "machine": {"processor": "P", "cores": 2},
        "versions": {"torch": "2"},
        "command": "c",
    }
    return {"settings": cell.settings, "result": result, "provenance": provenance}


def test_the_report_says_what_lies_above_the_limit():
    records = {"a": record("tiny", "constant", 1.05), "b": record("image", "constant", 1.05)}

    document = report.document(records)

    (note,) = document.notes
    assert note.kind == "warning" and note.text.startswith("1 of 2 ratios are above their limits")
    assert "image model, constant, rows given: 1.05, at most 1.02." in note.text
    assert note.figure.png.startswith(b"\x89PNG")
    assert [line["ratio"] for line in data(document)["summary"]] == [1.05, 1.05]
    (note,) = report.document({"a": record("tiny", "constant", 1.05)}).notes
    assert note.kind == "answer"


def test_a_terminal_shows_the_whole_table():
    printed = terminal(report.document({"a": record("tiny", "constant", 1.05)}))

    assert all(name in printed for name in ("guide", "1.05", "tiny"))


def test_records_of_another_sweep_are_refused():
    with pytest.raises(ReportError, match="Expected settings.workload in the record"):
        report.document({"a": {"settings": {}, "result": {}, "provenance": {}}})


def test_a_cell_makes_a_record():
    cell = overhead.plan(options("--guides", "constant", "--workloads", "tiny"), {})[0]
    short = type(cell)("overhead", {**cell.settings, "rounds": 2, "steps": 1})

    assert run_cell(short, context())["result"]["ratio"] > 0
