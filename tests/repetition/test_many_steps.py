"""Steps that are taken in one call are single steps, to the last bit."""

import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_avi as avi
from pyro_avi import families
from pyro_avi.families import Family
from pyro_avi.repetition import entry_loop, graph_loop
from pyro_avi.repetition.graph_loop import GraphLoop
from pyro_avi.repetition.many_steps import ManySteps
from tests.discovery import classes_in
from tests.marks import needs_compiler

pytestmark = [needs_compiler, pytest.mark.slow]

N, STEPS = 23, 130
X = torch.rand(N, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """The numbers of steps of all calls of loops; a call may take as long as it likes, so that no number is by the clock."""
    found, take = [], GraphLoop.take

    def count(self, steps, *rest):
        found.append(take(self, steps, *rest))
        return found[-1]

    monkeypatch.setattr(GraphLoop, "take", count)
    monkeypatch.setattr(ManySteps, "longest", float("inf"))
    monkeypatch.setattr(ManySteps, "fewest", 0)
    return found


GUIDES = {
    "constant": avi.ConstantGuide,
    "amortized": lambda model, **options: avi.AmortizedGuide(model, encoder=(6,), **options),
    "factorized": avi.FactorizedGuide,
}


FAMILIES = {
    **classes_in(families, Family),
    "LowRankNormal": lambda: avi.LowRankNormal(rank=1),
    "MarkovNormal": lambda: avi.MarkovNormal(order=1),
    "Conditional": lambda: avi.Conditional(avi.DiagonalNormal()),
    "Flow": lambda: avi.Flow(transforms=1, hidden=(4,), context=2, bins=3),
    "RowFlow": lambda: avi.RowFlow(transforms=1, hidden=3, bins=3),
}

# Of two of these torch's dispatcher is called, which takes tensors over: they may not be kept then.
BY_ONE_LIBRARY = ["DiagonalNormal", "MultivariateNormal", "LowRankNormal"]


def build(guide="amortized", dtype=torch.float32, seed=0, family=avi.DiagonalNormal):
    torch.manual_seed(seed)
    likelihood = avi.models.GaussianLikelihood(0.5, learned=True)
    model = avi.models.BayesianDecoder(avi.models.DenseDecoder(2, (5,), (1, 4, 4)), size=N, likelihood=likelihood)
    model = model.to(dtype)
    return model, GUIDES[guide](model, family=family())


def fit(pair, *args, single=False, x=X, **options):
    """The training; by single steps alone if that is asked for."""
    if not args and "batches" not in options:
        options["batches"] = avi.minibatches(x, batch_size=5)
    defaults = {"num_steps": STEPS, "lr": 0.01, "elbo": TraceMeanField_ELBO(), "compile": True, "progress": False}
    with pytest.MonkeyPatch.context() as patch:
        if single:
            patch.setattr(ManySteps, "take", lambda *_: 0)
        return avi.fit(*pair, *args, **{**defaults, **options})


def state(pair):
    return {(i, name): value.clone() for i, part in enumerate(pair) for name, value in part.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_same(
    taken, *args, guide="amortized", dtype=torch.float32, family=avi.DiagonalNormal, may_be_single=False, **options
):
    """Train twice; return the pair that was trained by loops."""
    one, other = (build(guide, dtype, family=family) for _ in range(2))
    made = {name: value() if name == "batches" else value for name, value in options.items()}
    expected = fit(one, *args, single=True, **made)
    assert not taken
    made = {name: value() if name == "batches" else value for name, value in options.items()}
    found = fit(other, *args, **made)
    # Without the two of the comparison.
    assert may_be_single or sum(taken[1:]) > 0.9 * STEPS - 3
    assert torch.equal(found.losses, expected.losses) and same(state(one), state(other))
    assert found.steps == expected.steps and len(found.times) == len(expected.times)
    return other


# --- the same numbers


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("guide", GUIDES)
def test_losses_and_parameters_are_those_of_single_steps(guide, whole, taken):
    # Five rows of 23: the batch at the end of an epoch has rows of the next one.
    assert_same(taken, *((X,) if whole else ()), guide=guide)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family(family, taken):
    # Graphs of some are not one library alone.
    assert_same(taken, family=FAMILIES[family], elbo=Trace_ELBO(), may_be_single=family not in BY_ONE_LIBRARY)


def test_in_double_precision(taken):
    assert_same(taken, dtype=torch.double, x=X.double())


@pytest.mark.parametrize("guide", ["amortized", "factorized"])
def test_with_schedules_and_clipped_gradients(guide, taken):
    warm = {"kl_weight": lambda step: min(1.0, (1 + step) / 50), "lr": lambda step: 0.03 / (1 + step) ** 0.7}
    assert_same(taken, guide=guide, clip_norm=3.0, **warm)


@pytest.mark.parametrize("guide", ["amortized", "factorized"])
@pytest.mark.parametrize("kept", ["some", "none"])
def test_where_not_all_tensors_of_a_graph_are_kept(kept, guide, taken, monkeypatch):
    if kept == "some":
        monkeypatch.setattr(entry_loop, "MOST_KEPT", 600)
    else:
        monkeypatch.setattr(graph_loop, "new_memory", lambda *_: None)
    assert_same(taken, guide=guide)


def test_a_training_inside_of_another_has_tensors_of_its_own(taken):
    """Both call the library of one graph."""
    expected = [fit(build(), single=True, seed=seed).losses for seed in (0, 5)]
    inner, pair, other = [], build(), build()
    outer = fit(pair, callbacks=[Stopping(60, lambda: inner.append(fit(other, seed=5).losses))])
    assert sum(taken) > 1.8 * STEPS
    assert torch.equal(outer.losses, expected[0]) and torch.equal(*inner, expected[1])


def test_with_a_rate_for_each_part(taken):
    assert_same(taken, lr={"local": lambda step: 0.1 / (3 + step), "global": 0.01})


def test_of_several_tensors_and_types(taken):
    def model(x, scale, index):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample=index):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x.to(z.dtype))

    results = []
    for single in (True, False):
        torch.manual_seed(0)
        batches = avi.minibatches(
            X[:, 0, 0, 0].double(), 1 + torch.rand(N, generator=torch.Generator().manual_seed(1)), batch_size=4
        )
        guide = avi.ConstantGuide(model)
        results.append((fit((model, guide), batches=batches, single=single).losses, state((guide,))))
    assert sum(taken) > 100
    assert torch.equal(results[0][0], results[1][0]) and same(results[0][1], results[1][1])


def test_of_a_model_that_holds_a_tensor_whose_elements_share_memory(taken):
    """It cannot be written to, so that a step does not change it."""
    x, loc = torch.randn(N), torch.tensor([0.5]).expand(N)

    def model(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pairs = [(model, avi.FactorizedGuide(model)) for _ in range(2)]
    one, other = (fit(pair, x, single=single).losses for pair, single in zip(pairs, (True, False), strict=True))
    assert torch.equal(one, other) and sum(taken) > 0.9 * STEPS and loc.stride() == (0,)


def test_smaller_last_batches_of_epochs_are_single_steps_in_between(taken):
    options = {"batches": lambda: avi.minibatches(X, batch_size=5, last_batch="keep"), "num_steps": 1000}
    one, other = build(), build()
    expected = fit(one, single=True, **options | {"batches": options["batches"]()})
    found = fit(other, **options | {"batches": options["batches"]()})
    assert torch.equal(found.losses, expected.losses) and same(state(one), state(other))
    # Four batches of five rows an epoch, and one of three.
    assert max(taken) == 4 and sum(taken) > 700


@pytest.mark.parametrize("forgets", ["a draw", "a position", "the rate"])
def test_the_twin_that_forgets_something_gives_other_numbers(forgets, taken, monkeypatch):
    take = entry_loop.take_turns

    def other(loop, turns, positions, numbers, losses):
        if forgets == "a draw":
            loop.num_draws -= 1
        if forgets == "a position" and positions is not None:
            positions = positions.flip(0)
        done = take(loop, turns, positions, [] if forgets == "the rate" else numbers, losses)
        loop.num_draws += forgets == "a draw"
        return done

    options = {"lr": lambda step: 0.03 / (1 + step)}
    one, two = build(), build()
    expected = fit(one, single=True, **options)
    # Not seen by the comparison before the first use: that is the next test.
    monkeypatch.setattr(GraphLoop, "_compare", lambda *_: None)
    monkeypatch.setattr(graph_loop, "take_turns", other)
    found = fit(two, **options)
    assert taken and not torch.equal(found.losses, expected.losses) and not same(state(one), state(two))


def test_a_loop_that_gives_other_numbers_is_not_used(taken, monkeypatch):
    take = entry_loop.take_turns

    def without_draws(loop, *rest):
        loop.num_draws = 1
        return take(loop, *rest)

    one, two = build(), build()
    expected = fit(one, single=True)
    monkeypatch.setattr(graph_loop, "take_turns", without_draws)
    found = fit(two)
    assert taken == [graph_loop._TRIAL]
    assert torch.equal(found.losses, expected.losses) and same(state(one), state(two))


# --- what else happens in a training


@pytest.mark.parametrize("single", [True, False])
def test_a_training_goes_on_in_the_middle(single, taken, tmp_path):
    whole, begun, again = build(), build(), build(seed=1)
    expected = fit(whole, single=True, checkpoint=tmp_path / "whole", every=30)
    with pytest.raises(KeyboardInterrupt):
        fit(begun, single=not single, checkpoint=tmp_path / "file", every=30, callbacks=[Stopping(77, interrupt)])
    found = fit(again, single=single, checkpoint=tmp_path / "file", every=30)
    assert torch.equal(found.losses, expected.losses) and same(state(again), state(whole))
    assert sum(taken[1:]) == (77 - 2 if single else STEPS - 60 - 1)


def interrupt():
    raise KeyboardInterrupt


class Stopping:
    """A callback that is called once."""

    def __init__(self, step, end):
        self.step, self.end, self.called = step, end, []

    def next_call(self, steps):
        return self.step if steps < self.step else 10**9

    def __call__(self, done):
        self.called.append((done.steps, len(done.losses)))
        return self.end() if done.steps == self.step else None


def test_a_callback_that_says_when_is_called_then_and_may_end_the_training(taken):
    one, two = build(), build()
    expected = fit(one, single=True, num_steps=57)
    found = fit(two, callbacks=[callback := Stopping(57, lambda: True)])
    assert callback.called == [(57, 57)] and found.steps == 57
    assert sum(taken[1:]) == 57 - 2 and torch.equal(found.losses, expected.losses) and same(state(one), state(two))


def test_a_callback_that_says_nothing_is_called_after_every_step(taken):
    seen = []
    fit(build(), callbacks=[lambda done: seen.append(done.steps)])
    assert seen == list(range(1, STEPS + 1)) and not taken


def test_validation_sees_what_it_sees_of_single_steps(taken):
    results = []
    for single in (True, False):
        model, guide = pair = build()
        callback = avi.Validation(model, guide, X[:4], torch.arange(4), num_samples=3, every=40)
        fit(pair, single=single, callbacks=[callback])
        results.append((callback.steps, callback.values))
    assert results[0][0] == results[1][0] == [1, 40, 80, 120, 130] and sum(taken[1:]) > 100
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("step", [2, 63, 101])
def test_a_divergence_is_told_at_the_same_step_with_the_same_state(step, taken):
    results = []
    for single in (True, False):
        pair = build()
        with pytest.raises(avi.DivergedError) as error:
            # The steps after the next two would move parameters to infinity.
            fit(pair, single=single, lr=lambda now: 1e30 if now == step else 0.01)
        results.append((str(error.value), error.value.step, state(pair)))
    (one, at, before), (two, other, after) = results
    assert at == other and abs(at - step) < 3 and one == two and same(before, after)
    assert taken


def test_a_row_that_is_not_finite_is_named(taken):
    broken = X.clone()

    def break_a_row(done):
        broken[3] = torch.nan

    callback = Stopping(50, lambda: break_a_row(None))
    with pytest.raises(avi.DivergedError, match="The data at site 'x' are not finite: 16 of 80") as error:
        fit(build(), x=broken, callbacks=[callback])
    assert 50 <= error.value.step < 50 + 10 and sum(taken[1:]) == error.value.step + 1 - 2


def test_a_schedule_that_fails_does_so_at_its_step(taken):
    def rate(step):
        if step == 90:
            raise ZeroDivisionError
        return 0.01

    one, two = build(), build()
    for pair, single in ((one, True), (two, False)):
        # The rates of all steps are read before the first one where a file is written.
        with pytest.raises(ZeroDivisionError):
            fit(pair, single=single, lr=rate)
    assert same(state(one), state(two)) and sum(taken[1:]) == 90 - 2


def test_draws_of_the_program_go_on_behind_those_of_the_training(taken):
    after = []
    for single in (True, False):
        torch.manual_seed(7)
        pair = build()
        torch.manual_seed(8)
        fit(pair, single=single, seed=None)
        after.append(torch.rand(3))
    assert torch.equal(*after) and taken


# --- what stays single


def lists():
    return [(X[:5], torch.arange(5)), (X[5:10], torch.arange(5, 10))]


SINGLE = {
    "eager": {"compile": False},
    "a list": {"batches": lists()},
    "an optimizer": {"optimizer": torch.optim.SGD, "lr": 1e-5},
}


@pytest.mark.parametrize("case", SINGLE)
def test_other_steps_stay_single(case, taken):
    fit(build(), **SINGLE[case], num_steps=12)
    assert not taken


def test_rows_on_the_host_stay_single(taken):
    model, _ = build()
    fit((model, avi.FactorizedGuide(model, rows_on="cpu")), num_steps=12)
    assert not taken


def test_other_draws_stay_single(taken):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.rate = torch.nn.Parameter(torch.zeros(4))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Gamma(2.0, self.rate.exp()))

    fit((model, Guide()), torch.ones(4), elbo=Trace_ELBO(), num_steps=12)
    assert not taken


def test_without_a_library_steps_are_single(taken, monkeypatch, caplog):
    monkeypatch.setattr(entry_loop, "_library", lambda: None)
    with caplog.at_level(logging.WARNING):
        fit(build(), num_steps=12)
    assert not taken and not caplog.records


def test_a_training_of_few_steps_makes_no_loop(taken, monkeypatch):
    monkeypatch.setattr(ManySteps, "fewest", STEPS - 1)
    fit(build())
    assert not taken
    monkeypatch.setattr(ManySteps, "fewest", STEPS - 2)
    fit(build())
    assert taken


def test_a_call_takes_no_longer_than_a_tenth_of_a_second(taken, monkeypatch):
    monkeypatch.setattr(ManySteps, "longest", 0.1)

    def slow(self, *given):
        loss = single(self, *given)
        self._seconds = 0.03
        return loss

    single = ManySteps.single
    monkeypatch.setattr(ManySteps, "single", slow)
    fit(build())
    assert max(taken) == 3 and sum(taken) > 100
