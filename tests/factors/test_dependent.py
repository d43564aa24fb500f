"""Factors that depend on one another: at a row's exact posterior, a member, every draw weighs as much as the evidence."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate

import pyro_avi as avi
from pyro_avi.densities import log_joint as joint
from pyro_avi.families import Family

ROWS, TIMES = 3, 5
X = torch.linspace(-1.5, 2.5, ROWS, dtype=torch.double)
SERIES = torch.sin(torch.arange(ROWS * TIMES).double()).reshape(ROWS, TIMES)
STEP = torch.tensor([[0.8, -0.4], [0.3, 0.7]], dtype=torch.double)


@pytest.fixture(autouse=True)
def double_and_seeded():
    pyro.clear_param_store()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- series


def by_steps(x):
    """A site for each time, the state two-dimensional."""
    with pyro.plate("data", len(x)):
        z = torch.zeros(2)
        for t in pyro.markov(range(TIMES)):
            z = pyro.sample(f"z_{t}", dist.Normal(z @ STEP.T, 0.6).to_event(1))
            pyro.sample(f"x_{t}", dist.Normal(z.sum(-1), 0.5), obs=x[..., t])


def at_once(x):
    """One number for each time, all in one site."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(TIMES), series_covariance(torch.tensor([[0.9]]))))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def series_covariance(step):
    """Of states ``[T * D]`` that start at zero, by sums of noise: times outer, dimensions inner."""
    size = len(step)
    reach = torch.zeros(TIMES * size, TIMES * size)
    for t in range(TIMES):
        for s in range(t + 1):
            power = torch.linalg.matrix_power(step, t - s)
            reach[t * size : (t + 1) * size, s * size : (s + 1) * size] = power
    return 0.36 * reach @ reach.T


def exact_series(step, read):
    """The evidence of every row, and the mean ``[N, K]`` and covariance of its posterior."""
    prior, noise = series_covariance(step), 0.25 * torch.eye(TIMES)
    of_data = read @ prior @ read.T + noise
    gain = prior @ read.T @ torch.linalg.inv(of_data)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(TIMES), of_data).log_prob(SERIES)
    return evidence, SERIES @ gain.T, prior - gain @ read @ prior


def markov_parameters(mean, covariance, order):
    """Those of a normal whose precision is a band."""
    cholesky = torch.linalg.cholesky(covariance)
    scale = cholesky.diagonal()
    coefficients = torch.eye(len(scale)) - torch.linalg.inv(cholesky / scale[:, None])
    row, column = torch.tril_indices(len(scale), order, -1)
    band = coefficients[row, row - 1 - column]
    return torch.cat([mean, scale.log().expand_as(mean), band.expand(len(mean), -1)], -1)


SERIES_MODELS = {
    "a site for each time": (by_steps, STEP, torch.eye(TIMES).double().repeat_interleave(2, 1), 3),
    "one site": (at_once, torch.tensor([[0.9]], dtype=torch.double), torch.eye(TIMES).double(), 1),
}


@pytest.mark.parametrize("name", SERIES_MODELS)
def test_the_posterior_of_a_series_is_a_member(name):
    model, step, read, order = SERIES_MODELS[name]
    evidence, mean, covariance = exact_series(step, read)
    guide = avi.FactorizedGuide(model, family=avi.MarkovNormal(order)).setup(SERIES)
    with torch.no_grad():
        guide.table.copy_(markov_parameters(mean, covariance, order))

    weights = avi.log_weights(model, guide, SERIES, num_samples=5).local

    torch.testing.assert_close(weights, evidence.expand(5, -1))
    q = guide.posterior(SERIES)
    torch.testing.assert_close(q.variance, covariance.diagonal().expand(ROWS, -1))
    # Without what lies farther from the diagonal it is not: the first latents of a state depend on three before them.
    with torch.no_grad():
        guide.table[:, -1] = 0
    assert avi.log_weights(model, guide, SERIES, num_samples=5).local.std(0).min() > 0.01


@pytest.mark.parametrize("make", [avi.ConstantGuide, avi.AmortizedGuide, avi.FactorizedGuide])
def test_a_bound_with_the_posterior_has_no_gradient_of_the_path(make):
    model, step, read, order = SERIES_MODELS["one site"]
    series = SERIES[:1]
    _, mean, covariance = exact_series(step, read)
    guide = make(model, family=avi.MarkovNormal(order)).setup(series)
    exact = markov_parameters(mean, covariance, order)[0]
    with torch.no_grad():
        {"ConstantGuide": lambda: guide.vector, "AmortizedGuide": lambda: guide.head.bias}.get(
            make.__name__, lambda: guide.table
        )().copy_(exact)

    loss = avi.StickingTheLandingELBO().differentiable_loss(model, guide, series)

    for gradient in torch.autograd.grad(loss, list(guide.parameters()), allow_unused=True):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


@pytest.mark.slow
def test_training_closes_what_independent_factors_leave():
    model, step, read, order = SERIES_MODELS["one site"]
    evidence, _, covariance = exact_series(step, read)
    # The divergence of the best product of normals: their precisions are those of the posterior's diagonal.
    precision = torch.linalg.inv(covariance)
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    bounds = {}
    for family in (avi.DiagonalNormal(), avi.MarkovNormal(order)):
        guide = avi.FactorizedGuide(model, family=family).setup(SERIES)
        guide = avi.refine(model, guide, SERIES, num_steps=300)
        bounds[type(family).__name__] = avi.log_weights(model, guide, SERIES, num_samples=1000).local.mean(0)
    torch.testing.assert_close(evidence - bounds["DiagonalNormal"], gap.expand(ROWS), rtol=0, atol=0.03)
    assert gap > 0.15
    assert (evidence - bounds["MarkovNormal"]).abs().max() < 0.01


LENGTHS = torch.tensor([2, 5, 3])


def of_lengths(x, lengths):
    """Series that end early, padded, as a deep Markov model takes them."""
    with pyro.plate("data", len(x)):
        z = torch.zeros(2)
        for t in pyro.markov(range(TIMES)):
            with pyro.poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Normal(z @ STEP.T, 0.6).to_event(1))
                pyro.sample(f"x_{t}", dist.Normal(z.sum(-1), 0.5), obs=x[..., t])


def of_lengths_at_once(x, lengths):
    """Numbers along a plate inside the row, masked there."""
    present = pyro.poutine.mask(mask=torch.arange(TIMES) < lengths[:, None])
    with pyro.plate("data", len(x), dim=-2), pyro.plate("times", TIMES, dim=-1), present:
        z = pyro.sample("z", dist.Normal(0.0, 0.6))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def positive_of_lengths(x, lengths):
    """The same on another scale, all in one site."""
    present = torch.arange(TIMES) < lengths[:, None]
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(len(x), TIMES), 0.6).mask(present).to_event(1))
        pyro.sample("x", dist.Normal(z.log(), 0.5).mask(present).to_event(1), obs=x)


@pytest.mark.parametrize("model", [of_lengths, of_lengths_at_once, positive_of_lengths])
def test_rows_that_end_early(model):
    size, order = (2, 3) if model is of_lengths else (1, 1)
    step = STEP if model is of_lengths else torch.zeros(1, 1)
    prior, read = series_covariance(step), torch.eye(TIMES).repeat_interleave(size, 1)
    guide = avi.FactorizedGuide(model, family=avi.MarkovNormal(order), plate="data").setup(SERIES, LENGTHS)
    evidence, rows = [], []
    for x, length in zip(SERIES, LENGTHS, strict=True):
        # By the values that are there, at which the others have their prior.
        of_data = (read @ prior @ read.T + 0.25 * torch.eye(TIMES))[:length, :length]
        gain = prior @ read.T[:, :length] @ torch.linalg.inv(of_data)
        evidence.append(torch.distributions.MultivariateNormal(torch.zeros(length), of_data).log_prob(x[:length]))
        mean, covariance = gain @ x[:length], prior - gain @ read[:length] @ prior
        rows.append(markov_parameters(mean[None], covariance, order)[0])
    with torch.no_grad():
        guide.table.copy_(torch.stack(rows))

    weights = avi.log_weights(model, guide, SERIES, LENGTHS, num_samples=5).local

    torch.testing.assert_close(weights, torch.stack(evidence).expand(5, -1))
    # Anything may stand where nothing is.
    with torch.no_grad():
        guide.table[0, size * LENGTHS[0] : size * TIMES] += 1
    again = avi.log_weights(model, guide, SERIES, LENGTHS, num_samples=5).local
    torch.testing.assert_close(again, weights)


# --- labels


MEANS = torch.tensor([[-2.0, 1.0], [0.5, 0.0], [2.0, -1.0]], dtype=torch.double)
SPREADS = torch.tensor([0.5, 1.0, 0.3], dtype=torch.double)
PRIOR = torch.tensor([0.2, 0.5, 0.3], dtype=torch.double)
POINTS = torch.stack([X, X.cos()], -1)
READ = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.double)


def clusters(x):
    """Labels, positions around their centers, and a mixed view of these."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(PRIOR))
        z = pyro.sample("z", dist.Normal(MEANS[y], SPREADS[y][..., None]).to_event(1))
        pyro.sample("x", dist.Normal(z @ READ.T, 0.7).to_event(1), obs=x)


def one_hot_clusters(x):
    """The same, the label behind the position and one-hot."""
    with pyro.plate("data", len(x)):
        mixture = dist.Categorical(PRIOR), dist.Normal(MEANS, SPREADS[:, None]).to_event(1)
        z = pyro.sample("z", dist.MixtureSameFamily(*mixture))
        responsibility = PRIOR.log() + dist.Normal(MEANS, SPREADS[:, None]).to_event(1).log_prob(z[..., None, :])
        y = pyro.sample("y", dist.OneHotCategorical(logits=responsibility))
        del y
        pyro.sample("x", dist.Normal(z @ READ.T, 0.7).to_event(1), obs=x)


def exact_clusters():
    """The evidence ``[N]``, the log probabilities of the labels ``[N, C]``, the mean and covariance of each component."""
    log_joint, means, covariances = [], [], []
    for mean, spread, prior in zip(MEANS, SPREADS, PRIOR, strict=True):
        before = spread**2 * torch.eye(2)
        of_data = READ @ before @ READ.T + 0.49 * torch.eye(2)
        gain = before @ READ.T @ torch.linalg.inv(of_data)
        residual = POINTS - mean @ READ.T
        likelihood = torch.distributions.MultivariateNormal(torch.zeros(2), of_data).log_prob(residual)
        log_joint.append(prior.log() + likelihood)
        means.append(mean + residual @ gain.T)
        covariances.append(before - gain @ READ @ before)
    log_joint = torch.stack(log_joint, -1)
    return log_joint.logsumexp(-1), log_joint.log_softmax(-1), torch.stack(means, 1), torch.stack(covariances)


def exact_table():
    _, logits, means, covariances = exact_clusters()
    cholesky = torch.linalg.cholesky(covariances)
    scale = cholesky.diagonal(dim1=-2, dim2=-1)
    lower = (cholesky / scale[..., None])[:, 1, :1]
    members = torch.cat([means, *(part.expand(ROWS, *part.shape) for part in (scale.log(), lower))], -1)
    return torch.cat([members.flatten(1), logits], -1)


@pytest.fixture(params=[clusters, one_hot_clusters])
def of_clusters(request):
    guide = avi.FactorizedGuide(request.param, family=avi.Conditional(avi.MultivariateNormal())).setup(POINTS)
    with torch.no_grad():
        guide.table.copy_(exact_table())
    return request.param, guide


def test_the_posterior_of_a_mixture_is_a_member(of_clusters):
    model, guide = of_clusters
    evidence, logits, _, _ = exact_clusters()

    weights = avi.log_weights(model, guide, POINTS, num_samples=20).local

    torch.testing.assert_close(weights, evidence.expand(20, -1))
    # Labels in another order, or positions that know nothing of them, would show.
    with torch.no_grad():
        guide.table[:, :15] = guide.table[:, :15].roll(5, -1)
    assert avi.log_weights(model, guide, POINTS, num_samples=20).local.std(0).min() > 0.1


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO])
@pytest.mark.parametrize("particles", [1, 3])
def test_every_elbo_is_the_evidence_at_the_posterior(of_clusters, elbo, particles):
    model, guide = of_clusters
    options = {"max_plate_nesting": 1, "num_particles": particles, "vectorize_particles": True}
    called = config_enumerate(guide) if elbo is TraceEnum_ELBO else guide
    if elbo is TraceEnum_ELBO and model is one_hot_clusters:
        # Pyro sums out what the model states before that which depends on it in the guide.
        with pytest.raises(ValueError, match="Enumeration dim conflict at site"):
            elbo(**options).loss(model, called, POINTS)
        return

    loss = elbo(**options).loss(model, called, POINTS)

    assert loss == pytest.approx(-float(exact_clusters()[0].sum()), abs=1e-9)


def test_an_enumerated_label_has_an_exact_gradient():
    guide = avi.FactorizedGuide(clusters, family=avi.Conditional(avi.MultivariateNormal())).setup(POINTS)
    with torch.no_grad():
        guide.table.copy_(exact_table())
    elbo = TraceEnum_ELBO(max_plate_nesting=1)

    loss = elbo.differentiable_loss(clusters, config_enumerate(guide), POINTS)

    (gradient,) = torch.autograd.grad(loss, guide.table)
    # Of the logits: at the posterior every label is worth the same.
    torch.testing.assert_close(gradient[:, 15:], torch.zeros(ROWS, 3), rtol=0, atol=1e-9)
    # That of the members has the noise of their draws.
    assert gradient[:, :15].abs().max() > 0.01


def test_answers_of_a_conditional_family(of_clusters):
    model, guide = of_clusters
    _, logits, means, covariances = exact_clusters()
    weights = logits.exp()
    mean = (weights[..., None] * means).sum(1)
    second = torch.einsum("nc,nckl->nkl", weights, covariances + means[..., None] * means[..., None, :])
    sd = (second.diagonal(dim1=-2, dim2=-1) - mean.square()).sqrt()

    q = guide.posterior(POINTS)
    draws = guide.posterior_by_row([(POINTS,)], num_samples=4000)

    torch.testing.assert_close(q.mean, mean)
    assert ((draws["z"].mean(0) - mean).abs() < 5 * sd / 4000**0.5).all()
    # With the labels of the same draws.
    label = draws["y"] if draws["y"].dim() == 2 else draws["y"].argmax(-1)
    for c in range(3):
        chosen = (label == c).double()
        count = chosen.sum(0)
        off = (chosen[..., None] * (draws["z"] - means[:, c])).sum(0) / count[:, None].clamp(min=1)
        assert ((off.abs() < 5 * covariances[c].diagonal().sqrt() / count[:, None] ** 0.5) | (count[:, None] < 2)).all()
    averaged = guide.posterior_by_row([(POINTS,)])
    assert ((averaged["z"] - mean).abs() < 5 * sd / 1000**0.5).all()
    below = (draws["z"] <= guide.median(POINTS)["z"]).double().mean(0)
    assert (below - 0.5).abs().max() < 5 * 0.5 * (1 / 4000 + 1 / 2000) ** 0.5


@pytest.mark.parametrize("make", [avi.ConstantGuide, avi.AmortizedGuide, avi.FactorizedGuide])
@pytest.mark.parametrize("base", [avi.DiagonalNormal(), avi.LowRankNormal(rank=1), avi.Flow(hidden=(4,))])
def test_conditional_guides_are_kept_in_files(make, base, tmp_path):
    guide = make(clusters, family=avi.Conditional(base)).setup(POINTS)

    avi.save(guide, tmp_path / "guide.safetensors")
    again = avi.load(tmp_path / "guide.safetensors", clusters, POINTS)

    assert repr(again.family) == repr(guide.family)
    torch.testing.assert_close(again.variational_parameters(POINTS), guide.variational_parameters(POINTS))


def several_labels(x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
        with pyro.plate("inner", 2, dim=-1):
            y = pyro.sample("y", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)


def many_labels(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(torch.full((10,), 0.5)).to_event(1))
        z = pyro.sample("z", dist.Normal(y.sum(-1), 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    "model, options, message",
    [
        (
            several_labels,
            {"plate": "data"},
            r"(?s)without plates inside a row.*'y' with rows of shape \(1, 2\).*plate=",
        ),
        (many_labels, {}, r"(?s)at most 1000 values.*got 1024 of \['y'\].*not conditional"),
    ],
)
def test_tables_that_cannot_be_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        avi.FactorizedGuide(model, family=avi.Conditional(avi.DiagonalNormal()), **options).setup(POINTS)


# --- families of users


class Skewed(Family):
    """Exponentials of normals, to the right of their location."""

    def num_parameters(self, num_latents):
        return 2 * num_latents

    def initial(self, loc, scale):
        return torch.cat([loc, torch.full_like(loc, scale).log()], -1)

    def distribution(self, parameters):
        loc, log_scale = parameters.chunk(2, -1)
        return dist.LogNormal(loc, log_scale.exp()).to_event(1)

    def settings(self):
        return {}


def one_number(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_draws_of_a_skewed_factor_are_not_mirrored():
    loc = torch.zeros(ROWS, 1)
    q = dist.Gumbel(loc, 1.0).to_event(1)
    # The mean and the variance of a Gumbel variable, and its entropy.
    mean, variance, entropy = 0.57722, torch.pi**2 / 6, 1.57722
    second = variance + mean**2
    bound = -math.log(2 * math.pi) - 0.5 * (second + X.square() - 2 * X * mean + second) + entropy
    local_joint = joint.LocalJoint(one_number, (X,), {}, plate="data")

    def difference(*, symmetric):
        options = {"symmetric": symmetric, "num_samples": 20000, "max_memory": 2**30}
        weights = local_joint.log_weights(q, **options).local.unflatten(0, (-1, 2)).mean(1)
        return (weights.mean(0) - bound).abs(), weights.std(0) / 10000**0.5

    off, error = difference(symmetric=False)
    assert (error < 0.05).all() and (off < 5 * error).all()
    # Mirrored at the mean they would be those of another distribution.
    assert (difference(symmetric=True)[0] > 0.2).all()


def test_the_mean_of_a_skewed_family_is_not_its_median():
    guide = avi.FactorizedGuide(clusters, family=Skewed()).setup(POINTS)
    with torch.no_grad():
        guide.table[:, :4] = torch.tensor([0.0, 0.0, 0.0, 0.0])

    mean = guide.posterior_by_row([(POINTS,)])["z"]

    # exp(1/2), and a variance of e^2 - e; the median is 1.
    assert ((mean - 1.6487).abs() < 5 * (4.671 / 1000) ** 0.5).all()


# --- calls that observe a label


def labelled(x, label=None):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(PRIOR), obs=label)
        z = pyro.sample("z", dist.Normal(MEANS[y], SPREADS[y][..., None]).to_event(1))
        pyro.sample("x", dist.Normal(z @ READ.T, 0.7).to_event(1), obs=x)


LABELS = torch.tensor([2, 0, 1])


@pytest.mark.parametrize("make", [avi.ConstantGuide, avi.AmortizedGuide, avi.FactorizedGuide])
def test_a_label_that_a_call_observes_is_no_latent_of_it(make):
    guide = make(labelled, family=avi.Conditional(avi.MultivariateNormal())).setup(POINTS)

    trace = pyro.poutine.trace(guide).get_trace(POINTS, LABELS)

    assert "y" not in trace.nodes and set(guide(POINTS, LABELS)) == set(guide.median(POINTS, LABELS)) == {"z"}
    assert set(guide(POINTS)) == {"y", "z"}


def test_labels_of_a_call_choose_the_member():
    guide = avi.FactorizedGuide(labelled, family=avi.Conditional(avi.MultivariateNormal())).setup(POINTS)
    with torch.no_grad():
        guide.table.copy_(exact_table())
    evidence, logits, means, covariances = exact_clusters()
    rows = torch.arange(ROWS)

    weights = avi.log_weights(labelled, guide, POINTS, LABELS, num_samples=10).local

    torch.testing.assert_close(weights, (evidence + logits[rows, LABELS]).expand(10, -1))
    torch.testing.assert_close(guide.posterior(POINTS, LABELS).mean, means[rows, LABELS])
    by_row = guide.posterior_by_row([(POINTS, LABELS)], num_samples=2000)
    assert torch.equal(by_row["y"], LABELS.expand(2000, -1))
    sd = covariances.diagonal(dim1=-2, dim2=-1)[LABELS].sqrt()
    assert ((by_row["z"].mean(0) - means[rows, LABELS]).abs() < 5 * sd / 2000**0.5).all()
    # Other labels, other members.
    assert (guide.posterior(POINTS, LABELS.roll(1)).mean - means[rows, LABELS]).abs().max() > 0.5


def test_a_part_of_a_joint_factor_cannot_be_observed():
    def model(x, w=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(z, 1.0), obs=w)
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    independent, joint_guide = (
        avi.FactorizedGuide(model, family=family).setup(X) for family in (avi.DiagonalNormal(), avi.MarkovNormal(1))
    )
    assert set(independent(X, X)) == {"z"}
    with pytest.raises(ValueError, match=r"(?s)observes all of the latents.*MarkovNormal, got values of \['w'\]"):
        joint_guide(X, X)
