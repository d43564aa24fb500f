"""The contract of the measurements: right on models of every structure, or refused with a sentence."""

import dataclasses

import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_value
from pyro.poutine.util import site_is_subsample

import pyro_avi as avi
from pyro_avi.inspection.sites import is_observation
from tests.measured.brute_force import laplace, log_evidence
from tests.measured.cases import CALLS, best_table, cases, held, is_known, make, near
from tests.measured_structures import GUIDES, MEASUREMENTS, STRUCTURES

# --- the structures themselves


def test_structures_are_many_and_each_is_measured():
    assert len(STRUCTURES) >= 40
    for name, structure in STRUCTURES.items():
        keys = set(structure.refused) - {"setup", *MEASUREMENTS}
        assert all(key.partition(" ")[0] in GUIDES and key.partition(" ")[2] for key in keys), name
        assert structure.brute_force in ("mode", "wide", None), name


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if STRUCTURES[name].is_conjugate else pytest.mark.slow)
        for name, structure in STRUCTURES.items()
        if structure.brute_force
    ],
)
def test_the_exact_evidence_is_that_of_the_models_density(name):
    structure = STRUCTURES[name]
    value, error = log_evidence(structure, num_samples=500)
    exact = structure.evidence.sum()
    assert abs(value - exact) < 4 * error + 1e-4 * abs(exact), (value, error, exact)
    # A row that is left out would be seen.
    assert error < min(1.0, 0.5 * abs(exact)) or exact == 0


# --- log weights


def whole(model, guide, args, seed):
    """The log weight of one draw, as Pyro's traces have it."""
    torch.manual_seed(seed)
    guide_trace = poutine.trace(guide).get_trace(*args)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    if any(site["infer"].get("enumerate") for site in model_trace.nodes.values() if site["type"] == "sample"):
        return None
    return torch.as_tensor(model_trace.log_prob_sum() - guide_trace.log_prob_sum()).double()


def check_blocks(weights, structure):
    numbers = torch.cat([blocks.flatten() for blocks in (weights.blocks or {(): torch.arange(0)}).values()])
    assert weights.local.shape[1] == len(structure.evidence)
    assert weights.scale == pytest.approx(structure.scale)
    if structure.blocks is not None and weights.blocks is not None:
        assert next(iter(weights.blocks.values())).tolist() == list(structure.blocks)
        assert set(numbers.tolist()) == set(range(len(structure.evidence)))
    else:
        assert structure.blocks in (None, (0,)) or len(structure.evidence) == 1


@cases("log_weights")
def test_log_weights(kind, name):
    """They add up to the log joint, and their blocks' mean weights are the evidence."""
    structure = STRUCTURES[name]
    model, guide = make(kind, name, held(name))
    torch.manual_seed(3)
    weights = avi.log_weights(model, guide, *structure.args, num_samples=60, seed=3)

    check_blocks(weights, structure)
    assert not weights.has_globals
    total = whole(model.eval() if isinstance(model, torch.nn.Module) else model, guide, structure.args, 3)
    if total is not None:
        torch.testing.assert_close(weights.total[0], total, rtol=1e-5, atol=1e-4)
    estimate = avi.iwelbo(weights)
    # Draws for several rows at once hardly meet the posterior, until the guide is refined.
    near(estimate.rows, estimate.rows_se, structure.evidence, at_most=0.4, resolved=0.2 * (structure.blocks is None))


@cases("log_weights", is_known, kinds=("FactorizedGuide",))
def test_every_draw_from_the_posterior_has_the_evidence_as_its_weight(kind, name):
    structure = STRUCTURES[name]
    model, guide = best_table(name)

    weights = avi.log_weights(model, guide, *structure.args, num_samples=3)

    exact = torch.as_tensor(structure.evidence).expand(3, -1)
    torch.testing.assert_close(weights.local, exact, rtol=1e-4, atol=1e-4)
    assert weights.global_.abs().max() < 1e-6


@pytest.mark.parametrize("name", [name for name, structure in STRUCTURES.items() if structure.theta])
@pytest.mark.slow
def test_the_weights_of_the_whole_data_set_have_its_evidence(name):
    structure = STRUCTURES[name]
    mode, _ = laplace(dataclasses.replace(structure, theta={}))
    # Wider than the posterior, whose latents depend on one another.
    model, guide = make("FactorizedGuide", name, init_loc_fn=init_to_value(values=mode), init_scale=0.6)

    weights = avi.log_weights(model, guide, *structure.args, num_samples=1500)

    assert weights.has_globals
    estimate = avi.iwelbo(weights)
    assert estimate.se < 0.2 and abs(estimate.value - structure.total) < 4 * estimate.se, (estimate, structure.total)


# --- export


@cases("to_arviz", fast=4, one_kind=True)
def test_to_arviz(kind, name):
    structure = STRUCTURES[name]
    model, guide = make(kind, name)
    torch.manual_seed(3)
    weights = avi.log_weights(model, guide, *structure.args, num_samples=4, seed=3)

    data = avi.to_arviz(model, guide, *structure.args, num_samples=4, seed=3)

    stats = data["sample_stats"]
    # After the first draw, latents that are summed out are drawn as well.
    same = slice(0, 1 if set(data["posterior"].data_vars) - set(guide.median(*structure.args)) else None)
    for label, expected in (("log_weight", weights.total), ("local_log_weight", weights.local)):
        assert stats[label].values[0][same] == pytest.approx(expected.numpy()[same], rel=1e-5, abs=1e-4)
    trace = poutine.trace(model).get_trace(*structure.args)
    drawn = {label for label, site in trace.nodes.items() if is_drawn(site)}
    assert {str(label) for label in data["posterior"].data_vars} == drawn
    for label in drawn:
        values = data["posterior"][label].values[0]
        assert values.reshape(4, -1).shape[1] == trace.nodes[label]["value"].numel(), label


def is_drawn(site):
    return site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)


@cases("posterior_predictive", fast=4, one_kind=True)
def test_posterior_predictive(kind, name):
    structure = STRUCTURES[name]
    model, guide = make(kind, name)
    draws = avi.posterior_predictive(model, guide, *structure.args, num_samples=6)
    trace = poutine.trace(model).get_trace(*structure.args)
    observed = {label: site["value"] for label, site in trace.nodes.items() if is_observation(site)}
    assert draws.keys() == observed.keys()
    for label, value in observed.items():
        assert draws[label].shape == (6, *value.shape) and draws[label].isfinite().all(), label


# --- what is refused


def refusals():
    """Every refusal of a guide, those of its set-up once."""
    for name, structure in STRUCTURES.items():
        for kind in GUIDES:
            never = "setup" in structure.refused or f"{kind} setup" in structure.refused
            for measurement in MEASUREMENTS[:1] if never else MEASUREMENTS:
                if measurement in structure.applies and structure.refusal(kind, measurement):
                    yield pytest.param(kind, name, measurement, id=f"{measurement}, {kind}, {name}")


@pytest.mark.parametrize("kind, name, measurement", list(refusals()))
def test_what_is_refused(kind, name, measurement):
    structure = STRUCTURES[name]
    with pytest.raises(ValueError, match=structure.refusal(kind, measurement)):
        model, guide = make(kind, name)
        CALLS[measurement](model, guide, structure.args, structure)


# --- measurements change nothing


@pytest.mark.parametrize("name", ["dropout in a decoder", "batch normalization in a decoder"])
@pytest.mark.parametrize("measurement", MEASUREMENTS)
def test_nothing_moves(name, measurement):
    structure = STRUCTURES[name]
    model = structure.make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    guide = avi.AmortizedGuide(model, encoder=(4,)).setup(*structure.args)
    of_guide = {key: value.clone() for key, value in guide.state_dict().items()}

    CALLS[measurement](model, guide, structure.args, structure)

    assert all(module.training for module in model.modules())
    for module, state in ((model, before), (guide, of_guide)):
        for key, value in module.state_dict().items():
            assert torch.equal(value, state[key]), key
