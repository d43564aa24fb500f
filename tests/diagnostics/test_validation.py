"""The bound of held-out rows during a training: beside it, on draws of its own, and what ends it."""

import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pyro_avi as avi
from pyro_avi.seeds import seeded
from tests.all_guides import GUIDES, TO_TRAIN
from tests.marks import needs_compiler

N = 12
X, HELD = (torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(n), dtype=torch.double) for n in (N, 7))
MODELS = {"VAE": avi.models.VAE, "BayesianDecoder": avi.models.BayesianDecoder}


class Noisy(nn.Module):
    """A decoder with running statistics and dropout."""

    latent_dim = 2

    def __init__(self):
        super().__init__()
        self.inner = avi.models.DenseDecoder(2, (5,), (1, 4, 4))
        self.norm, self.dropout = nn.BatchNorm1d(2), nn.Dropout(0.2)

    def forward(self, z):
        return self.inner(self.norm(self.dropout(z)))


def build(guide="amortized", model="VAE"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = Noisy() if model == "VAE" else avi.models.DenseDecoder(2, (5,), (1, 4, 4))
        likelihood = avi.models.GaussianLikelihood(0.5, learned=True)
        model = MODELS[model](decoder, size=N, likelihood=likelihood).double()
        return model, GUIDES[guide](model, **({"encoder": (6,)} if guide == "amortized" else {}))


def train(pair, *callbacks, num_steps=9, **options):
    options = {"lr": 0.05, "seed": 3, "progress": False, "compile": False, **options}
    batches = avi.minibatches(X, batch_size=5, seed=1)
    return avi.fit(*pair, batches=batches, num_steps=num_steps, callbacks=callbacks, **options)


def validation(pair, **options):
    held = (X, torch.arange(N)) if isinstance(pair[1], avi.FactorizedGuide) else (HELD,)
    return avi.Validation(*pair, *held, **{"num_samples": 5, "every": 4, **options})


def state(pair):
    return {(i, name): value.clone() for i, m in enumerate(pair) for name, value in m.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- beside the training


@pytest.mark.parametrize("guide", TO_TRAIN)
@pytest.mark.parametrize("model", MODELS)
def test_the_training_comes_to_the_same_with_and_without(model, guide):
    without, beside = build(guide, model), build(guide, model)
    expected = train(without)
    held = validation(beside)
    trained = train(beside, held)
    assert torch.equal(trained.losses, expected.losses) and same(state(beside), state(without))
    assert held.steps == [1, 4, 8, 9] and held.values.isfinite().all() and (held.errors > 0).all()
    assert (held.seconds.diff() > 0).all() and held.seconds[-1] == trained.seconds


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("guide", [name for name in GUIDES if name != "semiamortized"])
def test_a_compiled_training_too(guide):
    without, beside = (build(guide, "BayesianDecoder") for _ in range(2))
    expected = train(without, compile=True)
    held = validation(beside)
    assert torch.equal(train(beside, held, compile=True).losses, expected.losses)
    assert same(state(beside), state(without)) and held.values[-1] > held.values[0]


def model_of_parameters(x):
    loc = pyro.param("loc", torch.zeros(()))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def posterior(x):
    """The exact one, of a trained model."""
    loc = pyro.param("loc", torch.zeros(()))
    pyro.param("unused", torch.ones(()), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc + 0.8 * (x - loc), 0.2**0.5))


def test_with_the_posterior_for_a_guide_it_is_the_evidence_of_the_rows():
    x, held = torch.linspace(1.0, 3.0, 5), torch.linspace(0.0, 2.0, 7)
    seen = []

    def callback(trained):
        seen.append(dist.Normal(pyro.param("loc").item(), 1.25**0.5).log_prob(held).mean().item())

    beside = avi.Validation(model_of_parameters, posterior, held, num_samples=3, every=1, patience=99)
    avi.fit(model_of_parameters, posterior, x, num_steps=5, lr=0.1, callbacks=[callback, beside], progress=False)
    torch.testing.assert_close(beside.values, torch.tensor(seen, dtype=torch.double), rtol=1e-5, atol=0.0)
    # No draw differs from another, and every step brings held-out rows nearer.
    assert (beside.errors < 1e-6).all() and (beside.values.diff() > 0).all()
    # What stands in pyro.param alone is kept and brought back as well.
    beside.restore()
    assert pyro.param("loc").item() == pytest.approx(0.5, abs=0.02)


def test_it_is_the_local_part_of_the_bound_on_the_same_draws_every_time():
    pair = build(model="BayesianDecoder")
    pair[1].setup(X)
    held = validation(pair, every=1, seed=5)
    train(pair, held, lr=0.0, num_steps=3)
    weights = avi.log_weights(*pair, HELD, num_samples=5, seed=5)
    assert (held.values == held.values[0]).all()
    torch.testing.assert_close(held.values[0], weights.local.mean(), rtol=1e-12, atol=0.0)
    other = validation(pair, every=1, seed=6)
    train(pair, other, lr=0.0, num_steps=1)
    assert other.values[0] != held.values[0]


def test_the_clock_stands_meanwhile(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    pair = build()
    held = validation(pair, every=1)
    evaluate = held._evaluate

    def slow():
        now[0] += 1000.0
        return evaluate()

    monkeypatch.setattr(held, "_evaluate", slow)
    assert train(pair, held).seconds == 0.0


# --- what ends a training


class Scripted(avi.Validation):
    """Bounds that are given."""

    def __init__(self, pair, bounds, **options):
        super().__init__(*pair, HELD, num_samples=2, every=1, **options)
        self.bounds = iter(bounds)

    def _evaluate(self):
        return torch.tensor(next(self.bounds), dtype=torch.double)


def flat(*values):
    return [(value, value) for value in values]


RULES = {
    "no better": (flat(1.0, 2.0, 1.5, 1.9, 3.0), {"patience": 2}, 2, 4),
    "better in time": (flat(1.0, 2.0, 1.5, 2.5, 2.0, 2.1), {"patience": 2}, 4, 6),
    "too little": (flat(1.0, 1.2, 1.4, 1.6), {"patience": 1, "min_delta": 0.3}, 1, 2),
    "little by little": (flat(1.0, 1.2, 1.4, 1.6, 1.65), {"patience": 2, "min_delta": 0.3}, 3, 5),
    # The draws differ as much as the gain is large, or always by the same.
    "within its error": ([(0.0, 0.0), (2.1, -0.1), (2.1, -0.1)], {"patience": 2}, 1, 3),
    "beyond its error": ([(0.0, 9.0), (0.1, 9.1), (0.0, 9.0)], {"patience": 1}, 2, 3),
    "not a number at first": (flat(float("nan"), 1.0, 0.9), {"patience": 1}, 2, 3),
    "not a number then": (flat(1.0, float("nan")), {"patience": 1}, 1, 2),
}


@pytest.mark.parametrize("case", RULES)
def test_what_is_an_improvement(case):
    bounds, options, best, end = RULES[case]
    pair = build()
    held = Scripted(pair, bounds, **options)
    trained = train(pair, held, num_steps=20)
    assert (held.best_step, trained.steps, held.stopped) == (best, end, True)


@pytest.mark.parametrize("guide", TO_TRAIN)
def test_the_best_state_is_that_of_its_step(guide):
    stopped, shorter, last = (build(guide) for _ in range(3))
    held = Scripted(stopped, flat(1.0, 2.0, 1.0, 1.0), patience=2)
    train(stopped, held)
    train(shorter, num_steps=2)
    assert held.best_step == 2 and same(state(stopped), state(shorter))
    held = Scripted(last, flat(1.0, 2.0, 1.0, 1.0), patience=2, restore_best=False)
    train(last, held)
    assert held.stopped and not same(state(last), state(shorter))
    with pytest.raises(ValueError, match="a state to go back to, got none"):
        held.restore()


def test_a_training_that_takes_all_its_steps_ends_in_its_best_state():
    pair, shorter = build(), build()
    held = Scripted(pair, flat(1.0, 2.0, 1.0, 1.0), patience=9)
    train(pair, held, num_steps=4)
    train(shorter, num_steps=2)
    assert not held.stopped and same(state(pair), state(shorter))
    # Without patience it looks on.
    pair, whole = build(), build()
    train(pair, Scripted(pair, flat(1.0, 2.0, 1.0, 1.0)), num_steps=4)
    train(whole, num_steps=4)
    assert same(state(pair), state(whole))


class Linear(nn.Module):
    latent_dim = 4

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 12))

    def forward(self, z):
        return self.net(z).unflatten(-1, (1, 3, 4))


def factors(count, seed):
    """Rows of two factors and as much noise."""
    loadings = torch.randn(2, 12, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    z, noise = (torch.randn(count, size, generator=generator) for size in (2, 12))
    return (z @ loadings + noise).view(count, 1, 3, 4)


def overfitted(patience, num_steps):
    rows, held = factors(30, 0), factors(100, 1)
    torch.manual_seed(0)
    model = avi.models.VAE(Linear(), size=30, likelihood=avi.models.GaussianLikelihood(learned=True))
    guide = avi.AmortizedGuide(model)
    found = avi.Validation(model, guide, held, num_samples=5, every=25, patience=patience)
    options = {"num_steps": num_steps, "lr": 0.02, "progress": False, "compile": False}
    trained = avi.fit(model, guide, rows, callbacks=[found], **options)
    bound = avi.elbo(avi.log_weights(model, guide, held, num_samples=50)).rows.mean().item()
    return found, trained, bound


def test_a_model_that_learns_its_noise_by_heart_is_stopped_near_its_best():
    found, trained, bound = overfitted(3, 300)
    assert found.stopped and trained.steps < 250
    assert abs(bound - found.values.max().item()) < 0.2
    # The twin is not stopped: it is two nats a row worse, on its way down.
    looked_on, trained, worse = overfitted(None, 300)
    assert trained.steps == 300 and worse < bound - 2
    assert torch.equal(looked_on.values[: len(found.values)], found.values)


# --- which rows


def test_rows_without_parameters_are_refused():
    pair = build("factorized")
    for rows in (HELD, X + 1):
        pair[1].setup(X)
        pair[1].check_rows(X)
        with pytest.raises(ValueError, match=r"avi.refine\(model, guide, x_new"):
            train(pair, avi.Validation(*pair, rows, num_samples=2))


def test_as_many_other_rows_are_not_taken_for_those_of_a_table():
    # Trained by positions, the table has never seen a call without.
    pair = build("factorized")
    with pytest.raises(ValueError, match=r"(?s)with their positions, got a call without.*torch.arange.*avi.refine"):
        train(pair, avi.Validation(*pair, X + 1, num_samples=2))
    pair = build("factorized")
    held = avi.Validation(*pair, X, num_samples=2)
    avi.fit(*pair, X, num_steps=2, callbacks=[held], progress=False)
    assert held.steps == [1, 2]

    def drawing(x):
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[rows])

    x = torch.linspace(-1.0, 1.0, 8)
    guide = avi.FactorizedGuide(drawing)
    held = avi.Validation(drawing, guide, x, num_samples=2)
    avi.fit(drawing, guide, x, num_steps=2, callbacks=[held], progress=False)
    assert held.values.isfinite().all()


def test_latents_that_are_all_global_have_one_bound_for_the_call():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.warns(UserWarning, match="every latent is global"):
        guide = avi.ConstantGuide(model).setup(torch.ones(5))
    held = avi.Validation(model, guide, torch.ones(5), num_samples=3)
    avi.fit(model, guide, torch.ones(5), num_steps=1, lr=0.0, callbacks=[held], progress=False)
    with seeded(0):
        expected = avi.elbo(avi.log_weights(model, guide, torch.ones(5), num_samples=3))
    assert held.values.item() == pytest.approx(expected.value) and held.errors.item() == pytest.approx(expected.se)


# --- the rest


def test_what_goes_on_is_validated_from_there(tmp_path):
    whole, again = build(), build()
    expected = validation(whole)
    train(whole, expected)
    train(again, num_steps=5).save(tmp_path / "file")
    held = validation(again)
    train(again, held, resume=tmp_path / "file")
    assert held.steps == [6, 8, 9] and torch.equal(held.values[1:], expected.values[2:])


def test_it_is_one_line():
    pair = build()
    held = Scripted(pair, [(-1.0, -1.2), (-2.0, -2.2)], patience=1)
    assert repr(held) == "Validation(no evaluation yet)"
    train(pair, held)
    assert repr(held) == "Validation(2 evaluations, best -1.10 ± 0.10 nats a row after 1 step, stopped after 2)"


def test_a_single_draw_has_no_error():
    pair = build()
    held = validation(pair, num_samples=1, every=1, patience=9)
    train(pair, held)
    assert held.errors.isnan().all() and held.best_step > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples of at least 1, got 0"),
        ({"every": 0}, "every of at least 1, got 0"),
        ({"patience": 0}, "patience of at least 1, got 0"),
        ({"min_delta": -1.0}, "min_delta of at least 0 nats a row, got -1.0"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        validation(build(), **options)


def test_every_training_has_one_of_its_own():
    pair = build()
    held = validation(pair)
    train(pair, held)
    with pytest.raises(
        ValueError, match="behind step 9, the last one evaluated, got step 1.\nMake a Validation for each"
    ):
        train(pair, held)
    with pytest.raises(TypeError, match=r"(?s)of one training, got a list of 2.*zip\(validations, fits\)"):
        held([1, 2])


@needs_compiler
@pytest.mark.slow
def test_replicas_are_validated_each_by_its_own():
    pairs, alone = ([build(model="BayesianDecoder") for _ in range(2)] for _ in range(2))
    beside = [validation(pair) for pair in pairs]
    batches = [avi.minibatches(X, batch_size=5, seed=1) for _ in pairs]
    options = {"num_steps": 9, "lr": 0.05, "progress": False}
    callbacks = [lambda fits: [one(fit) for one, fit in zip(beside, fits, strict=True)]]
    avi.fit_many(pairs, batches=batches, seed=[3, 4], callbacks=callbacks, **options)
    for pair, one, seed in zip(alone, beside, (3, 4), strict=True):
        expected = validation(pair)
        train(pair, expected, seed=seed)
        torch.testing.assert_close(one.values, expected.values, rtol=1e-7, atol=0.0)
