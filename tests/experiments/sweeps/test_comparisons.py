"""The sweeps `linear`, `series` and `nonlinear`: closed forms, a training, and what their reports say."""

import argparse
import math
from functools import cache

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_avi as avi
from experiments.comparison.report import document, lines_of, shown, soonest
from experiments.reporting.pages import data, terminal
from experiments.reporting.records import ReportError
from experiments.runner.run_cell import Context, run_cell
from experiments.sweeps import linear, nonlinear, series
from experiments.sweeps.linear.problem import Linear
from experiments.sweeps.nonlinear.problem import Nonlinear
from experiments.sweeps.series.problem import WIDE, A, Series
from tests.marks import needs_compiler


def options(sweep, *argv):
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    return parser.parse_args(argv)


# --- closed forms


def test_a_constant_factor_loses_the_closed_form():
    problem = Linear(30)
    constant = problem.model.inference_gap(problem.x, problem.model.best_constant(problem.x))

    assert math.isclose(
        constant, problem.model.approximation_gap(problem.x) + problem.predicted("degree 0"), rel_tol=1e-9
    )


def best_table(problem, theta, theta_scale, loc, scale):
    guide = avi.FactorizedGuide(problem.model).setup(problem.x).double()
    with torch.no_grad():
        guide.table.copy_(torch.stack([loc.flatten(), scale.log().flatten()], -1))
        guide.global_guide.vector.copy_(torch.stack([theta, theta_scale.log()]))
    return guide


def linear_best(problem):
    best = problem.model.best_diagonal(problem.x)
    z = best["z"].base_dist
    return best_table(problem, best["theta"].mean, best["theta"].stddev, z.loc, z.scale)


def series_best(problem):
    x = problem.x.double()
    before, precision = torch.cat([x.new_zeros(1), x[:-1]]), len(x) * A**2 + WIDE**-2
    y = x - A * before
    theta = A * y.sum() / (1 + A**2) / (len(x) * A**2 / (1 + A**2) + WIDE**-2)
    loc = (before + A * (x - A * theta)) / (1 + A**2)
    return best_table(problem, theta, x.new_tensor(precision**-0.5), loc, torch.full_like(loc, (1 + A**2) ** -0.5))


def nonlinear_best(problem):
    theta, theta_scale, q = problem.optimum
    return best_table(problem, theta, theta_scale, q.mean, q.stddev)


#: Its optimum takes seconds.
nonlinear_problem = cache(Nonlinear)
PROBLEMS = {
    "linear": (Linear, linear_best),
    "series": (Series, series_best),
    "nonlinear": (nonlinear_problem, nonlinear_best),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_best_bound_is_that_of_the_best_factors_and_of_their_draws(name):
    make, best = PROBLEMS[name]
    problem = make(12)
    guide = best(problem)

    assert math.isclose(problem.bound(guide), problem.best, rel_tol=1e-9)
    with pyro.validation_enabled(False):
        weights = avi.log_weights(problem.model, guide, problem.x, num_samples=400, seed=0, progress=False)
    total = (weights.local.sum(-1) + weights.global_).double()
    error = total.std() / 20
    assert abs(total.mean() - problem.best) < 5 * error < 0.6
    # The log weights spread as said; a product of two normals has a kurtosis of 9 at most.
    assert abs(total.std() / problem.spread - 1) < 5 * (8 / (4 * 400)) ** 0.5
    # Other factors are worse, and a bound without its constants would not be below the evidence as this is.
    with torch.no_grad():
        guide.table.add_(0.05)
    assert problem.bound(guide) < problem.best < problem.evidence


def test_the_evidence_of_a_series_is_that_of_its_innovations():
    problem = Series(12)
    x = problem.x.double()
    y = x - A * torch.cat([x.new_zeros(1), x[:-1]])
    covariance = (1 + A**2) * torch.eye(12).double() + A**2 * WIDE**2

    exact = dist.MultivariateNormal(torch.zeros(12).double(), covariance).log_prob(y)

    # Given the rows before it a row is y_n and a known shift.
    assert math.isclose(exact, problem.evidence, rel_tol=1e-6)


def test_what_an_encoder_of_one_row_loses_is_reached_and_not_passed():
    problem = Series(40)
    guide = series_best(problem)
    loc = guide.posterior(problem.x).mean.flatten().detach()
    design = torch.stack([torch.ones(40).double(), problem.x.double()], -1)
    fitted = design @ torch.linalg.lstsq(design, loc).solution
    with torch.no_grad():
        guide.table[:, 0] = fitted

    loss = problem.best - problem.bound(guide)

    assert math.isclose(loss, problem.predicted("x_n, linear"), rel_tol=1e-6)
    assert problem.predicted("constant") > loss > 0 == problem.predicted("window(1, 0), 4")


@pytest.mark.parametrize("sweep, problem", [(linear, Linear), (series, Series), (nonlinear, nonlinear_problem)])
def test_every_arm_has_a_guide(sweep, problem):
    problem = problem(12)
    for cell in sweep.plan(options(sweep, "--preset", "paper"), {}):
        guide = problem.guide(cell.settings["arm"]).setup(problem.x)
        assert problem.bound(guide) < problem.best


# --- the nonlinear problem


def bound_by_hand(x, theta, theta_scale, loc, scale):
    """The ELBO of normals, rows in the last dimension, by Gauss-Hermite quadrature over each z."""
    nodes, weights = (torch.as_tensor(each) for each in np.polynomial.hermite_e.hermegauss(80))
    z = loc.unsqueeze(-1) + scale.unsqueeze(-1) * nodes
    missed = (x - theta.unsqueeze(-1)).unsqueeze(-1) - z - z * z.sin()
    # The square of what is missed, and the variance that theta adds to it.
    squares = missed.square() + theta_scale.square()[..., None, None]
    log_joint = -0.5 * z.square() - 0.5 * squares * (-2 * z.cos()).exp() - z.cos() - math.log(2 * math.pi)
    entropies = scale.log().sum(-1) + theta_scale.log() + 0.5 * (len(x) + 1) * (1 + math.log(2 * math.pi))
    return (log_joint @ weights).sum(-1) / math.sqrt(2 * math.pi) + entropies


def climbed(x, theta, log_theta_scale, loc, log_scale, steps=400):
    """The bounds by hand that Adam ends at."""
    parameters = [each.clone().requires_grad_() for each in (theta, log_theta_scale, loc, log_scale)]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        theta, log_theta_scale, loc, log_scale = parameters
        (-bound_by_hand(x, theta, log_theta_scale.exp(), loc, log_scale.exp()).sum()).backward()
        optimizer.step()
        falling.step()
    theta, log_theta_scale, loc, log_scale = parameters
    return bound_by_hand(x, theta, log_theta_scale.exp(), loc, log_scale.exp()).detach()


def test_the_bound_of_the_nonlinear_sweep_is_the_mean_of_the_models_and_the_one_by_hand():
    problem = nonlinear_problem(12)
    theta, theta_scale, loc, scale = (torch.as_tensor(each) for each in (0.3, 0.2, 0.5, 0.7))
    guide = best_table(
        problem, theta.double(), theta_scale.double(), loc.expand(12).double(), scale.expand(12).double()
    )

    bound = problem.bound(guide)

    q, (nodes, weights) = guide.fixed_posterior(problem.x), np.polynomial.hermite_e.hermegauss(9)
    given = [problem.model.elbo(problem.x, q, 0.3 + 0.2 * node).sum().item() for node in nodes]
    entropy = math.log(0.2) + 0.5 * (1 + math.log(2 * math.pi))
    assert math.isclose(bound, weights @ given / weights.sum() + entropy, rel_tol=1e-7)
    x = problem.x.double().flatten()
    by_hand = bound_by_hand(x, theta.double(), theta_scale.double(), loc.expand(12).double(), scale.expand(12).double())
    assert math.isclose(bound, by_hand, rel_tol=1e-7)


def test_no_climb_passes_the_optimum_by_quadrature_and_that_from_several_starts_attains_it():
    problem = nonlinear_problem(12)
    x, generator = problem.x.double().flatten(), torch.Generator().manual_seed(0)
    starts = torch.stack([problem.starts.double().T, *(
        torch.stack([4 * torch.randn(12, generator=generator).double(), torch.full((12,), -1.0).double()])
        for _ in range(20)
    )])  # fmt: skip
    zero = torch.zeros(len(starts)).double()

    ends = climbed(x, zero, zero - 1, starts[:, 0], starts[:, 1])

    assert (ends < problem.best + 1e-6).all()
    assert problem.best - ends[0] < 1e-3
    # Starts matter: others lead into local optima.
    assert (problem.best - ends[1:] > 1).sum() > 10


# --- cells


def test_the_presets_of_the_series_have_their_widths():
    quick, paper = ({cell.settings["arm"] for cell in series.plan(options(series, "--preset", name), {})}
                    for name in ("quick", "paper"))  # fmt: skip
    assert paper - quick == {"x_n, 4", "x_n, 6", "x_n, 20", "window(1, 0), 2"} and quick < paper
    (one,) = series.plan(options(series, "--arms", "x_n, 20"), {})
    assert one.settings["arm"] == "x_n, 20"


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="at least 4 rows"):
        linear.plan(options(linear, "--rows", "2"), {})


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("sweep, arm", [(linear, "degree 1"), (series, "window(1, 0), 4"), (nonlinear, "x_n, 4")])
def test_a_cell_trains_and_its_record_is_drawn(sweep, arm):
    line = ("--arms", arm, "--rows", "20", "--steps", "60", "--seeds", "2")
    (cell,) = sweep.plan(options(sweep, *line), {})

    record = run_cell(cell, Context("cpu", None, False))

    result = record["result"]
    assert len(result["runs"]) == 2 * 4 and len(result["seconds"]) == len(result["looks"])
    # At the largest rates few steps of few rows may end below where they began.
    calm = [run["bounds"] for run in result["runs"] if run["rate"] <= 0.03]
    first, last = ([bounds[at] for bounds in calm] for at in (0, -1))
    assert all(one < two < result["best"] for one, two in zip(first, last, strict=True))
    drawn = sweep.document({cell.key: record})
    assert arm in terminal(drawn) and all(figure.png for part in drawn.walk() for figure in part.drawings)


# --- reports


def record(arm, gaps, *, predicted=0.0, rate=0.1, sweep=linear):
    """A record of two looks, whose last gaps are given by protocol and seed."""
    cell = next(c for c in sweep.plan(options(sweep), {}) if c.settings["arm"] == arm)
    runs = [
        {"protocol": protocol, "rate": rate, "seed": seed, "bounds": [-2000.0, -1000.0 - gap]}
        for protocol, by_seed in gaps.items()
        for seed, gap in enumerate(by_seed)
    ]
    result = {"best": -1000.0, "evidence": -999.0, "spread": 0.5, "predicted_loss": predicted}
    result |= {"looks": [1, 500], "seconds": [0.0, 0.25], "runs": runs}
    return {"key": cell.key, "settings": cell.settings, "result": result}


def test_a_report_says_gaps_and_when_each_guide_is_near():
    records = {
        "a": record("degree 1", {"published": [20.0, 5.0], "fair": [0.1, 0.3]}),
        "b": record("degree 0", {"published": [90.0, 90.0], "fair": [111.0, 111.2]}, predicted=111.1),
    }

    drawn = linear.document(records)

    (part, _) = drawn.parts
    assert [note.kind for note in part.notes] == ["answer", "answer"]
    lines = data(drawn)["summary"]
    of = {(line["protocol"], line["guide"]): line for line in lines}
    assert of["fair", "degree 1"]["gap_nats_a_row"] == pytest.approx(2e-4)
    assert of["fair", "degree 1"]["steps_to_1"] == 500 and of["fair", "degree 1"]["seconds_to_1"] == 0.25
    assert of["published", "degree 1"]["steps_to_1_is_lower_bound"] and of["fair", "degree 0"][
        "closed_form"
    ] == pytest.approx(0.1111)
    assert all(figure.png for figure in part.drawings)


def test_a_gap_that_is_left_is_a_warning():
    records = {
        "a": record("degree 1", {"published": [1.0], "fair": [0.1, 1.5]}),
        "b": record("degree 2", {"published": [1.0], "fair": [0.1, 1.5]}),
        "c": record("degree 0", {"published": [1.0], "fair": [111.1, 113.0]}, predicted=111.1),
    }

    assert [note.kind for note in linear.document(records).parts[0].notes] == ["warning"] * 3


def test_the_series_report_says_who_converged_and_what_one_row_loses():
    gaps = {"F-VI": 0.001, "x_n, linear": 300.01, "x_n, 10": 295.0, "window(1, 0), 4": 0.002}
    losses = {"x_n, linear": 300.0, "x_n, 10": None}

    def notes(**changed):
        records = {
            arm: record(arm, {"fair": [gap] * 2}, predicted=losses.get(arm, 0.0), sweep=series)
            for arm, gap in {**gaps, **changed}.items()
        }
        return series.document(records).parts[0].notes

    assert [note.kind for note in notes()] == ["answer"] * 4
    # The spread of these records is .5, that of 1,000 draws .5 / 1000 ** .5.
    assert "Within 0.016 nats" in notes()[0].text and notes()[0].text.endswith("F-VI; x_n, linear; window(1, 0), 4.")
    assert "networks of x_n alone lose 295.0 to 295.0 nats, of the 300.0 that a line loses" in notes()[3].text
    late = notes(**{"F-VI": 0.02, "x_n, 10": 100.0})
    assert [note.kind for note in late] == ["warning", "answer", "answer", "warning"]
    assert "Not converged: F-VI." in late[0].text


@pytest.mark.parametrize(
    "several, encoder, kinds",
    [
        ([3.0, 4.0], [4.5, 9.0], ["answer", "answer", "answer", "answer"]),
        # An encoder above F-VI, and a seed that ends below its start.
        ([3.0, 4.7], [4.5, 1200.0], ["answer", "warning", "warning", "answer"]),
    ],
)
def test_the_nonlinear_report_says_who_ends_above_whom(several, encoder, kinds):
    gaps = {"F-VI": [20.0, 21.0], "F-VI, several starts": several, "x_n, 4": encoder}
    records = {arm: record(arm, {"fair": of, "published": [30.0] * 2}, sweep=nonlinear) for arm, of in gaps.items()}

    notes = nonlinear.document(records).parts[0].notes

    # Of the published protocol: all are alike.
    assert [note.kind for note in notes if not note.text.startswith("Published")] == kinds
    assert "-1,000.000 nats, the evidence -999.000" in notes[0].text
    assert f"{max(several) - min(encoder):.2g}".lstrip("-") in notes[-2].text
    assert "F-VI of one start is not at its optimum" in notes[-1].text


def test_the_best_rate_and_the_soonest_are_told_apart():
    slow, quick = record("degree 1", {"fair": [0.1]}), record("degree 1", {"fair": [9.0]}, rate=0.3)
    slow["result"]["runs"][0]["bounds"] = [-2000.0, -1000.1]
    quick["result"]["runs"][0]["bounds"] = [-1009.0, -1009.0]

    lines = lines_of({"a": slow, "b": quick})

    (best,) = shown(lines)
    assert best.rate == 0.1 and soonest(lines, best).rate == 0.3


def test_records_of_another_sweep_are_refused():
    broken = record("degree 1", {"fair": [0.1]})
    del broken["result"]["spread"]

    with pytest.raises(ReportError, match="Expected result.spread in the record"):
        document({"a": broken}, title="", lead="", claims=lambda lines: [], text="")
