"""The training loop: the same steps as ``pyro.infer.SVI``, seeds, learning rates, rows, interruptions, errors."""

import itertools
import random
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import constraints

import pyro_avi as avi
from tests.all_guides import GUIDES, TO_TRAIN

N, SHAPE = 12, (1, 4, 4)
MODELS = {"VAE": avi.models.VAE, "BayesianDecoder": avi.models.BayesianDecoder}


def data(dtype=torch.float64):
    return torch.rand(N, *SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(0))


def build(model="VAE", guide="amortized", seed=0, dtype=torch.float64, **options):
    """A model and a guide that have seen the data; the same ones at every call."""
    if guide == "amortized":
        options = {"encoder": (6,), **options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = avi.models.DenseDecoder(2, (5,), SHAPE)
        likelihood = avi.models.GaussianLikelihood(0.5, learned=True)
        model = MODELS[model](decoder, size=N, likelihood=likelihood).to(dtype)
        return model, GUIDES[guide](model, **options).setup(data(dtype))


def train(model, guide, *args, **options):
    return avi.fit(model, guide, *args, **{"progress": False, "num_steps": 6, "lr": 0.05, **options})


def state(*modules):
    return {(i, name): value.clone() for i, m in enumerate(modules) for name, value in m.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-10)


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- the same as SVI


@pytest.mark.parametrize("batch_size", [N, 5])
@pytest.mark.parametrize("guide", TO_TRAIN)
@pytest.mark.parametrize("model", MODELS)
def test_fit_and_svi_take_the_same_steps(model, guide, batch_size):
    x, steps = data(), 12
    start = build(model, guide)
    fit = train(
        *start,
        num_steps=steps,
        lr=0.02,
        seed=3,
        optimizer=torch.optim.Adam,
        batches=avi.minibatches(x, batch_size=batch_size, seed=1),
    )
    pyro.clear_param_store()
    again = build(model, guide)
    assert moved(state(*start), state(*again))
    svi = SVI(*again, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    torch.manual_seed(3)
    batches = avi.minibatches(x, batch_size=batch_size, seed=1)
    losses = [svi.step(*next(batches)) for _ in range(steps)]
    torch.testing.assert_close(fit.losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-10, atol=1e-8)
    assert_close(state(*start), state(*again))


def test_an_elbo_of_pyro_is_used_where_given():
    loss = {}
    for elbo in (None, Trace_ELBO(), TraceMeanField_ELBO(), Trace_ELBO(num_particles=3)):
        loss[elbo] = train(*build(), data(), elbo=elbo, num_steps=1).losses.item()
    one, same_one, closed_form, three = loss.values()
    assert one == same_one and len({one, closed_form, three}) == 3


def test_keyword_arguments_reach_model_and_guide():
    x, index = data(), torch.arange(N)
    positional = train(*build(), x, index).losses
    assert torch.equal(positional, train(*build(), x=x, index=index).losses)


# --- seeds


@pytest.mark.parametrize("guide", TO_TRAIN)
def test_the_seed_decides_all_and_the_global_random_state_is_left_alone(guide):
    def run(seed):
        pair = build("BayesianDecoder", guide, dtype=torch.float32)
        batches = avi.minibatches(data(torch.float32), batch_size=5)
        return train(*pair, batches=batches, seed=seed).losses, state(*pair)

    states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    (losses, parameters), again, other = run(7), run(7), run(8)
    assert torch.equal(losses, again[0]) and same(parameters, again[1])
    assert not torch.equal(losses, other[0]) and not same(parameters, other[1])
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), repr(np.random.get_state()))


def test_a_guide_that_was_never_set_up_is_trained_the_same_at_the_same_seed():
    def run():
        torch.manual_seed(0)
        model = avi.models.VAE(avi.models.DenseDecoder(2, (5,), SHAPE), size=N)
        torch.rand(run.calls)
        run.calls += 1
        return train(model, avi.AmortizedGuide(model, encoder=(6,)), data(torch.float32), seed=5).losses

    run.calls = 0
    assert torch.equal(run(), run())


def test_without_a_seed_the_draws_are_those_of_the_program():
    torch.manual_seed(7)
    losses = train(*build(), data(), seed=None).losses
    after = torch.get_rng_state()
    assert torch.equal(losses, train(*build(), data(), seed=7).losses)
    torch.manual_seed(7)
    assert not torch.equal(after, torch.get_rng_state())


def test_compile_false_takes_the_same_steps():
    assert torch.equal(train(*build(), data()).losses, train(*build(), data(), compile=False).losses)


# --- learning rates and the optimizer


@pytest.mark.parametrize("guide", TO_TRAIN)
@pytest.mark.parametrize("part", ["local", "global"])
def test_a_part_without_a_learning_rate_stays_bit_equal(guide, part):
    model, guide = build("BayesianDecoder", guide, dtype=torch.float32)
    of_inference = set(map(id, guide.local_parameters()))
    parameters = {
        name: parameter
        for module in (model, guide)
        for name, parameter in module.named_parameters(prefix=type(module).__name__)
    }
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    train(model, guide, data(torch.float32), lr={part: 0.1})
    changed = moved(before, parameters)
    assert changed == {name for name, p in parameters.items() if (id(p) in of_inference) is (part == "local")}
    assert changed and len(changed) < len(parameters)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in parameters.values())


@pytest.mark.parametrize("guide", TO_TRAIN)
def test_equal_rates_for_both_parts_are_one_rate_for_all(guide):
    pairs = [build("BayesianDecoder", guide) for _ in range(2)]
    train(*pairs[0], data(), lr={"local": 0.05, "global": 0.05})
    train(*pairs[1], data(), lr=0.05)
    assert_close(state(*pairs[0]), state(*pairs[1]))


@pytest.mark.parametrize("guide", TO_TRAIN)
@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam])
def test_a_rate_may_be_a_function_of_the_step(guide, optimizer):
    steps = []

    def rate(step):
        steps.append(step)
        return 0.05 if step < 4 else 0.0

    pair, stopped = (build("BayesianDecoder", guide, dtype=torch.float32) for _ in range(2))
    x = data(torch.float32)
    losses = train(*pair, x, lr=rate, optimizer=optimizer, num_steps=9).losses
    assert torch.equal(losses[:4], train(*stopped, x, lr=0.05, optimizer=optimizer, num_steps=4).losses)
    assert same(state(*pair), state(*stopped))
    assert sorted(set(steps)) == list(range(9))


def test_an_optimizer_gets_the_parameters_in_groups():
    made = []

    def optimizer(groups, lr):
        made.append(([(len(group["params"]), group["lr"]) for group in groups], lr))
        return torch.optim.SGD(groups, lr=lr)

    model, guide = build("BayesianDecoder", "factorized")
    rates = {"local": 1e-4, "global": lambda step: 1e-6}
    table = guide.table.detach().clone()
    train(model, guide, data(), lr=rates, optimizer=optimizer)
    # The table; the vector of the global latents and the noise of the model.
    assert made == [([(1, 1e-4), (2, 1e-6)], 1e-4)]
    # Plain gradient descent moves by the rate times the gradient: nothing of Adam's size.
    assert 0 < (guide.table - table).abs().max() < 6 * 1e-4 * 1e3


# --- rows


def turns(x):
    """Rows 4 to 7 once, then rows 0 to 3 for ever."""
    index = torch.arange(N)
    first, rest = index[4:8], index[:4]
    return itertools.chain([(x[first], first)], itertools.repeat((x[rest], rest)))


def test_rows_move_only_when_they_are_in_the_batch_unless_dense_adam_is_asked_for():
    x = data()

    def after(steps, **options):
        model, guide = build("VAE", "factorized")
        train(model, guide, batches=turns(x), num_steps=steps, **options)
        return guide.table.detach()

    start = build("VAE", "factorized")[1].table.detach()
    one, many = after(1), after(8)
    assert torch.equal(one[4:8], many[4:8]) and (one[4:8] != start[4:8]).all()
    assert torch.equal(many[8:], start[8:]) and (many[:4] != start[:4]).all()
    one, many = (after(steps, optimizer=torch.optim.Adam) for steps in (1, 8))
    assert (one[4:8] != many[4:8]).all()
    assert torch.equal(many[8:], start[8:])


@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_with_all_rows_in_every_batch_row_by_row_adam_is_adam(model, batches):
    x = data()
    pairs = [build(model, "factorized") for _ in range(2)]
    for pair, optimizer in zip(pairs, (None, torch.optim.Adam), strict=True):
        options = {"batches": avi.minibatches(x, batch_size=N)} if batches else {}
        train(*pair, *([] if batches else [x]), num_steps=15, optimizer=optimizer, **options)
    assert_close(state(*pairs[0]), state(*pairs[1]))


def test_rows_that_the_model_draws_are_trained():
    x = data()

    def model(x):
        with pyro.plate("data", N, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[index, 0, 0, 0])

    guide = avi.FactorizedGuide(model).setup(x)
    start = guide.table.detach().clone()
    train(model, guide, x, num_steps=1)
    assert (guide.table != start).any(1).sum() == 4
    train(model, guide, x, num_steps=30)
    assert (guide.table != start).any(1).all()


@pytest.mark.parametrize("guide", TO_TRAIN)
def test_rows_of_a_minibatch_stand_for_the_whole_data_set(guide):
    # With closed-form divergences and hardly any noise the loss hardly depends on the draws.
    x = data()
    model, guide = build("BayesianDecoder", guide, init_scale=1e-7)
    options = {"elbo": TraceMeanField_ELBO(), "lr": 0.0}
    whole = train(model, guide, x, num_steps=1, **options).losses
    # The last batch is smaller and counts for less.
    sizes = torch.tensor([5, 5, 2])
    batches = avi.minibatches(x, batch_size=5, last_batch="keep")
    parts = train(model, guide, batches=batches, num_steps=3, **options).losses
    torch.testing.assert_close((parts * sizes).sum() / N, whole[0], rtol=1e-6, atol=0.0)
    # Of one size, they are an epoch when every row was there as often.
    mean = train(model, guide, batches=avi.minibatches(x, batch_size=5), num_steps=N, **options).losses.mean()
    torch.testing.assert_close(mean, whole[0], rtol=1e-6, atol=0.0)
    # A loss without the factor N / B would miss this by far.
    assert (parts * sizes / N).sum() / (parts * (sizes / N) ** 2).sum() > 2


# --- whose parameters are trained


@pytest.mark.parametrize("by", ["fit", "svi"])
@pytest.mark.parametrize("model", MODELS)
def test_two_models_of_one_class_train_their_own_tensors(model, by):
    first, second = build(model), build(model, seed=1)
    if by == "fit":
        train(*first, data())
    else:
        SVI(*first, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()).step(data())
    of_first, of_second = state(*first), state(*second)
    losses = train(*second, data()).losses
    assert same(of_first, state(*first))
    parameters = {(i, name) for i, module in enumerate(second) for name, _ in module.named_parameters()}
    assert moved(of_second, state(*second)) == parameters
    pyro.clear_param_store()
    alone = build(model, seed=1)
    assert torch.equal(losses, train(*alone, data()).losses) and same(state(*second), state(*alone))


def function_model(x):
    w = pyro.param("w", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)


def function_guide(x):
    loc = pyro.param("loc", torch.zeros(()))
    scale = pyro.param("scale", torch.ones(()), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale))


X = torch.linspace(-2.0, 3.0, 6)


def test_bare_parameters_are_kept_and_continued():
    train(function_model, function_guide, X)
    store = pyro.get_param_store()
    assert set(store) == {"w", "loc", "scale"}
    values = {name: value.detach().clone() for name, value in store.items()}
    assert all((values[name] != start).item() for name, start in (("w", 0.5), ("loc", 0.0), ("scale", 1.0)))
    continued = train(function_model, function_guide, X, lr=0.0, num_steps=1, seed=1).losses
    assert all(torch.equal(values[name], value) for name, value in store.items())
    pyro.clear_param_store()
    assert not torch.equal(continued, train(function_model, function_guide, X, lr=0.0, num_steps=1, seed=1).losses)
    train(function_model, function_guide, X, num_steps=5)
    trained = {name: value.detach().clone() for name, value in store.items()}
    train(*build(), data())
    assert set(store) == set(trained) and all(torch.equal(trained[name], store[name]) for name in trained)


def test_a_modules_parameters_stay_out_of_the_store():
    train(*build("BayesianDecoder"), data())
    assert not set(pyro.get_param_store())


# --- interruptions, callbacks, the clock


class Interrupt:
    def __init__(self, step):
        self.step = step

    def __call__(self, fit):
        if fit.steps == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("guide", TO_TRAIN)
def test_what_is_interrupted_is_trained_so_far(guide):
    pair, stopped = (build("BayesianDecoder", guide) for _ in range(2))
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        train(*pair, data(), callbacks=[Interrupt(3)])
    train(*stopped, data(), num_steps=3)
    assert same(state(*pair), state(*stopped))
    assert all(p.grad is None and p.requires_grad for module in pair for p in module.parameters())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("known", [True, False])
def test_bare_parameters_survive_an_interruption(known):
    if known:
        train(function_model, function_guide, X, lr=0.0, num_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(function_model, function_guide, X, callbacks=[Interrupt(3)])
    store = pyro.get_param_store()
    interrupted = {name: store[name].detach().clone() for name in ("w", "loc", "scale")}
    pyro.clear_param_store()
    train(function_model, function_guide, X, num_steps=3)
    assert all(torch.equal(value, store[name]) for name, value in interrupted.items())


class Clock:
    """Time passes when it is told to."""

    now = 0.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


def test_callbacks_are_off_the_clock(monkeypatch):
    model, guide = build()
    clock, seen = Clock(), []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *args: (clock.pass_(1.0), forward(self, *args))[1])
    monkeypatch.setattr(time, "perf_counter", clock)

    def callback(fit):
        clock.pass_(1000.0)
        seen.append((fit.steps, fit.seconds, len(fit.losses)))

    fit = train(model, guide, data(), callbacks=[callback], num_steps=4)
    assert fit.seconds == 4.0 and fit.steps == 4
    assert seen == [(1, 1.0, 1), (2, 2.0, 2), (3, 3.0, 3), (4, 4.0, 4)]


def test_a_callback_may_end_the_training():
    pair, stopped = build(), build()
    calls = []

    def callbacks(end):
        return [lambda fit: fit.steps == end, lambda fit: calls.append(fit.steps) or "not True"]

    fit = train(*pair, data(), callbacks=callbacks(4), num_steps=9)
    assert fit.steps == len(fit.losses) == 4 and calls == [1, 2, 3, 4]
    train(*stopped, data(), num_steps=4)
    assert same(state(*pair), state(*stopped))


def test_the_progress_bar_says_where_the_training_is(capsys, monkeypatch):
    monkeypatch.setattr("pyro_avi.display.progress_bar._DELAY", 0.0)
    train(*build(), data(), num_steps=130, progress=True)
    err = capsys.readouterr().err
    assert "130/130" in err and "loss=" in err
    train(*build(), data())
    assert capsys.readouterr().err == ""


# --- errors


@pytest.mark.parametrize(("bad", "steps"), [(0, 3), (2, 250), (130, 250), (249, 250)])
def test_a_loss_that_is_not_finite_is_told_with_its_step(bad, steps):
    model, guide = build()
    x = data()
    batches = itertools.chain(itertools.repeat((x,), bad), [(x * float("nan"),)], itertools.repeat((x,)))
    with (
        pyro.validation_enabled(False),
        pytest.raises(avi.DivergedError, match=f"got nan at step {bad}.\nThe data at site 'x' are not finite") as error,
    ):
        train(model, guide, batches=batches, num_steps=steps)
    assert error.value.step == bad


def beyond(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Bernoulli(logits=z), obs=x)


def test_validation_sees_the_first_step_and_is_left_as_it_was():
    with (
        pyro.validation_enabled(True),
        pytest.raises(ValueError, match=r"within the support \(Boolean\(\)\)"),
    ):
        avi.fit(beyond, avi.ConstantGuide(beyond), 3 * torch.ones(4), num_steps=2, progress=False)
    on = []
    for enabled in (True, False):
        with pyro.validation_enabled(enabled):
            train(*build(), data(), callbacks=[lambda fit: on.append(pyro.infer.util.is_validation_enabled())])
    assert on == 6 * [True] + 6 * [False]


def test_a_training_that_ends_early_has_finite_losses_too():
    model, guide = build()
    x = data()
    batches = itertools.chain([(x,), (x,), (x * float("nan"),)], itertools.repeat((x,)))
    with pytest.raises(avi.DivergedError) as error:
        train(model, guide, batches=batches, callbacks=[lambda fit: fit.steps == 5], num_steps=50)
    assert error.value.step == 2


class NoParameters:
    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))


def two_batches():
    return iter([(data(),), (data(),)])


REFUSED = {
    "no steps": ({"num_steps": 0}, ValueError, "num_steps of at least 1, got 0"),
    "precision": ({"precision": "float16"}, ValueError, "one of float32, tf32, bfloat16, got .float16"),
    "clip_norm": ({"clip_norm": 0.0}, ValueError, "clip_norm > 0, got 0.0"),
    "compile": ({"compile": "yes"}, ValueError, "compile to be 'auto', True or False, got 'yes'"),
    "unknown part": ({"lr": {"encoder": 0.1}}, ValueError, r'"local", "global" or both, got \[\'encoder\'\]'),
    "no part": ({"lr": {}}, ValueError, r'"local", "global" or both, got \[\]'),
    "run out": ({"batches": two_batches}, ValueError, "batches for 6 steps, got 2.\n.*avi.minibatches"),
    "empty": ({"batches": lambda: iter([])}, ValueError, "batches for 6 steps, got 0"),
    "not tuples": ({"batches": lambda: itertools.repeat(data())}, TypeError, "every batch to be a tuple.*got Tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused(case):
    options, error, message = REFUSED[case]
    model, guide = build()
    before = state(model, guide)
    batches = options.get("batches")
    arguments = [] if batches else [data()]
    with pytest.raises(error, match=f"(?s)Expected.*{message}"):
        train(model, guide, *arguments, **options | ({"batches": batches()} if batches else {}))
    # Nothing is trained, unless the batches ran out on the way.
    assert case == "run out" or same(before, state(model, guide))


def test_arguments_and_batches_together_are_refused():
    with pytest.raises(ValueError, match="either for all steps or as batches=, got both"):
        train(*build(), data(), batches=two_batches())


def test_a_model_and_a_guide_without_parameters_are_refused():
    with pytest.raises(ValueError, match="a model or a guide with parameters to train, found none"):
        train(NoParameters().model, NoParameters().guide, X)


def test_two_rates_need_a_guide_that_tells_its_parts():
    with pytest.raises(ValueError, match="one learning rate for a function, which does not tell local from global"):
        train(function_model, function_guide, X, lr={"local": 0.1})


def test_a_rate_for_a_part_without_parameters_is_refused():
    model = NoParameters().model
    guide = avi.FactorizedGuide(model).setup(X)
    train(model, guide, X, lr={"local": 0.1})
    with pytest.raises(ValueError, match=r"parameters for the learning rates \['global'\], found none"):
        train(model, guide, X, lr={"global": 0.1})


# --- guides of others


def test_a_module_without_rows_of_its_own_trains_by_fit():
    # Any guide of Pyro: no protocol is needed.
    model = NoParameters().model
    guide = pyro.infer.autoguide.AutoNormal(model)
    losses = train(model, guide, X, num_steps=3).losses
    assert losses.isfinite().all() and isinstance(guide, nn.Module)
