"""The sweep `speed`: what it times, how turns are taken, and what its report says."""

import argparse
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from experiments.reporting.pages import data
from experiments.reporting.records import ReportError
from experiments.reporting.tables import csv_text
from experiments.runner.run_cell import Context
from experiments.sweeps import speed
from experiments.sweeps.speed import report
from experiments.sweeps.speed.implementations import IMPLEMENTATIONS, Workload
from experiments.sweeps.speed.implementations.by_hand import Loss, _libraries
from experiments.sweeps.speed.rounds import Rounds
from experiments.sweeps.speed.timing import time_implementations


def cells(*argv, device="cpu"):
    parser = argparse.ArgumentParser()
    speed.add_arguments(parser)
    return speed.plan(parser.parse_args(argv, argparse.Namespace(device=device)), {})


def test_every_workload_is_a_cell():
    found = cells()

    assert len(set(found)) == len({speed.describe(cell) for cell in found}) == 13
    assert all(speed.estimate(cell, device="cpu") > 0 for cell in found)
    assert cells("--ways", "products", "--workloads", "tiny, A-VI k=16, batch 20") == []


def test_a_device_has_cells_and_ways_of_its_own():
    here, there = cells(), cells(device="cuda")

    assert not {cell.key for cell in here} & {cell.key for cell in there} and len(here) == len(there)
    assert "on CUDA" in speed.describe(there[0]) and speed.estimate(there[0], device="cuda") > 0
    assert set(IMPLEMENTATIONS) == {way for cell in there for way in cell.settings["ways"]}
    assert {"hand graph", "tf32", "numpyro tf32"}.isdisjoint(way for cell in here for way in cell.settings["ways"])
    (asked,) = cells("--ways", "hand graph", "--workloads", "tiny, A-VI k=16, batch 20")
    assert asked.settings["ways"] == ["hand graph"]


class Turns:
    """Gives two rounds of three steps."""

    def __init__(self):
        self.sent, self.left = [], 2

    def send(self, value):
        self.sent.append(value)

    def recv(self):
        self.left -= 1
        return 3 if self.left >= 0 else None


def small(kind):
    settings = {"num_rows": 24, "batch_size": 8, "latent_dim": 2, "guide": kind, "width": 4, "seed": 0}
    return {**settings, "layers": [4], "pixels": 4, "made": False}


@pytest.mark.parametrize("kind", ["constant", "amortized", "factorized"])
@pytest.mark.parametrize("way", ["eager", "hand", "svi", "products"])
def test_a_way_takes_its_turns(way, kind):
    turns = Turns()

    IMPLEMENTATIONS[way](Workload(small(kind)), Rounds(turns))

    # One message when it is ready, one for each round.
    assert len(turns.sent) == 3 and all(seconds > 0 for seconds in turns.sent)


def test_rounds_wait_for_a_device(monkeypatch):
    waits, turns = [], Turns()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(turns.sent)))

    Rounds(turns, "cuda").run(lambda: None)

    # When each of the two rounds begins, and when it ends.
    assert waits == [1, 1, 2, 2] and len(turns.sent) == 3


def test_a_step_is_captured_once_and_launched_at_every_step(monkeypatch):
    """On stand-ins: the memory of the rows is filled anew before each launch."""
    launched, streams = [], SimpleNamespace(wait_stream=lambda other: None)
    workload = Workload(small("factorized"))
    graph = SimpleNamespace(replay=lambda: launched.append(copied[-2:]))
    copied, copy = [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: (copied.append(other), copy(self, other))[1])
    for name, stand_in in {
        "Stream": lambda: streams,
        "current_stream": lambda: streams,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": lambda: graph,
        "graph": lambda graph: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    # A CPU has no such steps of Adam.
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, capturable, **options: adam(*args, **options))

    IMPLEMENTATIONS["hand graph"](workload, Rounds(Turns()))

    # Three before the first round, then two rounds of three.
    assert len(launched) == 9
    calls = workload.calls()
    next(calls)
    for (x, index), (given, positions) in zip(launched, calls, strict=False):
        assert x.equal(given) and index.equal(positions)


def test_every_library_gives_the_same_product():
    one, two = torch.rand(6, 5, dtype=torch.float32).T, torch.rand(6, 3)

    for product in _libraries(one, two):
        torch.testing.assert_close(product(), one @ two)


def test_the_step_by_hand_is_the_librarys():
    settings = {
        "num_rows": 24,
        "batch_size": 8,
        "latent_dim": 2,
        "guide": "factorized",
        "width": 0,
        "seed": 0,
        "layers": [4],
        "pixels": 4,
        "made": False,
    }
    workload = Workload(settings)
    by_hand = Loss(workload)
    model, guide = workload.model_and_guide()
    x, index = workload.x[:8], torch.arange(8)
    guide.setup(x, index)
    # Nothing is random where the scales are all but zero.
    half = len(by_hand.theta) // 2
    with torch.no_grad():
        by_hand.theta[half:], by_hand.vector[:, 2:] = -30.0, -30.0
        guide.table[:, 2:], guide.global_guide.vector[half:] = -30.0, -30.0
        guide.table[:, :2], guide.global_guide.vector[:half] = by_hand.vector[:, :2], by_hand.theta[:half]

    assert by_hand(x, index).item() == pytest.approx(TraceMeanField_ELBO().loss(model, guide, x, index), rel=1e-5)


@pytest.mark.slow
def test_processes_take_turns():
    cell = next(
        cell for cell in cells("--ways", "eager", "hand graph", "hand") if cell.settings["workload"].startswith("tiny")
    )
    settings = {**cell.settings, "rounds": 2, "steps": 2}

    result = time_implementations(settings, Context("cpu", None, False))

    assert set(result["ms"]) == {"eager", "hand"} and not result["warnings"]
    assert all(len(times) == 2 and min(times) > 0 for times in result["ms"].values())
    assert all(memory > 1e8 for memory in result["peak_memory_bytes"].values())
    # The one that a CPU does not have is left out, and the others go on.
    assert list(result["left_out"]) == ["hand graph"] and "CUDA" in result["left_out"]["hand graph"]
    with pytest.raises(
        RuntimeError, match="Expected a way of taking a step that can be taken here, got none: {'hand graph'"
    ):
        time_implementations({**settings, "ways": ["hand graph"]}, Context("cpu", None, False))


def record(workload, **ms):
    result = {
        "ms": {way: [value, value] for way, value in ms.items()},
        "median_ms": ms,
        "seconds_until_ready": dict.fromkeys(ms, 1.0),
        "left_out": {},
    }
    provenance = {
        "commit": "a" * 40,
        "machine": {"processor": "P", "cores": 2},
        "versions": {"torch": "2"},
        "command": "c",
    }
    return {"settings": {"workload": workload}, "result": result, "provenance": provenance}


def limits(document):
    """The ratios that are to keep to a limit, by what they are against."""
    return {line["against"]: line["ratio"] for line in document.tables[0].values}


def test_the_report_says_what_lies_above_the_limit():
    records = {
        "a": record("A-VI k=64, batch 256", compiled=0.6, hand=1.0, svi=4.0),
        "b": record("F-VI, batch 256", compiled=0.8, hand=1.0, svi=4.0),
        "c": record("F-VI, batch 256, 10^4 rows", compiled=1.0),
        "d": record("F-VI, batch 256, 10^6 rows", compiled=1.1),
        "e": record("F-VI, 16 latents, batch 256, 10^4 rows", compiled=1.0),
        "f": record("F-VI, 16 latents, batch 256, 10^7 rows", compiled=1.4),
    }

    found = report.document(records)

    ratios = {line["against"]: (line["ratio"], line["at most"]) for line in found.tables[0].values}
    growth = "itself, F-VI of 10^7 rows / of 10^4 rows, 16 latents"
    assert ratios == {
        "a hand-written eager step, batch 256": (0.8, 0.55),
        "Pyro's SVI step, batch 256": (0.2, 0.27),
        "itself, F-VI of 10^6 rows / of 10^4 rows": (1.1, 1.15),
        growth: (1.4, 1.3),
    }
    (note,) = found.notes
    assert note.kind == "warning" and note.text.startswith("2 of 4 ratios are above")
    assert "a hand-written eager step, batch 256: 0.80, at most 0.55" in note.text
    assert all(figure.png.startswith(b"\x89PNG") for figure in found.drawings) and len(found.drawings) == 2


def test_workloads_may_have_been_timed_in_different_ways():
    records = {
        "a": record("A-VI k=64, batch 256", compiled=0.6, numpyro=1.0),
        "b": record("small, A-VI k=64, batch 100", **{"compiled": 0.8, "hand": 1.0, "five at once": 1.5}),
    }

    found = report.document(records)

    assert csv_text(data(found)["summary"]).splitlines()[1:] == [
        '"A-VI k=64, batch 256",cpu,0.6,1.0,,',
        '"small, A-VI k=64, batch 100",cpu,0.8,,1.0,1.5',
    ]
    assert limits(found)["five hand-written eager fits, small model, five at once"] == pytest.approx(1.5 / 5)


def test_the_mean_over_workloads_is_geometric():
    records = {
        "a": record("A-VI k=64, batch 256", compiled=0.25, numpyro=1.0),
        "b": record("F-VI, batch 256", compiled=1.0, numpyro=1.0),
        "c": record("small, A-VI k=64, batch 100", compiled=9.0, numpyro=1.0),
    }

    found = limits(report.document(records))

    assert found["NumPyro's step, geometric mean over images"] == pytest.approx(0.5)
    assert found["NumPyro's step, images, 256 rows"] == 1.0 and found["NumPyro's step, small"] == 9.0


def test_from_which_step_on_compiling_pays():
    """10 s later to start, then a millisecond a step ahead of one way, and behind the other."""
    of_one = record("A-VI k=64, batch 256", compiled=1.0, eager=2.0, numpyro=0.5)
    of_one["result"]["seconds_until_ready"] = {"compiled": 15.0, "eager": 5.0, "numpyro": 5.0}

    (table,) = report.document({"a": of_one}).parts[0].tables

    ((compiled, eager, numpyro),) = [[[cell for cell, _ in line[1:]] for line in lines] for lines in table.groups]
    # Earlier records do not tell rows and memory.
    assert compiled == ["compiled", "1.00", "", "", "15", "16", "20", "65", ""]
    assert eager == ["eager", "2.00", "", "", "5", "6", "15", "105", "10,000"]
    assert numpyro == ["numpyro", "0.50", "", "", "5", "5", "8", "30", "never"]


def test_it_says_what_was_left_out_and_warned_of():
    of_one = record("A-VI k=64, batch 256", compiled=1.0, eager=2.0)
    of_one["settings"] |= {"batch_size": 256, "device": "cuda"}
    of_one["result"] |= {"left_out": {"numpyro": "no JAX"}, "warnings": {"compiled": ["One after another."]}}
    of_one["result"]["peak_memory_bytes"] = {"compiled": 2_000_000_000}

    found = report.document({"a": of_one})

    said = {note.title: note.text for note in found.notes}
    assert said == {
        "Left out": "numpyro: no JAX (A-VI k=64, batch 256).",
        "Warnings": "compiled: One after another (A-VI k=64, batch 256).",
    }
    (table,) = found.parts[0].tables
    assert [(line["rows a second"], line["GB"]) for line in table.values] == [(256_000.0, 2.0), (128_000.0, None)]
    # A device is compared with no CPU.
    both = report.document({"a": of_one, "b": record("A-VI k=64, batch 256", compiled=9.0, hand=1.0)})
    assert [part.title for part in both.parts] == ["Speed", "Speed on CUDA"]
    assert [line["device"] for line in data(both)["summary"]] == ["cpu", "cuda"]


def test_growth_is_not_judged_without_compiled_steps():
    records = {
        "a": record("F-VI, batch 256, 10^4 rows", eager=1.0),
        "b": record("F-VI, batch 256, 10^6 rows", eager=1.1, compiled=0.9),
    }

    found = report.document(records)
    assert (
        [table.file for table in found.tables] == ["", "summary"]
        and found.notes[0].kind == "warning"
        and "None of the ratios" in found.notes[0].text
    )


def test_records_of_another_sweep_are_refused():
    with pytest.raises(ReportError, match="Expected settings.workload in the record"):
        report.document({"a": {"settings": {}}})
