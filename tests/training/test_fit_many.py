"""Replicas that are trained together come to what each comes to alone."""

import itertools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_avi as avi
from tests.marks import needs_compiler

X = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
SEEDS = (7, 8, 9)


def make(seed, guide_class=avi.FactorizedGuide, model_class=avi.models.BayesianDecoder, hidden=5):
    torch.manual_seed(seed)
    decoder = avi.models.DenseDecoder(2, (hidden,), (1, 4, 4)).double()
    model = model_class(decoder, size=12, likelihood=avi.models.GaussianLikelihood(0.5, learned=True)).double()
    return model, guide_class(model, **({"encoder": (6,)} if guide_class is avi.AmortizedGuide else {}))


def batches(seed):
    """Five rows, five rows, two rows."""
    return avi.minibatches(X, batch_size=5, last_batch="keep", seed=seed)


def assert_as_alone(lr=0.01, elbo=TraceMeanField_ELBO, steps=7, **options):
    rates = list(lr) if isinstance(lr, tuple) else [lr] * 3
    together, alone = ([make(seed, **options) for seed in SEEDS] for _ in range(2))
    options = {"num_steps": steps, "elbo": elbo(), "progress": False, "clip_norm": 50.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_each = [batches(seed) for seed in SEEDS]
        given = rates if isinstance(lr, tuple) else lr
        fits = avi.fit_many(together, batches=of_each, lr=given, seed=SEEDS, **options)
    assert fits[0].compile_seconds > 0
    for seed, rate, trained, one, other in zip(SEEDS, rates, fits, together, alone, strict=True):
        expected = avi.fit(*other, batches=batches(seed), lr=rate, seed=seed, compile=False, **options)
        torch.testing.assert_close(trained.losses, expected.losses, rtol=1e-9, atol=0.0)
        for mine, theirs in zip(one, other, strict=True):
            for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
                # Every replica has memory of its own again.
                assert a.untyped_storage().nbytes() == a.numel() * 8
    assert not fits[0].losses.equal(fits[1].losses)


@needs_compiler
@pytest.mark.slow
def test_a_row_twice_in_a_batch():
    index = torch.tensor([3, 7, 3, 0, 7])
    together, alone = ([make(seed) for seed in SEEDS] for _ in range(2))
    options = {"num_steps": 4, "elbo": TraceMeanField_ELBO(), "progress": False, "clip_norm": 50.0}
    calls = [(X[index], index), (X[:5], torch.arange(5))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        avi.fit_many(together, batches=[itertools.cycle(calls) for _ in SEEDS], seed=SEEDS, **options)
    for seed, one, other in zip(SEEDS, together, alone, strict=True):
        avi.fit(*other, batches=itertools.cycle(calls), seed=seed, compile=False, **options)
        torch.testing.assert_close(one[1].table, other[1].table, rtol=1e-7, atol=1e-9)


@needs_compiler
@pytest.mark.slow
def test_tables_and_rates_of_their_own():
    assert_as_alone(lr=(0.01, 0.02, lambda step: 0.001 * (step + 1)))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("model_class", [avi.models.BayesianDecoder, avi.models.VAE])
@pytest.mark.parametrize("guide_class", [avi.ConstantGuide, avi.AmortizedGuide])
def test_as_alone(guide_class, model_class):
    assert_as_alone(guide_class=guide_class, model_class=model_class, elbo=Trace_ELBO)


@needs_compiler
@pytest.mark.slow
def test_rates_of_parts_and_the_gradient_of_the_path():
    assert_as_alone(lr={"local": 0.05, "global": 0.001}, elbo=avi.StickingTheLandingELBO)


@needs_compiler
@pytest.mark.slow
def test_a_tensor_that_all_have_and_a_callback_that_ends():
    replicas = [make(seed) for seed in SEEDS]
    seen = []

    def stop(fits):
        seen.append([fit.losses[-1].item() for fit in fits])
        return fits[0].steps == 3

    fits = avi.fit_many(replicas, X, num_steps=9, seed=SEEDS, progress=False, callbacks=[stop])
    assert [fit.steps for fit in fits] == [3, 3, 3]
    assert [fit.losses[-1].item() for fit in fits] == seen[-1]


@needs_compiler
@pytest.mark.slow
def test_one_that_diverges_does_not_stop_the_others():
    replicas = [make(seed) for seed in SEEDS]
    fits = avi.fit_many(replicas, X, num_steps=30, lr=[0.01, 1e6, 0.01], seed=SEEDS, progress=False)
    assert fits[1].diverged_at is not None
    assert fits[0].diverged_at is None and fits[2].diverged_at is None
    assert fits[0].losses[-5:].mean() < fits[0].losses[:5].mean()


@needs_compiler
@pytest.mark.slow
def test_other_shapes_take_turns():
    replicas = [make(0), make(1, hidden=4)]
    alone = [make(0), make(1, hidden=4)]
    with pytest.warns(UserWarning, match="one after another: replica 1 has parameters of other shapes"):
        fits = avi.fit_many(replicas, X, num_steps=3, seed=[5, 6], progress=False)
    for trained, seed, pair in zip(fits, (5, 6), alone, strict=True):
        expected = avi.fit(*pair, X, num_steps=3, seed=seed, compile=False, progress=False)
        torch.testing.assert_close(trained.losses, expected.losses, rtol=1e-9, atol=0.0)


@needs_compiler
@pytest.mark.slow
def test_models_that_differ_in_more_than_their_parameters_take_turns():
    """The twin of all above: a graph of the first one is not taken for one that has another prior."""

    def model_of(scale):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), scale))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return model, avi.FactorizedGuide(model)

    with pytest.warns(UserWarning, match="one after another: its graph gives another loss"):
        avi.fit_many([model_of(1.0), model_of(2.0)], torch.ones(4), num_steps=2, progress=False)


def test_what_is_refused():
    one, two = make(0), make(1)
    options = {"num_steps": 2, "progress": False}
    with pytest.raises(
        ValueError, match="Expected replicas with parameters of their own, got some that replicas 0 and 1"
    ):
        avi.fit_many([one, one], X, **options)
    with pytest.raises(ValueError, match="one seed for each, got 2 and 3"):
        avi.fit_many([one, two], X, seed=[0, 1, 2], **options)
    with pytest.raises(ValueError, match="at least one replica"):
        avi.fit_many([], X, **options)
    with pytest.raises(ValueError, match="num_steps of at least 1"):
        avi.fit_many([one, two], X, num_steps=0)

    def bare(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0).expand([len(x)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="belong to modules, got others in replica 0"):
        avi.fit_many([(bare, avi.ConstantGuide(bare))], torch.ones(3), **options)
