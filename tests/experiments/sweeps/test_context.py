"""The sweep `context`: what it trains and measures, and what its report says."""

import argparse

import pytest
import torch

import pyro_avi as avi
from experiments.reporting.pages import data, terminal
from experiments.reporting.records import ReportError
from experiments.runner.run_cell import Context, run_cell
from experiments.sweeps import context


def plan(*argv):
    parser = argparse.ArgumentParser()
    context.add_arguments(parser)
    return context.plan(parser.parse_args(argv), {})


def cell(kind, **settings):
    first = plan("--models", kind)[0]
    return type(first)("context", {**first.settings, **settings})


@pytest.mark.parametrize("kind", ["chain", "process"])
def test_a_cell_measures_what_windows_lose(kind):
    short = cell(kind, rows=12, steps=2, series=40, windows=[0, 2])

    result = run_cell(short, Context("cpu", None, False))["result"]

    assert [line["window"] for line in result["windows"]] == [0, 2]
    assert all(line["gap"] > 0 and line["se"] > 0 for line in result["windows"])
    # Untrained, an encoder loses more than the best of its window, by 2.6 standard errors and more.
    assert all(line["gap"] > line["closed_form"] > 0 for line in result["windows"])


@pytest.mark.slow
def test_a_trained_encoder_is_on_the_curve():
    short = cell("chain", rows=30, steps=500, series=100, windows=[1])

    (line,) = run_cell(short, Context("cpu", None, False))["result"]["windows"]

    error = line["gap"] - line["closed_form"]
    assert abs(error) < 5 * line["se"] and line["se"] < 0.05 * line["closed_form"]
    # A neighbour less would be seen.
    one = torch.ones(1, 1)
    model = avi.models.LinearGaussianStateSpace(0.9 * one, one, size=30, transition_scale=1.0, emission_scale=1.0)
    assert model.window_gap(0) - line["gap"] > 5 * line["se"]


def record(key, gaps, closed_form=(4.0, 1.0, 0.25), se=0.1):
    windows = [
        {"window": at, "gap": gap, "se": se, "closed_form": exact}
        for at, (gap, exact) in enumerate(zip(gaps, closed_form, strict=True))
    ]
    return {"key": key, "settings": plan()[0].settings, "result": {"windows": windows, "approximation_gap": 1.0}}


def test_the_report_says_which_gaps_are_on_their_curves():
    (first, second) = context.document({"a": record("a", (4.1, 1.0, 0.2))}).notes

    assert first.kind == "answer" and "3 of 3 measured gaps are within 5 standard errors" in first.text
    assert "0.244 (0.250), 0.200 (0.250)" in second.text
    (first, _) = context.document({"a": record("a", (4.1, 1.0, 0.9))}).notes
    assert first.kind == "warning" and "2 of 3" in first.text and "0 of 1 models" in first.text


def test_the_report_is_drawn():
    drawn = context.document({"a": record("a", (4.1, 1.0, 0.2))})

    assert all(figure.png for figure in drawn.drawings)
    assert "chain phi 0.9, q 1, r 1" in terminal(drawn)
    assert [line["standard_errors_apart"] for line in data(drawn)["summary"]] == pytest.approx([1.0, 0.0, -0.5])


def test_records_of_another_sweep_are_refused():
    with pytest.raises(ReportError, match="Expected result.windows in the record"):
        context.document({"a": {"key": "a", "settings": {}, "result": {}}})
