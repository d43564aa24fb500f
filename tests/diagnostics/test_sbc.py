"""Simulation-based calibration: of exact posteriors, of factors that are off by a known amount, of what is no posterior."""

import arviz
import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_avi as avi
from pyro_avi.diagnostics.simulated_data import Simulator
from pyro_avi.estimators.ranks import UniformBand
from pyro_avi.inspection.isolated_run import isolated_run

ROWS, SIGMA = 2_500, 0.6
# The columns are not orthogonal.
WEIGHT = torch.tensor([[1.0, 0.7], [0.6, 1.0], [0.5, 0.5]], dtype=torch.double)
PRECISION = torch.eye(2, dtype=torch.double) + WEIGHT.T @ WEIGHT / SIGMA**2
X = torch.linspace(-2, 2, 6, dtype=torch.double)
MANY = {"num_simulations": 4, "num_samples": 49}
FEW = {"num_simulations": 1, "num_samples": 20}


def factors():
    return avi.models.FactorAnalysis(WEIGHT, SIGMA, size=ROWS), torch.zeros(ROWS, 3, dtype=torch.double)


def linear(model, x, slope, scale, *, full=False):
    """An amortized guide that answers N(slope x, scale scale')."""
    guide = avi.AmortizedGuide(model, nn.Identity(), family=avi.MultivariateNormal() if full else None).setup(x)
    sd = scale.diagonal()
    lower = (scale / sd.unsqueeze(-1))[tuple(torch.tril_indices(len(sd), len(sd), -1))] if full else sd[:0]
    with torch.no_grad():
        guide.head.weight.zero_()[: len(sd)] = slope
        guide.head.bias.copy_(torch.cat([torch.zeros_like(sd), sd.log(), lower]))
    return guide


def of_factors(*, full, stretch=1.0):
    """The exact posterior, or the best independent normals, with all standard deviations stretched."""
    model, x = factors()
    scale = torch.linalg.cholesky(PRECISION.inverse()) if full else PRECISION.diagonal().rsqrt().diag()
    guide = linear(model, x, torch.linalg.solve(PRECISION, WEIGHT.T / SIGMA**2), stretch * scale, full=full)
    return model, guide, x


def exact_coverage(ratio, num_samples, probs):
    """That of central intervals between draws from N(m, (ratio s)^2) for N(m, s^2), by quadrature over the latter."""
    e = torch.linspace(-8, 8, 2001, dtype=torch.double)
    below = dist.Binomial(num_samples, dist.Normal(0.0, 1.0).cdf(e / ratio).clamp(1e-15, 1 - 1e-15))
    ranks = torch.arange(num_samples + 1, dtype=torch.double)
    mass = below.log_prob(ranks.unsqueeze(-1)).exp() @ torch.softmax(-0.5 * e**2, 0)
    inside = (2 * (ranks + 0.5) / (num_samples + 1) - 1).abs() <= torch.tensor(probs).unsqueeze(-1) + 1e-6
    return inside.double() @ mass


# --- closed forms


def test_ranks_of_the_exact_posterior_are_uniform():
    model, guide, x = of_factors(full=True)
    found = avi.sbc(model, guide, x, **MANY)
    assert found.ranks.shape == (4 * ROWS, 3) and found.names == ("z[0]", "z[1]", "log likelihood")
    assert found.ranks.min() == 0 and found.ranks.max() == 49
    assert (found.p_values > 0.01).all()
    coverage = found.coverage([0.5, 0.9])
    assert coverage.se.max() < 0.006
    assert ((coverage.empirical - coverage.nominal.unsqueeze(-1)).abs() < 5 * coverage.se).all()
    # The prior has variance 1.
    torch.testing.assert_close(found.contraction, 1 - PRECISION.inverse().diagonal(), atol=0.03, rtol=0.0)


def test_a_scale_off_by_a_tenth_is_seen():
    stretch = 1.1
    model, guide, x = of_factors(full=True, stretch=stretch)
    found = avi.sbc(model, guide, x, **MANY)
    assert (found.p_values < 1e-3).all()
    coverage = found.coverage([0.5, 0.9])
    expected = exact_coverage(stretch, 49, [0.5, 0.9])
    near = (coverage.empirical[:, :2] - expected.unsqueeze(-1)).abs() < 5 * coverage.se[:, :2]
    calibrated = (coverage.empirical[:, :2] - coverage.nominal.unsqueeze(-1)).abs() < 5 * coverage.se[:, :2]
    assert near.all() and not calibrated.any()


def test_independent_normals_are_too_narrow_by_as_much_as_they_must():
    model, guide, x = of_factors(full=False)
    found = avi.sbc(model, guide, x, **MANY)
    coverage = found.coverage([0.5, 0.9])
    ratios = PRECISION.diagonal().rsqrt() / PRECISION.inverse().diagonal().sqrt()
    assert (ratios < 0.75).all()

    def agrees(error):
        expected = torch.stack([exact_coverage(error * ratio, 49, [0.5, 0.9]) for ratio in ratios], -1)
        return (coverage.empirical[:, :2] - expected).abs() < 5 * coverage.se[:, :2]

    assert coverage.se.max() < 0.006 and agrees(1.0).all() and not agrees(0.9).any() and not agrees(1.1).any()
    assert (found.p_values < 1e-3).all()


def test_draws_as_good_as_the_truth_cover_what_ranks_say():
    for count in (20, 99):
        model = torch.ones(3, 1)
        found = avi.Calibration(model.long(), ("z",), count, model[0]).coverage([0.3, 0.5, 0.95])
        torch.testing.assert_close(found.nominal, exact_coverage(1.0, count, [0.3, 0.5, 0.95]), atol=1e-9, rtol=0.0)


@pytest.mark.parametrize("held, calibrated", [(0.7, True), (1.0, False)])
def test_rows_are_simulated_and_answered_at_the_same_global_latents(held, calibrated):
    tau, sigma, theta = 1.2, 0.8, 0.7
    model = avi.models.NormalNormal(tau, sigma, size=ROWS)
    x = torch.zeros(ROWS, 1)
    variance = tau**2 + sigma**2
    guide = linear(model, x, torch.tensor([[tau / variance]]), torch.tensor([[sigma / variance**0.5]]))
    with torch.no_grad():
        guide.head.bias[0] = -theta * tau / variance
    found = avi.sbc(model, guide, x, theta={"theta": torch.tensor(held)}, **MANY)
    assert found.names == ("z[0]", "log likelihood")
    assert bool((found.p_values > 0.01).all()) == calibrated
    # Rows lie 0.3 higher than the guide expects, and so it takes their latents to be larger: of two normals with one scale,
    # shifted, the second is below the first as often as the difference is negative.
    shift = 0.0 if calibrated else -0.3 * tau / sigma / variance**0.5
    expected = dist.Normal(0.0, 1.0).cdf(torch.tensor(shift / 2**0.5)).item()
    assert abs(found.pit[:, 0].mean().item() - expected) < 5 * (1 / 12 / len(found.ranks)) ** 0.5


def test_ranks_of_latents_cannot_see_a_guide_that_ignores_the_data():
    model, x = factors()
    prior = avi.ConstantGuide(model).setup(x)
    with torch.no_grad():
        prior.vector.zero_()
    found = avi.sbc(model, prior, x, **MANY)
    assert (found.p_values[:2] > 0.01).all() and found.contraction.abs().max() < 0.05
    # The likelihood can: that of a row's own latent is higher than those of others.
    assert found.p_values[2] < 1e-3 and found.pit[:, 2].mean() > 0.8


def test_refined_answers_are_those_of_the_best_factors():
    model, _ = factors()
    x = torch.zeros(1_000, 3, dtype=torch.double)
    guide = avi.FactorizedGuide(model).setup(x)
    found = avi.sbc(model, guide, x, num_simulations=2, num_samples=99, num_steps=100, lr=0.1)
    coverage = found.coverage([0.9])
    ratios = PRECISION.diagonal().rsqrt() / PRECISION.inverse().diagonal().sqrt()
    expected = torch.stack([exact_coverage(ratio, 99, [0.9]) for ratio in ratios], -1)
    # What the steps leave: a twentieth of the scale.
    off = exact_coverage(1.05 * ratios[0], 99, [0.9]) - exact_coverage(ratios[0], 99, [0.9])
    assert ((coverage.empirical[:, :2] - expected).abs() < 5 * coverage.se[:, :2] + off).all()


def test_refinement_holds_the_global_latents():
    model = avi.models.NormalNormal(1.2, 0.8, size=500)
    x = torch.zeros(500, 1)
    # The guide's own factor of them is far off, and not asked.
    guide = avi.FactorizedGuide(model).setup(x)
    theta = {"theta": torch.tensor(2.0)}
    found = avi.sbc(model, guide, x, num_simulations=1, num_samples=49, num_steps=100, lr=0.1, theta=theta)
    assert (found.pit[:, 0].mean() - 0.5).abs() < 5 * (1 / 12 / 500) ** 0.5
    assert (found.coverage([0.5]).empirical[0, 0] - 0.5).abs() < 0.1


@pytest.mark.parametrize("full", [True, False])
def test_refinement_starts_at_the_guides_own_answers(full):
    model, guide, _ = of_factors(full=full)
    x = torch.zeros(50, 3, dtype=torch.double)
    with torch.no_grad():
        # Away from the best, where a row has something to gain.
        guide.local_parameters()[-1].add_(0.7)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    kept, moved = (avi.sbc(model, guide, x, **FEW, num_steps=20, lr=lr).ranks for lr in (0.0, 0.1))
    assert torch.equal(kept, avi.sbc(model, guide, x, **FEW).ranks) and not torch.equal(kept, moved)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())


# --- the test of uniformity


def ranks(seed, rows=200, columns=300, count=20):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, count + 1, (rows, columns)))


def test_p_values_of_uniform_ranks_are_uniform():
    band = UniformBand(200, 20)
    p = band.p_values(ranks(1, columns=2_000))
    for level in (0.05, 0.3, 0.7):
        assert abs((p <= level).double().mean().item() - level) < 5 * (level * (1 - level) / 2_000) ** 0.5
    # Ranks that leave ties at their lower ends are not uniform, and neither are those of one draw less.
    assert (band.p_values(2 * (ranks(1) // 2)) < 0.05).double().mean() > 0.5
    assert (band.p_values(ranks(1, count=18)) < 0.05).double().mean() > 0.5


def test_the_band_and_the_p_value_say_the_same():
    band = UniformBand(200, 20)
    drawn = torch.cat([ranks(2), ranks(3, count=19)], 1)
    lower, upper = (end.unsqueeze(-1) for end in band.band(0.95))
    line = band.distribution(drawn)
    inside = ((line >= lower - 1e-9) & (line <= upper + 1e-9)).all(0)
    p = band.p_values(drawn)
    clear = (p - 0.05).abs() > 0.005
    assert torch.equal(inside[clear], p[clear] > 0.05) and inside.any() and not inside.all()


def test_the_band_is_that_of_arviz():
    stats = pytest.importorskip("arviz.stats.ecdf_utils")
    band = UniformBand(500, 19)
    shares = band.shares.numpy()
    lower, upper = (end.numpy() for end in band.band(0.9))
    theirs = stats.ecdf_confidence_band(500, shares, shares, prob=0.9, method="optimized")
    # Binomial quantiles are multiples of 1/500.
    assert np.abs(lower - theirs[0]).max() < 0.0045 and np.abs(upper - theirs[1]).max() < 0.0045
    assert (upper - lower).max() < 0.2


# --- putting the simulated values into the arguments


def plain(x, index=None, shift=0.0):
    with pyro.plate("data", 6, subsample=index):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z + shift, 0.5), obs=x)


def reshaped(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x.reshape(-1))


def in_a_dictionary(batch, weight):
    pyro.sample("outside", dist.Normal(0.0, 1.0), obs=weight)
    with pyro.plate("data", len(batch["x"])):
        z = pyro.sample("z", dist.Normal(batch["x"].new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=batch["x"])
        pyro.sample("count", dist.Poisson(z.exp()), obs=batch["count"])


def transformed(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x.log())


def drawn_rows(x):
    with pyro.plate("data", len(x), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])


def simulated(model, *args, rebuild=None, **kwargs):
    simulator = Simulator(model, "data", args, kwargs, ["z"], rebuild)
    with isolated_run(1):
        latents, call = simulator.draw()
    trace = poutine.trace(poutine.condition(model, data=latents)).get_trace(*call.args, **call.kwargs)
    trace.compute_log_prob()
    observed = [name for name, site in trace.nodes.items() if site["type"] == "sample" and site["is_observed"]]
    sites = [trace.nodes[name] for name in observed if name not in ("z", "outside")]
    expected = sum(site["log_prob"] / site["scale"] for site in sites)
    torch.testing.assert_close(call.log_likelihood(latents), expected.double())
    return latents["z"], call


def test_the_argument_that_is_observed_is_replaced_and_no_other():
    index = torch.tensor([4, 1, 0])
    shift = torch.full((3,), 100.0, dtype=torch.double)
    z, call = simulated(plain, X[:3], index, shift=shift)
    assert torch.equal(call.args[1], index) and torch.equal(call.kwargs["shift"], shift)
    assert call.args[0].shape == (3,) and ((call.args[0] - 100 - z).abs() < 3).all()
    # Zeros in the place of data, and zeros that are none.
    zeros = torch.zeros(6, dtype=torch.double)
    _, call = simulated(plain, zeros, shift=zeros.clone())
    assert torch.equal(call.kwargs["shift"], zeros) and call.args[0].abs().min() > 0


def test_shapes_nests_and_types_are_kept():
    z, call = simulated(reshaped, X.reshape(6, 1))
    assert call.args[0].shape == (6, 1) and ((call.args[0][:, 0] - z).abs() < 3).all()
    weight, counts = torch.tensor(3.0), torch.arange(6)
    _, call = simulated(in_a_dictionary, {"x": X, "count": counts}, weight)
    batch, same = call.args
    assert same is weight and batch["count"].dtype == torch.long and not torch.equal(batch["count"], counts)


def test_what_is_computed_from_an_argument_is_rebuilt_as_told():
    z, call = simulated(transformed, X.exp(), rebuild=lambda values: ((values["x"].exp(),), {}))
    assert ((call.args[0].log() - z).abs() < 3).all()


WRONG = {
    "computed": (transformed, {}, "Expected the values observed at site 'x' to be an argument"),
    "drawn rows": (drawn_rows, {}, "Expected the values observed at site 'x' to be an argument"),
    "not what is observed": (
        transformed,
        {"rebuild": lambda values: ((values["x"].exp() + 1,), {})},
        "Expected the model to observe the simulated values at site 'x'",
    ),
    "other rows every time": (
        drawn_rows,
        {"rebuild": lambda values: ((values["x"].repeat(3),), {})},
        "Expected the model to observe the simulated values at site 'x'",
    ),
    "scaled": (poutine.scale(plain, scale=2.0), {}, "Expected a model whose draws follow its density, got a scale"),
    "masked": (poutine.mask(plain, mask=X > 0), {}, "Expected a model whose draws follow its density, got a mask"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_call_that_cannot_be_simulated_is_refused(name):
    model, options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        simulated(model, X.exp(), **options)


def test_a_model_with_a_factor_or_without_data_is_refused():
    def factored(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("more", -z)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    with pytest.raises(ValueError, match="got a pyro.factor at site 'more'"):
        simulated(factored, X)
    with pytest.raises(ValueError, match="Expected an observation in plate 'data'"):
        simulated(avi.models.NormalNormal(1.0, 1.0, size=3))


def test_masks_of_observations_are_kept():
    def partly(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    _, call = simulated(partly, X, X > 0)
    assert torch.equal(call.args[1], X > 0)


# --- latents of every kind


def test_ties_of_discrete_latents_are_ranked_at_random():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.3)))
            pyro.sample("x", dist.Normal(z, 3.0), obs=x)

    x = torch.zeros(ROWS)
    guide = avi.ConstantGuide(model).setup(x)
    with torch.no_grad():
        guide.vector.copy_(torch.tensor([0.7, 0.3]).log())
    found = avi.sbc(model, guide, x, num_simulations=1, num_samples=30)
    assert found.p_values[0] > 0.01 and found.p_values[1] < 1e-3
    with torch.no_grad():
        guide.vector.copy_(torch.tensor([0.6, 0.4]).log())
    assert avi.sbc(model, guide, x, num_simulations=1, num_samples=30).p_values[0] < 1e-3


def test_coordinates_are_named_by_site():
    def model(x):
        rows = pyro.plate("data", 6, dim=-1)
        with pyro.plate("outer", 3, dim=-2), rows:
            pyro.sample("in both", dist.Normal(x.new_zeros(()), 1.0))
        with rows:
            rates = pyro.sample("rates", dist.Gamma(2.0, x.new_ones(2, 1)).to_event(2))
            pyro.sample("x", dist.Normal(rates.sum((-1, -2)), 0.5), obs=x)

    found = avi.sbc(model, avi.AmortizedGuide(model, (4,), plate="data").setup(X), X, **FEW)
    assert found.names == ("in both[0]", "in both[1]", "in both[2]", "rates[0,0]", "rates[1,0]", "log likelihood")
    assert found.ranks.shape == (6, 6)


# --- results


def short(**options):
    guide = avi.AmortizedGuide(plain, (4,)).setup(X)
    return avi.sbc(plain, guide, X, **{"num_simulations": 5, "num_samples": 20, **options})


def test_the_program_is_left_as_it_is_and_the_seed_decides():
    short()
    state = torch.get_rng_state()
    one, same, other = short(), short(), short(seed=1)
    assert torch.equal(one.ranks, same.ranks) and not torch.equal(one.ranks, other.ranks)
    assert torch.equal(state, torch.get_rng_state()) and not set(pyro.get_param_store())


def test_draws_in_pieces_are_ranked_together(monkeypatch):
    monkeypatch.setattr("pyro_avi.diagnostics.sbc._NUMBERS", 6 * 7)
    model, guide, _ = of_factors(full=True)
    x = torch.zeros(500, 3, dtype=torch.double)
    found = avi.sbc(model, guide, x, num_simulations=1, num_samples=50)
    assert found.ranks.max() > 40 and (found.p_values > 0.01).all()
    torch.testing.assert_close(found.contraction, 1 - PRECISION.inverse().diagonal(), atol=0.1, rtol=0.0)


def test_the_table_says_what_is_not_uniform():
    found = short()
    frame = found.table("frame", probs=[0.8])
    assert isinstance(frame, pandas.DataFrame) and list(frame.index) == ["z", "log likelihood"]
    assert list(frame.columns) == ["p", "mean rank", "in 81 %", "contraction"]
    assert frame["p"].tolist() == found.p_values.tolist()
    text = found.table()
    assert "30 rows, 20 draws each" in text and "not uniform: z" in text
    assert found.table("markdown").startswith("| ranked | p | mean rank |")
    with pytest.raises(ValueError, match="Expected format"):
        found.table("html")
    for probs in ([], [0.0], [0.05], [1.0]):
        with pytest.raises(ValueError, match="Expected probabilities"):
            found.coverage(probs)


def test_the_figure_has_the_least_uniform_first():
    found = short()
    figure = found.plot(most=1)
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 3 and titles[0].startswith(found.names[found.p_values.argmin()])
    assert len(found.plot().axes) == 5
    with pytest.raises(ValueError, match="Expected most of at least 1"):
        found.plot(most=0)


def test_arviz_takes_the_ranks(monkeypatch):
    found = short()
    data = found.to_arviz()["prior_sbc"]
    assert data["z"].dims == ("chain", "draw") and set(data) == set(found.names)
    assert torch.equal(torch.as_tensor(data["log likelihood"].values[0]), found.pit[:, 1])
    if hasattr(arviz, "plot_ecdf"):
        points = {"eval_points": found.uniform.shares.numpy(), "cdf": lambda x: x, "ax": found.plot().axes[0]}
        arviz.plot_ecdf(data["z"].values[0], difference=True, confidence_bands="optimized", **points)
    calls = []
    monkeypatch.setattr(arviz, "__version__", "1.2.0")
    monkeypatch.setattr(arviz, "from_dict", lambda *args, **kwargs: calls.append((args, kwargs)) or "tree")
    assert found.to_arviz() == "tree"
    ((groups,), named) = calls[0]
    assert list(groups) == ["prior_sbc"] and groups["prior_sbc"]["z"].shape == (1, 30) and named == {}


# --- errors


def test_errors_say_what_to_do():
    guide = avi.ConstantGuide(plain).setup(X)
    for name, count in (("num_simulations", 0), ("num_samples", 19), ("num_steps", -1)):
        with pytest.raises(ValueError, match=f"Expected {name} of at least {count + 1}, got {count}"):
            avi.sbc(plain, guide, X, **{**FEW, name: count})
    with pytest.raises(ValueError, match="Pass num_steps=..., by which avi.refine"):
        avi.sbc(plain, avi.FactorizedGuide(plain).setup(X), X, **FEW)
    with pytest.raises(TypeError, match="got AutoNormal"):
        avi.sbc(plain, AutoNormal(plain), X, **FEW)
    with torch.no_grad():
        guide.vector[0] = torch.nan
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="nan in 6 of 6 simulated rows"):
        avi.sbc(plain, guide, X, **FEW)
