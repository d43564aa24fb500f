"""The sweep `images`: its plan, what it refuses, and cells on the digits from end to end."""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch

import pyro_avi as avi
from experiments import datasets, sweep
from experiments.runner.cell import Cell
from experiments.runner.run_cell import Context, run_cell
from experiments.sweeps import images
from experiments.sweeps.images import evaluation, training
from experiments.sweeps.images.cells import best_of
from experiments.sweeps.images.model import as_factorized, build, load
from experiments.sweeps.images.rounds import Rounds, convergence, has_fallen
from experiments.sweeps.images.tuning import next_pair
from tests.marks import needs_compiler

REPOSITORY = Path(__file__).resolve().parents[4]
SHARED = Path(os.environ.get("PYRO_AVI_DATA") or REPOSITORY.parent / "shared" / "data")


def options(line=""):
    parser = argparse.ArgumentParser()
    images.add_arguments(parser)
    return parser.parse_args(line.split(), argparse.Namespace(data_dir=None, download=False))


def records(tunings, elbo):
    """Finished records of these tuning cells, with the bound that `elbo` gives for settings and learning rates."""

    def trials(settings):
        for local, rest in settings["grid"]:
            rates = {"lr_local": local, "lr_global": rest}
            yield rates | {"elbo": elbo(settings | rates)}

    return {
        cell.key: {"settings": cell.settings, "result": {"trials": list(trials(cell.settings))}} for cell in tunings
    }


def chosen(cells, **settings):
    return [cell for cell in cells if settings.items() <= cell.settings.items()]


# --- the plan


BOTH = "--protocol published fair"


def test_tuning_comes_first_and_results_with_the_best_rates_after():
    command = options(f"{BOTH} --widths 1 16 64 --steps 160")
    first = images.plan(command, {})
    tuning = chosen(first, purpose="tuning")
    assert len(chosen(first, protocol="published", purpose="result")) == 5 * 2 and len(tuning) == 5
    assert len(first) == 15 and images.count(command) == 25
    # Equal budgets: every guide and width is tried at the same rates, for the same steps, from one seed of its own.
    assert len({(cell.settings["guide"], cell.settings["width"]) for cell in tuning}) == 5
    grid = [[local, rest] for local in (1e-2, 1e-1) for rest in (1e-3, 1e-2)]
    assert chosen(tuning, grid=grid, steps=10, seed=20_000) == tuning
    assert {rate for pair in grid for rate in pair} < set(tuning[0].settings["ladder"])

    def elbo(s):
        # Another pair for every guide: the rates of the best are those nearest to what is asked for.
        best = {None: (1e-2, 1e-2), 1: (1e-2, 1e-3), 16: (1e-1, 1e-3), 64: (1e-1, 1e-2)}[s["width"]]
        return -abs(s["lr_local"] - best[0]) - abs(s["lr_global"] - best[1])

    finished = images.plan(command, records(tuning, elbo))
    results = chosen(finished, protocol="fair", purpose="result")
    assert len(finished) == images.count(command) and set(first) < set(finished)
    rates = {(s["width"], s["lr_local"], s["lr_global"]) for s in (cell.settings for cell in results)}
    assert rates == {(None, 1e-2, 1e-2), (1, 1e-2, 1e-3), (16, 1e-1, 1e-3), (64, 1e-1, 1e-2)}
    assert {cell.settings["seed"] for cell in results} == {0, 1}
    assert {cell.settings["steps"] for cell in results} == {160} and {cell.settings["share"] for cell in results} == {
        0.01
    }
    # The widest encoder's cells go on as F-VI, at F-VI's rates.
    continued = {cell.settings["width"]: cell.settings["continued"] for cell in results}
    assert continued == {None: None, 1: None, 16: None, 64: {"lr_local": 1e-2, "lr_global": 1e-2}}
    # A published cell is what it was: its key is found in stores of before.
    assert not {"share", "continued"} & {
        name for cell in chosen(finished, protocol="published") for name in cell.settings
    }


def test_a_guide_goes_on_when_its_own_tuning_is_finished():
    tuning = chosen(images.plan(options(), {}), purpose="tuning")

    def goes_on(*tuned):
        named = images.plan(options(), records(tuned, lambda s: 0.0))
        return {(cell.settings["guide"], cell.settings["width"]) for cell in chosen(named, purpose="result")}

    (constant,), (factorized,) = chosen(tuning, guide="constant"), chosen(tuning, guide="factorized")
    (narrow,), (wide,) = chosen(tuning, width=16), chosen(tuning, width=64)
    assert goes_on(constant) == {("constant", None)} and goes_on(narrow) == {("amortized", 16)}
    # The widest encoder's cell needs the rates of F-VI, too.
    assert goes_on(wide) == set() and goes_on(wide, factorized) == {("amortized", 64), ("factorized", None)}
    alone = chosen(images.plan(options("--guides amortized"), {}), purpose="tuning", width=64)
    (cell, _) = chosen(images.plan(options("--guides amortized"), records(alone, lambda s: 0.0)), purpose="result")
    assert cell.settings["continued"] is None


def test_a_trial_that_diverged_is_never_the_best():
    tuning = chosen(images.plan(options("--guides constant"), {}), purpose="tuning")
    finished = records(tuning, lambda s: -1000.0 * s["lr_global"] if s["lr_local"] == 1e-2 else None)
    (one, other) = chosen(images.plan(options("--guides constant"), finished), protocol="fair", purpose="result")
    assert (one.settings["lr_local"], one.settings["lr_global"]) == (1e-2, 1e-3)
    assert other.settings["lr_local"] == 1e-2


def test_published_cells_have_one_rate_for_all_and_dense_adam(monkeypatch):
    cells = images.plan(options("--preset paper --dataset digits --num-train 0 --steps 3"), {})
    assert len(cells) == images.count(options("--preset paper --dataset digits --num-train 0")) == 60
    assert {(cell.settings["lr_local"], cell.settings["lr_global"]) for cell in cells} == {(1e-3, 1e-3)}
    assert {cell.settings["noise"] for cell in cells} == {"fixed"}
    given = optimization_of(monkeypatch, "published", guide="factorized", steps=10)
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = given["optimizer"]([{"params": [parameter], "lr": given["lr"]}], lr=given["lr"])
    assert type(optimizer) is torch.optim.Adam and given["lr"] == 1e-3
    defaults = torch.optim.Adam([parameter]).defaults
    assert all(optimizer.defaults[name] == defaults[name] for name in ("betas", "eps", "weight_decay", "amsgrad"))
    # The library's own Adam is the same where every parameter is in every step, and a part of a compiled one.
    for settings in ({"guide": "factorized", "batch_size": 40}, {"guide": "amortized", "width": 3}, {}):
        assert optimization_of(monkeypatch, "published", **settings) == {"lr": 1e-3}


def test_fair_cells_have_a_rate_for_each_part_that_rises_and_falls_in_rounds(monkeypatch):
    given = optimization_of(monkeypatch, "fair", steps=800, lr_local=0.1, lr_global=0.01)
    assert "optimizer" not in given
    for part, largest in (("local", 0.1), ("global", 0.01)):
        rates = [given["lr"][part](step) / largest for step in range(800)]
        began = 0
        for end in (50, 100, 200, 400, 800):
            of_round = rates[began:end]
            top = max(range(len(of_round)), key=of_round.__getitem__)
            assert 0.99 < of_round[top] <= 1 and top <= 0.05 * len(of_round)
            assert of_round[:top] == sorted(of_round[:top]) and of_round[top:] == sorted(of_round[top:], reverse=True)
            assert 0 < of_round[-1] < 2e-3
            began = end


@pytest.mark.parametrize("most", [1, 2, 3, 15, 16, 17, 1000])
def test_rounds_double_the_steps_up_to_the_most(most):
    rounds = Rounds.doubling(most)
    assert rounds.ends[-1] == most and list(rounds.ends) == sorted(set(rounds.ends)) and rounds.ends[0] >= 1
    assert all(one <= half for half, one in zip(rounds.ends[1:], rounds.ends, strict=False))
    assert all(later - 1 <= 2 * one <= later + 1 for one, later in itertools.pairwise(rounds.ends) if later > 2)
    assert set(rounds.ends) <= rounds.points() and min(rounds.points()) >= 1 and max(rounds.points()) == most
    assert all(0 < rounds.share_of_rate(step) <= 1 for step in range(most))


def curve(*bounds, first=100):
    """A curve with points at 0, `first` and every doubling of it, ten milliseconds a step."""
    steps = [0, *(first * 2**place for place in range(len(bounds) - 1))]
    return {"step": steps, "seconds": [step / 100 for step in steps], "elbo": list(bounds)}


@pytest.mark.parametrize(
    ("bounds", "converged", "gain"),
    [
        ((-100.0, 0.0, 0.9), True, 0.9),
        ((-100.0, 0.0, 1.1), False, 1.1),
        # What is compared is the last half, not the last point before.
        ((-100.0, -50.0, -0.5, 0.0), True, 0.5),
        # A bound that falls by so much has not come to rest either.
        ((-100.0, 0.0, -5.0), False, -5.0),
        ((-100.0, 0.0, None), False, None),
        ((-100.0, None, 0.0), False, None),
    ],
)
def test_a_training_has_converged_when_its_last_half_gained_little_of_what_all_did(bounds, converged, gain):
    told = convergence(curve(*bounds), 0.01)
    assert told["converged"] is converged and told["late_gain"] == gain and told["share"] == 0.01
    assert told["steps"] == 100 * 2 ** (len(bounds) - 2) and told["late_seconds"] == pytest.approx(told["steps"] / 200)
    if gain is not None:
        assert told["rise"] == bounds[-1] - bounds[0]


def test_what_goes_on_from_a_training_is_judged_by_what_both_gained():
    told = convergence(curve(0.0, 0.3, 0.8), 0.01, before=99.2)
    assert told["rise"] == pytest.approx(100.0) and told["converged"]
    assert not convergence(curve(0.0, 0.3, 0.8), 0.01)["converged"]
    assert not convergence(curve(0.0, 0.3, 0.8), 0.01, before=None)["converged"]


class Stop(Exception):
    """The training is not what is looked at."""


def optimization_of(monkeypatch, protocol, **settings):
    """What a cell gives to `fit`."""
    given = {}

    def fit(*args, **kwargs):
        given.update(kwargs)
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(avi, "fit", fit)
        training.train_cell(tiny(protocol=protocol, **settings), CONTEXT)
    return {name: given[name] for name in ("lr", "optimizer") if name in given}


def test_every_cell_is_named_and_costs_something():
    cells = images.plan(options(f"{BOTH} --noise fixed learned --widths 1 16 64 --steps 500"), {})
    labels = [images.describe(cell) for cell in cells]
    assert len(set(labels)) == len(labels) == 30
    assert "digits learned noise, fair: amortized k=16, learning rates" in labels
    assert "digits fixed noise, published: factorized, seed 1" in labels
    long = images.plan(options(f"{BOTH} --widths 1 16 64 --steps 15000"), {})
    for device in ("cpu", "cuda"):
        seconds = [images.estimate(cell, device=device) for cell in cells]
        assert min(seconds) > 0
        assert sum(images.estimate(cell, device=device) for cell in long) > sum(seconds)
    tuning = chosen(cells, purpose="tuning", guide="factorized")[0]
    one = Cell("images", {**tuning.settings, "grid": tuning.settings["grid"][:1]})
    assert images.estimate(tuning, device="cpu") == pytest.approx(4 * images.estimate(one, device="cpu"))
    result = chosen(cells, purpose="result", guide="factorized")[0]
    assert images.estimate(one, device="cpu") < images.estimate(result, device="cpu")


def test_options_decide_the_cells():
    command = options(
        "--guides amortized factorized --widths 4 2 --seeds 7 --steps 30 --batch-size 50 --num-train 100 "
        "--noise fixed --architecture conv --protocol published --dataset Digits --compile"
    )
    cells = images.plan(command, {})
    assert images.count(command) == len(cells) == 3
    assert [(cell.settings["guide"], cell.settings["width"]) for cell in cells] == [
        ("amortized", 4),
        ("amortized", 2),
        ("factorized", None),
    ]
    common = {"dataset": "digits", "num_train": 100, "seed": 7, "steps": 30, "batch_size": 50, "noise": "fixed"}
    assert chosen(cells, **common, architecture="conv", protocol="published", compile=True) == cells
    # All of the data set's images are one cell, however they are asked for.
    assert images.plan(options("--num-train 0"), {}) == images.plan(options("--num-train 1437"), {})


# --- what is refused

BAD = {
    "width 0": (["--widths", "4", "0"], "Expected --widths of at least 1, got 0"),
    "widths without an encoder": (["--guides", "constant", "factorized", "--widths", "4"], "--widths together with"),
    "large batch": (["--batch-size", "1438"], "--batch-size of at most the 1280 training images, got 1438"),
    "batch beyond the subset": (["--num-train", "100", "--batch-size", "101"], "at most the 100 training images"),
    "batch 0": (["--batch-size", "0"], "Expected --batch-size of at least 1, got 0"),
    "steps": (["--steps", "-5"], "Expected --steps of at least 1, got -5"),
    "seed": (["--seeds", "0", "-1"], "Expected --seeds of at least 0, got -1"),
    "repeated seeds": (["--seeds", "3", "4", "3"], "different values of --seeds, got 3 4 3"),
    "repeated widths": (["--widths", "4", "4"], "different values of --widths, got 4 4"),
    "repeated guides": (["--guides", "constant", "constant"], "different values of --guides"),
    "repeated data sets": (["--dataset", "digits", "Digits"], "different values of --dataset, got digits digits"),
    "unknown data set": (["--dataset", "digitz"], "name of a data set, one of cifar10, digits.*got 'digitz'"),
    "subset": (["--num-train", "-1"], "Expected --num-train of at least 1, got -1"),
    "large subset": (["--num-train", "1438"], "num_train from 1 to 1,437.*got 1,438"),
    "missing data": (["--dataset", "mnist"], "mnist"),
    "unknown guide": (["--guides", "amortised"], "invalid choice: 'amortised'"),
    "unknown noise": (["--noise", "loud"], "invalid choice: 'loud'"),
    "unknown protocol": (["--protocol", "unfair"], "invalid choice: 'unfair'"),
    "unknown architecture": (["--architecture", "deep"], "invalid choice: 'deep'"),
    "unknown preset": (["--preset", "slow"], "invalid choice: 'slow'"),
    "no number": (["--widths", "wide"], "invalid int value: 'wide'"),
    "no seeds": (["--seeds"], "expected at least one argument"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_before_any_work(tmp_path, capsys, case):
    arguments, message = BAD[case]
    out, data = tmp_path / "results", tmp_path / "data"
    data.mkdir()
    try:
        code = sweep.main([*arguments, "--device", "cpu", "--out", str(out), "--data-dir", str(data)])
    except SystemExit as end:
        code = end.code
    printed, err = capsys.readouterr()
    assert (code, printed) == (2, "") and re.search(message, err, re.DOTALL) and "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == [data] and not list(data.iterdir())


# --- cells

CONTEXT = Context("cpu", None, False)


def tiny(**settings):
    """The settings of a cell of some seconds."""
    line = "--num-train 40 --batch-size 15 --steps 4 --seeds 0 --guides constant --noise learned --protocol published"
    (cell,) = images.plan(options(line), {})
    return cell.settings | {"latent_dim": 2, "hidden_dim": 6} | settings


def finite(numbers):
    return all(isinstance(number, float) and abs(number) < 1e9 for number in numbers)


@pytest.mark.parametrize(
    ("guide", "width", "architecture", "noise"),
    [
        ("constant", None, "dense", "learned"),
        ("amortized", 3, "dense", "fixed"),
        ("amortized", 3, "conv", "learned"),
        pytest.param("factorized", None, "conv", "fixed", marks=pytest.mark.slow),
        ("factorized", None, "dense", "learned"),
    ],
)
def test_a_cell_from_end_to_end(guide, width, architecture, noise):
    progress = []
    context = Context("cpu", None, False, progress=lambda *step: progress.append(step))
    settings = tiny(guide=guide, width=width, architecture=architecture, noise=noise)
    result = images.run(settings, context)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert progress == [(4, 4, "")]
    assert result["status"] == "done" and result["diverged_at"] is None
    curve = result["curve"]
    assert curve["step"] == [0, 1, 2, 3, 4]
    assert all(len(values) == 5 for values in curve.values())
    assert all(finite(values) for name, values in curve.items() if name != "step")
    assert curve["seconds"] == sorted(curve["seconds"]) and curve["seconds"][0] == 0.0
    assert 0 < curve["seconds"][-1] <= result["train_seconds"] and result["evaluation_seconds"] > 0
    train, test = result["final"]["train"], result["final"]["test"]
    assert (train["rows"], test["rows"]) == (40, 360)
    assert finite([train["elbo"], train["elbo_se"], train["mse"], test["elbo"], test["elbo_se"], test["mse"]])
    assert "refined" in test["source"] if guide == "factorized" else "refined" not in test["source"]
    assert (result["refined"] is None) is (guide == "factorized")
    for part, rows in (("train", 40), ("test", 360)) if result["refined"] else ():
        refined = result["refined"][part]
        assert refined["rows"] == rows and refined["gain"] > -5 * refined["gain_se"]
    weights = 2 * 6 + 6 + 6 * 6 + 6 + 6 * 64 + 64
    parameters = result["parameters"]
    if architecture == "dense":
        of_encoder = 64 * 3 + 3 + 3 * 3 + 3 + 3 * 4 + 4
        assert parameters["local"] == {"constant": 4, "amortized": of_encoder, "factorized": 40 * 4}[guide]
        assert parameters["global"] == 2 * weights
    assert parameters["model"] == (1 if noise == "learned" else 0)
    assert (result["noise_scale"] == 1.0) is (noise == "fixed")
    data = datasets.load("digits", num_train=40)
    mean_image = data.train.mean(0)
    assert result["mean_image_mse"]["test"] == pytest.approx((data.test - mean_image).square().mean().item())
    pictures = result["images"]
    assert pictures["shape"] == [1, 8, 8] and len(pictures["originals"]) == len(pictures["reconstructions"]) == 5
    assert {len(image) for image in pictures["originals"] + pictures["reconstructions"]} == {64}
    assert pictures["originals"][0] == [round(pixel, 3) for pixel in data.test[0].flatten().tolist()]


def fair(**settings):
    """The settings of a cell of the fair protocol, of some seconds."""
    return tiny(protocol="fair", share=0.0, continued=None, lr_local=1e-2, lr_global=1e-2) | settings


@pytest.mark.slow
def test_a_fair_cell_ends_with_the_round_that_gained_little():
    progress = []
    context = Context("cpu", None, False, progress=lambda *step: progress.append(step))
    settings = fair(steps=64)
    whole = images.run(settings, context)
    assert whole["curve"]["step"][-1] == whole["convergence"]["steps"] == 64 and progress[-1] == (64, 64, "")
    assert not whole["convergence"]["converged"] and whole["convergence"]["late_gain"] > 0
    # Any gain is less than ten times all: the second round is the last.
    short = images.run(settings | {"share": 10.0}, context)
    assert short["convergence"]["steps"] == 8 and short["convergence"]["converged"] and progress[-1] == (64, 64, "")
    ends = [4, 8]
    for end in ends:
        place, other = short["curve"]["step"].index(end), whole["curve"]["step"].index(end)
        assert short["curve"]["elbo"][place] == whole["curve"]["elbo"][other]
    values = short["curve"]["elbo"]
    gain = values[-1] - values[short["curve"]["step"].index(4)]
    assert short["convergence"]["late_gain"] == pytest.approx(gain)


@pytest.mark.slow
def test_only_ends_of_rounds_look_at_the_held_out_rows_of_a_table():
    result = images.run(fair(guide="factorized", steps=32), CONTEXT)
    looked = [step for step, error in zip(*(result["curve"][n] for n in ("step", "test_mse")), strict=True) if error]
    assert looked == [2, 4, 8, 16, 32]


def test_a_training_that_diverges_starts_again_with_smaller_rates(monkeypatch):
    monkeypatch.setattr(training, "_ATTEMPTS", (1.0, 1e-19))
    settings = fair(guide="amortized", width=3, steps=6, lr_local=1e18, lr_global=1e18)
    result = images.run(settings, CONTEXT)
    first, second = result["attempts"]
    assert (first["lr_local"], first["lr_global"]) == (1e18, 1e18) and 1 <= first["diverged_at"] <= 6
    assert (second["lr_local"], second["lr_global"]) == (0.1, 0.1) and second["diverged_at"] is None
    assert result["status"] == "done"
    alone = images.run(settings | {"lr_local": 0.1, "lr_global": 0.1}, CONTEXT)
    assert alone["attempts"] == [second] and alone["curve"]["elbo"] == result["curve"]["elbo"]
    # Its seconds are those of both.
    assert result["curve"]["seconds"][0] > alone["curve"]["seconds"][0] == 0
    published = images.run(settings | {"protocol": "published"}, CONTEXT)
    assert published["status"] == "diverged" and len(published["attempts"]) == 1


def test_a_training_that_loses_what_it_gained_starts_again_too(monkeypatch):
    looked = []
    monkeypatch.setattr(evaluation, "has_fallen", lambda found: looked.append(found) or len(looked) == 1)
    result = images.run(fair(steps=32), CONTEXT)
    first, second = result["attempts"]
    # It ends with the round that fell, the second of the first attempt.
    assert first["diverged_at"] == looked[0]["steps"] == 4 and second["diverged_at"] is None
    assert second["lr_local"] == pytest.approx(0.3 * first["lr_local"]) and result["status"] == "done"


@pytest.mark.parametrize(
    ("bounds", "fell"),
    [
        ((-100.0, 0.0, -9.0), False),
        ((-100.0, 0.0, -11.0), True),
        ((-100.0, 0.0, -3000.0), True),
        ((-100.0, 0.0, 5.0), False),
        # Below where it began, however it moves.
        ((-100.0, -150.0, -120.0), True),
        ((-100.0, 0.0, None), False),
    ],
)
def test_a_training_that_loses_more_than_a_tenth_of_what_was_gained_has_fallen(bounds, fell):
    assert has_fallen(convergence(curve(*bounds), 0.01)) is fell


def test_f_vi_at_the_outputs_of_an_encoder_has_its_weights_bit_for_bit():
    settings = fair(guide="amortized", width=3)
    train, _ = load(settings, CONTEXT)
    model, guide = build(settings, train)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    table = as_factorized(guide, model, train)

    def weights(one):
        torch.manual_seed(3)
        return avi.log_weights(model, one, train, num_samples=2, seed=3)

    one, other = weights(guide), weights(table)
    assert torch.equal(one.local, other.local) and torch.equal(one.total, other.total)
    # A table elsewhere has others.
    with torch.no_grad():
        table.table.add_(0.01)
    assert not torch.equal(weights(table).local, one.local)


@pytest.mark.slow
def test_the_widest_encoder_goes_on_as_f_vi_and_loses_nothing_by_it():
    rates = {"lr_local": 1e-1, "lr_global": 1e-2}
    settings = fair(guide="amortized", width=3, steps=40, continued=rates)
    result = images.run(settings, CONTEXT)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    continued, before = result["continued"], result["final"]["train"]
    assert continued["status"] == "done" and continued["final"]["train"]["elbo"] > before["elbo"]
    assert continued["curve"]["step"][0] == 0 and continued["train_seconds"] > 0
    assert continued["convergence"]["rise"] > result["convergence"]["rise"]
    # What the guide came to does not depend on what follows.
    alone = images.run(settings | {"continued": None}, CONTEXT)
    assert alone["continued"] is None
    assert alone["curve"]["elbo"] == result["curve"]["elbo"] and alone["final"] == result["final"]
    lost = images.run(settings | {"continued": {"lr_local": 1e18, "lr_global": 1e18}}, CONTEXT)["continued"]
    assert lost["status"] == "diverged" and lost["final"]["train"] == before


def tuning(**settings):
    """The settings of a tuning cell of some seconds, with no rates beyond its grid."""
    grid = [[1e-2, 1e-3], [1e-1, 1e-2], [1e-3, 1e-2]]
    s = tiny(purpose="tuning", protocol="fair", grid=grid, ladder=[1e-3, 1e-2, 1e-1], **settings)
    return {name: value for name, value in s.items() if name not in ("lr_local", "lr_global")}


@pytest.mark.parametrize("guide", ["constant", "factorized"])
def test_a_tuning_cell_measures_the_training_bound_of_every_trial(guide):
    progress = []
    context = Context("cpu", None, False, progress=lambda *step: progress.append(step))
    settings = tuning(guide=guide) | {"ladder": []}
    result = images.run(settings, context)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert progress == [(12, 12, "")] and result["train_seconds"] > 0 and result["evaluation_seconds"] > 0
    assert [[trial["lr_local"], trial["lr_global"]] for trial in result["trials"]] == settings["grid"]
    assert finite([trial[name] for trial in result["trials"] for name in ("elbo", "elbo_se")])
    assert len({trial["elbo"] for trial in result["trials"]}) == 3
    # Each as if it were the only one.
    for place, pair in enumerate(settings["grid"]):
        assert images.run(settings | {"grid": [pair]}, CONTEXT)["trials"] == result["trials"][place : place + 1]


def test_a_grid_widens_until_its_best_lies_inside_or_the_ladder_ends():
    settings = tuning(guide="factorized", steps=20) | {"grid": [[1e-3, 1e-3]], "ladder": [1e-4, 1e-3, 1e-2, 1e-1]}
    trials = images.run(settings, CONTEXT)["trials"]
    # Larger rates gain more in so few steps, up to the end of the ladder.
    assert len(trials) > 4 and next_pair(trials, settings["grid"], settings["ladder"]) == []
    best = best_of(trials)
    assert best["lr_local"] == 1e-1 and best["elbo"] == max(trial["elbo"] for trial in trials)
    assert len({(trial["lr_local"], trial["lr_global"]) for trial in trials}) == len(trials)


def test_smaller_local_rates_take_the_place_of_those_that_diverge():
    ladder, grid = (1e-4, 1e-3, 1e-2, 1e-1, 1.0), [(1e-1, 1e-2), (1e-2, 1e-2), (1e-2, 1e-3)]

    def following(**bounds):
        names = {"a": (1e-1, 1e-2), "b": (1e-2, 1e-2), "c": (1e-2, 1e-3), "d": (1e-3, 1e-2), "e": (1e-1, 1e-1)}
        trials = [dict(zip(("lr_local", "lr_global"), names[n], strict=True)) | {"elbo": e} for n, e in bounds.items()]
        return next_pair(trials, grid, ladder)

    # The next smaller one has been tried where it is in the grid itself.
    assert following(a=None, b=0.0, c=-1.0) == [(1e-3, 1e-2)]
    assert following(a=None, b=None, c=-1.0) == [(1e-3, 1e-2)]
    assert following(a=None, b=None, c=-1.0, d=None) == [(1e-4, 1e-2)]
    assert following(a=None, b=None, c=-1.0, d=0.0) == [(1e-4, 1e-2)]
    # Beyond the grid nothing takes the place of what diverged.
    assert following(a=0.0, b=-1.0, c=-1.0, e=None) == [(1.0, 1e-2)]


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        ((1e-1, 1e-3), (3e-1, 1e-3)),
        ((1e-2, 1e-3), (3e-3, 1e-3)),
        ((3e-2, 1e-2), (3e-2, 3e-2)),
        ((3e-2, 1e-3), (3e-2, 3e-4)),
        ((3e-2, 3e-3), None),
    ],
)
def test_the_next_rate_lies_beyond_the_edge_where_the_best_is(best, expected):
    ladder = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    pairs = itertools.product((1e-2, 3e-2, 1e-1), (1e-3, 3e-3, 1e-2))
    trials = [{"lr_local": a, "lr_global": b, "elbo": -1.0 if (a, b) == best else -9.0} for a, b in pairs]
    trials[0 if best != (1e-2, 1e-3) else 1]["elbo"] = None
    assert next_pair(trials, [], ladder) == ([] if expected is None else [expected])


def test_a_trial_that_diverges_leaves_the_others():
    settings = tuning(steps=6) | {"grid": [[1e18, 1e18], [1e-2, 1e-3]], "ladder": []}
    (one, other) = images.run(settings, CONTEXT)["trials"]
    assert 1 <= one["diverged_at"] <= 6 and one["elbo"] is None and one["elbo_se"] is None
    assert other["diverged_at"] is None and finite([other["elbo"]])
    # One step: the loss before it is finite, the parameters after it are useless.
    (one,) = images.run(tuning(steps=1) | {"grid": [[1e-3, 1e39]], "ladder": []}, CONTEXT)["trials"]
    assert one["diverged_at"] == 1 and one["elbo"] is None


@needs_compiler
@pytest.mark.slow
def test_compiled_trials_come_to_the_same_every_time():
    settings = tuning(guide="amortized", width=3, batch_size=20, steps=60)
    eager = images.run(settings, CONTEXT)["trials"]
    records = [run_cell(Cell("images", settings | {"compile": True}), CONTEXT) for _ in range(2)]
    one, other = (record["result"]["trials"] for record in records)
    assert one == other
    for alone, compiled in zip(eager, one, strict=True):
        assert alone["elbo"] == pytest.approx(compiled["elbo"], rel=1e-4)
    for record in records:
        assert record["provenance"]["compiled"] == ["The training step"] and record["provenance"]["fallbacks"] == []


def test_a_record_says_that_a_step_was_to_be_compiled_and_was_not(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("Read-only file system: '/home/ada/.cache/pyro_avi/ab/c.cpp'")

    monkeypatch.setattr("pyro_avi.optimization.compiled_step.compile_graph", broken)
    with pytest.warns(UserWarning, match="taken eagerly, not compiled"):
        provenance = run_cell(Cell("images", tiny(compile=True)), CONTEXT)["provenance"]
    assert provenance["compiled"] == []
    (told,) = provenance["fallbacks"]
    assert told.startswith("The training step is evaluated eagerly, not compiled: ")
    assert told.endswith("Read-only file system: 'c.cpp'.") and str(REPOSITORY) not in told


@pytest.mark.parametrize(("saved", "told"), [(True, 1), (False, 0)])
def test_a_record_says_that_a_step_would_be_compiled_if_there_were_a_compiler(monkeypatch, saved, told):
    monkeypatch.setattr("pyro_avi.optimization.step.has_compiler", lambda: False)
    monkeypatch.setattr("pyro_avi.optimization.step._COST_OF_COMPILING", 0.0 if saved else 1e9)
    provenance = run_cell(Cell("images", tiny(compile="auto")), CONTEXT)["provenance"]
    assert provenance["compiled"] == [] and len(provenance["fallbacks"]) == told
    assert all("there is no C++ compiler" in text for text in provenance["fallbacks"])


def numbers(record):
    """A record's result without the times."""

    def untimed(value):
        if not isinstance(value, dict):
            return value
        return {name: untimed(inner) for name, inner in value.items() if not name.endswith("seconds")}

    return untimed(record["result"])


@pytest.mark.slow
@pytest.mark.parametrize(("guide", "protocol"), [("amortized", "published"), ("factorized", "fair")])
def test_a_cell_gives_the_same_numbers_wherever_and_after_whatever_it_runs(guide, protocol):
    settings = (fair if protocol == "fair" else tiny)(guide=guide, width=3 if guide == "amortized" else None)
    cell, threads = Cell("images", settings), torch.get_num_threads()
    first = numbers(run_cell(cell, CONTEXT))
    # Another cell, other draws, a store full of other parameters, more threads.
    images.run(tiny(guide="factorized", seed=5), CONTEXT)
    torch.manual_seed(99)
    pyro.param("likelihood$$$log_scale", torch.tensor(3.0))
    pyro.param("decoder", torch.tensor(1.0))
    try:
        torch.set_num_threads(3 if threads == 2 else 2)
        assert numbers(run_cell(cell, CONTEXT)) == first
    finally:
        torch.set_num_threads(threads)
    assert numbers(run_cell(Cell("images", {**settings, "seed": 1}), CONTEXT)) != first
    code = (
        "import json, sys\nfrom experiments.runner.cell import Cell\n"
        "from experiments.runner.run_cell import Context, run_cell\n"
        "cell = Cell('images', json.loads(sys.argv[1]))\n"
        "print(json.dumps(run_cell(cell, Context('cpu', None, False))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(settings)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert numbers(json.loads(done.stdout)) == first


@pytest.mark.parametrize("guide", ["constant", "amortized", "factorized"])
def test_a_cell_that_diverges_says_so_and_where(guide):
    width = 3 if guide == "amortized" else None
    result = images.run(tiny(guide=guide, width=width, lr_local=1e18, lr_global=1e18, steps=6), CONTEXT)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["status"] == "diverged" and 1 <= result["diverged_at"] <= 6
    assert result["final"] is None and result["refined"] is None and result["images"] is None
    curve = result["curve"]
    assert curve["step"][0] == 0 and finite([curve["elbo"][0], curve["train_mse"][0], curve["test_mse"][0]])
    assert len(curve["step"]) > 1 and curve["elbo"][-1] is None
    assert result["mean_image_mse"]["train"] > 0


def test_a_training_that_ends_in_nonsense_has_diverged():
    # One step: the loss before it is finite, the parameters after it are useless.
    result = images.run(tiny(lr_global=float("1e38"), steps=2), CONTEXT)
    assert result["status"] == "diverged" and result["final"] is None


def test_a_cell_of_the_published_images():
    if not (SHARED / "MNIST").is_dir():
        pytest.skip("MNIST is not there: set PYRO_AVI_DATA")
    arguments = options("--preset paper --guides constant --steps 1")
    arguments.data_dir = str(SHARED)
    (cell, *_) = images.plan(arguments, {})
    assert cell.settings["num_train"] == 10_000
    settings = cell.settings | {"hidden_dim": 4, "latent_dim": 2, "compile": False}
    result = images.run(settings, Context("cpu", str(SHARED), False))
    # Known of these images: what a guide without a look at the row can reach.
    assert result["mean_image_mse"]["train"] == pytest.approx(0.0675, abs=5e-4)


def test_the_record_of_a_cell_is_one():
    (cell, *_) = images.plan(
        options("--num-train 40 --batch-size 15 --steps 1 --guides constant --protocol published"), {}
    )
    record = run_cell(cell, CONTEXT)
    assert record["key"] == cell.key and record["result"]["status"] == "done" and record["settings"] == cell.settings


@pytest.mark.slow
def test_the_command_draws_its_report_and_repeats_nothing(tmp_path):
    out = tmp_path / "results"
    line = "-m experiments.sweep --device cpu --jobs 2 --steps 5 --seeds 0 --widths 2 --num-train 40 --batch-size 15"
    line += f" {BOTH}"
    command = [sys.executable, *line.split(), "--out", str(out)]

    def run():
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run()
    page = out / "images" / "report" / "report.html"
    assert "9 cells: 9 run, 0 reused, 0 failed" in first and str(page) in first
    assert "constant" in page.read_text() and "F-VI" in page.read_text()
    before = {path: path.stat().st_mtime_ns for path in (out / "images" / "cells").iterdir()}
    assert len(before) == 9 and "9 cells: 0 run, 9 reused, 0 failed" in run()
    assert before == {path: path.stat().st_mtime_ns for path in (out / "images" / "cells").iterdir()}
