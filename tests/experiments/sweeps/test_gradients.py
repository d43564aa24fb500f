"""The sweep `gradients`: cells against their closed forms, a training by each kind of ELBO, and the report of both."""

import argparse

import pyro
import pytest
import torch

from experiments.runner.cell import Cell
from experiments.runner.run_cell import Context
from experiments.sweeps import gradients
from experiments.sweeps.gradients.cells import CONTINUOUS, DISCRETE
from experiments.sweeps.gradients.training import _elbos, _model_and_guide

CONTEXT = Context("cpu", None, False)
SIZES = {"rows": 200, "draws": 5, "seed": 0}
TRAINING = {
    "kind": "training", "dataset": "digits", "latent_dim": 3, "widths": [8], "batch_size": 64, "steps": 20, "lr": 3e-3,
    "num_particles": 2,
}  # fmt: skip


def record(settings, result):
    return {"key": str(settings), "settings": settings, "result": result}


@pytest.fixture(scope="module")
def records():
    cells = [
        {"kind": "normal", "mu": 0.0, "dim": 3, **SIZES},
        {"kind": "normal", "mu": 2.0, "dim": 1, **SIZES},
        {"kind": "coin", "p": 0.8, "high": 2.0, "low": 0.3, **SIZES},
        *({**TRAINING, "latents": "binary", "estimator": "leave_one_out", "seed": seed} for seed in (0, 1)),
        {**TRAINING, "latents": "continuous", "estimator": "pathwise", "seed": 0},
    ]
    found = [record(cell, gradients.run(cell, CONTEXT)) for cell in cells]
    for off in (0.0, 1.0):
        lines = [{"estimator": name, "bound": "ELBO", "variance": variance + off, "se": 0.1, "snr": None, "evaluations": 1.0}
                 for name, variance in (("pathwise", 2.0), ("sticking_the_landing", 1e-30))]  # fmt: skip
        cell = {"kind": "linear", "latent_dim": 2, "num_rows": 50, "off": off, "draws": 4, "seed": 0}
        found.append(record(cell, {"lines": lines}))
    return {each["key"]: each for each in found}


def test_the_report_says_what_was_measured(records):
    report = gradients.document(records)
    notes = {note.title: note for note in report.notes}
    assert notes["Normal draws"].kind == "answer" and notes["Normal draws"].text.startswith("5 of 5 measured")
    assert notes["Coins"].text.startswith("4 of 4 measured variances within 5 standard errors")
    assert notes["A linear model"].text == "Without noise at the best factors: sticking the landing."
    assert notes["digits, binary latents"].text.startswith("After equal seconds: leave one out -")
    assert all(figure.png.startswith(b"\x89PNG") for part in report.walk() for figure in part.drawings)
    assert [part.title for part in report.parts][-1] == "How to read this"
    (training,) = (part for part in report.parts if part.title == "digits, binary latents")
    (line,) = training.tables[0].values
    assert line["seeds"] == 2 and line["ms a step"] > 0


def test_a_variance_that_is_off_is_a_warning(records):
    wrong = {key: each for key, each in records.items() if each["settings"]["kind"] == "coin"}
    (one,) = wrong.values()
    lines = [dict(line) for line in one["result"]["lines"]]
    lines[0]["variance"] *= 2
    report = gradients.document({"one": record(one["settings"], {"lines": lines})})
    assert report.notes[0].kind == "warning" and report.notes[0].text.startswith("3 of 4 measured")


def test_a_training_that_diverges_is_left_out_and_named(records):
    kept = {key: each for key, each in records.items() if each["settings"].get("latents") == "binary"}
    lost = gradients.run(
        {**TRAINING, "latents": "continuous", "estimator": "score_function", "seed": 0, "lr": 1e8}, CONTEXT
    )
    assert lost["diverged_at"] is not None
    (first, *_), settings = kept.values(), next(iter(kept.values()))["settings"]
    report = gradients.document({**kept, "lost": record({**settings, "seed": 9}, lost)})
    assert "Diverged, left out: leave one out, seed 9, at step" in report.notes[1].text
    (part,) = (part for part in report.parts if part.title == "digits, binary latents")
    assert part.tables[0].values[0]["seeds"] == 2 and first["result"]["diverged_at"] is None
    alone = gradients.document({"lost": record(settings, lost)})
    assert [note.kind for note in alone.notes] == ["warning"]


def test_every_estimator_of_a_training_has_an_elbo():
    assert set(_elbos(2)) == {*CONTINUOUS, *DISCRETE}


def options(*words):
    parser = argparse.ArgumentParser()
    gradients.add_arguments(parser)
    return parser.parse_args([*words, "--kinds", "training"])


def test_a_decoder_starts_at_the_shares_of_the_pixels():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    model, _ = _model_and_guide({**TRAINING, "latents": "binary", "seed": 0, "batch_size": 3}, rows)
    torch.nn.init.zeros_(model.decoder.layers[-2].weight)
    # One more of each: 4 of 5 and 2 of 5.
    torch.testing.assert_close(model.decoder(torch.zeros(1, 3)).sigmoid(), torch.tensor([[0.8, 0.4]]))


def test_a_training_does_not_go_on_with_the_average_of_another():
    settings = {**TRAINING, "latents": "binary", "estimator": "decaying_baseline", "seed": 0}
    found = []
    for _ in range(2):
        curve = gradients.run(settings, CONTEXT)["curve"]
        found.append([(point["step"], point["elbo"]) for point in curve])
        (name,) = (name for name in pyro.get_param_store() if "baseline_avg" in name)
        pyro.get_param_store()[name] = torch.tensor(float("nan"))
    assert found[0] == found[1] and len(found[0]) == 10


def test_a_training_ends_by_seconds_of_the_processor():
    settings = {**TRAINING, "latents": "binary", "estimator": "score_function", "seed": 0, "seconds": 0.2}
    del settings["steps"]
    found = gradients.run(settings, CONTEXT)
    seconds, steps = ([point[name] for point in found["curve"]] for name in ("seconds", "step"))
    assert len(seconds) == 10 and seconds == sorted(seconds) and steps == sorted(steps)
    # No step and no evaluation of the bound is among them.
    assert all(at >= 0.02 * (n + 1) for n, at in enumerate(seconds)) and seconds[-1] < 0.4
    report = gradients.document({"one": record(settings, found)})
    (line,) = report.parts[0].tables[0].values
    assert line["steps"] == steps[-1] and line["ms a step"] == pytest.approx(1e3 * seconds[-1] / steps[-1])


def test_rates_are_tried_until_the_best_is_not_on_the_edge():
    settings = {**TRAINING, "kind": "trials", "latents": "binary", "estimator": "vimco", "seed": 0,
                "rates": [1e-4], "ladder": [1e-5, 1e-4, 1e-2, 100.0, 1e4]}  # fmt: skip
    del settings["lr"]
    trials = gradients.run(settings, CONTEXT)["trials"]
    assert [trial["lr"] for trial in trials] == [1e-4, 1e-2, 100.0]
    assert max(trials, key=lambda trial: trial["elbo"])["lr"] == 1e-2


def test_each_estimator_is_trained_at_the_best_rate_of_its_trials(records):
    choice = options("--preset", "mnist", "--estimators", "vimco", "pathwise", "--seeds", "3", "4")
    first = gradients.plan(choice, {})
    assert [cell.settings["kind"] for cell in first] == ["trials", "trials"] and gradients.count(choice) == 6
    trials = [{"lr": 1e-3, "elbo": -150.0}, {"lr": 3e-3, "elbo": -140.0}, {"lr": 1e-2, "elbo": None}]
    kept = {first[0].key: record(first[0].settings, {"trials": trials})}
    every = gradients.plan(choice, kept)
    trained = [cell.settings for cell in every if cell.settings["kind"] == "training"]
    assert [(s["estimator"], s["lr"], s["seed"]) for s in trained] == [("pathwise", 3e-3, 3), ("pathwise", 3e-3, 4)]

    curve = [{"step": 5 * n, "seconds": 4.0 * n, "elbo": -200.0 + n, "se": 0.1} for n in range(1, 11)]
    done = {Cell("gradients", s).key: record(s, {"curve": curve, "diverged_at": None}) for s in trained}
    (part, _) = gradients.document({**kept, **done}).parts
    ranking, tried = part.tables
    assert [(line["rate"], line["best"]) for line in tried.values] == [("0.001", ""), ("0.003", "yes"), ("0.01", "")]
    (line,) = ranking.values
    assert line["seeds"] == 2 and line["ELBO after 40 s"].value == -190.0 and line["steps"] == 50
    assert "Adam at 0.003 for all" in part.lead

    other = {**trained[0], "lr": 1e-2}
    worse = [{**point, "elbo": point["elbo"] - 5.0} for point in curve]
    (part, _) = gradients.document({**done, "other": record(other, {"curve": worse, "diverged_at": None})}).parts
    ranks = [(line["estimator"], line["rate"], line["seeds"]) for line in part.tables[0].values]
    assert ranks == [("pathwise at 0.003", "0.003", 2), ("pathwise at 0.01", "0.01", 1)]
    assert "Adam at the rate of the table" in part.lead


def test_one_rate_is_tried_nowhere():
    choice = options("--preset", "mnist", "--rates", "0.002", "--latents", "binary", "--seeds", "5", "--seconds", "7")
    every = [cell.settings for cell in gradients.plan(choice, {})]
    assert [s["estimator"] for s in every] == list(DISCRETE) and gradients.count(choice) == len(DISCRETE)
    assert {(s["kind"], s["latents"], s["lr"], s["seed"], s["seconds"]) for s in every} == {
        ("training", "binary", 0.002, 5, 7)
    }


@pytest.mark.parametrize("words", [("--steps", "5"), ("--seconds", "0"), ("--rates", "0")])
def test_lengths_that_are_none_are_refused(words):
    with pytest.raises(ValueError, match=f"Expected {words[0]}"):
        gradients.plan(options(*words), {})
