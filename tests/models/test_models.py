"""The decoder models: log joints against hand-written ones, shapes, draws, errors, copies."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.func import functional_call

import pyro_avi as avi
from pyro_avi.models import VAE, BayesianDecoder, BernoulliLikelihood, ConvDecoder, DenseDecoder, GaussianLikelihood

MODELS = {"VAE": VAE, "BayesianDecoder": BayesianDecoder}
DECODERS = {
    "dense": lambda shape: DenseDecoder(2, (5, 4), shape),
    "conv": lambda shape: ConvDecoder(2, shape, channels=(3, 2)),
}
LIKELIHOODS = {
    "unit": GaussianLikelihood,
    "fixed": lambda: GaussianLikelihood(0.3),
    "learned": lambda: GaussianLikelihood(0.3, learned=True),
    "bernoulli": BernoulliLikelihood,
}
N, SHAPE = 6, (1, 5, 3)


def normal_log_density(x, loc=0.0, scale=1.0):
    return -0.5 * ((x - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


def bernoulli_log_density(x, logits):
    p = 1 / (1 + (-logits).exp())
    return x * p.log() + (1 - x) * (1 - p).log()


def make(model="VAE", decoder="dense", likelihood="unit", size=N, shape=SHAPE):
    return MODELS[model](DECODERS[decoder](shape), size=size, likelihood=LIKELIHOODS[likelihood]())


def log_joint(model, *args, **values):
    return poutine.trace(poutine.condition(model, data=values)).get_trace(*args).log_prob_sum()


# --- the log joint


@pytest.mark.parametrize("rows", ["all", "minibatch", "held out"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("model", MODELS)
def test_the_log_joint_is_the_one_written_by_hand(model, decoder, likelihood, rows):
    torch.manual_seed(0)
    network = DECODERS[decoder](SHAPE).double()
    model = MODELS[model](network, size=N, likelihood=LIKELIHOODS[likelihood]()).double()
    args = {
        "all": (torch.rand(N, *SHAPE).double(),),
        "minibatch": (torch.rand(3, *SHAPE).double(), torch.tensor([5, 0, 2])),
        "held out": (torch.rand(9, *SHAPE).double(),),
    }[rows]
    z = torch.randn(len(args[0]), 2).double()
    values, expected, weights = {"z": z}, torch.zeros(()).double(), dict(network.named_parameters())
    if isinstance(model, BayesianDecoder):
        # Other weights than the module's own, in the order of its parameters.
        theta = 0.3 * torch.randn(sum(weight.numel() for weight in network.parameters())).double()
        values["theta"], expected, start = theta, normal_log_density(theta).sum(), 0
        for name, weight in network.named_parameters():
            weights[name] = theta[start : start + weight.numel()].reshape(weight.shape)
            start += weight.numel()
    output = functional_call(network, weights, z)
    if likelihood == "bernoulli":
        of_rows = bernoulli_log_density(args[0], output)
    else:
        # The precision of a scale is that of the tensor that holds it.
        scale = model.likelihood.log_scale.exp().item()
        assert scale == pytest.approx(1.0 if likelihood == "unit" else 0.3, rel=1e-6)
        of_rows = normal_log_density(args[0], output, scale)
    local = of_rows.flatten(1).sum(1) + normal_log_density(z).sum(1)
    expected = expected + (2 if rows == "minibatch" else 1) * local.sum()
    torch.testing.assert_close(log_joint(model, *args, **values), expected, rtol=0.0, atol=1e-10)


def test_the_dense_decoder_is_its_layers():
    network = DenseDecoder(2, (3,), SHAPE)
    first, last = (layer for layer in network.layers if isinstance(layer, nn.Linear))
    z = torch.randn(4, 2)
    hidden = z @ first.weight.T + first.bias
    hidden = torch.where(hidden > 0, hidden, 0.2 * hidden)
    expected = (hidden @ last.weight.T + last.bias).reshape(4, *SHAPE)
    torch.testing.assert_close(network(z), expected)
    assert [type(layer) for layer in DenseDecoder(2, (), SHAPE, activation=nn.Tanh).layers] == [nn.Linear, nn.Unflatten]
    assert any(isinstance(layer, nn.Tanh) for layer in DenseDecoder(2, (3,), SHAPE, activation=nn.Tanh).layers)


# --- likelihoods


@pytest.mark.parametrize("event_dim", [0, 1, 3])
def test_the_isotropic_normal_is_independent_normals(event_dim):
    torch.manual_seed(0)
    loc, x = torch.randn(2, 4, *SHAPE).double()
    scale = torch.tensor(0.7).double().requires_grad_()
    with torch.no_grad():
        likelihood = GaussianLikelihood(0.7).double()
        likelihood.log_scale.copy_(scale.log())
    ours = likelihood(loc).to_event(event_dim)
    theirs = dist.Normal(loc, scale).to_event(event_dim)
    assert (ours.batch_shape, ours.event_shape) == (theirs.batch_shape, theirs.event_shape)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x).detach(), rtol=0.0, atol=1e-10)
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.variance, theirs.variance.detach())
    assert ours.support == theirs.support or ours.support.event_dim == theirs.support.event_dim
    wide = ours.expand(torch.Size((2,)) + ours.batch_shape)
    assert wide.batch_shape == (2, *ours.batch_shape) and wide.event_shape == ours.event_shape
    torch.testing.assert_close(wide.log_prob(x)[1], ours.log_prob(x))


def test_draws_of_the_isotropic_normal_have_its_moments():
    torch.manual_seed(0)
    likelihood = GaussianLikelihood(0.5, learned=True)
    loc = torch.tensor([1.0, -2.0])
    count = 20_000
    draws = likelihood(loc).rsample((count,))
    assert draws.requires_grad and not likelihood(loc).sample().requires_grad
    # Resolved to a hundredth of the scale: five standard errors of mean and of standard deviation.
    assert ((draws.mean(0) - loc).abs() < 5 * 0.5 / count**0.5).all()
    assert ((draws.std(0) - 0.5).abs() < 5 * 0.5 / (2 * count) ** 0.5).all()


def test_a_fixed_scale_is_no_parameter_and_a_learned_one_is():
    fixed, learned = GaussianLikelihood(0.3), GaussianLikelihood(0.3, learned=True)
    assert not list(fixed.parameters()) and [name for name, _ in learned.named_parameters()] == ["log_scale"]
    assert "log_scale" in fixed.state_dict()
    assert fixed.scale.item() == learned.scale.item() == pytest.approx(0.3)


def test_bernoulli_takes_binary_and_grey_images():
    torch.manual_seed(0)
    model = make(likelihood="bernoulli")
    assert set(model().unique().tolist()) <= {0.0, 1.0}
    grey, z = torch.rand(N, *SHAPE), torch.zeros(N, 2)
    # Linear in the pixels: a grey pixel counts as that share of a white one.
    ends = [log_joint(model, torch.full((N, *SHAPE), value), z=z) for value in (0.0, 1.0)]
    half = log_joint(model, torch.full((N, *SHAPE), 0.5), z=z)
    torch.testing.assert_close(half, sum(ends) / 2)
    assert log_joint(model, grey, z=z).isfinite()


def test_the_likelihood_is_gaussian_with_unit_noise_unless_one_is_given():
    model = VAE(DenseDecoder(2, (3,), SHAPE), size=N)
    assert isinstance(model.likelihood, GaussianLikelihood) and model.likelihood.scale.item() == 1.0


# --- shapes


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 5, 7), (2, 1, 1), (1, 9, 2)])
@pytest.mark.parametrize("decoder", DECODERS)
def test_decoders_give_images_of_any_size(decoder, shape):
    network = DECODERS[decoder](shape)
    assert network.latent_dim == 2 and network.shape == shape
    assert network(torch.zeros(4, 2)).shape == (4, *shape)
    assert network(torch.zeros(3, 4, 2)).shape == (3, 4, *shape)
    z = torch.randn(3, 4, 2)
    torch.testing.assert_close(network(z)[1], network(z[1]))


@pytest.mark.parametrize("channels", [(4,), (4, 3, 2)])
def test_the_convolutional_decoder_doubles_as_often_as_it_has_channels(channels):
    network = ConvDecoder(2, (1, 28, 20), channels=channels)
    assert sum(isinstance(layer, nn.ConvTranspose2d) for layer in network.layers) == len(channels)
    assert network(torch.zeros(2, 2)).shape == (2, 1, 28, 20)


def test_every_pixel_and_every_latent_counts():
    for decoder in DECODERS.values():
        torch.manual_seed(0)
        network = decoder(SHAPE)
        jacobian = torch.func.jacrev(lambda z, f=network: f(z[None])[0])(torch.randn(2))
        assert (jacobian.abs().flatten(0, -2).amax(-1) > 0).all() and (jacobian.abs().flatten(0, -2).amax(0) > 0).all()


@pytest.mark.parametrize("model", MODELS)
def test_without_data_the_model_draws(model):
    torch.manual_seed(0)
    model = make(model)
    index = torch.tensor([4, 1])
    one, other = model(), model()
    assert one.shape == (N, *SHAPE) and not torch.equal(one, other)
    assert model(index=index).shape == (2, *SHAPE)
    x = torch.rand(2, *SHAPE)
    assert model(x, index) is x
    trace = poutine.trace(model).get_trace(x, index)
    assert trace.nodes["data"]["value"] is index and trace.nodes["z"]["fn"].batch_shape == (2,)
    assert trace.nodes["x"]["scale"] == trace.nodes["z"]["scale"] == N / 2
    latents = {"z"} | ({"theta"} if isinstance(model, BayesianDecoder) else set())
    assert {name for name in trace.stochastic_nodes if name != "data"} == latents


def test_particles_may_be_vectorized():
    # Latents with a dimension of particles on the left decode to images with the same.
    model = make("VAE", "conv")
    x = torch.rand(N, *SHAPE)
    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(model).get_trace(x)
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].shape == (4, N)


# --- life


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("model", MODELS)
def test_a_model_in_double_precision_stays_there(model, decoder):
    model = make(model, decoder, "learned").to(torch.float64)
    trace = poutine.trace(model).get_trace(torch.rand(N, *SHAPE).double())
    assert {trace.nodes[name]["value"].dtype for name in trace.stochastic_nodes if name != "data"} == {torch.float64}
    assert trace.log_prob_sum().dtype == model().dtype == torch.float64


@pytest.mark.parametrize("model", MODELS)
def test_a_copy_is_another_model_with_the_same_numbers(model):
    model = make(model, likelihood="learned")
    other = copy.deepcopy(model)
    torch.manual_seed(0)
    x = model()
    torch.manual_seed(0)
    assert torch.equal(x, other())
    assert not set(map(id, model.parameters())) & set(map(id, other.parameters()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    guide = avi.ConstantGuide(other)
    avi.fit(other, guide, torch.rand(N, *SHAPE), num_steps=3, lr=0.1, progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not torch.equal(other.likelihood.log_scale, model.likelihood.log_scale)


def test_the_state_of_a_model_is_its_parameters():
    torch.manual_seed(0)
    one, other = make("VAE", likelihood="learned"), make("VAE", likelihood="learned")
    other.load_state_dict(one.state_dict())
    z = torch.zeros(N, 2)
    x = torch.rand(N, *SHAPE)
    assert torch.equal(log_joint(one, x, z=z), log_joint(other, x, z=z))


def test_the_users_decoder_gives_shapes_alone():
    torch.manual_seed(0)
    network = DenseDecoder(2, (5,), SHAPE)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    model = BayesianDecoder(network, size=N).double()
    assert not list(model.parameters())
    avi.fit(model, avi.ConstantGuide(model), torch.rand(N, *SHAPE).double(), num_steps=2, lr=0.1, progress=False)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 and p.grad is None for p in network.parameters())
    # Nor do later changes of it reach the model.
    x = torch.rand(N, *SHAPE).double()
    values = {"theta": torch.ones(2 * 5 + 5 + 5 * 15 + 15).double(), "z": torch.ones(N, 2).double()}
    before = log_joint(model, x, **values)
    nn.init.zeros_(next(network.parameters()))
    assert torch.equal(before, log_joint(model, x, **values))


# --- errors


class Normalized(nn.Module):
    latent_dim = 2

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))


REFUSED = {
    "no rows": (lambda: make(size=0), "Expected size to be the number of rows of the data set, got 0"),
    "latent dim": (lambda: DenseDecoder(0, (3,), SHAPE), "Expected positive sizes of the decoder, got 0"),
    "width": (lambda: DenseDecoder(2, (3, -1), SHAPE), "Expected positive sizes of the decoder, got -1"),
    "shape": (lambda: ConvDecoder(2, (1, 0, 3)), "Expected positive sizes of the decoder, got 0"),
    "channels": (lambda: ConvDecoder(2, SHAPE, channels=(4, 0)), "Expected positive sizes of the decoder, got 0"),
    "scale": (lambda: GaussianLikelihood(0.0), "Expected a positive scale of the noise, got 0.0"),
    "scale that is no number": (
        lambda: GaussianLikelihood(float("nan")),
        "Expected a positive scale of the noise, got nan",
    ),
    "buffers": (
        lambda: BayesianDecoder(Normalized(), size=N),
        "Expected a decoder whose state is its weights alone, got one with buffers: Normalized",
    ),
    "index": (
        lambda: make()(torch.rand(3, *SHAPE), torch.arange(2)),
        "Expected one position in index for each of the 3 rows of x, got 2.\nPass model",
    ),
    "images without channels": (
        lambda: make()(torch.rand(N, *SHAPE[1:])),
        r"Expected rows of x of shape \(1, 5, 3\), got \(5, 3\)",
    ),
    "flat images": (lambda: make()(torch.rand(N, 15)), r"Expected rows of x of shape \(1, 5, 3\), got \(15,\)"),
    "images of one pixel": (
        lambda: make("BayesianDecoder")(torch.rand(N, 1, 1, 1)),
        r"Expected rows of x of shape \(1, 5, 3\), got \(1, 1, 1\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_model_or_no_data_is_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
