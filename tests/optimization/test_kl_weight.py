"""The weight of the divergence from the prior: the loss by hand, warm-up in a training, what it is refused for."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from torch.distributions import kl_divergence

import pyro_avi as avi
from pyro_avi.optimization.kl_weight import KLWeight
from tests.all_guides import READING, mostly_slow
from tests.all_guides import SMALL_GUIDES as GUIDES
from tests.marks import needs_compiler
from tests.structures import STRUCTURES

X = torch.tensor([-1.0, 0.4, 2.0, 0.1], dtype=torch.double)
INDEX = torch.tensor([5, 0, 7, 2])


def model(x, index=None):
    """Rows of a data set of twelve, with a label, and a location that they share."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=torch.double), 1.0))
    with pyro.plate("data", 12, subsample=index):
        y = pyro.sample("y", dist.Bernoulli(torch.full_like(x, 0.3)))
        z = pyro.sample("z", dist.Normal(theta + y, 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


def guide(x, index=None, logit=0.2, loc=0.5):
    pyro.sample("theta", dist.Normal(torch.as_tensor(loc, dtype=torch.double), 0.8))
    with pyro.plate("data", 12, subsample=index):
        pyro.sample("y", dist.Bernoulli(logits=logit * x))
        pyro.sample("z", dist.Normal(loc * x, 0.4))


def weighted(elbo, weight):
    return KLWeight(elbo, weight, dtype=torch.double).elbo


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("elbo", [infer.Trace_ELBO, avi.StickingTheLandingELBO, avi.ScoreFunctionELBO])
def test_the_loss_by_hand(elbo, weight):
    torch.manual_seed(0)
    trace = poutine.trace(guide).get_trace(X, INDEX)
    theta, y, z = (trace.nodes[name]["value"] for name in ("theta", "y", "z"))
    log_q = dist.Bernoulli(logits=0.2 * X).log_prob(y) + dist.Normal(0.5 * X, 0.4).log_prob(z)
    prior = dist.Bernoulli(0.3).log_prob(y) + dist.Normal(theta + y, 1.0).log_prob(z)
    of_theta = dist.Normal(0.0, 1.0).log_prob(theta) - dist.Normal(0.5, 0.8).log_prob(theta)
    likelihood = dist.Normal(z, 0.7).log_prob(X)
    expected = -(weight * (of_theta + 3 * (prior - log_q).sum()) + 3 * likelihood.sum())

    torch.manual_seed(0)
    assert weighted(elbo(), weight).loss(model, guide, X, INDEX) == pytest.approx(expected.item(), rel=1e-6)
    torch.manual_seed(0)
    unweighted = elbo().loss(model, guide, X, INDEX)
    assert (unweighted == pytest.approx(expected.item(), rel=1e-6)) is (weight == 1.0)


def normal(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.parametrize("beta", [0.25, 4.0])
def test_the_optimum_of_a_weight_is_the_posterior_of_a_tempered_likelihood(beta):
    r"""That of the likelihood to the power :math:`1 / \beta`: the gradient of the path is zero there in every draw."""

    def gradient(power):
        variance = 1 / (1 + 4 * power)
        guide = avi.FactorizedGuide(normal).setup(X)
        with torch.no_grad():
            guide.table.copy_(torch.stack([variance * 4 * power * X, torch.full_like(X, variance).sqrt().log()], 1))
        torch.manual_seed(0)
        with pyro.get_param_store().scope():
            loss = weighted(avi.StickingTheLandingELBO(), beta).differentiable_loss(normal, guide, X)
        return torch.autograd.grad(loss, guide.table)[0].abs().max()

    assert gradient(1 / beta) < 1e-12
    # The twin: the posterior itself is elsewhere.
    assert gradient(1.0) > 0.1


def test_the_closed_form_of_the_divergence_has_the_weight():
    x = X.float()
    guide = avi.FactorizedGuide(normal).setup(x)
    divergence = kl_divergence(guide.posterior(x).base_dist, dist.Normal(torch.zeros(4, 1), 1.0)).sum().item()
    losses = []
    for elbo in (infer.TraceMeanField_ELBO(), KLWeight(infer.TraceMeanField_ELBO(), 3.0).elbo):
        torch.manual_seed(0)
        losses.append(elbo.loss(normal, guide, x))

    assert losses[1] - losses[0] == pytest.approx(2 * divergence, rel=1e-5)


def test_the_gradient_of_a_discrete_latent_is_that_of_the_weighted_bound():
    """20,000 particles at once: a standard error of about .03 of gradients of size 1."""
    x = torch.tensor([1.5], dtype=torch.double)
    logits = torch.tensor([0.4], dtype=torch.double, requires_grad=True)

    def coin(x):
        with pyro.plate("data", 1):
            y = pyro.sample("y", dist.Bernoulli(torch.full_like(x, 0.3)))
            pyro.sample("x", dist.Normal(2 * y, 1.0), obs=x)

    def q(x):
        with pyro.plate("data", 1):
            pyro.sample("y", dist.Bernoulli(logits=logits))

    p = logits.sigmoid()
    likelihood = p * dist.Normal(2.0, 1.0).log_prob(x) + (1 - p) * dist.Normal(0.0, 1.0).log_prob(x)
    divergence = kl_divergence(dist.Bernoulli(logits=logits), dist.Bernoulli(torch.full_like(x, 0.3))).sum()
    exact = {
        beta: torch.autograd.grad(beta * divergence - likelihood, logits, retain_graph=True)[0] for beta in (0.2, 1.0)
    }

    torch.manual_seed(0)
    elbo = infer.Trace_ELBO(20_000, vectorize_particles=True, max_plate_nesting=1)
    found = torch.autograd.grad(weighted(elbo, 0.2).differentiable_loss(coin, q, x), logits)[0]

    assert (found - exact[0.2]).abs() < 0.02
    assert (exact[1.0] - exact[0.2]).abs() > 0.05


@pytest.mark.parametrize(
    "name", ["function", "global latents", "rows given, data whole", "nested plates, two row sets"]
)
@pytest.mark.parametrize("kind", mostly_slow(GUIDES))
def test_every_guide_can_be_warmed_up(kind, name):
    structure = STRUCTURES[name]

    def losses(**options):
        model = structure.make()
        own = structure.amortized if kind in READING else {}
        torch.manual_seed(0)
        guide = GUIDES[kind](model, **structure.options, **own)
        options = {"num_steps": 3, "lr": 1e-2, "compile": False, "progress": False, **options}
        return avi.fit(model, guide, *structure.args, **options).losses

    rising = losses(kl_weight=lambda step: step / 2)
    # The same as no weight at all where it is 1; and other losses from the first on where it is 0.
    assert torch.equal(losses(kl_weight=lambda step: 1.0), losses())
    assert rising.isfinite().all() and rising[0] != losses()[0]
    assert losses(kl_weight=0.0)[0] == rising[0]


def warmed_up(num_steps=8, rise=4, **options):
    torch.manual_seed(0)
    guide = avi.AmortizedGuide(normal, encoder=(4,)).setup(X)
    options = {"lr": 0.05, "compile": False, "progress": False, **options}
    fit = avi.fit(normal, guide, X, num_steps=num_steps, kl_weight=lambda step: min(1.0, step / rise), **options)
    return fit.losses, torch.cat([parameter.detach().flatten() for parameter in guide.parameters()])


def test_a_warm_up_goes_on_where_it_was(tmp_path):
    whole, end = warmed_up()
    path = tmp_path / "training"

    warmed_up(3, checkpoint=path)
    losses, parameters = warmed_up(checkpoint=path)

    assert torch.equal(losses, whole) and torch.equal(parameters, end)
    with pytest.raises(ValueError, match="kl_weight at step 1 was 0.25, is 0.5"):
        warmed_up(rise=2, checkpoint=path)


@needs_compiler
@pytest.mark.slow
def test_a_graph_reads_the_weight_at_every_step():
    for one, other in zip(warmed_up(compile=True), warmed_up(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    # The twin: the weight of another step would show.
    assert not torch.allclose(warmed_up(rise=5)[0], warmed_up()[0])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"kl_weight": -1.0}, ValueError, "kl_weight to be a number of at least 0 or a function of the step, got -1.0"),
        ({"kl_weight": True}, ValueError, "kl_weight to be a number"),
        ({"kl_weight": 0.5, "elbo": avi.VimcoELBO(num_particles=2)}, TypeError, "kl_weight=, got VimcoELBO"),
        (
            {"kl_weight": 0.5, "elbo": infer.TraceEnum_ELBO()},
            TypeError,
            "(?s)Trace_ELBO.*got TraceEnum_ELBO.*avi.fit again",
        ),
    ],
)
def test_refused(options, error, message):
    with pytest.raises(error, match=message):
        avi.fit(normal, avi.ConstantGuide(normal), X, num_steps=1, progress=False, **options)
