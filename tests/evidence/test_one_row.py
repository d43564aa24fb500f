"""Models whose latents are all global, measured as one row."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_avi as avi

X = torch.tensor([0.5, -1.0, 2.0, 0.7, 1.1], dtype=torch.float64)
# z ~ N(0, I) in two dimensions, x_n ~ N(z_1 + z_2, 1): evidence, and what independent normals lose.
COVARIANCE = torch.eye(5).double() + 2.0
EVIDENCE = dist.MultivariateNormal(torch.zeros(5).double(), COVARIANCE).log_prob(X).item()
PRECISION = torch.eye(2).double() + 5.0
APPROXIMATION = 0.5 * (PRECISION.diagonal().log().sum() - PRECISION.logdet()).item()

pytestmark = pytest.mark.filterwarnings("ignore:The model has no plate")


def model(x):
    # Indexed from the left: no dimension may be in its way.
    z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z[0] + z[1], 1.0), obs=x)


@pytest.fixture(params=[avi.ConstantGuide, avi.AmortizedGuide, avi.FactorizedGuide])
def guide(request):
    pyro.clear_param_store()
    torch.manual_seed(0)
    guide = request.param(model).setup(X)
    mean = torch.linalg.solve(PRECISION, torch.full((2,), X.sum().item()).double())
    with torch.no_grad():
        # The best independent normals.
        guide.global_guide.vector.copy_(torch.cat([mean, -0.5 * PRECISION.diagonal().log()]))
    return guide


def test_the_bounds_of_the_one_row(guide):
    weights = avi.log_weights(model, guide, X, num_samples=1000)
    assert weights.local.shape == (1000, 1) and not weights.global_.any() and not weights.has_globals
    for estimate, expected in ((avi.elbo(weights), EVIDENCE - APPROXIMATION), (avi.iwelbo(weights), EVIDENCE)):
        assert estimate.se < APPROXIMATION / 6 and abs(estimate.value - expected) < 5 * estimate.se
    bound = avi.ais(model, guide, X, num_chains=40, num_temperatures=6, num_leapfrog=2)
    assert bound.se < APPROXIMATION / 5 and abs(bound.value - EVIDENCE) < 5 * bound.se


def test_the_gaps_of_the_one_row(guide):
    with torch.no_grad():
        guide.global_guide.vector[0] += 0.5
    options = {"num_samples": 100, "num_steps": 60, "max_rounds": 1, "evidence": torch.tensor([EVIDENCE])}
    gaps = avi.measure_gaps(model, guide, X, **options)
    # The shift of one mean costs half its square times the precision; sixty steps may leave some hundredths.
    loss = 0.5 * 0.25 * PRECISION[0, 0].item()
    assert gaps.amortization.se < loss / 6
    assert gaps.amortization.value == pytest.approx(loss, abs=5 * gaps.amortization.se + 0.06)
    assert gaps.approximation.value == pytest.approx(APPROXIMATION, abs=5 * gaps.approximation.se + 0.06)


def test_calibration_of_the_one_row(guide):
    with pytest.raises(ValueError, match="num_steps"):
        avi.sbc(model, guide, X, num_simulations=3, num_samples=20)
    found = avi.sbc(model, guide, X, num_simulations=3, num_samples=20, num_steps=5)
    assert found.ranks.shape == (3, 3) and found.names == ("z[0]", "z[1]", "log likelihood")


def test_another_factor_of_the_globals_is_weighed_but_not_measured():
    guide = avi.ConstantGuide(model, global_guide=pyro.infer.autoguide.AutoMultivariateNormal)
    guide.setup(X)
    weights = avi.log_weights(model, guide, X, num_samples=10)
    assert weights.local.shape == (10, 1) and math.isfinite(avi.elbo(weights).value)
    with pytest.raises(ValueError, match="default factor of global latents, got AutoMultivariateNormal"):
        avi.measure_gaps(model, guide, X, num_samples=30, num_steps=1)
