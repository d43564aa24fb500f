"""The sweep `images`: its plan, what it refuses, and cells on the digits from end to end."""

import argparse
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
from experiments import datasets, image_training, sweep
from experiments.cell import Cell
from experiments.run import Context, run_cell
from experiments.sweeps import images
from tests.marks import needs_compiler

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("PYRO_AVI_DATA") or REPOSITORY.parent / "shared" / "data")


@pytest.fixture(autouse=True)
def surroundings():
    """Cells seed torch: its state is given back."""
    random_state = torch.get_rng_state()
    yield
    torch.set_rng_state(random_state)
    pyro.clear_param_store()


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


def of(cells, **settings):
    return [cell for cell in cells if settings.items() <= cell.settings.items()]


# --- the plan


def test_tuning_comes_first_and_results_with_the_best_rates_after():
    command = options("--steps 50")
    first = images.plan(command, {})
    tuning = of(first, purpose="tuning")
    assert len(of(first, protocol="published", purpose="result")) == 5 * 2 and len(tuning) == 5
    assert len(first) == 15 and images.count(command) == 25
    # Equal budgets: every guide and width is tried at the same rates, for the same steps, from one seed of its own.
    assert len({(cell.settings["guide"], cell.settings["width"]) for cell in tuning}) == 5
    grid = [[local, rest] for local in (1e-3, 1e-2, 1e-1) for rest in (1e-3, 1e-2)]
    assert of(tuning, grid=grid, steps=10, seed=20_000) == tuning

    def elbo(s):
        # Another pair for every guide: the rates of the best are those nearest to what is asked for.
        best = {None: (1e-3, 1e-2), 1: (1e-2, 1e-2), 16: (1e-1, 1e-3), 64: (1e-2, 1e-3)}[s["width"]]
        return -abs(s["lr_local"] - best[0]) - abs(s["lr_global"] - best[1])

    finished = images.plan(command, records(tuning, elbo))
    results = of(finished, protocol="fair", purpose="result")
    assert len(finished) == images.count(command) and set(first) < set(finished)
    rates = {(s["width"], s["lr_local"], s["lr_global"]) for s in (cell.settings for cell in results)}
    assert rates == {(None, 1e-3, 1e-2), (1, 1e-2, 1e-2), (16, 1e-1, 1e-3), (64, 1e-2, 1e-3)}
    assert {cell.settings["seed"] for cell in results} == {0, 1}
    assert {cell.settings["steps"] for cell in results} == {50}


def test_a_guide_goes_on_when_its_own_tuning_is_finished():
    tuning = of(images.plan(options(), {}), purpose="tuning")
    of_constant = of(tuning, guide="constant")
    named = images.plan(options(), records(of_constant, lambda s: 0.0))
    assert [cell.settings["guide"] for cell in of(named, protocol="fair", purpose="result")] == ["constant"] * 2


def test_a_trial_that_diverged_is_never_the_best():
    tuning = of(images.plan(options("--guides constant"), {}), purpose="tuning")
    finished = records(tuning, lambda s: -1000.0 * s["lr_global"] if s["lr_local"] == 1e-2 else None)
    (one, other) = of(images.plan(options("--guides constant"), finished), protocol="fair", purpose="result")
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


def test_fair_cells_have_a_falling_rate_for_each_part(monkeypatch):
    given = optimization_of(monkeypatch, "fair", steps=10, lr_local=0.1, lr_global=0.01)
    assert "optimizer" not in given
    for part, start in (("local", 0.1), ("global", 0.01)):
        rates = [given["lr"][part](step) for step in range(10)]
        assert rates[0] == start and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.03 * start
        assert rates[5] == pytest.approx(start / 2)


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
        image_training.train_cell(tiny(protocol=protocol, **settings), CONTEXT)
    return {name: given[name] for name in ("lr", "optimizer") if name in given}


def test_every_cell_is_named_and_costs_something():
    cells = images.plan(options("--noise fixed learned"), {})
    labels = [images.describe(cell) for cell in cells]
    assert len(set(labels)) == len(labels) == 30
    assert "digits learned noise, fair: amortized k=16, learning rates" in labels
    assert "digits fixed noise, published: factorized, seed 1" in labels
    long = images.plan(options("--steps 15000"), {})
    for device in ("cpu", "cuda"):
        seconds = [images.estimate(cell, device=device) for cell in cells]
        assert min(seconds) > 0
        assert sum(images.estimate(cell, device=device) for cell in long) > sum(seconds)
    tuning = of(cells, purpose="tuning", guide="factorized")[0]
    one = Cell("images", {**tuning.settings, "grid": tuning.settings["grid"][:1]})
    assert images.estimate(tuning, device="cpu") == pytest.approx(6 * images.estimate(one, device="cpu"))
    result = of(cells, purpose="result", guide="factorized")[0]
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
    assert of(cells, **common, architecture="conv", protocol="published", compile=True) == cells
    # All of the data set's images are one cell, however they are asked for.
    assert images.plan(options("--num-train 0"), {}) == images.plan(options("--num-train 1437"), {})


# --- what is refused

BAD = {
    "width 0": (["--widths", "4", "0"], "Expected --widths of at least 1, got 0"),
    "widths without an encoder": (["--guides", "constant", "factorized", "--widths", "4"], "--widths together with"),
    "large batch": (["--batch-size", "1438"], "--batch-size of at most the 1437 training images, got 1438"),
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
        ("factorized", None, "conv", "fixed"),
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


def tuning(**settings):
    """The settings of a tuning cell of some seconds."""
    s = tiny(purpose="tuning", protocol="fair", grid=[[1e-2, 1e-3], [1e-1, 1e-2], [1e-3, 1e-2]], **settings)
    return {name: value for name, value in s.items() if name not in ("lr_local", "lr_global")}


@pytest.mark.parametrize("guide", ["constant", "factorized"])
def test_a_tuning_cell_measures_the_training_bound_of_every_trial(guide):
    progress = []
    context = Context("cpu", None, False, progress=lambda *step: progress.append(step))
    settings = tuning(guide=guide)
    result = images.run(settings, context)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert progress == [(12, 12, "")] and result["train_seconds"] > 0 and result["evaluation_seconds"] > 0
    assert [[trial["lr_local"], trial["lr_global"]] for trial in result["trials"]] == settings["grid"]
    assert finite([trial[name] for trial in result["trials"] for name in ("elbo", "elbo_se")])
    assert len({trial["elbo"] for trial in result["trials"]}) == 3
    # Each as if it were the only one.
    for place, pair in enumerate(settings["grid"]):
        assert images.run(settings | {"grid": [pair]}, CONTEXT)["trials"] == result["trials"][place : place + 1]


def test_a_trial_that_diverges_leaves_the_others():
    settings = tuning(steps=6) | {"grid": [[1e18, 1e18], [1e-2, 1e-3]]}
    (one, other) = images.run(settings, CONTEXT)["trials"]
    assert 1 <= one["diverged_at"] <= 6 and one["elbo"] is None and one["elbo_se"] is None
    assert other["diverged_at"] is None and finite([other["elbo"]])
    # One step: the loss before it is finite, the parameters after it are useless.
    (one,) = images.run(tuning(steps=1) | {"grid": [[1e-3, 1e39]]}, CONTEXT)["trials"]
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

    monkeypatch.setattr("pyro_avi.compiled.compile_graph", broken)
    with pytest.warns(UserWarning, match="taken eagerly, not compiled"):
        provenance = run_cell(Cell("images", tiny(compile=True)), CONTEXT)["provenance"]
    assert provenance["compiled"] == []
    (told,) = provenance["fallbacks"]
    assert told.startswith("The training step is evaluated eagerly, not compiled: ")
    assert told.endswith("Read-only file system: 'c.cpp'.") and str(REPOSITORY) not in told


@pytest.mark.parametrize(("saved", "told"), [(True, 1), (False, 0)])
def test_a_record_says_that_a_step_would_be_compiled_if_there_were_a_compiler(monkeypatch, saved, told):
    monkeypatch.setattr("pyro_avi.steps.has_compiler", lambda: False)
    monkeypatch.setattr("pyro_avi.steps._COST_OF_COMPILING", 0.0 if saved else 1e9)
    provenance = run_cell(Cell("images", tiny(compile="auto")), CONTEXT)["provenance"]
    assert provenance["compiled"] == [] and len(provenance["fallbacks"]) == told
    assert all("there is no C++ compiler" in text for text in provenance["fallbacks"])


def numbers(record):
    """A record's result without the times."""
    untimed = {name: value for name, value in record["result"].items() if not name.endswith("_seconds")}
    return untimed | {"curve": {name: value for name, value in untimed["curve"].items() if name != "seconds"}}


@pytest.mark.parametrize(("guide", "protocol"), [("amortized", "published"), ("factorized", "fair")])
def test_a_cell_gives_the_same_numbers_wherever_and_after_whatever_it_runs(guide, protocol):
    settings = tiny(guide=guide, width=3 if guide == "amortized" else None, protocol=protocol)
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
        "import json, sys\nfrom experiments.cell import Cell\nfrom experiments.run import Context, run_cell\n"
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
    (cell, *_) = images.plan(options("--num-train 40 --batch-size 15 --steps 1 --guides constant"), {})
    record = run_cell(cell, CONTEXT)
    assert record["key"] == cell.key and record["result"]["status"] == "done" and record["settings"] == cell.settings


@pytest.mark.slow
def test_the_command_draws_its_report_and_repeats_nothing(tmp_path):
    out = tmp_path / "results"
    line = "-m experiments.sweep --device cpu --jobs 2 --steps 5 --seeds 0 --widths 2 --num-train 40 --batch-size 15"
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
