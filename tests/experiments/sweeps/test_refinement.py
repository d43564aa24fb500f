"""The sweep `refinement`: what a cell measures, and what its report says."""

import argparse

import pytest

from experiments.reporting.pages import data, terminal
from experiments.runner.run_cell import Context
from experiments.sweeps import refinement
from experiments.sweeps.refinement.refining import STARTS, STEPS, measure_cell

SMALL = ("--training-steps", "30", "--rows", "12", "--latent-dim", "2", "--hidden-dim", "8")


def options(*argv):
    parser = argparse.ArgumentParser()
    refinement.add_arguments(parser)
    parser.add_argument("--data-dir")
    parser.add_argument("--download", action="store_true")
    return parser.parse_args(argv)


def test_a_cell_for_each_data_set_and_seed():
    cells = refinement.plan(options(*SMALL, "--seeds", "0", "1"), {})
    assert len(set(cells)) == refinement.count(options(*SMALL, "--seeds", "0", "1")) == 2
    assert {refinement.describe(cell) for cell in cells} == {"digits, seed 0", "digits, seed 1"}
    assert all(refinement.estimate(cell, device="cpu") > 0 for cell in cells)


@pytest.mark.parametrize("argv", [("--rows", "0"), ("--training-steps", "-1"), ("--rows", "100000")])
def test_bad_options_are_refused(argv):
    with pytest.raises(ValueError, match="Expected --(rows|training-steps|dataset)"):
        refinement.plan(options(*argv), {})


@pytest.mark.slow
def test_steps_close_the_gap_and_the_report_shows_it():
    (cell,) = refinement.plan(options(*SMALL), {})
    result = measure_cell(cell.settings, Context("cpu", None, False))
    lines = {(line["start"], line["steps"]): line for line in result["lines"]}
    assert set(lines) == {(start, steps) for start in STARTS for steps in STEPS}
    # No steps from the encoder are its own output.
    assert lines["encoder", 0]["short"] == pytest.approx(result["gap"], abs=1e-4)
    assert lines["encoder", 0]["seconds"] == 0 < lines["encoder", 1]["seconds"]
    for start in STARTS:
        short = [lines[start, steps]["short"] for steps in STEPS]
        # After a training this short the prior is nearly the best there is.
        assert short[-1] < (0.2 * short[0] if start != "prior" else short[0] + 1e-3)
    document = refinement.document({"a": {"settings": cell.settings, "result": result}})
    assert len(data(document)["refinement"]) == len(lines)
    assert "gap closed" in terminal(document)
    (figure,) = document.figures
    assert figure.png.startswith(b"\x89PNG")
