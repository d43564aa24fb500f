"""A cell's name, and what running one cell records."""

import doctest
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.runner import cell as cell_module
from experiments.runner.cell import Cell
from experiments.runner.engines import attempt
from experiments.runner.run_cell import Context, run_cell

REPOSITORY = Path(__file__).resolve().parents[3]
SETTINGS = {"guide": "amortized", "width": 64, "lr": 1e-3, "seeds": [1, 2], "note": "naïve", "none": None}


def test_the_key_is_the_hash_of_canonical_json():
    # printf '%s' TEXT | sha256sum, where TEXT is {"settings":{"guide":"amortized","lr":0.001,"none":null,
    # "note":"na\u00efve","seeds":[1,2],"width":64},"sweep":"images"} on one line.
    # Records are found by it: it must never change.
    assert Cell("images", SETTINGS).key == "70c31085fc1dbf7d"


def test_the_docstring_of_the_module_holds():
    assert doctest.testmod(cell_module).failed == 0


@pytest.mark.parametrize(
    "same",
    [
        dict(reversed(SETTINGS.items())),
        {**SETTINGS, "seeds": (1, 2)},
        json.loads(json.dumps(SETTINGS)),
    ],
)
def test_equal_settings_are_one_cell(same):
    one, other = Cell("images", SETTINGS), Cell("images", same)
    assert one == other and hash(one) == hash(other) and one.key == other.key
    assert {one: 1}[other] == 1


def test_nested_settings_do_not_depend_on_order_or_on_the_kind_of_key():
    cell = Cell("images", {"lr": {10: {"a": 1, "b": 2}, 9: {}}})
    assert cell == Cell("images", {"lr": {"9": {}, "10": {"b": 2, "a": 1}}})
    assert cell == Cell("images", json.loads(json.dumps(cell.settings)))


@pytest.mark.parametrize(
    "other", [Cell("images", {**SETTINGS, "width": 65}), Cell("linear", SETTINGS), "70c31085fc1dbf7d"]
)
def test_other_settings_or_another_sweep_are_another_cell(other):
    assert Cell("images", SETTINGS) != other


def test_a_cell_keeps_its_own_copy_and_travels():
    settings = {"widths": [1, 2]}
    cell = Cell("images", settings)
    key = cell.key
    settings["widths"].append(3)
    assert Cell("images", cell.settings).key == key
    assert pickle.loads(pickle.dumps(cell)) == cell


@pytest.mark.parametrize(
    ("sweep", "settings", "message"),
    [
        ("../images", {}, "name of a sweep"),
        ("", {}, "name of a sweep"),
        ("images", {"lr": float("nan")}, "sweep images that JSON can hold"),
        ("images", {"guides": {"constant"}}, "sweep images that JSON can hold"),
    ],
)
def test_what_is_no_cell_is_refused(sweep, settings, message):
    with pytest.raises(ValueError, match=message):
        Cell(sweep, settings)


def test_a_record_says_what_was_run_and_nothing_of_the_place(tiny, tmp_path):
    cell = Cell("tiny", {"kind": "plain", "seed": 5})
    seen = []
    context = Context("cpu", str(tmp_path), False, progress=lambda *step: seen.append(step), command="the command")
    record = run_cell(cell, context)
    assert seen == [(1, 2, "half way")]
    assert record["key"] == cell.key and record["settings"] == cell.settings
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    provenance = record["provenance"]
    assert provenance["command"] == "the command" and provenance["threads"] == 1 and provenance["device"] == "cpu"
    assert provenance["compiled"] == provenance["fallbacks"] == []
    assert provenance["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(provenance["versions"]) == {"python", "torch", "pyro-ppl", "pyro_avi", "numpy"}
    assert provenance["started"].endswith("+00:00") and 0 <= provenance["seconds"] < 60
    text = json.dumps(record)
    assert str(tmp_path) not in text and os.uname().nodename not in text


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the process")
def test_peak_memory_is_that_of_the_cell():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not let a process reset its peak memory")
    # In a process of its own: 300 MiB before the cell do not count, 100 MiB within it do.
    code = """
import types
from experiments.runner import registry
from experiments.runner.cell import Cell
from experiments.runner.engines import attempt
from experiments.runner.run_cell import Context, run_cell

def peak(mib):
    return run_cell(Cell("t", {"mib": mib}), Context("cpu", None, False))["provenance"]["peak_memory_bytes"]

blocks = types.SimpleNamespace(run=lambda settings, context: {"size": len(bytearray(settings["mib"] << 20))})
registry.find = lambda name: blocks
before = len(bytearray(300 << 20))
print(peak(100), peak(1))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    large, small = (int(peak) / 2**20 for peak in done.stdout.split())
    assert 100 < large < 250 and 80 < large - small < 120


@pytest.mark.parametrize("kind", ["threads", "fail"])
def test_a_cell_runs_on_one_thread_and_leaves_the_callers(tiny, tmp_path, monkeypatch, kind):
    import torch

    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    try:
        outcome = attempt(Cell("tiny", {"kind": kind, "seed": 0}), Context("cpu", str(tmp_path), False))
        if kind == "threads":
            assert outcome.record["result"] == {"value": 1} and outcome.record["provenance"]["threads"] == 1
        else:
            assert outcome.record is None
        assert torch.get_num_threads() == 2
        assert os.environ["OMP_NUM_THREADS"] == "2" and "MKL_NUM_THREADS" not in os.environ
    finally:
        torch.set_num_threads(before)


def test_a_process_refuses_a_second_cell_while_one_is_running(tiny, tmp_path):
    first, second = (Cell("tiny", {"kind": "plain", "seed": seed}) for seed in (0, 1))
    context, met = Context("cpu", str(tmp_path), False), []

    def meanwhile(*step):
        met.append(attempt(second, context))

    assert run_cell(first, replace(context, progress=meanwhile))["key"] == first.key
    (refused,) = met
    assert refused.record is None and "Expected one cell at a time in a process" in refused.failure
    assert attempt(second, context).record is not None


def test_a_number_that_is_not_finite_is_refused(tiny, tmp_path):
    with pytest.raises(
        ValueError, match="result of a cell of sweep tiny as JSON.*None for a number that is not finite"
    ):
        run_cell(Cell("tiny", {"kind": "nan", "seed": 0}), Context("cpu", str(tmp_path), False))
