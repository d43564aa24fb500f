"""The sweep `context`: what it trains and measures, and what its report says."""

import argparse
from types import SimpleNamespace

import pytest
import torch

import pyro_avi as avi
from experiments.reporting.pages import data, terminal
from experiments.reporting.records import ReportError
from experiments.runner.run_cell import Context, run_cell
from experiments.sweeps import context
from experiments.sweeps.context.training import MeanParameters


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


def test_the_smooth_processes_take_more_steps_than_the_chains():
    by_kind = {each.settings["model"]: each.settings["steps"] for each in plan()}

    assert by_kind == {"chain": 2400, "process": 9600}
    assert {each.settings["steps"] for each in plan("--steps", "7")} == {7}


def test_the_encoder_is_the_mean_of_the_second_half_of_the_steps():
    values = torch.nn.Linear(1, 1)
    mean = MeanParameters(values, 5)

    for step in range(1, 6):
        torch.nn.init.constant_(values.weight, float(step**2))
        mean(SimpleNamespace(steps=step))
    mean.take()

    assert values.weight.item() == pytest.approx((9 + 16 + 25) / 3)


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


RATE = 0.3
CLOSED_FORM = tuple(4.0 * RATE**width + 0.02 for width in range(5))


def record(key, gaps=CLOSED_FORM, se=0.1, **settings):
    windows = [
        {"window": at, "gap": gap, "se": se, "closed_form": exact}
        for at, (gap, exact) in enumerate(zip(gaps, CLOSED_FORM, strict=True))
    ]
    settings = {**plan()[0].settings, **settings}
    return {"key": key, "settings": settings, "result": {"windows": windows, "approximation_gap": 1.0}}


def test_the_report_says_which_gaps_are_on_their_curves():
    (first, _) = context.document({"a": record("a")}).parts[0].notes
    assert first.kind == "answer" and "5 of 5 measured gaps are within 5 standard errors" in first.text
    off = (*CLOSED_FORM[:4], CLOSED_FORM[4] + 0.6)
    (first, _) = context.document({"a": record("a", off)}).parts[0].notes
    assert first.kind == "warning" and "4 of 5" in first.text and "0 of 1 models" in first.text


def test_the_rate_at_which_gaps_fall_is_fitted_beside_that_of_the_closed_form():
    # The first, of the row alone, is no part of it.
    gaps = (9.0, *(4.0 * 0.4**width + 0.02 for width in range(1, 5)))

    (_, rate) = context.document({"a": record("a", gaps)}).parts[0].notes

    # lambda of the chain (0.9, 1, 1) has lambda + 1 / lambda = 2.81 / 0.9.
    share = 0.362334
    assert abs(share + 1 / share - 2.81 / 0.9) < 1e-5
    assert "a fitted rate of 0.400" in rate.text and "that of the closed form is 0.300" in rate.text
    assert f"the limit for wide windows {share**2:.3f}" in rate.text


def test_the_report_is_drawn_by_size():
    drawn = context.document({"a": record("a", [gap + 0.1 for gap in CLOSED_FORM]), "b": record("b", steps=7)})

    parts = drawn.parts[:2]
    assert [part.title for part in parts] == ["150 rows, 7 steps", "150 rows, 2,400 steps"]
    assert all(figure.png for part in parts for figure in part.drawings)
    assert "chain phi 0.9, q 1, r 1" in terminal(drawn)
    apart = [line["standard_errors_apart"] for line in data(drawn)["summary"]]
    assert apart == pytest.approx([0.0] * 5 + [1.0] * 5)


def test_records_of_another_sweep_are_refused():
    with pytest.raises(ReportError, match="Expected result.windows in the record"):
        context.document({"a": {"key": "a", "settings": {}, "result": {}}})
