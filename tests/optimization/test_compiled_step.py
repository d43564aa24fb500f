"""The compiled step is the eager one, and what cannot be compiled is taken eagerly with a reason."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_avi as avi
from pyro_avi.optimization import step
from tests.all_guides import GUIDES
from tests.marks import needs_compiler

PATIENT = step._COST_OF_A_SHAPE


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Every shape has a graph, in however short a training."""
    monkeypatch.setattr(step, "_COST_OF_A_SHAPE", 0.0)


def rows(count=12):
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def train(guide_class, *, compile, elbo=TraceMeanField_ELBO, model_class=avi.models.BayesianDecoder, **options):
    torch.manual_seed(1)
    decoder = avi.models.DenseDecoder(2, (5,), (1, 4, 4)).double()
    likelihood = avi.models.GaussianLikelihood(0.5, learned=True)
    model = model_class(decoder, size=12, likelihood=likelihood).double()
    given = {"family": options.pop("family", None), **({"encoder": (6,)} if guide_class is avi.AmortizedGuide else {})}
    guide = guide_class(model, **given)
    size = options.pop("batch_size", 5)
    batches = options.pop("batches", None) or avi.minibatches(rows(), batch_size=size, last_batch="keep")
    fit = avi.fit(
        model,
        guide,
        batches=batches,
        **{"num_steps": 9, "lr": 0.01, "progress": False, **options},
        elbo=elbo(),
        compile=compile,
    )
    return fit.losses, torch.cat([p.detach().flatten() for m in (model, guide) for p in m.parameters()])


def assert_same_training(*args, **kwargs):
    """Five rows, five rows, two rows: two graphs, and no warning of a step taken eagerly."""
    eager_losses, eager = train(*args, compile=False, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled_losses, compiled = train(*args, compile=True, **kwargs)
    torch.testing.assert_close(compiled_losses, eager_losses, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(compiled, eager, rtol=1e-7, atol=1e-9)


@needs_compiler
@pytest.mark.slow
def test_a_table_moves_row_by_row_as_in_eager_steps():
    assert_same_training(avi.FactorizedGuide)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("model_class", [avi.models.BayesianDecoder, avi.models.VAE])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("name", [name for name in GUIDES if name != "semiamortized"])
def test_same_losses_and_parameters_as_eager(name, elbo, model_class):
    assert_same_training(GUIDES[name], elbo=elbo, model_class=model_class)


@needs_compiler
@pytest.mark.slow
def test_steps_inside_of_the_guide_and_their_gradients_are_part_of_the_graph():
    assert_same_training(GUIDES["semiamortized"], model_class=avi.models.VAE, batch_size=6)


@needs_compiler
@pytest.mark.slow
def test_rates_that_change_and_clipping_are_part_of_the_graph():
    schedule = {"local": lambda step: 0.02 / (1 + step), "global": lambda step: 0.001 * min(step, 4)}
    assert_same_training(avi.FactorizedGuide, lr=schedule, clip_norm=0.7)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("family", [avi.MultivariateNormal(), avi.LowRankNormal(rank=1)])
def test_joint_families(family):
    assert_same_training(avi.AmortizedGuide, elbo=Trace_ELBO, family=family)


@needs_compiler
@pytest.mark.slow
def test_buffers_of_the_model_are_read_at_every_step():
    class Annealed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.zeros(()))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
                pyro.factor("prior", self.weight * z**2)
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def losses(compile):
        model = Annealed()

        def anneal(fit):
            model.weight.fill_(fit.steps)

        guide = avi.ConstantGuide(model).setup(torch.ones(3))
        options = {"num_steps": 4, "compile": compile, "progress": False, "callbacks": [anneal]}
        return avi.fit(model, guide, torch.ones(3), **options).losses

    torch.testing.assert_close(losses(True), losses(False), rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.slow
def test_the_weight_of_the_elbo_is_read_at_every_step():
    def trained(compile, rising=True):
        weight = torch.zeros(1, dtype=torch.double)

        def rise(fit):
            if rising:
                weight.fill_(fit.steps / 9)

        return train(
            avi.FactorizedGuide,
            compile=compile,
            elbo=lambda: avi.StickingTheLandingELBO(weight=weight),
            callbacks=[rise],
        )[1]

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-7, atol=1e-9)
    # The twin: the weight of the first step would show.
    assert (trained(False) - trained(False, rising=False)).abs().max() > 1e-4


@needs_compiler
@pytest.mark.slow
def test_compiling_is_timed_apart():
    x = rows().float()
    model = avi.models.VAE(avi.models.DenseDecoder(2, (5,), (1, 4, 4)), size=12)
    fit = avi.fit(model, avi.AmortizedGuide(model), x, num_steps=3, compile=True, progress=False)
    assert 0 < fit.compile_seconds < fit.seconds
    fit = avi.fit(model, avi.AmortizedGuide(model), x, num_steps=3, compile=False, progress=False)
    assert fit.compile_seconds == 0


def test_short_trainings_are_not_compiled_unasked():
    x = rows().float()
    model = avi.models.VAE(avi.models.DenseDecoder(2, (5,), (1, 4, 4)), size=12)
    fit = avi.fit(model, avi.AmortizedGuide(model), x, num_steps=3, progress=False)
    assert fit.compile_seconds == 0


@needs_compiler
@pytest.mark.slow
def test_long_trainings_are_compiled_unasked():
    x = rows().float()
    model = avi.models.VAE(avi.models.DenseDecoder(2, (5,), (1, 4, 4)), size=12)
    options = {"num_steps": 20_000, "progress": False, "callbacks": [lambda fit: fit.steps == 3]}
    assert avi.fit(model, avi.AmortizedGuide(model), x, **options).compile_seconds > 0
    # Nothing was asked for, so nothing is warned of.
    assert avi.fit(model, avi.AmortizedGuide(model), x, elbo=OtherELBO(), **options).compile_seconds == 0


@needs_compiler
@pytest.mark.slow
def test_dense_optimizer_and_particles():
    assert_same_training(avi.FactorizedGuide, optimizer=torch.optim.Adam)
    assert_same_training(avi.AmortizedGuide, elbo=lambda: Trace_ELBO(num_particles=3))


@needs_compiler
@pytest.mark.slow
def test_ways_agree_over_200_steps():
    """Compiled and eager by rounding alone, in double precision; products of eight bits within 2 % of the loss."""
    options = {"num_steps": 200, "batches": None}
    eager, _ = train(avi.AmortizedGuide, compile=False, **options)
    compiled, _ = train(avi.AmortizedGuide, compile=True, **options)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0.0)

    def single(precision):
        torch.manual_seed(1)
        x = rows().float()
        model = avi.models.VAE(avi.models.DenseDecoder(2, (5,), (1, 4, 4)), size=12)
        options = {"num_steps": 200, "lr": 0.01, "compile": True, "progress": False}
        return avi.fit(model, avi.AmortizedGuide(model, (6,)), x, precision=precision, **options).losses[-50:].mean()

    assert (single("bfloat16") / single("float32") - 1).abs() < 0.02


class OtherELBO(Trace_ELBO):
    """An ELBO that the compiled step does not know."""


def test_other_elbo_is_taken_eagerly():
    eager, _ = train(avi.ConstantGuide, compile=False, elbo=OtherELBO)
    with pytest.warns(UserWarning, match="taken eagerly, not compiled: OtherELBO is none of Trace_ELBO"):
        other, _ = train(avi.ConstantGuide, compile=True, elbo=OtherELBO)
    # By another Adam, of the same formula.
    torch.testing.assert_close(other, eager, rtol=1e-12, atol=0.0)


def test_bare_parameters_are_taken_eagerly():
    def model(x):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0).expand([len(x)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.warns(UserWarning, match="not compiled: a parameter belongs to no module"):
        avi.fit(model, avi.ConstantGuide(model), torch.ones(3), num_steps=2, compile=True, progress=False)


def test_a_model_that_reads_its_latents_into_python_is_taken_eagerly():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))
            scale = 1.0 if z.sum() > 0 else 2.0
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    with pytest.warns(UserWarning, match="taken eagerly, not compiled"):
        avi.fit(model, avi.ConstantGuide(model), torch.ones(3), num_steps=2, compile=True, progress=False)


@needs_compiler
def test_a_graph_that_is_not_the_eager_step_is_refused():
    """A model that counts its runs is frozen at its count when it is traced: the comparison under one seed finds it."""
    runs = []

    def model(x):
        runs.append(None)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]))
            pyro.sample("x", dist.Normal(z, float(len(runs))), obs=x)

    with pytest.warns(UserWarning, match="another loss or gradient than the eager step"):
        avi.fit(model, avi.ConstantGuide(model), torch.ones(3), num_steps=2, compile=True, progress=False)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("cost", "graphs"), [(PATIENT, 1), (0.0, 2)])
def test_other_shapes_have_graphs_where_that_pays(monkeypatch, caplog, cost, graphs):
    # As of the last batch of a loader's epoch.
    monkeypatch.setattr(step, "_COST_OF_A_SHAPE", cost)
    calls = [(rows()[:count], torch.arange(count)) for count in 8 * (5, 5, 2)]
    with caplog.at_level("INFO", logger="pyro_avi"):
        compiled, _ = train(avi.FactorizedGuide, compile=True, batches=calls, num_steps=24)
    assert [record.what for record in caplog.records] == graphs * ["The training step"]
    torch.testing.assert_close(
        compiled, train(avi.FactorizedGuide, compile=False, batches=calls, num_steps=24)[0], rtol=1e-4, atol=1e-6
    )


@needs_compiler
@pytest.mark.slow
def test_more_shapes_than_graphs_are_taken_eagerly():
    calls = [(rows()[:count], torch.arange(count)) for count in (2, 3, 4, 5, 6, 7, 2, 3, 4)]
    with pytest.warns(UserWarning, match="more than 4 shapes"):
        compiled, _ = train(avi.FactorizedGuide, compile=True, batches=calls)
    torch.testing.assert_close(compiled, train(avi.FactorizedGuide, compile=False, batches=calls)[0])
