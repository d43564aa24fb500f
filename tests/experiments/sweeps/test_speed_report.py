"""What the report of the sweep `speed` says."""

import pytest

from experiments.reporting.pages import data
from experiments.reporting.records import ReportError
from experiments.reporting.tables import csv_text
from experiments.sweeps.speed import report


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
    # A device is compared with no CPU, and no thread by the processor's time with threads by the clock.
    slow, threads = (record("A-VI k=64, batch 256", compiled=9.0, hand=1.0) for _ in range(2))
    threads["settings"]["threads"] = 2
    all_of_them = report.document({"a": of_one, "b": threads, "c": slow})
    assert [part.title for part in all_of_them.parts] == ["Speed", "Speed by the clock, threads: 2", "Speed on CUDA"]
    assert [len(part.tables) for part in all_of_them.parts] == [3, 2, 2]
    assert [line["device"] for line in data(all_of_them)["summary"]] == ["cpu", "cpu, threads: 2", "cuda"]


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
