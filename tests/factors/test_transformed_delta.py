"""The site of a part of a joint draw counts as the change of variables says, in every kind of ELBO."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import biject_to, kl, kl_divergence

from pyro_avi.factors.transformed_delta import TransformedDelta


@pytest.fixture
def unremembered():
    """torch warns of two rules that fit alike at the first divergence of two classes only, and remembers."""
    kl._KL_MEMOIZE.clear()
    yield
    kl._KL_MEMOIZE.clear()


ROWS = 4
MODELS = {
    "Normal": lambda: dist.Normal(torch.zeros(ROWS), 1.0),
    "torch's own Normal": lambda: torch.distributions.Normal(torch.zeros(ROWS), 1.0),
    "torch's own Independent": lambda: torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(ROWS, 3), 1.0), 1
    ),
    "Independent": lambda: dist.Normal(torch.zeros(ROWS, 3), 1.0).to_event(1),
    "MultivariateNormal": lambda: dist.MultivariateNormal(torch.zeros(ROWS, 3), torch.eye(3)),
    "MaskedDistribution": lambda: dist.Normal(torch.zeros(ROWS), 1.0).mask(torch.arange(ROWS) > 1),
    "MaskedDistribution of a number": lambda: dist.Normal(torch.zeros(ROWS), 1.0).mask(False),
    "ExpandedDistribution": lambda: ExpandedDistribution(dist.Normal(0.0, 1.0), (ROWS,)),
    "LogNormal": lambda: dist.LogNormal(torch.zeros(ROWS), 1.0),
    "TransformedDistribution": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(ROWS, 2), 1.0).to_event(1), [biject_to(dist.constraints.simplex)]
    ),
    "torch's own TransformedDistribution": lambda: torch.distributions.TransformedDistribution(
        torch.distributions.Normal(torch.zeros(ROWS), 1.0), [biject_to(dist.constraints.positive)]
    ),
    "Gamma": lambda: dist.Gamma(torch.ones(ROWS), 2.0),
    "Beta": lambda: dist.Beta(torch.ones(ROWS) * 2, 2.0),
    "Dirichlet": lambda: dist.Dirichlet(torch.ones(ROWS, 3) * 2),
    "LKJCholesky": lambda: dist.LKJCholesky(3, torch.ones(ROWS)),
    "Uniform": lambda: dist.Uniform(torch.zeros(ROWS), 2.0),
    "Delta": lambda: dist.Delta(torch.zeros(ROWS), log_density=0.5),
    "ImproperUniform": lambda: dist.ImproperUniform(dist.constraints.real, (ROWS,), ()),
    "TransformedDelta": lambda: TransformedDelta(torch.zeros(ROWS), torch.ones(ROWS)),
}


def placed_for(p):
    """A site for a model's distribution: its value, and a density."""
    value = p.v if isinstance(p, dist.Delta) else torch.randn(p.batch_shape + p.event_shape)
    if not isinstance(p, dist.Delta | dist.ImproperUniform):
        value = p.sample()
    return TransformedDelta(value, torch.randn(p.batch_shape), event_dim=len(p.event_shape))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("unremembered")
def test_the_divergence_keeps_the_density(name):
    p = MODELS[name]()
    site = placed_for(p)

    divergence = kl_divergence(site, p)

    assert divergence.shape == (ROWS,)
    torch.testing.assert_close(divergence, site.log_density - p.log_prob(site.v))
    # It is what a draw of the site says, which has one value only.
    torch.testing.assert_close(divergence, site.log_prob(site.rsample()) - p.log_prob(site.rsample()))


@pytest.mark.usefixtures("unremembered")
def test_one_rule_alone_would_be_ambiguous(monkeypatch):
    class Other(dist.Delta):
        pass

    monkeypatch.setitem(kl._KL_REGISTRY, (Other, torch.distributions.Distribution), lambda p, q: p.log_density)

    with pytest.warns(RuntimeWarning, match="Ambiguous"):
        kl_divergence(Other(torch.zeros(ROWS)), dist.Normal(0.0, 1.0))


def test_a_delta_forgets_its_density():
    v, log_density, p = torch.randn(ROWS), torch.randn(ROWS), dist.Normal(torch.zeros(ROWS), 1.0)
    torch.testing.assert_close(kl_divergence(dist.Delta(v, log_density), p), -p.log_prob(v))


@pytest.mark.parametrize("event_dim", [0, 1, 2])
@pytest.mark.parametrize("shape", [(4, 3, 2), (7, 4, 3, 2), (5, 7, 4, 3, 2)])
def test_expanded_it_is_the_same_many_times(event_dim, shape):
    batch_shape = (4, 3, 2)[: 3 - event_dim]
    site = TransformedDelta(torch.randn(4, 3, 2), torch.randn(batch_shape), event_dim=event_dim)
    target = shape[: len(shape) - event_dim]

    wide = site.expand(target)

    assert type(wide) is TransformedDelta
    assert (wide.batch_shape, wide.event_shape) == (target, site.event_shape)
    assert torch.equal(wide.rsample(), site.v.expand(shape))
    assert torch.equal(wide.log_prob(wide.rsample()), site.log_density.expand(target))
    p = dist.Normal(torch.zeros(4, 3, 2), 1.0).to_event(event_dim)
    torch.testing.assert_close(kl_divergence(wide, p), kl_divergence(site, p).expand(target))


def test_an_expanded_dimension_of_size_one():
    site = TransformedDelta(torch.randn(5, 1), torch.randn(5, 1)).mask(torch.arange(5)[:, None] > 2)

    wide = site.expand((5, 6))

    for x in (site.v, site.v + 1):
        assert torch.equal(wide.log_prob(x.expand(5, 6)), site.log_prob(x).expand(5, 6))
    assert type(wide) is TransformedDelta


MASKS = {
    "of every row": torch.tensor([True, False, True, False]),
    "of numbers": torch.tensor([1.0, 0.0, 1.0, 0.0]),
    "of more than the rows": torch.tensor([[True], [False]]),
    "true": True,
    "false": False,
    "true, a tensor": torch.tensor(True),
}


@pytest.mark.parametrize("name", MASKS)
def test_masked_it_counts_as_pyros_masked_delta(name):
    site, mask = TransformedDelta(torch.randn(ROWS, 2), torch.randn(ROWS), event_dim=1), MASKS[name]

    masked = site.mask(mask)

    expected = dist.Delta(site.v, site.log_density, event_dim=1).mask(mask)
    assert type(masked) is TransformedDelta
    assert masked.batch_shape == expected.batch_shape
    # At its value and at any other.
    for x in (site.v, torch.zeros(ROWS, 2)):
        assert torch.equal(masked.log_prob(x), expected.log_prob(x))


def test_the_divergence_of_a_masked_site():
    site, mask = TransformedDelta(torch.randn(ROWS), torch.randn(ROWS)), MASKS["of every row"]
    p = dist.Normal(torch.zeros(ROWS), 1.0)
    expected = kl_divergence(site, p)

    # Where both are masked, nothing is left; where one is, what the other counts for.
    torch.testing.assert_close(kl_divergence(site.mask(mask), p.mask(mask)), expected.where(mask, 0.0))
    torch.testing.assert_close(
        kl_divergence(site.mask(mask), p), site.log_density.where(mask, 0.0) - p.log_prob(site.v)
    )
    torch.testing.assert_close(
        kl_divergence(site, p.mask(mask)), site.log_density - p.log_prob(site.v).where(mask, 0.0)
    )


def test_masked_twice():
    site = TransformedDelta(torch.randn(ROWS), torch.ones(ROWS))
    twice = site.mask(torch.arange(ROWS) > 0).mask(torch.arange(ROWS) < 3)
    assert torch.equal(twice.log_prob(site.v), torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert torch.equal(twice.log_prob(site.v + 1), torch.tensor([0.0, -torch.inf, -torch.inf, 0.0]))
    assert torch.equal(site.log_density, torch.ones(ROWS))


def test_gradients_go_through_value_and_density():
    u = torch.randn(ROWS, requires_grad=True)
    p = dist.Gamma(2.0, 1.0)

    (grad,) = torch.autograd.grad(kl_divergence(TransformedDelta(u.exp(), -u), p).sum(), u)

    # d/du of -u - log p(exp(u)) with log p = log z - z.
    torch.testing.assert_close(grad, -1 - 1 + u.detach().exp())


def model():
    with pyro.plate("data", ROWS):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + w.sum(-1), 0.5), obs=torch.ones(ROWS))


def guide_of(kind):
    """All latents of a row from one correlated normal, through an auxiliary site."""
    joint = dist.MultivariateNormal(torch.zeros(ROWS, 3), 0.1 * torch.eye(3) + 0.2)

    def guide():
        with pyro.plate("data", ROWS):
            u = pyro.sample("u", joint, infer={"is_auxiliary": True})
            pyro.sample("z", kind(u[..., 0].exp(), -u[..., 0]))
            pyro.sample("w", kind(u[..., 1:], torch.zeros(()).expand(u.shape[:-1]), event_dim=1))

    return guide


def losses_of(guide, **kwargs):
    losses = []
    for elbo in (Trace_ELBO, TraceMeanField_ELBO):
        torch.manual_seed(1)
        losses.append(elbo(**kwargs).loss(model, guide))
    return losses


@pytest.mark.parametrize("kwargs", [{}, {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}])
def test_elbos_agree_draw_for_draw(kwargs):
    trace_loss, mean_field_loss = losses_of(guide_of(TransformedDelta), **kwargs)
    assert mean_field_loss == pytest.approx(trace_loss, rel=1e-5)

    trace_loss, mean_field_loss = losses_of(guide_of(dist.Delta), **kwargs)
    assert mean_field_loss != pytest.approx(trace_loss, rel=1e-2)


def test_a_mask_around_it_masks_its_density():
    mask = torch.tensor([True, False, True, True])
    with poutine.trace() as capture, poutine.mask(mask=mask), pyro.plate("data", ROWS):
        pyro.sample("z", TransformedDelta(torch.ones(ROWS), torch.ones(ROWS)))
    capture.trace.compute_log_prob()
    assert torch.equal(capture.trace.nodes["z"]["log_prob"], mask.float())
