"""Constant < amortized < factorized: copied from one to the next, every log weight is the same to the last bit."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_avi as avi

N, DRAWS = 6, 3
INDEX = torch.tensor([4, 1, 0])


class Structured:
    """Locals of several kinds, an inner plate, globals, and names with dots."""

    def __call__(self, x, index=None):
        loc = pyro.sample("theta.loc", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        scale = pyro.sample("theta.scale", dist.LogNormal(x.new_zeros(()), 0.5))
        with pyro.plate("data", N, subsample=index, dim=-2):
            rate = pyro.sample("rate", dist.Gamma(x.new_full((), 2.0), 1.0))
            share = pyro.sample("share", dist.Dirichlet(x.new_ones(3)))
            with pyro.plate("inner", 2, dim=-1):
                w = pyro.sample("w", dist.Normal(rate, 1.0))
                pyro.sample("x", dist.Normal(w * share[..., 0] + loc.sum(), scale), obs=x)


def decoder(model, **kwargs):
    likelihood = avi.models.GaussianLikelihood(0.5)
    return model(avi.models.DenseDecoder(2, (4,), (3,)), size=N, likelihood=likelihood, **kwargs)


MODELS = {
    "VAE": (lambda: decoder(avi.models.VAE), 3, None),
    "BayesianDecoder": (lambda: decoder(avi.models.BayesianDecoder), 3, None),
    "locals of several kinds": (Structured, 2, "data"),
}


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(params=MODELS)
def chain(request, dtype):
    """A model, its rows, and three guides, each with the output of the one before."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    make, dim, plate = MODELS[request.param]
    model, x = make(), torch.randn(N, dim).to(dtype)
    if isinstance(model, torch.nn.Module):
        model.to(dtype)
    options = {"plate": plate, "init_scale": 0.3}
    constant = avi.ConstantGuide(model, **options).setup(x)
    with torch.no_grad():
        constant.vector.add_(torch.randn_like(constant.vector))
        if constant.global_guide is not None:
            constant.global_guide.vector.add_(0.1 * torch.randn_like(constant.global_guide.vector))
    amortized = avi.AmortizedGuide(model, (5,), global_guide=copy.deepcopy(constant.global_guide), **options).setup(x)
    factorized = avi.FactorizedGuide(model, global_guide=copy.deepcopy(constant.global_guide), **options).setup(x)
    return model, x, constant, amortized, factorized


@torch.no_grad()
def constant_to_amortized(constant, amortized):
    amortized.head.weight.zero_()
    amortized.head.bias.copy_(constant.vector)


@torch.no_grad()
def amortized_to_factorized(amortized, factorized, x):
    amortized.head.weight.normal_()
    factorized.table.copy_(amortized.variational_parameters(x))


def weigh(model, guide, *args):
    torch.manual_seed(1)
    return avi.log_weights(model, guide, *args, num_samples=DRAWS, seed=1, plate="data")


def identical(model, one, two, *args):
    a, b = weigh(model, one, *args), weigh(model, two, *args)
    assert a.local.shape == (DRAWS, len(args[0]))
    assert a.local.isfinite().all() and a.local.var() > 0
    return torch.equal(a.local, b.local) and torch.equal(a.global_, b.global_) and a.scale == b.scale


def calls(x):
    return [(x,), (x[INDEX], INDEX)]


def test_constant_within_amortized(chain, dtype):
    model, x, constant, amortized, _ = chain
    constant_to_amortized(constant, amortized)

    assert amortized.variational_parameters(x).dtype == dtype
    for args in calls(x):
        assert identical(model, constant, amortized, *args)
    with torch.no_grad():
        amortized.head.bias[0] += 1e-6
    for args in calls(x):
        assert not identical(model, constant, amortized, *args)


def test_amortized_within_factorized(chain, dtype):
    model, x, _, amortized, factorized = chain
    amortized_to_factorized(amortized, factorized, x)

    assert factorized.table.dtype == dtype
    assert identical(model, amortized, factorized, x)
    with torch.no_grad():
        factorized.table[INDEX[0], 0] += 1e-6
    assert not identical(model, amortized, factorized, x)


def test_amortized_within_factorized_for_a_minibatch(chain):
    model, x, _, amortized, factorized = chain
    amortized_to_factorized(amortized, factorized, x)
    with torch.no_grad():
        # What the network gives for a row may differ in the last bit with the number of rows it is given at once.
        factorized.table[INDEX] = amortized.variational_parameters(x[INDEX], INDEX)

    args = x[INDEX], INDEX
    assert identical(model, amortized, factorized, *args)
    with torch.no_grad():
        factorized.table[2] += 1.0
    assert identical(model, amortized, factorized, *args)
    with torch.no_grad():
        factorized.table[INDEX[0], 0] += 1e-6
    assert not identical(model, amortized, factorized, *args)
