"""Data that are no tensors, that have no rows, or that an encoder cannot read: errors that say what was passed."""

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

N = 6
X = torch.linspace(-1.0, 1.0, 3 * N).reshape(N, 3)


def model(x, index=None):
    with pyro.plate("data", N if index is not None else len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 3), 1.0).to_event(1), obs=x)


GUIDES = {
    "constant": avi.ConstantGuide,
    "amortized": lambda model: avi.AmortizedGuide(model, (4,)),
    "factorized": avi.FactorizedGuide,
}

TO_PREDICT = {
    "call": lambda g, *a: g(*a),
    "traced call": lambda g, *a: poutine.trace(g).get_trace(*a),
    "parameters": lambda g, *a: g.variational_parameters(*a),
    "posterior": lambda g, *a: g.posterior(*a),
    "median": lambda g, *a: g.median(*a),
    "quantiles": lambda g, *a: g.quantiles([0.1, 0.9], *a),
    "mean": lambda g, *a: g.mean(*a),
    "sample": lambda g, *a: g.sample(*a, num_samples=2),
    "by row": lambda g, *a: g.posterior_by_row([a]),
}
TO_MEASURE = {
    "fit": lambda g, *a: avi.fit(model, g, *a, num_steps=2, progress=False),
    "fit by batches": lambda g, *a: avi.fit(model, g, batches=[a] * 2, num_steps=2, progress=False),
    "log_weights": lambda g, *a: avi.log_weights(model, g, *a, num_samples=2),
    "ais": lambda g, *a: avi.ais(model, g, *a, num_chains=2, num_temperatures=2, num_leapfrog=1),
    "measure_gaps": lambda g, *a: avi.measure_gaps(model, g, *a, num_steps=2, num_samples=100),
    "sbc": lambda g, *a: avi.sbc(model, g, *a, num_simulations=1, num_samples=20, num_steps=1),
    "posterior_predictive": lambda g, *a: avi.posterior_predictive(model, g, *a, num_samples=2),
    "to_arviz": lambda g, *a: avi.to_arviz(model, g, *a, num_samples=2),
}
AFTER_SETUP = {"refine": lambda g, *a: avi.refine(model, g, *a, num_steps=2)}

CASES = [
    pytest.param(kind, call, is_set_up, id=f"{kind}, {name}, {'after' if is_set_up else 'before'} setup")
    for kind in GUIDES
    for is_set_up in (False, True)
    for name, call in {**TO_PREDICT, **TO_MEASURE, **(AFTER_SETUP if is_set_up else {})}.items()
]
everywhere = pytest.mark.parametrize("kind, call, is_set_up", CASES)


def make(kind, is_set_up=True):
    guide = GUIDES[kind](model)
    return guide.setup(X) if is_set_up else guide


# --- no tensors


@everywhere
def test_an_array_is_to_be_converted(kind, call, is_set_up):
    with pytest.raises(
        TypeError, match=r"(?s)value observed at site 'x', got a numpy.ndarray of shape \(6, 3\).*as_tensor"
    ):
        call(make(kind, is_set_up), X.numpy())


NO_TENSORS = {
    "list": (X.tolist(), "observed at site 'x', got a list"),
    "data frame": (pandas.DataFrame(X.numpy()), r"got a pandas.*DataFrame of shape \(6, 3\)"),
}


@pytest.mark.parametrize("name", NO_TENSORS)
@pytest.mark.parametrize("kind", GUIDES)
def test_so_is_what_else_is_no_tensor(kind, name):
    data, message = NO_TENSORS[name]
    for call in (TO_PREDICT["call"], TO_MEASURE["fit"]):
        with pytest.raises(TypeError, match=message):
            call(make(kind), data)


def test_a_model_that_fails_on_an_array_says_so():
    def by_methods(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.float().sum(-1))

    for guide in (avi.ConstantGuide(by_methods), avi.ConstantGuide(by_methods).setup(X)):
        with pytest.raises(TypeError, match=r"(?s)numpy.ndarray of shape \(6, 3\).*AttributeError.*'float'.*as_tensor"):
            avi.fit(by_methods, guide, X.numpy(), num_steps=1, progress=False)


# --- other devices


def test_data_on_another_device_are_to_be_moved():
    """The device "meta", which every torch has, stands in for any other."""
    vae = avi.models.VAE(avi.models.DenseDecoder(2, (5,), (3,)), size=N)
    guide = avi.AmortizedGuide(vae, (4,)).setup(X)
    guide.to("meta")
    for call in (
        lambda: avi.fit(vae, guide, X, num_steps=1, progress=False),
        lambda: avi.log_weights(vae, guide, X, num_samples=2),
    ):
        with pytest.raises(RuntimeError, match=r"(?s)Expected the arguments .* got arguments on cpu, .*x.to\(device\)"):
            call()


def test_other_failures_of_a_model_are_its_own():
    def failing(x):
        raise AttributeError("no such thing")

    with pytest.raises(AttributeError, match="^no such thing$"):
        avi.ConstantGuide(failing).setup(X)

    def dividing(x):
        return 1 / 0

    with pytest.raises(ZeroDivisionError, match="division by zero"):
        avi.ConstantGuide(dividing).setup(X[:0])


@pytest.mark.filterwarnings("ignore:.*could not be traced to the model's arguments:UserWarning")
@pytest.mark.parametrize("kind", GUIDES)
def test_a_model_may_convert_its_arrays_itself(kind):
    def converting(x):
        return model(torch.as_tensor(x))

    fit = avi.fit(converting, GUIDES[kind](converting), X.numpy(), num_steps=2, progress=False)
    assert fit.steps == 2


@pytest.mark.parametrize("kind", GUIDES)
def test_positions_may_be_an_array(kind):
    guide, index = make(kind), np.array([4, 1])
    assert torch.equal(guide.median(X[index], index)["z"], guide.median(X)["z"][index])


@pytest.mark.parametrize("name", ["fit", "fit by batches", "log_weights", "to_arviz"])
def test_data_of_other_guides_too(name):
    with pytest.raises(TypeError, match=r"(?s)numpy.ndarray of shape \(6, 3\).*as_tensor"):
        TO_MEASURE[name](AutoNormal(model), X.numpy())
    with pytest.raises(ValueError, match=r"at least one row.*shape \(0, 3\)"):
        TO_MEASURE[name](AutoNormal(model), X[:0])


# --- no rows


@everywhere
@pytest.mark.parametrize("index", [(), (torch.arange(0),)], ids=["alone", "with positions"])
def test_a_call_without_rows_is_refused(kind, call, is_set_up, index):
    with pytest.raises(ValueError, match=r"at least one row.*shape \(0, 3\)") as caught:
        call(make(kind, is_set_up), X[:0], *index)
    assert "Trace Shapes" not in str(caught.value)


@pytest.mark.parametrize("kind", GUIDES)
def test_an_empty_batch_on_the_way_is_refused(kind):
    index = torch.arange(0)
    batches = [(X, torch.arange(N)), (X[index], index)]
    with pytest.raises(ValueError, match=r"at least one row.*shape \(0, 3\), \(0,\)"):
        avi.fit(model, GUIDES[kind](model), batches=batches, num_steps=2, progress=False)


def test_plates_given_without_rows_are_refused():
    def plates(x):
        return pyro.plate("data", len(x))

    guide = avi.ConstantGuide(model, create_plates=plates).setup(X)
    with pytest.raises(ValueError, match=r"at least one row.*shape \(0, 3\)"):
        guide(X[:0])


def test_no_rows_make_no_minibatches():
    with pytest.raises(ValueError, match="rows, at least 1, got"):
        avi.minibatches(X[:0], batch_size=2)


# --- encoders


class By(nn.Module):
    """A layer, and what is made of its features."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(3, 4), function

    def forward(self, x):
        return self.function(self.layer(x))


def raising(features):
    raise KeyError("nothing")


ENCODERS = {
    "other inputs": (
        nn.Linear(5, 4),
        r"inputs of shape \(6, 3\) and torch.float32.*\(Linear\) fails: .*6x3 and 5x4",
    ),
    "images": (
        avi.encoders.Conv(1, (8, 8)),
        r"(?s)inputs of shape \(6, 3\).*\(Conv\) fails: RuntimeError.*nn.Unflatten",
    ),
    "another type": (nn.Embedding(3, 4), r"(?s)shape \(6, 3\) and torch.float32.*Embedding.*inputs="),
    "too few rows": (By(lambda x: x[:-1]), r"map \(6, 3\) to features of shape \(6, H\), got \(5, 4\)"),
    "too many dimensions": (By(lambda x: x[None]), r"map \(6, 3\) to features of shape \(6, H\), got \(1, 6, 4\)"),
    "too few dimensions": (By(lambda x: x.sum(-1)), r"map \(6, 3\) to features of shape \(6, H\), got \(6,\)"),
    "a tuple": (By(lambda x: (x, x)), r"map \(6, 3\) to features of shape \(6, H\), got a tuple"),
    "fails inside": (
        By(raising),
        r"inputs of shape \(6, 3\) and torch.float32, on which it \(By\) fails: KeyError: 'nothing'",
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_told_the_shape_that_it_was_given(name):
    encoder, message = ENCODERS[name]
    guide = avi.AmortizedGuide(model, encoder)
    for call in (guide.setup, TO_PREDICT["traced call"], TO_MEASURE["fit"]):
        with pytest.raises(ValueError, match=message) as caught:
            call(X) if call == guide.setup else call(guide, X)
        assert "Trace Shapes" not in str(caught.value)


def test_what_an_encoder_raised_is_the_cause():
    with pytest.raises(ValueError, match="fails: KeyError") as caught:
        avi.AmortizedGuide(model, By(raising)).setup(X)
    assert isinstance(caught.value.__cause__, KeyError)


def test_memory_that_is_not_there_is_no_fault_of_the_encoder():
    def full(features):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="^full$"):
        avi.AmortizedGuide(model, By(full)).setup(X)


LATER = {
    "by widths, more features": ((4,), (5, 4), r"rows with features of shape \(3,\).*got values of shape \(5, 4\)"),
    "by widths, one feature": ((4,), (5, 1), r"rows with features of shape \(3,\).*got values of shape \(5, 1\)"),
    "by widths, no feature": ((4,), (5,), r"rows in dimension -2.*got shape \(5,\)"),
    "module": (nn.Linear(3, 4), (5, 4), r"(?s)inputs of shape \[B, 3\].*got inputs of shape \(5, 4\).*5x4 and 3x4"),
}


@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize("call", ["call", "parameters", "mean"])
def test_later_rows_have_the_shape_of_the_first(name, call):
    encoder, shape, message = LATER[name]
    guide = avi.AmortizedGuide(model, encoder).setup(X)
    with pytest.raises(ValueError, match=message):
        TO_PREDICT[call](guide, torch.ones(shape))


def test_features_of_other_numbers_of_rows_are_looked_at_in_every_call():
    guide = avi.AmortizedGuide(model, By(lambda features: features.squeeze())).setup(X)
    assert guide.variational_parameters(X[:2]).shape == (2, 2)
    with pytest.raises(ValueError, match=r"map \(1, 3\) to features of shape \(1, H\), got \(4,\)"):
        guide.variational_parameters(X[:1])


def test_what_is_read_is_a_tensor():
    guide = avi.AmortizedGuide(model, inputs=lambda x, index=None: x.numpy())
    with pytest.raises(TypeError, match=r"inputs= to return a tensor \[B, ...\], got a ndarray"):
        guide.setup(X)
