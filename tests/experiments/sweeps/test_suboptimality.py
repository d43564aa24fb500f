"""The sweep `suboptimality`: its plan, its training, its records, and what its report says."""

import argparse
import copy
import math

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO

import pyro_avi as avi
from experiments.reporting.pages import data
from experiments.reporting.records import ReportError
from experiments.runner.run_cell import Context, run_cell
from experiments.sweeps import suboptimality
from experiments.sweeps.suboptimality import report, training
from experiments.sweeps.suboptimality.cells import _FAMILIES, _RICHER
from experiments.sweeps.suboptimality.report.arms import SUMS, read
from experiments.sweeps.suboptimality.report.rows import mean_between, mean_of_rows, share
from experiments.sweeps.suboptimality.training import binary_images, build, learning_rate

TINY = (
    "--encoders small --families diagonal --steps 40 --warm-up 10 --latent-dim 2 --hidden-dim 8 --rows 12 --num-samples 30 "
    "--refine-steps 5 --max-rounds 1 --ais-rows 4 --ais-temperatures 3 --ais-leapfrog 2"
)


def options(line=""):
    parser = argparse.ArgumentParser()
    suboptimality.add_arguments(parser)
    return parser.parse_args(line.split(), argparse.Namespace(data_dir=None, download=False))


def plan(line=""):
    return suboptimality.plan(options(line), {})


# --- the plan


def test_every_encoder_family_and_seed_is_a_cell():
    cells = plan("--encoders small wide conv --families diagonal full flow --seeds 0 1")

    assert len(set(cells)) == len({suboptimality.describe(cell) for cell in cells}) == 18
    assert suboptimality.count(options("--seeds 0 1 2")) == len(plan("--seeds 0 1 2"))
    assert all(suboptimality.estimate(cell, device="cpu") > 0 for cell in cells)
    assert {(c.settings["encoder"], c.settings["encoder_dim"]) for c in cells} == {
        ("small", 128), ("wide", 320), ("conv", 128),
    }  # fmt: skip
    # No family is richer than itself.
    assert {(c.settings["family"], c.settings["richer"]) for c in cells} == {
        ("diagonal", "full"), ("full", None), ("flow", None),
    }  # fmt: skip
    assert {cell.settings["richer"] for cell in plan("--richer none")} == {None}
    richer = {(c.settings["family"], c.settings["richer"]) for c in plan("--richer flow --families diagonal full flow")}
    assert richer == {("diagonal", "flow"), ("full", "flow"), ("flow", None)}
    assert set(training.RICHER) == {name for names in _RICHER.values() for name in names}


def test_the_published_sizes():
    cells = plan("--preset paper --dataset digits --rows 100 --ais-rows 0 --num-train 0")

    assert {cell.settings["latent_dim"] for cell in cells} == {50}
    assert {cell.settings["encoder_dim"] for cell in cells} == {200, 500}
    assert {cell.settings["steps"] / (60_000 / cell.settings["batch_size"]) for cell in cells} == {3280}
    # 3,280 epochs are those of eight stages.
    assert sum(3**i for i in range(8)) == 3280


@pytest.mark.parametrize(
    "line, message",
    [
        ("--steps 0", "--steps of at least 1, got 0"),
        ("--num-samples 24", "--num-samples of at least 25, got 24"),
        ("--ais-chains 10", "--ais-chains of at least 25, got 10"),
        ("--warm-up 30 --steps 20", "--warm-up of at most the 20 steps, got 30"),
        ("--ais-rows 30 --rows 20", "--ais-rows of at most the 20 --rows, got 30"),
        ("--rows 361", "--rows of at most the 360 images of digits, got 361"),
        ("--batch-size 500 --num-train 400", "--batch-size of at most the 400 images of digits, got 500"),
        ("--lr 0", "--lr above 0, got 0"),
        ("--seeds -1", "--seeds of at least 0, got -1"),
        ("--seeds 1 1", "different values of --seeds, got 1 1"),
        ("--dataset letters", "name of a data set"),
    ],
)
def test_bad_options_are_refused(line, message):
    with pytest.raises(ValueError, match=message):
        plan(line)


# --- the training


def test_images_are_binary_with_the_grey_values_in_the_mean():
    train, test = binary_images("digits", None, 0, None, False)
    again, _ = binary_images.__wrapped__("digits", None, 0, None, False)

    assert set(train.unique().tolist()) == set(test.unique().tolist()) == {0.0, 1.0}
    assert train.equal(again) and not train.equal(binary_images("digits", None, 1, None, False)[0])
    grey = training.datasets.load("digits").train
    # The error of a mean of as many independent pixels.
    error = (grey * (1 - grey)).sum().sqrt().item() / grey.numel()
    assert (train - grey).mean().abs().item() < 5 * error < 0.01


def test_the_learning_rate_falls_in_eight_stages():
    rates = [learning_rate(step, 3280, first=1e-3) for step in range(3280)]

    ends = np.cumsum([3**i for i in range(8)])
    expected = np.repeat([1e-3 * 10 ** (-i / 7) for i in range(8)], np.diff([0, *ends]))
    assert rates == pytest.approx(expected.tolist())
    assert learning_rate(0, 7, first=1e-3) == 1e-3 and learning_rate(6, 7, first=1e-3) == pytest.approx(1e-4)


def small_vae(family="diagonal"):
    (cell,) = plan(f"{TINY} --families {family}")
    x, _ = binary_images("digits", None, 0, None, False)
    torch.manual_seed(0)
    return x, *build(cell.settings, x), cell.settings


@pytest.mark.parametrize("family", ["diagonal", "full", "flow"])
def test_the_weight_multiplies_the_divergence_and_nothing_else(family):
    x, model, guide, _ = small_vae(family)
    x, index = x[:20], torch.arange(20)

    def loss(weight):
        programs = [training._LatentsWeighted(each, torch.tensor(weight)) for each in (model, guide)]
        torch.manual_seed(1)
        return TraceMeanField_ELBO().differentiable_loss(*programs, x, index).item()

    torch.manual_seed(1)
    whole = TraceMeanField_ELBO().differentiable_loss(model, guide, x, index).item()
    torch.manual_seed(1)
    trace = poutine.trace(guide).get_trace(x, index)
    observed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(x, index)
    reconstruction = -observed.nodes["x"]["fn"].log_prob(x).sum().item() * len(model_rows(model)) / 20
    divergence = whole - reconstruction

    assert loss(1.0) == pytest.approx(whole, rel=1e-5)
    assert loss(0.25) == pytest.approx(reconstruction + 0.25 * divergence, rel=1e-5)
    # A weight on everything would be seen.
    assert abs(0.25 * whole - loss(0.25)) > 0.01 * whole


def model_rows(model):
    return range(model.size)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_weight_rises_while_training(compiled):
    x, model, guide, settings = small_vae()
    settings = {**settings, "steps": 6, "compile": compiled, "batch_size": len(x)}
    # Where nothing moves, losses differ in the weight alone.
    settings["lr"] = 0.0

    def losses(warm_up):
        chosen = {**settings, "warm_up": warm_up}
        return training.train(model, guide, x, chosen, Context("cpu", None, False)).losses

    missing = losses(0) - losses(4)

    assert missing[0] > 1.0 and (missing / missing[0]).tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0, 0, 0], abs=1e-4)


# --- the records


@pytest.fixture(scope="module")
def records():
    """One cell, and what would be those of other guides and of another seed."""
    random_state = torch.get_rng_state()
    (cell,) = plan(TINY)
    record = run_cell(cell, Context("cpu", None, False, command="c"))
    torch.set_rng_state(random_state)
    found = {}
    for changed in ({}, {"encoder": "wide", "encoder_dim": 16}, {"family": "full", "richer": None}):
        for seed in (0, 1):
            varied = copy.deepcopy(record)
            varied["settings"] |= {**changed, "seed": seed}
            if "richer" in changed:
                for part in varied["result"]["parts"].values():
                    part["bounds"]["richer"] = None
            found[f"{len(found)}"] = varied
    return found


def test_a_record_holds_bounds_in_order(records):
    for record in records.values():
        for part in record["result"]["parts"].values():
            bounds = {name: None if rows is None else np.array(rows) for name, rows in part["bounds"].items()}
            assert len(bounds["elbo"]) == part["rows"] == 12 and len(bounds["ais"]) == 4
            assert bounds["elbo"].mean() <= bounds["best"].mean() <= bounds["iwae"].mean()
            assert (bounds["richer"] is None) == (record["settings"]["richer"] is None)
            assert [at["steps"] for at in part["refinement"]] == [1, 5, 20, 100]
            gains = [np.mean(at["gain"]) for at in part["refinement"]]
            # Five steps of the search, a hundred of refinement.
            assert gains[0] < gains[-1] and min(np.min(at["gain"]) for at in part["refinement"]) > -1.0
        assert record["result"]["loss"]["step"][-1] == record["settings"]["steps"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice", ["--encoders small", "--encoders conv --families full", "--encoders wide --families flow"]
)
def test_a_cell_of_every_kind_repeats(choice):
    (cell,) = plan(f"{TINY} {choice}")

    one, other = (run_cell(cell, Context("cpu", None, False))["result"] for _ in range(2))

    assert one["loss"] == other["loss"] and one["status"] == "done"
    assert all(one["parts"][part]["bounds"] == other["parts"][part]["bounds"] for part in one["parts"])


def test_a_training_that_diverges_is_told():
    (cell,) = plan(f"{TINY} --lr 1e30")

    result = run_cell(cell, Context("cpu", None, False))["result"]

    assert result["status"] == "diverged" and result["parts"] is None and result["diverged_at"] is not None


# --- the report


def test_means_and_errors():
    rows = np.array([[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]])

    mean = mean_of_rows(rows)

    assert mean.value == 4.0 and mean.seeds == 2
    # Rows: 2, 3, 7, of variance 7; seeds: 3 and 5, of variance 2.
    assert mean.se == pytest.approx(math.sqrt(7 / 3 + 2 / 2))
    assert mean_of_rows(rows[:1]).se == pytest.approx(math.sqrt(7 / 3))


def known_records(ais=0.0, **changes):
    """Two encoders whose gaps are known: amortization 1.5 and 1.0, approximation 1.0, and 0.5 more on test rows."""
    provenance = {
        "commit": "a" * 40, "machine": {"processor": "P", "cores": 2}, "versions": {"torch": "2"}, "command": "c",
    }  # fmt: skip
    wave = 0.1 * np.sin(np.arange(400))
    records = {}
    for encoder, amortization in (("small", 1.5), ("wide", 1.0)):
        (cell,) = plan(f"--encoders {encoder} --families diagonal --rows 100 {changes.get('line', '')}")
        parts = {}
        for part, more in (("train", 0.0), ("test", 0.5)):
            best = -90.0 + wave
            elbo = best - amortization - more + wave[::-1]
            bounds = {
                "elbo": elbo,
                "best": best,
                "richer": best + 0.4,
                "iwae": best + 1.0,
                "ais": best[:50] + 1.0 + ais,
            }
            bounds["mean_image"] = best - changes.get("above_mean_image", 20.0)
            parts[part] = {
                "rows": 400,
                "bounds": {name: rows.tolist() for name, rows in bounds.items()},
                "draws_se": {}, "not_converged": changes.get("not_converged", []), "unreliable": [], "khat_above": 0,
                "ess_median": 10.0,
                "refinement": [
                    {"steps": steps, "gain": (closed * (best - elbo)).tolist(), "seconds": 0.1 * steps}
                    for steps, closed in ((1, 0.1), (5, 0.3), (20, 0.6), (100, 0.9))
                ],
                "seconds": {"gaps": 1.0, "ais": 1.0},
            }  # fmt: skip
        result = {"status": "done", "parts": parts}
        records[cell.key] = {"settings": cell.settings, "result": result, "provenance": provenance}
    return records


def texts(document):
    return {note.title: note.text for note in document.parts[0].notes}


def test_the_numbers_are_those_of_the_records():
    document = report.document(known_records(not_converged=[3, 7]))
    results, differences, refinement = (table.values for table in document.parts[0].tables)

    small, _, wide, _ = (line["amortization - approximation"] for line in results)
    assert small.value == pytest.approx(0.5, abs=1e-3) and small.sign == 1 and wide.sign == 0
    assert "amortization gap 1.500 ± 0.004 > approximation gap 1" in document.notes[0].text
    (other,) = [line for line in differences if line["guide"] == "wide, diagonal"]
    assert str(other["amortization - small encoder's, train"]) == "-0.5"
    assert all(line["amortization, test - train"].sign == 1 for line in differences)
    assert differences[0]["amortization - small encoder's, train"] is None
    assert "20 steps of refinement close 60% ± 0% of that of test rows" in document.notes[0].text
    assert [line["20 steps"].value for line in refinement] == pytest.approx([0.6] * 4)
    assert [line["s of 20"] for line in refinement] == [2.0] * 4
    said = texts(document)
    assert said["Rows that have not converged"].startswith("8 of 1,600")
    assert [line["not converged"] for line in results] == [2] * 4 and "Rows whose evidence is unreliable" not in said


@pytest.mark.parametrize("ais, added", [(0.3, 0.3), (-0.3, 0.0)])
def test_annealing_raises_the_evidence_where_it_is_the_better_bound(ais, added):
    records = known_records(ais=ais)
    arm = read(records)[0].arms[0]

    means = {name: arm.mean(name) for name in SUMS}

    assert means["approximation"].value == pytest.approx(1.0 + added)
    assert means["inference"].value == pytest.approx(means["approximation"].value + means["amortization"].value)
    assert means["evidence"].value - means["elbo"].value == pytest.approx(means["inference"].value)
    document = report.document(records)
    assert document.parts[0].tables[0].values[0]["annealing adds"].value == pytest.approx(ais)


def test_latents_that_are_not_used_are_told():
    def told(above):
        return any("not used" in title for title in texts(report.document(known_records(above_mean_image=above))))

    assert told(-1.5) and not told(20.0)


def test_a_share_of_no_gap_is_none():
    rows = np.sin(np.arange(100.0))[None]

    assert not share(rows, rows).known and share(0.5 * rows + 0.5, rows + 1).value == pytest.approx(0.5)


def test_generalization_is_between_other_rows():
    train, test, *_ = read(known_records())[0].arms

    gap = mean_between(test.rows("amortization"), train.rows("amortization"))

    one_row = np.std(train.rows("amortization")[0], ddof=1)
    assert gap.value == pytest.approx(0.5) and gap.se == pytest.approx(one_row * math.sqrt(2 / 400))


def test_the_published_numbers_stand_beside_and_apart(records):
    mnist = {key: {**record, "settings": {**record["settings"], "dataset": "mnist"}} for key, record in records.items()}

    for chosen, quoted in ((records, 0), (mnist, 1)):
        document = report.document(chosen)
        table = document.parts[0].tables[0]
        assert sum(line["guide"].startswith("Cremer et al.") for line in table.values) == quoted
        assert len(table.values) == 2 * 3 + quoted
    last = [cell for cell, _ in table.groups[-1][-1]]
    assert last[2:8] == ["-89.80", "-90.80", "-91.23", "-92.57", "1.43", "1.34"]
    assert last[0].endswith("quoted")


def test_the_report_of_a_real_cell_is_drawn(records):
    document = report.document(records)

    section, _ = document.parts
    assert [figure.png[:4] for figure in section.figures] == [b"\x89PNG"] * 2
    found = data(document)
    assert len(found["summary"]) == len(found["refinement"]) == 6 and len(found["differences"]) == 3
    assert all(math.isfinite(line["amortization_gap"]) for line in found["summary"])


def test_what_diverged_is_left_out_and_told(records):
    broken = copy.deepcopy(records)
    lost = next(record for record in broken.values() if record["settings"]["seed"] == 1)
    lost["result"] = {**lost["result"], "status": "diverged", "parts": None}

    said = texts(report.document(broken))

    assert said["Diverged, left out"].endswith(", seed 1")
    for record in broken.values():
        record["result"] = {**record["result"], "status": "diverged", "parts": None}
    document = report.document(broken)
    assert "Every cell diverged" in document.notes[0].text and not document.parts[0].figures


def test_records_of_another_sweep_are_refused():
    with pytest.raises(ReportError, match="Expected settings.seed in the record"):
        report.document({"a": {"settings": {}, "result": {}, "provenance": {}}})


def test_every_family_that_can_be_asked_for_is_made():
    assert set(training.FAMILIES) == set(_FAMILIES) == set(_RICHER)
    assert all(isinstance(make(), avi.Family) for make in training.FAMILIES.values())
