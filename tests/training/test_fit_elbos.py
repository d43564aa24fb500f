"""Training by any of Pyro's ELBOs, beside a model of the same latents, by one thread at a time."""

import argparse
import threading
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

import pyro_avi as avi

X = torch.linspace(-2.0, 3.0, 6, dtype=torch.double)


class Normals(PyroModule):
    """Rows with a latent each, and a weight to learn."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.double))

    def forward(self, x, scale=1.0):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(self.weight * z, scale), obs=x)


class Coins(PyroModule):
    """Rows with a coin each, which no draw can be differentiated through."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full_like(x, 0.4)))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)


class CoinsGuide(PyroModule):
    def __init__(self, baseline):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(X), dtype=torch.double))
        self.net = nn.Linear(1, 1).double()
        self.baseline = baseline

    def forward(self, x):
        net = self.net
        options = {
            "none": {},
            "average": {"use_decaying_avg_baseline": True},
            "net": {"nn_baseline": lambda given: net(given).squeeze(-1), "nn_baseline_input": x.unsqueeze(-1)},
        }[self.baseline]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.logits), infer={"baseline": options})


def normals():
    torch.manual_seed(0)
    model = Normals()
    return model, avi.AmortizedGuide(model, encoder=(3,)).setup(X)


def coins(baseline):
    torch.manual_seed(0)
    return Coins(), CoinsGuide(baseline)


CASES = {
    "Trace": (normals, Trace_ELBO),
    "TraceMeanField": (normals, TraceMeanField_ELBO),
    "TraceGraph": (normals, TraceGraph_ELBO),
    "TraceGraph, several particles": (normals, lambda: TraceGraph_ELBO(num_particles=2)),
    "Renyi": (normals, lambda: RenyiELBO(alpha=0.5, num_particles=3)),
    "TraceEnum": (normals, lambda: TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)),
    "wake and sleep": (
        normals,
        lambda: ReweightedWakeSleep(num_particles=2, insomnia=1.0, vectorize_particles=False),
    ),
    "scores": (lambda: coins("none"), TraceGraph_ELBO),
    "scores and averages": (lambda: coins("average"), TraceGraph_ELBO),
    "leave one out": (lambda: coins("none"), lambda: avi.LeaveOneOutELBO(3)),
    "vimco": (lambda: coins("none"), lambda: avi.VimcoELBO(3)),
    "twice reparameterized": (normals, lambda: avi.DoublyReparameterizedELBO(3)),
    "enumerated": (lambda: coins("none"), avi.EnumeratedELBO),
    "relaxed": (lambda: coins("none"), avi.RelaxedELBO),
    "scores and a net": (lambda: coins("net"), TraceGraph_ELBO),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_parameters_are_those_of_svi(case):
    make, elbo = CASES[case]
    torch.set_default_dtype(torch.double)
    try:
        pair, other = make(), make()
        start = [p.detach().clone() for module in pair for p in module.parameters()]
        options = {"lr": 0.05, "num_steps": 5, "optimizer": torch.optim.Adam, "seed": 3, "progress": False}
        losses = avi.fit(*pair, X, elbo=elbo(), **options).losses
        pyro.clear_param_store()
        svi = SVI(*other, pyro.optim.Adam({"lr": 0.05}), elbo())
        torch.manual_seed(3)
        values = [svi.step(X) for _ in range(5)]
    finally:
        torch.set_default_dtype(torch.float32)
    values = [sum(value) if isinstance(value, tuple) else value for value in values]
    torch.testing.assert_close(losses, torch.tensor(values, dtype=torch.double), rtol=1e-10, atol=1e-10)
    ours, theirs = ([p for module in modules for p in module.parameters()] for modules in (pair, other))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)
        assert one.grad is None
    assert sum(not torch.equal(one, before) for one, before in zip(ours, start, strict=True)) >= 1
    if "net" in case:
        assert not torch.equal(pair[1].net.weight, start[-2])


def test_a_training_begins_its_averages_anew():
    def train():
        model, guide = coins("average")
        avi.fit(model, guide.double(), X, num_steps=5, lr=0.05, elbo=TraceGraph_ELBO(), compile=False, progress=False)
        return guide.logits.detach()

    torch.set_default_dtype(torch.double)
    try:
        first = train()
        (name,) = pyro.get_param_store()
        # Those of a training that diverged, and that Pyro names by the latent alone.
        pyro.get_param_store()[name] = torch.full_like(pyro.get_param_store()[name], torch.nan)
        torch.testing.assert_close(train(), first, rtol=0, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)


def test_tables_move_row_by_row_by_an_elbo_that_takes_its_gradient():
    tables = []
    for elbo in (Trace_ELBO(), TraceGraph_ELBO()):
        model = Normals()
        guide = avi.FactorizedGuide(model).setup(X)
        avi.fit(model, guide, X, num_steps=4, lr={"local": 0.1}, elbo=elbo, progress=False)
        tables.append(guide.table.detach())
        assert model.weight == 0.5 and model.weight.grad is None
    # All draws are differentiated through: both have the gradient of the path.
    torch.testing.assert_close(*tables)


@pytest.mark.parametrize(
    ("elbo", "instead"),
    [
        (TraceGraph_ELBO(), "LeaveOneOutELBO"),
        (avi.RaoBlackwellizedELBO("average"), "LeaveOneOutELBO"),
        (RenyiELBO(num_particles=2), "ImportanceWeightedELBO"),
    ],
)
def test_what_cannot_be_compiled_says_what_can(elbo, instead):
    model, guide = normals()
    name = type(elbo).__name__
    said = (
        rf"taken eagerly, not compiled: {name} is none of Trace_ELBO.*avi\.{instead} comes close to it.*compile=False"
    )
    with pytest.warns(UserWarning, match=said):
        avi.fit(model, guide, X, num_steps=2, elbo=elbo, compile=True, progress=False)


def test_unasked_it_is_taken_eagerly_and_the_log_says_why(caplog):
    model, guide = normals()
    with warnings.catch_warnings(), caplog.at_level("INFO", "pyro_avi"):
        warnings.simplefilter("error")
        avi.fit(model, guide, X, num_steps=2, elbo=TraceGraph_ELBO(), progress=False)
        assert not caplog.messages
        trained = avi.fit(
            model,
            guide,
            X,
            num_steps=9_999_999,
            elbo=TraceGraph_ELBO(),
            progress=False,
            callbacks=[lambda fit: fit.steps == 2],
        )
    assert trained.compile_seconds == 0
    (said,) = caplog.messages
    assert said.startswith("The training step is evaluated eagerly, not compiled: TraceGraph_ELBO is none of")


@pytest.mark.parametrize(
    ("elbo", "message"),
    [
        (object(), "Expected one of Pyro's ELBOs"),
        (TraceTailAdaptive_ELBO(num_particles=2, vectorize_particles=True), "computes its loss, got TraceTailAdaptive"),
    ],
)
def test_what_is_no_loss_is_refused(elbo, message):
    with pytest.raises(TypeError, match=message):
        avi.fit(*normals(), X, num_steps=2, elbo=elbo, progress=False)


def test_a_graph_of_torch_jit_is_refused_for_a_table():
    model = Normals()
    guide = avi.FactorizedGuide(model).setup(X)
    with pytest.raises(ValueError, match=r"runs the guide at every step.*got JitTrace_ELBO.\nPass Trace_ELBO\(...\)"):
        avi.fit(model, guide, X, num_steps=2, elbo=JitTrace_ELBO(), progress=False)


# --- the latents of model and guide


def two(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def one(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def enumerated(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize(
    ("model", "other", "message"),
    [
        (two, one, r"got none for \['a'\]\.\n"),
        (one, two, r"got one for \['a'\], which the model does not draw\.\n"),
        (enumerated, one, r"got none for \['k'\](.|\n)*TraceEnum_ELBO"),
    ],
)
@pytest.mark.parametrize("validated", [True, False])
def test_a_guide_of_another_model_is_refused_before_any_step(model, other, message, elbo, validated):
    x = X.float()
    guide = AutoNormal(other)
    guide(x)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    with (
        pyro.validation_enabled(validated),
        pytest.raises(ValueError, match=f"for the latents of the model, {message}"),
    ):
        avi.fit(model, guide, x, num_steps=3, elbo=elbo(), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())


def test_latents_that_are_summed_out_need_no_guide():
    x = X.float()
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    losses = avi.fit(enumerated, avi.FactorizedGuide(enumerated), x, num_steps=3, elbo=elbo, progress=False).losses
    assert losses.isfinite().all()


# --- threads


def test_trainings_and_measurements_in_threads_are_those_of_one_after_another():
    def work(seed):
        torch.manual_seed(0)
        model = Normals()
        guide = avi.FactorizedGuide(model)
        losses = avi.fit(model, guide, X, num_steps=15, lr=0.05, seed=seed, progress=False, callbacks=[measure]).losses
        return losses, avi.refine(model, guide, X, num_steps=2, seed=seed).table.detach()

    def measure(trained):
        # Within a training, by its own thread.
        avi.log_weights(one, AutoNormal(one), X.float(), num_samples=1)

    seeds = range(4)
    alone = [work(seed) for seed in seeds]
    together, errors = {}, []

    def run(seed):
        try:
            together[seed] = work(seed)
        except BaseException as error:
            errors.append(error)

    before = torch.get_rng_state()
    threads = [threading.Thread(target=run, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for seed in seeds:
        assert all(torch.equal(*pair) for pair in zip(alone[seed], together[seed], strict=True))
    assert not torch.equal(alone[0][0], alone[1][0])
    # What is the program's is left as it was, and the next training alone works.
    assert not pyro.poutine.runtime._PYRO_STACK
    assert torch.get_rng_state().shape == before.shape
    assert torch.equal(work(0)[0], alone[0][0])


# --- arguments of a compiled step


class Settings:
    scale = 2.0


class ByArgument(Normals):
    def forward(self, x, settings):
        super().forward(x, float(np.asarray(getattr(settings, "scale", settings)).reshape(-1)[0]))


@pytest.mark.parametrize("settings", [argparse.Namespace(scale=2.0), np.array([2.0]), Settings()])
def test_arguments_that_may_change_are_taken_eagerly(settings):
    def train(compile, num_steps=3):
        torch.manual_seed(0)
        model = ByArgument()
        guide = avi.FactorizedGuide(model)
        options = {"compile": compile, "callbacks": [lambda fit: fit.steps == 3], "progress": False}
        return avi.fit(model, guide, X, settings, num_steps=num_steps, **options).losses

    eager = train(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(train("auto", 9_999_999), eager)
    name = type(settings).__name__
    with pytest.warns(UserWarning, match=f"an argument is a {name}, whose content may change") as told:
        torch.testing.assert_close(train(True), eager)
    assert len(told) == 1


def test_the_line_that_cannot_be_compiled_is_named():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))
            scale = 1.0 if z.sum() > 0 else 2.0
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    line = model.__code__.co_firstlineno + 3
    message = rf"test_fit_elbos.py:{line}, `scale = 1.0 if z.sum\(\) > 0 else 2.0`: a number is read out of a tensor"
    with pytest.warns(UserWarning, match=message):
        avi.fit(model, avi.ConstantGuide(model), torch.ones(3), num_steps=2, compile=True, progress=False)


# --- options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 3}, TypeError, "got epochs=.\nDid you mean num_steps=, counted in batches"),
        (
            {"learning_rate": 0.1},
            TypeError,
            r"arguments of the model \(scale, x\), got learning_rate=.\nDid you mean lr=",
        ),
        ({"device": "cpu"}, TypeError, r"got device=.\nDid you mean model.to\(device\)"),
        ({"something": 1}, TypeError, r"got something=\.$"),
        ({"lr": "x"}, ValueError, "lr to be a number of at least 0 or a function of the step, got 'x'"),
        ({"lr": {"local": -1.0}}, ValueError, "got -1.0"),
        ({"num_steps": 2.5}, TypeError, "num_steps to be a whole number, got 2.5"),
        (
            {"optimizer": pyro.optim.Adam({"lr": 0.1})},
            TypeError,
            "an object of pyro.optim.optim.PyroOptim.\nPass a class",
        ),
        ({"optimizer": "adam"}, TypeError, "an object of builtins.str"),
    ],
)
def test_options_that_are_none_are_named(options, error, message):
    model, guide = normals()
    with pytest.raises(error, match=message):
        avi.fit(model, guide, X, **{"num_steps": 2, "progress": False, **options})
    if "optimizer" not in options:
        options = {"num_steps": 2, "progress": False, **options}
        with pytest.raises(error, match=message):
            avi.fit_many([(model, guide)], X, **options)


def test_minibatches_of_arrays_and_frames():
    import pandas as pd

    array = np.arange(12.0).reshape(6, 2)
    batches = avi.minibatches(array, np.arange(6), pd.DataFrame(array), pd.Series(range(6)), batch_size=4)
    x, y, frame, series, index = next(batches)
    assert x.dtype == torch.get_default_dtype() and y.dtype == torch.int64
    assert torch.equal(x, torch.arange(12.0).view(6, 2)[index]) and torch.equal(frame, x)
    assert torch.equal(y, index) and torch.equal(series, index)
    for bad in (np.array(["a", "b"]), pd.DataFrame({"a": ["x"]}), 3.0):
        with pytest.raises(TypeError, match="Expected tensors or arrays of numbers"):
            avi.minibatches(bad, batch_size=1)
