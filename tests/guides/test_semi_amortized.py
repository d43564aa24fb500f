"""The semi-amortized guide: its steps are those of the formula, and training sees through them."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_avi as avi
from pyro_avi.closing.natural_steps import NaturalSteps
from pyro_avi.guides.fixed_points import balanced_signs

N, K = 6, 2
LOADINGS = torch.tensor([[1.0, 0.3], [-0.4, 0.8], [0.2, -0.5]], dtype=torch.double)
NOISE = 0.7
PRECISION = torch.eye(K, dtype=torch.double) + LOADINGS.T @ LOADINGS / NOISE**2
X = torch.linspace(-1, 2, 3 * N, dtype=torch.double).reshape(N, 3).sin()
SHIFT = X @ LOADINGS / NOISE**2


def linear(x, index=None):
    """Rows with a normal posterior of precision PRECISION and mean PRECISION^-1 SHIFT."""
    with pyro.plate("data", N if index is not None else len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ LOADINGS.T, NOISE).to_event(1), obs=x)


def stirred(model=linear, x=X, seed=0, **options):
    """A guide whose encoder tells rows apart."""
    torch.manual_seed(seed)
    guide = avi.SemiAmortizedGuide(model, encoder=(4,), init_scale=0.6, **options).setup(x)
    with torch.no_grad():
        for row_factor in guide.row_factors:
            for parameter in row_factor.function.head.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return guide


def start_of(guide, x, *args):
    """What the encoder gives."""
    twin = avi.AmortizedGuide(guide.model, encoder=(4,), init_scale=0.6).setup(x, *args)
    twin.load_state_dict({name: value for name, value in guide.state_dict().items() if "step_size" not in name})
    return twin.variational_parameters(x, *args).detach()


def natural_steps(parameters, count, step_size):
    """The formula for the linear model, whose bound is quadratic in locations."""
    loc, log_scale = parameters.chunk(2, -1)
    for _ in range(count):
        scale = log_scale.exp()
        step = step_size * scale.square() * (SHIFT - loc @ PRECISION)
        of_scale = step_size / 2 * (1 - scale.square() * PRECISION.diagonal())
        loc = loc + step.clamp(-scale, scale)
        log_scale = log_scale + of_scale.clamp(-(0.5**0.5), 0.5**0.5)
    return torch.cat([loc, log_scale], -1)


def divergence(guide):
    """The gap of each row of the linear model."""
    return divergence_of(guide.posterior(X)).detach()


def divergence_of(q):
    """The divergence of each row's factor from its posterior."""
    posterior = dist.MultivariateNormal(SHIFT @ PRECISION.inverse(), precision_matrix=PRECISION)
    if isinstance(q, dist.Independent):
        q = dist.MultivariateNormal(q.mean, scale_tril=torch.diag_embed(q.stddev))
    return torch.distributions.kl_divergence(q, posterior)


# --- what a step is


@pytest.mark.parametrize("count", [1, 3, 7])
def test_steps_on_a_linear_model_are_those_of_the_formula(count):
    guide = stirred(num_steps=count, step_size=0.4, num_points=4)

    expected = natural_steps(start_of(guide, X), count, 0.4)

    torch.testing.assert_close(guide.variational_parameters(X).detach(), expected, rtol=0.0, atol=1e-9)
    # The numbers of steps can be told apart.
    assert (natural_steps(start_of(guide, X), count + 1, 0.4) - expected).abs().max() > 1e-4


def test_one_step_of_size_one_from_the_right_scale_is_the_posterior():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 2.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.linspace(-0.4, 0.4, 5, dtype=torch.double)
    scale = (1 / 4 + 1 / 0.25) ** -0.5
    guide = avi.SemiAmortizedGuide(model, encoder=(4,), num_steps=1, step_size=1.0, init_scale=scale).setup(x)

    expected = torch.stack([x * 4 * scale**2, torch.full_like(x, math.log(scale))], -1)

    # The encoder still starts every row at the same place, more than that from its posterior.
    assert (start_of(guide, x)[:, 0] - expected[:, 0]).abs().max() > 0.1
    torch.testing.assert_close(guide.variational_parameters(x).detach(), expected, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("family", [avi.DiagonalNormal(), avi.MultivariateNormal()], ids=str)
def test_the_gap_falls_with_the_steps_to_that_of_the_family(family):
    gaps = [divergence(stirred(family=family, num_steps=k, step_size=0.7, num_points=4)) for k in (1, 2, 4, 24)]

    assert all((after < before).all() for before, after in zip(gaps, gaps[1:], strict=False))
    least = 0.5 * (PRECISION.diagonal().log().sum() - PRECISION.logdet()) if family.independent else 0.0
    torch.testing.assert_close(gaps[-1], torch.full((N,), float(least), dtype=torch.double), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("family", [avi.DiagonalNormal(), avi.MultivariateNormal()], ids=str)
def test_steps_are_those_that_refinement_takes_by_exact_gradients(family):
    guide = stirred(family=family, num_steps=3, step_size=0.4, num_points=4)
    factor = guide.row_factors[0].factor
    twin = avi.AmortizedGuide(linear, encoder=(4,), family=family, init_scale=0.6).setup(X)
    twin.load_state_dict({name: value for name, value in guide.state_dict().items() if "step_size" not in name})
    table = twin.variational_parameters(X).detach().requires_grad_()
    steps = NaturalSteps([table], lr=0.4, fisher={id(table): factor.fisher})

    for _ in range(3):
        table.grad = torch.autograd.grad(divergence_of(factor.distribution(table)).sum(), table)[0]
        steps.step()

    torch.testing.assert_close(guide.variational_parameters(X), table, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("num_latents", [1, 2, 3, 5])
def test_points_have_the_moments_of_normals_where_there_are_enough(num_latents):
    half = 1 << (num_latents - 1).bit_length()
    points = balanced_signs(2 * half, num_latents)

    assert points.shape == (2 * half, num_latents) and points.abs().eq(1).all()
    torch.testing.assert_close(points.T @ points / len(points), torch.eye(num_latents))
    cubes = torch.einsum("ci,cj,ck->ijk", points, points, points)
    assert not points.sum(0).any() and not cubes.any()


# --- rows


def test_a_batch_has_what_the_whole_has_and_rows_do_not_see_one_another():
    guide, index = stirred(num_steps=3), torch.tensor([4, 1])
    x = X.clone().requires_grad_()

    whole = guide.variational_parameters(x)

    torch.testing.assert_close(guide.variational_parameters(X[index], index), whole[index], rtol=0.0, atol=1e-12)
    (of_x,) = torch.autograd.grad(whole[3].sum(), x)
    assert of_x[3].abs().min() > 0 and not of_x[[0, 1, 2, 4, 5]].any()


def test_a_model_that_draws_its_rows_improves_those():
    def model(x):
        with pyro.plate("data", N, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ LOADINGS.T, NOISE).to_event(1), obs=x[index])

    guide, same = stirred(model, num_steps=2), stirred(num_steps=2)

    torch.testing.assert_close(guide.variational_parameters(X), same.variational_parameters(X))
    drawn = poutine.trace(guide).get_trace(X).nodes
    loc = same.posterior(X).mean[drawn["data"]["value"]]
    torch.testing.assert_close(drawn["z"]["fn"].mean, loc)


# --- the gradient through the steps


class Module(nn.Module):
    """The linear model with parameters of a module, and one in Pyro's store."""

    def __init__(self):
        super().__init__()
        self.loadings = nn.Parameter(LOADINGS.clone())

    def forward(self, x):
        pyro.module("decoder", self)
        scale = pyro.param("scale", torch.tensor(NOISE, dtype=torch.double), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal((z @ self.loadings.T).tanh(), scale).to_event(1), obs=x)


def numerical(parameter, value, size=1e-5):
    """The derivative of a function of nothing in the first number of a parameter."""
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.view(-1)[0] += sign * size
        found.append(value().item())
        with torch.no_grad():
            parameter.view(-1)[0] -= sign * size
    return (found[0] - found[1]) / (2 * size)


def test_every_parameter_has_the_total_derivative():
    model = Module()
    guide = stirred(model, num_steps=3, step_size=0.3)
    weights = torch.linspace(-1, 2, 2 * K * N, dtype=torch.double).reshape(N, 2 * K)

    def value():
        return (weights * guide.variational_parameters(X)).sum()

    in_store = pyro.get_param_store()._params["scale"]
    parameters = {**dict(guide.named_parameters()), "loadings": model.loadings, "scale": in_store}
    gradients = torch.autograd.grad(value(), list(parameters.values()))

    assert any("log_step_size" in name for name in parameters) and len(parameters) == 7
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        expected = numerical(parameter, value)
        assert gradient.reshape(-1)[0].item() == pytest.approx(expected, rel=1e-5, abs=1e-8), name
        assert abs(expected) > 1e-4, name


def test_svi_trains_encoder_step_and_both_kinds_of_parameters_of_the_model():
    model = Module()
    guide = stirred(model, num_steps=2)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    before = [value.detach().clone() for value in (*guide.parameters(), model.loadings, pyro.param("scale"))]

    svi.step(X)

    after = [*guide.parameters(), model.loadings, pyro.param("scale")]
    assert all((one != two).any() for one, two in zip(before, after, strict=True))


def test_the_models_runs_inside_leave_no_trace_outside():
    model = Module()
    guide = stirred(model, num_steps=2)
    with poutine.trace() as traced, poutine.trace(param_only=True) as params:
        guide(X)

    sites = {name for name, site in traced.trace.nodes.items() if site["type"] == "sample"}
    plain = poutine.trace(avi.AmortizedGuide(model).setup(X)).get_trace(X).nodes
    assert sites == {name for name, site in plain.items() if site["type"] == "sample"}
    assert not {"decoder$$$loadings", "scale"} & set(params.trace.nodes)
    state = torch.get_rng_state()
    guide.posterior(X)
    assert torch.equal(torch.get_rng_state(), state)


def test_modules_of_the_model_stay_in_training_mode_and_their_buffers_stand_still():
    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(K, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double()

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)

    model = Normalized()
    guide = stirred(model, num_steps=2)
    mean = model.net[1].running_mean.clone()

    assert torch.equal(guide.variational_parameters(X), guide.variational_parameters(X))
    assert torch.equal(model.net[1].running_mean, mean) and model.net[2].training


def test_without_a_gradient_the_steps_are_the_same():
    guide = stirred(num_steps=3)
    with torch.no_grad():
        fixed = guide.variational_parameters(X)

    assert not fixed.requires_grad
    assert torch.equal(fixed, guide.variational_parameters(X))


# --- the rest of the library


def test_the_global_latents_are_held_at_their_medians_or_at_the_draw():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, options = X[:, 0], {"encoder": (3,), "num_steps": 1, "step_size": 0.5, "init_scale": 0.5}
    held = avi.SemiAmortizedGuide(model, **options).setup(x)
    drawn = avi.SemiAmortizedGuide(model, reads_globals="draw", **options).setup(x)

    def of_z(guide, seed):
        torch.manual_seed(seed)
        nodes = poutine.trace(guide).get_trace(x).nodes
        return nodes["z"]["fn"].mean, nodes["loc"]["value"]

    assert torch.equal(of_z(held, 0)[0], of_z(held, 1)[0])
    (of_held,) = torch.autograd.grad(held.variational_parameters(x)[0, 0], held.global_guide.vector)
    # A step moves a location by size times variance times the gradient, and the encoder reads nothing at first.
    assert of_held.tolist() == pytest.approx([0.5 * 0.25, 0.0])
    (one, first), (other, second) = of_z(drawn, 0), of_z(drawn, 1)
    torch.testing.assert_close(one - other, (0.5 * 0.25 * (first - second)).expand(N))
    assert (first - second).abs() > 1e-3


def test_it_is_saved_and_loaded_with_its_steps(tmp_path):
    guide = stirred(num_steps=3, step_size=0.7, learn_step_size=False, num_points=6)
    avi.save(guide, tmp_path / "guide.safetensors")

    again = avi.load(tmp_path / "guide.safetensors", linear, X)

    assert torch.equal(again.variational_parameters(X), guide.variational_parameters(X))
    said = again.describe()
    assert (said["num_steps"], said["step_size"], said["learn_step_size"], said["num_points"]) == (3, 0.7, False, 6)
    assert not any("step_size" in name for name, _ in again.named_parameters())


def test_weights_and_gaps_are_those_of_the_improved_factors():
    guide = stirred(num_steps=12, step_size=0.9, num_points=4, family=avi.MultivariateNormal())

    weights = avi.log_weights(linear, guide, X, num_samples=2).local

    evidence = dist.MultivariateNormal(
        X.new_zeros(3), LOADINGS @ LOADINGS.T + NOISE**2 * torch.eye(3, dtype=torch.double)
    ).log_prob(X)
    torch.testing.assert_close(weights, evidence.expand_as(weights), rtol=0.0, atol=1e-3)


def test_fitting_starts_what_training_an_encoder_alone_reaches_later():
    """After the same short training the bound of the rows is higher than that of the encoder without steps."""
    options = {"num_steps": 30, "lr": 0.02, "compile": False, "progress": False, "seed": 1}
    gaps = {}
    for name, make in {"amortized": avi.AmortizedGuide, "semi": avi.SemiAmortizedGuide}.items():
        torch.manual_seed(0)
        guide = make(linear, encoder=(8,)).setup(X)
        avi.fit(linear, guide, X, **options)
        gaps[name] = divergence(guide).mean()

    assert gaps["semi"] < 0.5 * gaps["amortized"]


# --- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_steps": 0}, r"num_steps of at least 1, got 0.\nAn AmortizedGuide"),
        ({"num_steps": -1}, "num_steps"),
        ({"num_points": 3}, "num_points= to be even"),
        ({"step_size": 0.0}, "step_size= to be a positive number"),
    ],
)
def test_options_that_make_no_steps_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        avi.SemiAmortizedGuide(linear, **options)


@pytest.mark.parametrize("family", [avi.LowRankNormal(rank=1), avi.MarkovNormal(order=1), avi.RowFlow()], ids=str)
def test_families_without_a_fisher_information_are_refused(family):
    with pytest.raises(ValueError, match=r"(?s)formula of its Fisher information.*avi.refine"):
        avi.SemiAmortizedGuide(linear, family=family).setup(X)


def test_discrete_latents_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"(?s)continuous latents of rows, got the discrete \['y'\].*AmortizedGuide"):
        avi.SemiAmortizedGuide(model).setup(X[:, 0])


def test_a_log_joint_that_is_random_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(K), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + torch.randn(()), 1.0), obs=x[:, 0])

    with warnings.catch_warnings(), pytest.raises(ValueError, match="log joint is a function of its latents"):
        warnings.simplefilter("ignore")
        avi.SemiAmortizedGuide(model).setup(X)


def test_a_call_without_data_is_refused():
    def model(x, observed=True):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x if observed else None)

    guide = avi.SemiAmortizedGuide(model, inputs=lambda x, observed=True: x[:, None]).setup(X[:, 0])
    with pytest.raises(ValueError, match=r"observes its data, got one in which the model draws \['x'\]"):
        guide(X[:, 0], observed=False)
