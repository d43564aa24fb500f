"""The sweep `scale`: what it measures, and what its report makes of it."""

import argparse

import pytest

from experiments.reporting.pages import data
from experiments.reporting.records import ReportError
from experiments.runner.run_cell import Context, run_cell
from experiments.sweeps import scale
from experiments.sweeps.scale import report


def options(*argv):
    parser = argparse.ArgumentParser()
    scale.add_arguments(parser)
    return parser.parse_args(argv)


def test_tables_in_memory_end_where_memory_does():
    cells = scale.plan(options("--preset", "paper"), {})

    sizes = {guide: [] for guide in scale.cells._GUIDES}
    for cell in cells:
        sizes[cell.settings["guide"]].append(cell.settings["size"])
    assert max(sizes["factorized"]) == 10**7 and max(sizes["amortized"]) == 10**8
    by_size = [scale.demands(cell, device="cpu")["memory"] for cell in cells if cell.settings["guide"] == "factorized"]
    # Table, moments and visits of 8 means and 8 scales.
    assert all(memory > 4 * (3 * 16 + 1) * size for memory, size in zip(by_size, sizes["factorized"], strict=True))


def test_sizes_and_steps_can_be_chosen():
    (cell,) = scale.plan(options("--guides", "constant", "--sizes", "30", "--steps", "2"), {})

    assert (cell.settings["size"], cell.settings["steps"]) == (30, 2)
    with pytest.raises(ValueError, match="Expected --sizes and --steps of at least 1"):
        scale.plan(options("--steps", "0"), {})


@pytest.mark.parametrize("guide", ["constant", "amortized", "factorized", "factorized on disk"])
def test_a_guide_is_measured(guide):
    cell = scale.plan(options("--guides", guide), {})[0]
    short = type(cell)("scale", {**cell.settings, "size": 1000, "steps": 3})

    record = run_cell(short, Context("cpu", None, False))

    result = record["result"]
    on_disk = guide == "factorized on disk"
    assert result["first_ms"] > 0 and result["again_processor_ms"] > 0 and ("cold_ms" in result) is on_disk
    assert result["row_parameters"] == (16 if "factorized" in guide else 0)
    # Values, moments, visits and mark of every row.
    assert result["file_bytes"] // 1000 // 4 >= 50 if on_disk else result["file_bytes"] == 0
    decoder = 8 * 64 + 64 + 64 * 16 + 16
    assert result["shared_parameters"] == decoder + (16 if guide == "constant" else 0) or guide == "amortized"
    (page,) = [table for table in data(report.document({"a": record})).values() if len(table) == 4]
    assert [line["rows"] for line in page] == [10**6, 10**7, 10**8, 10**9]


def test_costs_are_products_of_what_was_measured():
    settings = {
        "guide": "factorized on disk",
        "size": 10**8,
        "numbers": 16,
        "batch": 250,
        "latents": 8,
        "steps": 1,
        "seed": 0,
    }
    result = {"again_processor_ms": 4.0, "cold_processor_ms": 9.0, "row_parameters": 16, "shared_parameters": 1000}
    record = {"settings": settings, "result": result}

    costs = data(report.document({"a": record}))["costs"]

    billion = costs[-1]
    assert billion["on_disk_gb"] == pytest.approx(200) and billion["table_and_moments_in_memory_gb"] == 0
    assert billion["hours_of_one_core"] == pytest.approx(10 * 10**9 / 250 * 0.009 / 3600)
    # Of 8 processes each takes an eighth of the 4 million steps of a pass.
    assert billion["network_of_8_gb_a_pass"] == pytest.approx(0.5e6 * 2 * 7 / 8 * 4000 / 1e9)
    in_memory = {**record, "settings": {**settings, "guide": "factorized"}}
    assert data(report.document({"a": in_memory}))["costs"][-1]["table_and_moments_in_memory_gb"] == pytest.approx(196)


def test_records_of_another_sweep_are_refused():
    with pytest.raises(ReportError, match="Expected settings.guide in the record"):
        report.document({"a": {"settings": {}, "result": {}, "provenance": {}}})
