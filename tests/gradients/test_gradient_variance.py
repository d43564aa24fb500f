"""The noise of gradient estimators: closed forms, no bias where none is claimed, and what is refused.

A row's draws are independent of another's: rows with equal parameters are as many draws of one gradient.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_avi as avi
from pyro_avi.elbos.doubly_reparameterized import DoublyReparameterizedELBO
from pyro_avi.elbos.leave_one_out import LeaveOneOutELBO
from pyro_avi.elbos.rao_blackwellized import RaoBlackwellizedELBO
from pyro_avi.elbos.vimco import VimcoELBO
from pyro_avi.gradients.estimator import estimator_names, find_estimator
from pyro_avi.gradients.estimators.decaying_baseline import DecayingBaseline
from pyro_avi.gradients.estimators.learned_baseline import LearnedBaseline

NO_DENSITY = torch.tensor(False)


def measure(model, guide, *args, num_samples=40, **options):
    return avi.gradient_variance(model, guide, *args, num_samples=num_samples, progress=False, **options)


# --- closed forms: the cost is a function f of the latents alone


class Normals(nn.Module):
    """N(mu, s^2 I_D) in every row, f = -|z|^2 / 2."""

    def __init__(self, mu, s, dim, rows, baseline=None):
        super().__init__()
        self.mu = nn.Parameter(torch.full((rows, dim), mu, dtype=torch.double))
        self.s, self.dim, self.rows, self.baseline = s, dim, rows, baseline

    def model(self):
        with pyro.plate("data", self.rows):
            with poutine.mask(mask=NO_DENSITY):
                z = pyro.sample("z", dist.Normal(torch.zeros(self.dim, dtype=torch.double), 1.0).to_event(1))
            pyro.factor("f", -0.5 * z.square().sum(-1))

    def forward(self):
        pyro.module("normals", self)
        infer = (
            {}
            if self.baseline is None
            else {"baseline": {"baseline_value": self.mu.new_tensor(self.baseline).expand(self.rows)}}
        )
        with pyro.plate("data", self.rows), poutine.mask(mask=NO_DENSITY):
            pyro.sample("z", dist.Normal(self.mu, self.s).to_event(1), infer=infer)


class Coins(nn.Module):
    """Bernoulli(p) in every row, f(1) = a and f(0) = b."""

    def __init__(self, p, a, b, rows, baseline=None):
        super().__init__()
        self.logits = nn.Parameter(torch.full((rows,), math.log(p / (1 - p)), dtype=torch.double))
        self.a, self.b, self.rows, self.baseline = a, b, rows, baseline

    def model(self):
        with pyro.plate("data", self.rows):
            with poutine.mask(mask=NO_DENSITY):
                z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=torch.double)))
            pyro.factor("f", torch.where(z > 0, *self.logits.new_tensor([self.a, self.b])))

    def forward(self):
        pyro.module("coins", self)
        infer = (
            {}
            if self.baseline is None
            else {"baseline": {"baseline_value": self.logits.new_tensor(self.baseline).expand(self.rows)}}
        )
        with pyro.plate("data", self.rows), poutine.mask(mask=NO_DENSITY):
            pyro.sample("z", dist.Bernoulli(logits=self.logits), infer=infer)


def check_variance(problem, estimator, expected, *, resolution=0.08):
    """The variance of one element of the gradient lies within 5 standard errors, themselves small."""
    found = measure(problem.model, problem, estimators=[estimator], num_samples=12)[estimator]
    (variance,) = found.variance.values()
    by_row = variance.flatten(1).mean(1) if variance.dim() > 1 else variance
    se = by_row.std() / len(by_row) ** 0.5
    assert se < resolution * expected
    assert abs(by_row.mean() - expected) < 5 * se
    # The twin: another variance is told apart.
    assert abs(by_row.mean() - expected * (1 + 10 * resolution)) > 5 * se
    return found


@pytest.mark.parametrize("mu", [0.0, 1.5])
@pytest.mark.parametrize("s", [0.5, 1.0])
def test_the_variance_of_the_path_is_that_of_a_draw(mu, s):
    check_variance(Normals(mu, s, 3, 4000), "pathwise", s**2)


@pytest.mark.parametrize("mu", [0.0, 1.0, 3.0])
def test_the_variance_of_the_score_function_grows_with_the_mean(mu):
    s = 0.7
    check_variance(Normals(mu, s, 1, 4000), "score_function", mu**4 / (4 * s**2) + 3.5 * mu**2 + 3.75 * s**2)


@pytest.mark.parametrize("dim", [1, 4, 16])
def test_the_variance_of_the_score_function_grows_with_the_square_of_the_dimension(dim):
    s = 1.3
    check_variance(Normals(0.0, s, dim, 4000), "score_function", s**2 * (dim + 2) * (dim + 4) / 4)
    best = Normals(0.0, s, dim, 4000, baseline=-(s**2) * (dim + 2) / 2)
    check_variance(best, "rao_blackwellized", s**2 * (dim + 2) / 2)


def test_sticking_the_landing_has_no_noise_at_the_posterior():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.linspace(-1.0, 2.0, 6, dtype=torch.double)
    guide = avi.FactorizedGuide(model).setup(x)
    with torch.no_grad():
        guide.table.copy_(torch.stack([0.8 * x, torch.full_like(x, 0.2**0.5).log()], 1))
    found = measure(model, guide, x, estimators=["sticking_the_landing", "pathwise"], num_samples=10)
    assert found["sticking_the_landing"].groups["local"].variance < 1e-24
    assert found["pathwise"].groups["local"].variance > 1


def test_the_best_baseline_of_a_coin_leaves_no_noise_and_the_mean_may_be_worse_than_none():
    p, a, b = 0.9, 2.0, 0.3
    best, mean = (1 - p) * a + p * b, p * a + (1 - p) * b
    exactly = measure(*_pair(Coins(p, a, b, 50, baseline=best)), estimators=["rao_blackwellized"])["rao_blackwellized"]
    assert exactly.groups["guide"].variance < 1e-24
    torch.testing.assert_close(
        *torch.broadcast_tensors(next(iter(exactly.mean.values())), torch.tensor(p * (1 - p) * (a - b)).double())
    )

    def variance(c):
        return p * (1 - p) ** 2 * (a - c) ** 2 + (1 - p) * p**2 * (b - c) ** 2 - (p * (1 - p) * (a - b)) ** 2

    assert variance(mean) > 5 * variance(0.0) and variance(best) < 1e-12
    check_variance(Coins(p, a, b, 4000), "score_function", variance(0.0))
    check_variance(Coins(p, a, b, 4000, baseline=mean), "rao_blackwellized", variance(mean))


def _pair(problem):
    return problem.model, problem


# --- no bias: against gradients that are exact

COPIES = 100


def rows_and_latents():
    """A normal latent a row; both bounds by quadrature."""
    x = torch.tensor([-1.0, 0.3, 1.7], dtype=torch.double)

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor([0.5, 0.1, -0.4], dtype=torch.double))

        def factor(self, x):
            return dist.Normal(self.a[0] * x + self.a[1], self.a[2].exp())

        def forward(self, x):
            pyro.module("guide", self)
            with pyro.plate("data", len(x)):
                pyro.sample("z", self.factor(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1.2, dtype=torch.double))

        def forward(self, x):
            pyro.module("model", self)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
                pyro.sample("x", dist.Normal(self.weight * z, 0.8), obs=x)

    model, guide = Model(), Guide()

    def bound(k):
        points, weights = (torch.tensor(v) for v in _hermite(24))
        q = guide.factor(x)
        z = q.loc + q.scale * points.unsqueeze(-1)
        log_w = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(model.weight * z, 0.8).log_prob(x) - q.log_prob(z)
        return _mean_over_tuples(log_w, weights.log().unsqueeze(-1).expand_as(log_w), k)

    return model, guide, x, bound


def _hermite(count):
    import numpy as np

    points, weights = np.polynomial.hermite_e.hermegauss(count)
    return points, weights / weights.sum()


def _mean_over_tuples(log_w, log_q, k):
    """The bound of k draws, by the sum over all tuples of the values ``[V, N]`` a draw may have."""
    at = torch.cartesian_prod(*[torch.arange(len(log_w))] * k).reshape(-1, k)
    return (log_q[at].sum(1).exp() * (log_w[at].logsumexp(1) - math.log(k))).sum()


def bits():
    """Two bits a row, vectors, and a learned prior."""
    torch.manual_seed(3)
    x = (torch.rand(3, 1, 2, 2) > 0.5).double()
    model = avi.models.SigmoidBelief(avi.models.DenseDecoder(2, (), (1, 2, 2)), size=3 * COPIES).double()
    guide = avi.AmortizedGuide(model, encoder=(3,)).setup(x)
    with torch.no_grad():
        for parameter in (*guide.parameters(), model.logits):
            parameter.add_(0.5 * torch.randn_like(parameter))

    def bound(k):
        values, joint = model.log_joint(x)
        logits = guide.variational_parameters(x).unflatten(-1, (2, 2))
        log_q = (
            dist.Bernoulli(logits=(logits[..., 1] - logits[..., 0]).unsqueeze(0)).log_prob(values.unsqueeze(1)).sum(-1)
        )
        return _mean_over_tuples(joint.T - log_q, log_q, k)

    return model, guide, x, bound


def clusters():
    """A categorical latent a row, one after the other."""
    x = torch.tensor([-2.0, 0.1, 2.5], dtype=torch.float)
    means = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float)
    prior = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(prior))
            pyro.sample("x", dist.Normal(means[y], 1.0), obs=x)

    guide = avi.AmortizedGuide(model, encoder=(3,)).setup(x)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))

    def bound(k):
        log_q = guide.variational_parameters(x).log_softmax(-1).T
        log_p = prior.log().unsqueeze(-1) + dist.Normal(means.unsqueeze(-1), 1.0).log_prob(x)
        return _mean_over_tuples(log_p - log_q, log_q, k)

    return model, guide, x, bound


def linear():
    """A linear decoder of two latents: the ELBO is the evidence minus a divergence of normals."""
    torch.manual_seed(2)
    x = torch.randn(3, 3, dtype=torch.double)
    model = avi.models.LinearVAE(2, 3, size=3 * COPIES).double()
    guide = avi.AmortizedGuide(model, encoder=(3,), init_scale=0.6).setup(x)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))

    def bound(k):
        return (model.log_evidence(x) - model.inference_gap(x, guide.posterior(x))).sum() if k == 1 else None

    return model, guide, x, bound


def labels():
    """One-hot labels, whose relaxations a model can use."""
    x = torch.tensor([-2.0, 0.1, 2.5], dtype=torch.double)
    means = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.double)
    prior = torch.tensor([0.2, 0.5, 0.3], dtype=torch.double)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(prior))
            pyro.sample("x", dist.Normal(y @ means, 1.0), obs=x)

    guide = avi.AmortizedGuide(model, encoder=(3,)).setup(x)

    def bound(k):
        log_q = guide.variational_parameters(x).log_softmax(-1).T
        log_p = prior.log().unsqueeze(-1) + dist.Normal(means.unsqueeze(-1), 1.0).log_prob(x)
        return _mean_over_tuples(log_p - log_q, log_q, k)

    return model, guide, x, bound


PROBLEMS = {f.__name__: f for f in (rows_and_latents, bits, clusters, linear, labels)}
K = 2


def exact_gradients(problem):
    """The pair, its rows many times over, and by bound and parameter the gradient."""
    torch.manual_seed(0)
    model, guide, x, bound = PROBLEMS[problem]()
    found = {}
    for name, k in (("ELBO", 1), ("importance-weighted", K)):
        value = bound(k)
        if value is not None:
            parameters = [p for part in (model, guide) if isinstance(part, nn.Module) for p in part.parameters()]
            grads = torch.autograd.grad(COPIES * value, parameters, allow_unused=True)
            found[name] = {id(p): grad for p, grad in zip(parameters, grads, strict=True) if grad is not None}
    return model, guide, x.repeat(COPIES, *[1] * (x.dim() - 1)), found


def deviations(model, guide, found, exact, num_samples):
    """The deviation of each element of the mean from the exact gradient in its standard errors, and the errors' size."""
    by_name = {f"model.{n}": p for n, p in model.named_parameters()} if isinstance(model, nn.Module) else {}
    by_name |= {f"guide.{n}": p for n, p in guide.named_parameters()}
    expected = {name: exact[id(by_name[name])] for name in found.mean if id(by_name[name]) in exact}
    mean, variance = (torch.cat([part[name].flatten() for name in expected]) for part in (found.mean, found.variance))
    wanted = torch.cat([grad.flatten().double() for grad in expected.values()])
    # Of gradients without noise the rounding.
    se = (variance / num_samples).sqrt() + 2e-6 * wanted.norm()
    return (mean - wanted) / se, (se.norm() / wanted.norm()).item()


@pytest.fixture
def short_warm_up(monkeypatch):
    """Whatever a baseline has learned, it adds no bias."""
    for estimator in (DecayingBaseline, LearnedBaseline):
        monkeypatch.setattr(estimator, "warm_up", 10)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_those_that_claim_no_bias_have_none(problem, short_warm_up):
    model, guide, x, exact = exact_gradients(problem)
    found = measure(model, guide, x, num_particles=K)
    unbiased = {name: each for name, each in found.estimators.items() if not each.is_biased and each.bound in exact}
    assert len(unbiased) >= 6
    for name, each in unbiased.items():
        z, resolution = deviations(model, guide, each, exact[each.bound], found.num_samples)
        # The worst of them, the plain score function, is known to a fifth of the gradient; most to a twentieth.
        assert resolution < 0.4, name
        assert z.abs().max() < 5, name


@pytest.mark.parametrize("problem", ["bits", "labels"])
def test_relaxations_show_their_bias(problem):
    model, guide, x, exact = exact_gradients(problem)
    names = ["gumbel_softmax", "straight_through", "enumeration"]
    found = measure(model, guide, x, estimators=names, temperature=1.0, num_samples=60)
    for name in names[:2]:
        z, _ = deviations(model, guide, found[name], exact["ELBO"], 60)
        assert found[name].is_biased and z.abs().max() > 5
        assert found[name].groups["local"].bias > 5 * found[name].groups["local"].bias_noise
    assert math.isnan(found["enumeration"].groups["local"].bias)


def with_itself(self, draws):
    value = draws.log_weights.mean(0)
    signal = (draws.log_weights - draws.log_weights.mean(0)).detach()
    return value, (draws.log_weights + draws.log_q - draws.log_q.detach() + draws.log_q * signal).mean(0)


def without_scores(self, draws):
    value = draws.log_weights.logsumexp(0) - math.log(len(draws.log_weights))
    path = draws.log_weights + draws.log_q - draws.log_q.detach()
    return value, (draws.log_weights.detach().softmax(0) * path + draws.log_q * self._signal(draws, value)).sum(0)


def once(self, draws):
    weights = draws.log_weights
    return weights.logsumexp(0), (weights.detach().softmax(0) * weights).sum(0)


@pytest.mark.parametrize(
    ("problem", "estimator", "elbo", "wrong"),
    [
        ("bits", "leave_one_out", LeaveOneOutELBO, with_itself),
        ("bits", "vimco", VimcoELBO, without_scores),
        ("rows_and_latents", "doubly_reparameterized", DoublyReparameterizedELBO, once),
    ],
)
def test_a_slightly_wrong_estimator_is_found(problem, estimator, elbo, wrong, monkeypatch):
    monkeypatch.setattr(elbo, "bound", wrong)
    model, guide, x, exact = exact_gradients(problem)
    found = measure(model, guide, x, estimators=[estimator], num_particles=K, num_samples=100)[estimator]
    z, _ = deviations(model, guide, found, exact[found.bound], 100)
    assert z.abs().max() > 5


# --- what is returned


def test_the_noise_of_rows_is_that_of_their_parameters():
    problem = Normals(0.5, 1.0, 2, 5)
    found = measure(problem.model, problem, estimators=["pathwise", "score_function"])
    for each in found.estimators.values():
        (variance,) = each.variance.values()
        torch.testing.assert_close(each.rows["z"], variance.sum(1))
        group = each.groups["guide"]
        assert group.variance == pytest.approx(variance.sum().item())
        (mean,) = each.mean.values()
        assert group.snr == pytest.approx(
            ((mean.square().sum() - group.variance / 40).clamp(min=0) ** 0.5 / group.variance**0.5).item()
        )
    assert found["score_function"].groups["guide"].bias < 5 * found["score_function"].groups["guide"].bias_noise


def test_costs_are_counted():
    model, guide, x, _ = bits()
    names = ["score_function", "leave_one_out", "enumeration"]
    found = measure(model, guide, x, estimators=names, num_particles=5, num_samples=3)
    assert [found[name].evaluations for name in names] == [1, 5, 4]
    model, guide, x, _ = linear()
    found = measure(model, guide, x, num_particles=3, num_samples=3, estimators=["doubly_reparameterized", "pathwise"])
    # The model runs twice, the second time at fixed latents.
    assert found["doubly_reparameterized"].evaluations == 6 and found["pathwise"].evaluations == 1
    assert all(each.seconds > 0 for each in found.estimators.values())
    lines = found.table(format="markdown").splitlines()
    assert lines[0].startswith("| estimator | bound | group | variance |") and len(lines) == 2 + 4 + 2
    with pytest.raises(ValueError, match="text"):
        found.table(format="html")


def test_nothing_is_trained_and_the_store_is_left_as_it_was():
    model, guide, x, _ = bits()
    before = {name: p.detach().clone() for name, p in [*model.named_parameters(), *guide.named_parameters()]}
    state = torch.get_rng_state()
    measure(model, guide, x, estimators=["decaying_baseline", "learned_baseline"], num_samples=2)
    assert torch.equal(torch.get_rng_state(), state) and not list(pyro.get_param_store())
    for name, p in [*model.named_parameters(), *guide.named_parameters()]:
        assert torch.equal(p, before[name]) and p.grad is None


def test_every_estimator_is_a_class_named_like_its_file():
    assert len(estimator_names()) == 14
    for name in estimator_names():
        assert find_estimator(name).__doc__


# --- what is refused


def counts():
    x = torch.tensor([1.0, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Poisson(torch.ones(2)))
            pyro.sample("x", dist.Normal(n, 1.0), obs=x)

    def guide(x):
        rate = pyro.param("rate", torch.ones(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("n", dist.Poisson(rate))

    return model, guide, x


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            bits,
            {"estimators": ["pathwise"]},
            r"differentiated through for 'pathwise', got \['z'\] of distributions without",
        ),
        (bits, {"estimators": ["doubly_reparameterized"]}, "for 'doubly_reparameterized'"),
        (counts, {"estimators": ["enumeration"]}, "finite list of values for 'enumeration', got {'n': 'Poisson'}"),
        (
            linear,
            {"estimators": ["enumeration"]},
            r"Expected discrete latents for 'enumeration', got \['z'\], all with a path",
        ),
        (bits, {"estimators": ["leave_one_out"], "num_particles": 1}, "num_particles of at least 2, got 1"),
        (bits, {"estimators": ["reinforce"]}, "estimators among closed_form_kl, .*got 'reinforce'"),
        (bits, {"estimators": []}, "at least one estimator"),
        (bits, {"max_memory": 100}, "fit into max_memory = 100 bytes, got"),
        (bits, {"num_samples": 1}, "num_samples of at least 2"),
    ],
)
def test_what_cannot_be_is_refused(make, options, message):
    model, guide, x = make()[:3]
    with pytest.raises(ValueError, match=message):
        measure(model, guide, x, **{"num_samples": 2, **options})


def test_all_that_can_be_used_are_by_default_and_the_others_say_why(short_warm_up):
    model, guide, x = counts()
    found = measure(model, guide, x, num_samples=2)
    assert set(found.estimators) | set(found.left_out) == set(estimator_names())
    assert "finite list" in found.left_out["enumeration"] and "leave_one_out" in found.estimators
    assert isinstance(RaoBlackwellizedELBO(), RaoBlackwellizedELBO)
    with pytest.raises(TypeError, match="a list of estimators, got 'pathwise'"):
        measure(model, guide, x, estimators="pathwise")


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_latents_outside_of_all_plates_have_all_estimators(dtype, short_warm_up):
    """A global number beside two locals, one of them positive, in a model that is a method."""
    zero = torch.zeros((), dtype=dtype)

    class Own:
        def model(self, x):
            level = pyro.sample("level", dist.Normal(zero, 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(zero, 1.0).expand([2]).to_event(1))
                scale = pyro.sample("scale", dist.LogNormal(zero, 0.5))
                pyro.sample("x", dist.Normal(level + z.sum(-1), scale), obs=x)

    model, x = Own().model, torch.linspace(-1, 1, 5, dtype=dtype)
    guide = avi.ConstantGuide(model).setup(x)

    result = measure(model, guide, x, estimators=["pathwise", "decaying_baseline", "learned_baseline"])

    noise = [group for each in result.estimators.values() for group in each.groups.values()]
    assert len(result.estimators) == 3 and all(0 < group.variance < math.inf for group in noise)
