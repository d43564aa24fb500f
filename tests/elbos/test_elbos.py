"""The bounds beside Pyro's own: their values by hand, what they need, whether they can be traced and compiled."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, TraceTMC_ELBO, config_enumerate

import pyro_avi as avi
from pyro_avi.optimization.traced_step import check_can_be_traced, surrogate_loss
from pyro_avi.tracing.operations import record

X = torch.tensor([-1.0, 0.4, 2.0, 0.1], dtype=torch.double)
SCALES = torch.tensor([0.3, 0.6], dtype=torch.double)


def model(x, index=None):
    """Rows of a data set of twelve, with a label and a location each, and two observations."""
    with pyro.plate("data", 12 if index is not None else len(x), subsample=index):
        y = pyro.sample("y", dist.Bernoulli(torch.full_like(x, 0.3)))
        z = pyro.sample("z", dist.Normal(2 * y, 1.0))
        with pyro.plate("twice", 2):
            pyro.sample("x", dist.Normal(z, 0.7), obs=x.expand(2, -1))


def guide(x, index=None):
    with pyro.plate("data", 12 if index is not None else len(x), subsample=index):
        y = pyro.sample("y", dist.Bernoulli(logits=x))
        pyro.sample("z", dist.Normal(0.8 * x + 0.2 * y, SCALES[0] + SCALES[1] * y))


def log_weights_by_hand(y, z):
    log_p = dist.Bernoulli(0.3).log_prob(y) + dist.Normal(2 * y, 1.0).log_prob(z) + 2 * dist.Normal(z, 0.7).log_prob(X)
    log_q = dist.Bernoulli(logits=X).log_prob(y) + dist.Normal(0.8 * X + 0.2 * y, SCALES[0] + SCALES[1] * y).log_prob(z)
    return log_p - log_q


INDEX = torch.tensor([5, 0, 7, 2])


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("batch", [False, True])
def test_rows_are_weighted_each_by_itself_and_scaled_by_the_plate(batch, vectorized):
    call, scale = ((X, INDEX), 3.0) if batch else ((X,), 1.0)
    options = {"num_particles": 3, "vectorize_particles": vectorized, "max_plate_nesting": 2}
    torch.manual_seed(0)
    found = -avi.ImportanceWeightedELBO(**options).loss(model, guide, *call)
    torch.manual_seed(0)
    runs = []
    for _ in range(1 if vectorized else 3):
        wide = pyro.plate("k", 3, dim=-3)(guide) if vectorized else guide
        trace = poutine.trace(wide).get_trace(*call)
        runs.append([trace.nodes[name]["value"].reshape(-1, 4) for name in "yz"])
    y, z = (torch.cat(values) for values in zip(*runs, strict=True))
    weights = log_weights_by_hand(y, z)
    expected = scale * (weights.logsumexp(0) - math.log(3)).sum()
    assert found == pytest.approx(expected.item())
    # The twin: the rows together, as pyro.infer.RenyiELBO has them, are another bound.
    assert found != pytest.approx(scale * (weights.sum(1).logsumexp(0) - math.log(3)).item())
    torch.manual_seed(0)
    assert -avi.LeaveOneOutELBO(**options).loss(model, guide, *call) == pytest.approx(
        (scale * weights.mean(0).sum()).item()
    )


def coins(x):
    with pyro.plate("data", len(x)):
        with pyro.plate("bits", 2):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2, len(x)), 0.4, dtype=torch.double)))
        pyro.sample("x", dist.Normal(z[..., :1, :] + 2 * z[..., 1:, :] - z.prod(-2, keepdim=True), 1.0), obs=x)


def test_joint_values_are_those_that_pyro_enumerates_one_by_one():
    logits = torch.tensor([[0.3], [-1.0]], dtype=torch.double).expand(2, 4).clone().requires_grad_()
    a, b = torch.tensor(0.2, dtype=torch.double), torch.tensor([1.0, -0.5], dtype=torch.double)

    def rows(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(torch.full_like(x, 0.3)))
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.5, 0.3], dtype=torch.double)))
            pyro.sample("x", dist.Normal(2 * y + k, 1.0), obs=x)

    def given(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(logits=logits[0]))
            pyro.sample(
                "k", dist.Categorical(logits=torch.stack(torch.broadcast_tensors(a + y, b[0] * x, b[1] - y * x), -1))
            )

    ours = avi.EnumeratedELBO().differentiable_loss(rows, given, X)
    theirs = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(rows, config_enumerate(given, "parallel"), X)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))

    def of_bits(x):
        with pyro.plate("data", len(x)), pyro.plate("bits", 2):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    # A plate inside the row, whose values are joint ones.
    values = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.double)] * 2)
    log_q = dist.Bernoulli(logits=logits).log_prob(values.unsqueeze(-1)).sum(1)
    log_p = dist.Bernoulli(torch.tensor(0.4, dtype=torch.double)).log_prob(values).sum(1, keepdim=True)
    mean = values[:, 0] + 2 * values[:, 1] - values.prod(1)
    log_p = log_p + dist.Normal(mean.unsqueeze(1), 1.0).log_prob(X)
    expected = -(log_q.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(avi.EnumeratedELBO().differentiable_loss(coins, of_bits, X), expected)


def test_a_bit_decoder_knows_its_evidence_and_its_posterior():
    torch.manual_seed(0)
    x = (torch.rand(5, 1, 2, 2) > 0.5).double()
    sbn = avi.models.SigmoidBelief(avi.models.DenseDecoder(3, (4,), (1, 2, 2)), size=5).double()
    values, joint = sbn.log_joint(x)
    for value, expected in zip(values, joint.T, strict=True):
        data = {"z": value.expand(5, 3)}
        trace = poutine.trace(poutine.condition(sbn, data=data)).get_trace(x)
        trace.compute_log_prob()
        torch.testing.assert_close(trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"], expected)
    posterior = sbn.posterior(x)

    def exact(x):
        with pyro.plate("data", len(x)):
            at = pyro.sample("at", posterior, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(values[at]).to_event(1))

    # At the posterior every draw of the ELBO is the evidence.
    trace = poutine.trace(exact).get_trace(x)
    log_q = posterior.log_prob(trace.nodes["at"]["value"])
    torch.testing.assert_close(
        joint.gather(1, trace.nodes["at"]["value"].unsqueeze(1)).squeeze(1) - log_q, sbn.log_evidence(x)
    )
    with pytest.raises(ValueError, match="at most 16 bits"):
        avi.models.SigmoidBelief(avi.models.DenseDecoder(17, (), (1,)), size=1).log_evidence(torch.ones(1, 1))


def bits():
    torch.manual_seed(0)
    x = (torch.rand(6, 1, 2, 2) > 0.5).float()
    sbn = avi.models.SigmoidBelief(avi.models.DenseDecoder(2, (), (1, 2, 2)), size=6)
    return sbn, avi.AmortizedGuide(sbn, encoder=(3,)).setup(x), x


def images():
    torch.manual_seed(0)
    x = torch.rand(6, 1, 2, 2)
    vae = avi.models.VAE(avi.models.DenseDecoder(2, (), (1, 2, 2)), size=6)
    return vae, avi.AmortizedGuide(vae, encoder=(3,)).setup(x), x


def labels():
    torch.manual_seed(0)
    mixture = avi.models.NormalMixture(torch.tensor([[-2.0], [0.0], [2.0]]), 1.0, size=6)
    x = mixture().detach()
    guide = avi.AmortizedGuide(mixture, encoder=(3,)).setup(x)
    # Compiled with the guide inside of Pyro's handlers.
    return mixture, config_enumerate(guide, "parallel"), x


def labels_and_locations():
    torch.manual_seed(0)
    own = avi.AmortizedGuide(model, encoder=(3,)).setup(X)
    return model, config_enumerate(own, "parallel"), X


TRACED = {
    "score function": (images, avi.ScoreFunctionELBO),
    "leave one out": (bits, lambda: avi.LeaveOneOutELBO(3, vectorize_particles=True, max_plate_nesting=1)),
    "importance-weighted": (images, lambda: avi.ImportanceWeightedELBO(3)),
    "vimco": (bits, lambda: avi.VimcoELBO(3)),
    "twice reparameterized": (images, lambda: avi.DoublyReparameterizedELBO(2)),
    "enumerated": (bits, avi.EnumeratedELBO),
    "enumerated by Pyro": (labels, lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "enumerated by Pyro beside a path": (labels_and_locations, lambda: TraceEnum_ELBO(max_plate_nesting=2)),
    "relaxed": (bits, avi.RelaxedELBO),
    "straight through": (bits, lambda: avi.RelaxedELBO(straight_through=True)),
}


@pytest.mark.parametrize("name", TRACED)
def test_what_can_be_compiled_reads_no_number_out_of_a_tensor(name):
    make, elbo = TRACED[name]
    pair, elbo = make(), elbo()
    check_can_be_traced(elbo)
    # Eagerly first, as in a training.
    elbo.differentiable_loss(*pair)
    with pyro.validation_enabled(False), pyro.get_param_store().scope():
        # Numbers that are read out of tensors are an error.
        record(lambda x: [surrogate_loss(elbo, *pair[:2], (x,), {})], [pair[2]], held_at=1)


def test_values_without_probability_count_zero_in_a_graph():
    mixture, guide, x = labels()
    head, elbo = poutine.unwrap(guide).head, TraceEnum_ELBO(max_plate_nesting=1)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.3, -300.0, 0.0]))
    assert poutine.unwrap(guide).variational_parameters(x).softmax(-1).eq(0).any()
    losses, gradients = [], []
    for loss in (elbo.differentiable_loss, lambda *pair: surrogate_loss(elbo, *pair[:2], pair[2:], {})):
        losses.append(loss(mixture, guide, x))
        gradients.append(torch.autograd.grad(losses[-1], head.bias)[0])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
    assert losses[0].isfinite() and gradients[0].abs().max() > 0


def test_a_learned_baseline_is_fitted_in_training():
    sbn, guide, x = bits()
    elbo = avi.RaoBlackwellizedELBO("learned")
    states = []
    options = {"elbo": elbo, "lr": 0.05, "progress": False, "optimizer": torch.optim.Adam}
    avi.fit(
        sbn,
        guide,
        x,
        num_steps=40,
        callbacks=[lambda _: states.append(elbo.networks["z"][0].weight.detach().clone())],
        **options,
    )
    assert not torch.equal(states[0], states[-1])


def test_tensor_monte_carlo_is_trained_by():
    vae, guide, x = images()
    several = config_enumerate(guide, "parallel", num_samples=4, expand=False)
    before = guide.head.weight.detach().clone()
    losses = avi.fit(vae, several, x, num_steps=3, elbo=TraceTMC_ELBO(max_plate_nesting=1), progress=False).losses
    assert losses.isfinite().all() and not torch.equal(guide.head.weight, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["leave one out", "twice reparameterized", "enumerated by Pyro"])
def test_compiled_trainings_are_the_eager_ones(name):
    make, elbo = TRACED[name]
    losses = []
    for compile in (False, True):
        sbn, guide, x = make()
        trained = avi.fit(sbn, guide, x, num_steps=6, lr=0.05, elbo=elbo(), compile=compile, progress=False)
        assert (trained.compile_seconds > 0) is compile
        losses.append(trained.losses)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


def chain(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(torch.zeros_like(x), 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def chain_guide(x, tie=1.0):
    loc = torch.zeros_like(x).requires_grad_()
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(loc, 1.0))
        pyro.sample("b", dist.Normal(tie * a + loc, 1.0) if tie else dist.Normal(loc, 1.0))


def poisson(x):
    with pyro.plate("data", len(x)):
        pyro.sample("n", dist.Poisson(torch.ones_like(x)))


def normal(x):
    with pyro.plate("data", len(x)):
        pyro.sample("n", dist.Normal(torch.zeros_like(x), 1.0))


def many(x):
    with pyro.plate("data", len(x)):
        pyro.sample("n", dist.Bernoulli(torch.full((len(x), 13), 0.5)).to_event(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: avi.LeaveOneOutELBO(1), "num_particles of at least 2, got 1"),
        (lambda: avi.VimcoELBO(1), "num_particles of at least 2, got 1"),
        (lambda: avi.ImportanceWeightedELBO(0), "num_particles of at least 1, got 0"),
        (lambda: avi.RelaxedELBO(0.0), "positive temperature, got 0.0"),
        (lambda: avi.RaoBlackwellizedELBO("mean"), "'average', 'learned' or None, got 'mean'"),
        (lambda: avi.EnumeratedELBO().loss(poisson, poisson, X), "finite list of values, got Poisson at site 'n'"),
        (lambda: avi.EnumeratedELBO().loss(normal, normal, X), "discrete latents to sum over, got none"),
        (lambda: avi.EnumeratedELBO().loss(many, many, X), "max_values = 4,096 .* got 8,192"),
        (lambda: avi.RelaxedELBO().loss(poisson, poisson, X), "Bernoulli or OneHotCategorical, got Poisson"),
        (
            lambda: avi.DoublyReparameterizedELBO(2).loss(poisson, poisson, X),
            r"got \['n'\] of distributions without a path",
        ),
        (
            lambda: avi.DoublyReparameterizedELBO(2).differentiable_loss(chain, chain_guide, X),
            "do not depend on other latents, got one at site 'b'",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_several_factors_that_are_independent_are_reparameterized_twice():
    loss = avi.DoublyReparameterizedELBO(2).differentiable_loss(chain, lambda x: chain_guide(x, tie=0.0), X)
    assert loss.isfinite()
