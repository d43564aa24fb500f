"""The sweep `gradients`: cells against their closed forms, a training by each kind of ELBO, and the report of both."""

import pytest

from experiments.runner.run_cell import Context
from experiments.sweeps import gradients
from experiments.sweeps.gradients.cells import CONTINUOUS, DISCRETE
from experiments.sweeps.gradients.training import _elbos

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
