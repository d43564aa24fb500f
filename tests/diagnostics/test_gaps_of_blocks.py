"""Gaps and refinement of rows that something ties, against closed forms of linear normal models."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_avi as avi
from pyro_avi.closing.weight_source import TraceWeights
from pyro_avi.diagnostics.gaps import _MIXTURE

P, ITEMS, NOISE = 3, 2, 0.7
Y = torch.tensor([[0.3, -1.0], [1.2, 0.4], [-0.6, 2.0]], dtype=torch.float64)


def normal():
    return dist.Normal(torch.zeros((), dtype=torch.float64), 1.0)


def crossed(y):
    """y_pi ~ N(a_p + b_i, NOISE^2)."""
    persons, items = pyro.plate("persons", P, dim=-2), pyro.plate("items", ITEMS, dim=-1)
    with persons:
        a = pyro.sample("a", normal())
    with items:
        b = pyro.sample("b", normal())
    with persons, items:
        pyro.sample("y", dist.Normal(a + b, NOISE), obs=y)


def nested(y):
    """z_p ~ N(0, 1), w_pi ~ N(z_p, 1), y_pi ~ N(w_pi, NOISE^2)."""
    with pyro.plate("persons", P, dim=-2):
        z = pyro.sample("z", normal())
        with pyro.plate("items", ITEMS, dim=-1):
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("y", dist.Normal(w, NOISE), obs=y)


def series(y):
    """y_n ~ N(z_n + z_{n-1}, NOISE^2)."""
    with pyro.plate("time", P * ITEMS):
        z = pyro.sample("z", normal())
        before = torch.cat([torch.zeros_like(z[..., :1]), z[..., :-1]], -1)
        pyro.sample("y", dist.Normal(z + before, NOISE), obs=y)


def design(model):
    """``[N, K]`` from independent standard normals to the means, and how the latents follow from these."""
    one, other = torch.eye(P).double(), torch.eye(ITEMS).double()
    ones = torch.ones(ITEMS, 1).double()
    if model is crossed:
        return torch.cat([torch.kron(one, ones), torch.kron(torch.ones(P, 1).double(), other)], 1), torch.eye(P + ITEMS)
    if model is nested:
        # Latents z, then w = z + e.
        of_z = torch.cat([one, torch.zeros(P, P * ITEMS).double()], 1)
        of_w = torch.cat([torch.kron(one, ones), torch.eye(P * ITEMS).double()], 1)
        return of_w, torch.cat([of_z, of_w])
    count = P * ITEMS
    return torch.eye(count).double() + torch.ones(count - 1).diag(-1).double(), torch.eye(count)


def answers(model):
    """The log evidence and what the best independent normals lose, of all rows; these normals' means and deviations."""
    weight, latents = design(model)
    latents = latents.double()
    noise = NOISE**2 * torch.eye(P * ITEMS).double()
    evidence = dist.MultivariateNormal(torch.zeros(P * ITEMS).double(), weight @ weight.T + noise).log_prob(Y.flatten())
    of_noise = torch.eye(weight.shape[1]).double() + weight.T @ weight / NOISE**2
    # Of the latents themselves.
    inverse = torch.linalg.inv(latents)
    precision = inverse.T @ of_noise @ inverse
    mean = latents @ torch.linalg.solve(of_noise, weight.T @ Y.flatten() / NOISE**2)
    gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    return evidence.item(), gap.item(), mean, precision.diagonal().rsqrt()


# The plates, the numbers of rows of their tables, and of blocks.
CALLS = {
    "crossed": (crossed, Y, ("persons", "items"), [P, ITEMS], 1),
    "nested": (nested, Y, ("persons", "items"), [P, P * ITEMS], P),
    "series": (series, Y.flatten(), "time", [P * ITEMS], 1),
}


def best(call, *, shift=0.0):
    """A guide at the best independent normals, its means moved by some of their deviations."""
    model, y, plate, sizes, _ = CALLS[call]
    guide = avi.FactorizedGuide(model, plate=plate).setup(y)
    _, _, mean, deviation = answers(model)
    with torch.no_grad():
        rows = torch.stack([mean + shift * deviation, deviation.log()], 1).split(sizes)
        for table, values in zip(guide.row_tables().values(), rows, strict=True):
            table.copy_(values)
    return model, y, guide


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_gaps_are_those_of_the_blocks(call):
    model, y, guide = best(call)
    evidence, gap, _, _ = answers(model)
    gaps = avi.measure_gaps(model, guide, y, num_samples=600, num_steps=10, max_rounds=1)
    assert gaps.elbo.rows.shape == (CALLS[call][4],)
    # Resolved, and right; and a twin, no gap at all.
    assert gaps.elbo.se < gap / 5 and abs(gaps.elbo.value - (evidence - gap)) < 5 * gaps.elbo.se
    assert abs(gaps.elbo.value - evidence) > 5 * gaps.elbo.se
    bound = gaps.evidence
    assert abs(bound.value - evidence) < 5 * bound.se + gaps.slack.value or gaps.unreliable.any()
    # Nothing is left to gain.
    assert abs(gaps.amortization.value) <= 5 * gaps.amortization.se + 1e-9


@pytest.mark.parametrize("call", CALLS)
def test_refinement_finds_the_best_normals_again(call):
    model, y, guide = best(call, shift=1.0)
    evidence, gap, _, _ = answers(model)
    refined = avi.refine(model, guide, y, num_steps=150)
    bounds = [avi.elbo(avi.log_weights(model, q, y, num_samples=400)) for q in (guide, refined)]
    # One deviation of each mean costs half a nat or more.
    assert bounds[0].value + 5 * bounds[0].se < evidence - gap - 1
    assert abs(bounds[1].value - (evidence - gap)) < 5 * bounds[1].se + 0.05


@pytest.mark.parametrize(("far", "found"), [(0.0, True), (-torch.inf, False), (torch.nan, False)])
def test_wide_factors_count_where_the_model_has_a_density_at_all_their_draws(monkeypatch, far, found):
    """Of six tied rows whose best factors are far too narrow; where one draw has no density, they are left out."""
    weights = TraceWeights.weights

    def weights_of(source, guide, draws):
        result = weights(source, guide, draws)
        if draws.seed == _MIXTURE:
            assert (guide.table == torch.tensor([0.0, 0.0])).all()
            result.local[3] += far
        return result

    monkeypatch.setattr(TraceWeights, "weights", weights_of)
    guide = avi.FactorizedGuide(series, plate="time", init_scale=0.02).setup(Y.flatten())
    options = {"num_samples": 50, "num_steps": 1, "max_rounds": 1, "lr": 0.0, "progress": False}
    gaps = avi.measure_gaps(series, guide, Y.flatten(), **options)
    matrix = design(series)[0]
    covariance = matrix @ matrix.T + NOISE**2 * torch.eye(P * ITEMS).double()
    exact = dist.MultivariateNormal(torch.zeros(P * ITEMS).double(), covariance).log_prob(Y.flatten()).item()
    # By the narrow factors alone it is 2.7 nats short, by the wide ones 0.1, with a standard error of 0.75.
    assert (exact - gaps.evidence.rows.item() < 1.4) == found


def test_rows_without_an_evidence_of_their_own_are_not_annealed():
    model, y, guide = best("series")
    with pytest.raises(ValueError, match="independent given the global latents, got rows that are tied"):
        avi.ais(model, guide, y, num_chains=2, num_temperatures=2, num_leapfrog=1)
    model, y, guide = best("crossed")
    with pytest.raises(ValueError, match="rows of one plate"):
        avi.ais(model, guide, y, num_chains=2, num_temperatures=2, num_leapfrog=1)


@pytest.mark.slow
def test_a_joint_evidence_is_that_of_the_one_block():
    one = torch.ones(1, 1)
    model = avi.models.LinearGaussianStateSpace(0.8 * one, one, size=6, transition_scale=1.0, emission_scale=0.7)
    x = Y.flatten().float().unsqueeze(1)
    guide = avi.ConstantGuide(model).setup(x)
    gaps = avi.measure_gaps(model, guide, x, num_samples=50, num_steps=5, max_rounds=1)
    assert gaps.exact and gaps.evidence.value == pytest.approx(model.log_evidence(x).item())
