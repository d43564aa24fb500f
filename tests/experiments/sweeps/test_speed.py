"""The sweep `speed`: what it times, how turns are taken, and what its report says."""

import argparse

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
from experiments.sweeps.speed.implementations.by_hand import Loss
from experiments.sweeps.speed.rounds import Rounds
from experiments.sweeps.speed.timing import time_implementations


def cells(*argv):
    parser = argparse.ArgumentParser()
    speed.add_arguments(parser)
    return speed.plan(parser.parse_args(argv), {})


def test_every_workload_is_a_cell():
    found = cells()

    assert len(set(found)) == len({speed.describe(cell) for cell in found}) == 13
    assert all(speed.estimate(cell, device="cpu") > 0 for cell in found)
    assert cells("--ways", "products", "--workloads", "tiny, A-VI k=16, batch 20") == []


class Turns:
    """Gives two rounds of three steps."""

    def __init__(self):
        self.sent, self.left = [], 2

    def send(self, value):
        self.sent.append(value)

    def recv(self):
        self.left -= 1
        return 3 if self.left >= 0 else None


@pytest.mark.parametrize("kind", ["constant", "amortized", "factorized"])
@pytest.mark.parametrize("way", ["eager", "hand", "svi"])
def test_a_way_takes_its_turns(way, kind):
    settings = {"num_rows": 24, "batch_size": 8, "latent_dim": 2, "guide": kind, "width": 4, "seed": 0}
    settings |= {"layers": [4], "pixels": 4, "made": False}
    turns = Turns()

    IMPLEMENTATIONS[way](Workload(settings), Rounds(turns))

    # One message when it is ready, one for each round.
    assert len(turns.sent) == 3 and all(seconds > 0 for seconds in turns.sent)


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
    cell = next(cell for cell in cells("--ways", "eager", "hand") if cell.settings["workload"].startswith("tiny"))
    settings = {**cell.settings, "rounds": 2, "steps": 2}

    result = time_implementations(settings, Context("cpu", None, False))

    assert set(result["ms"]) == {"eager", "hand"} and not result["not_installed"]
    assert all(len(times) == 2 and min(times) > 0 for times in result["ms"].values())


def record(workload, **ms):
    result = {
        "ms": {way: [value, value] for way, value in ms.items()},
        "median_ms": ms,
        "seconds_until_ready": dict.fromkeys(ms, 1.0),
        "not_installed": [],
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
        "a hand-written eager step, batch 256": (0.8, 0.65),
        "Pyro's SVI step, batch 256": (0.2, 0.27),
        "itself, F-VI of 10^6 rows / of 10^4 rows": (1.1, 1.15),
        growth: (1.4, 1.3),
    }
    (note,) = found.notes
    assert note.kind == "warning" and note.text.startswith("2 of 4 ratios are above")
    assert "a hand-written eager step, batch 256: 0.80, at most 0.65" in note.text
    assert all(figure.png.startswith(b"\x89PNG") for figure in found.drawings) and len(found.drawings) == 2


def test_workloads_may_have_been_timed_in_different_ways():
    records = {
        "a": record("A-VI k=64, batch 256", compiled=0.6, numpyro=1.0),
        "b": record("small, A-VI k=64, batch 100", **{"compiled": 0.8, "hand": 1.0, "five at once": 1.5}),
    }

    found = report.document(records)

    assert csv_text(data(found)["summary"]).splitlines()[1:] == [
        '"A-VI k=64, batch 256",0.6,1.0,,',
        '"small, A-VI k=64, batch 100",0.8,,1.0,1.5',
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
    assert found["NumPyro's step, images"] == 1.0


def test_from_which_step_on_compiling_pays():
    """10 s later to start, then a millisecond a step ahead of one way, and behind the other."""
    of_one = record("A-VI k=64, batch 256", compiled=1.0, eager=2.0, numpyro=0.5)
    of_one["result"]["seconds_until_ready"] = {"compiled": 15.0, "eager": 5.0, "numpyro": 5.0}

    (table,) = report.document({"a": of_one}).parts[0].tables

    ((compiled, eager, numpyro),) = [[[cell for cell, _ in line[1:]] for line in lines] for lines in table.groups]
    assert compiled == ["compiled", "1.00", "15", "16", "20", "65", ""]
    assert eager == ["eager", "2.00", "5", "6", "15", "105", "10,000"]
    assert numpyro == ["numpyro", "0.50", "5", "5", "8", "30", "never"]


def test_growth_is_not_judged_without_compiled_steps():
    records = {
        "a": record("F-VI, batch 256, 10^4 rows", eager=1.0),
        "b": record("F-VI, batch 256, 10^6 rows", eager=1.1, compiled=0.9),
    }

    found = report.document(records)
    assert (
        [table.file for table in found.tables] == ["summary"]
        and found.notes[0].kind == "warning"
        and "None of the ratios" in found.notes[0].text
    )


def test_records_of_another_sweep_are_refused():
    with pytest.raises(ReportError, match="Expected settings.workload in the record"):
        report.document({"a": {"settings": {}}})
