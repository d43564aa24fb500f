"""The contract of the measurements that look at every row by itself: evidence, gaps, refinement, calibration."""

import pytest
import torch

import pyro_avi as avi
from tests.measured.cases import CALLS, best_table, cases, given, held, is_known, make, near
from tests.measured_structures import STRUCTURES


@cases("ais", fast=4, one_kind=True)
def test_ais(kind, name):
    structure = STRUCTURES[name]
    model, guide = make(kind, name)

    bound = avi.ais(
        model, guide, *structure.args, num_chains=100, num_temperatures=8, num_leapfrog=2, **given(structure)
    )

    near(bound.rows, bound.rows_se, structure.evidence, at_most=0.5, resolved=0.6)
    assert bound.value == pytest.approx(structure.scale * bound.rows.sum().item(), rel=1e-6)


def bounds(model, guide, args, num_samples=40):
    """The ELBOs of blocks, by the same draws for guides of one family."""
    torch.manual_seed(5)
    return avi.log_weights(model, guide, *args, num_samples=num_samples, seed=5).local


@cases("refine", fast=6, one_kind=True)
def test_refine(kind, name):
    """No block loses, and none ends above its evidence."""
    structure = STRUCTURES[name]
    model, guide = make(kind, name, held(name))

    refined = avi.refine(model, guide, *structure.args, num_steps=60, lr=0.1)

    assert isinstance(refined, avi.FactorizedGuide)
    # Few draws would all have the same label.
    num_samples = 400 if "discrete" in structure.refused.get("ais", "") else 40
    before, after = (bounds(model, each, structure.args, num_samples) for each in (guide, refined))
    error = (after - before).std(0) / len(before) ** 0.5
    assert (after.mean(0) >= before.mean(0) - 4 * error - 1e-4).all(), (before.mean(0), after.mean(0), error)
    above = after.mean(0) - torch.as_tensor(structure.evidence)
    assert (above <= 4 * after.std(0) / len(after) ** 0.5 + 1e-3).all(), above


# Of several modes, and of latents that depend on one another, a factor that is refined misses a part.
@cases("refine", lambda structure: structure.is_conjugate, kinds=("FactorizedGuide",), fast=100)
def test_refined_rows_have_their_evidence(kind, name):
    structure = STRUCTURES[name]
    model, guide = make(kind, name, held(name))
    refined = avi.refine(model, guide, *structure.args, num_steps=150, lr=0.1)

    weights = avi.log_weights(model, refined, *structure.args, num_samples=structure.num_samples)

    estimate = avi.iwelbo(weights)

    near(estimate.rows, estimate.rows_se, structure.evidence, at_most=0.3)


@cases("refine", is_known, kinds=("FactorizedGuide",), fast=8)
def test_refinement_of_an_exact_posterior_stays_there(kind, name):
    structure = STRUCTURES[name]
    model, guide = best_table(name)

    refined = avi.refine(model, guide, *structure.args, num_steps=20)

    # Where the path's gradient vanishes at every draw, nothing moves but by rounding.
    after = bounds(model, refined, structure.args)
    torch.testing.assert_close(after, torch.as_tensor(structure.evidence).expand_as(after), rtol=1e-3, atol=2e-2)


@cases("measure_gaps", fast=20, one_kind=True)
def test_measure_gaps(kind, name):
    structure = STRUCTURES[name]
    model, guide = make(kind, name)

    gaps = avi.measure_gaps(
        model, guide, *structure.args, num_samples=100, num_steps=40, max_rounds=2, lr=0.1, **given(structure)
    )

    exact = torch.as_tensor(structure.evidence)
    assert not gaps.exact and gaps.evidence.rows.shape == exact.shape
    above = gaps.evidence.rows - exact
    assert (above <= 4 * gaps.evidence.rows_se + 1e-3).all(), above
    # What is called reliable is short by no more than the slack says.
    short = -above - 4 * gaps.evidence.rows_se - gaps.slack.rows
    assert (short[~gaps.unreliable] <= 0.05).all(), short
    assert (gaps.amortization.rows >= -4 * gaps.amortization.rows_se - 1e-4).all()
    assert (gaps.inference.rows >= -4 * gaps.inference.rows_se - 1e-4).all()
    parts = gaps.approximation.rows + gaps.amortization.rows
    torch.testing.assert_close(parts, gaps.inference.rows, rtol=1e-6, atol=1e-8)


@cases("measure_gaps", is_known, kinds=("FactorizedGuide",), fast=16)
def test_gaps_of_an_exact_posterior_are_zero(kind, name):
    structure = STRUCTURES[name]
    model, guide = best_table(name)

    gaps = avi.measure_gaps(model, guide, *structure.args, num_samples=50, num_steps=10, max_rounds=1)

    apart = (gaps.evidence.rows - torch.as_tensor(structure.evidence)).abs()
    assert (apart <= 4 * gaps.evidence.rows_se + 1e-2).all(), apart
    for gap in (gaps.inference, gaps.approximation, gaps.amortization):
        assert (gap.rows.abs() <= 4 * gap.rows_se + 1e-2).all(), gap


# --- calibration, export


@cases("sbc", is_known, kinds=("FactorizedGuide",), fast=100)
def test_ranks_of_exact_posteriors_are_uniform(kind, name):
    structure = STRUCTURES[name]
    model, guide = make(kind, name)

    calibration = avi.sbc(
        model,
        guide,
        *structure.args,
        num_simulations=10,
        num_samples=99,
        num_steps=100,
        lr=0.1,
        rebuild=structure.rebuild,
        **given(structure),
    )

    assert len(calibration.ranks) == 10 * len(structure.evidence)
    assert calibration.names[-1] == "log likelihood"
    assert (calibration.p_values > 1e-3).all(), calibration.p_values


@cases("sbc", fast=10, one_kind=True)
def test_sbc_runs(kind, name):
    structure = STRUCTURES[name]
    model, guide = make(kind, name)

    calibration = CALLS["sbc"](model, guide, structure.args, structure)

    assert len(calibration.ranks) == 2 * len(structure.evidence)
    assert ((calibration.ranks >= 0) & (calibration.ranks <= 20)).all()
