"""Options that many public functions have: the same name, default and meaning everywhere, and the same place."""

import inspect
from collections.abc import Callable, Iterator

import pytest
import torch

import pyro_avi as avi

# Those that end a list of options, in this order.
LAST = ("max_memory", "seed", "device", "progress")
# What an option that several functions share is by default, by its name.
DEFAULTS = {
    "seed": 0,
    "progress": True,
    "device": "cpu",
    "max_memory": 2**30,
    "theta": "mean",
    "reverse": None,
    "plate": None,
}
# What draws and takes long, and with it a bar.
LONG = {
    "fit",
    "fit_many",
    "refine",
    "distill",
    "escalate",
    "measure_gaps",
    "ais",
    "sbc",
    "log_weights",
    "to_arviz",
    "posterior_predictive",
    "gradient_variance",
    *(
        f"{guide}.posterior_by_row"
        for guide in ("AmortizedGuide", "ConstantGuide", "FactorizedGuide", "SemiAmortizedGuide")
    ),
}


def public_functions() -> Iterator[tuple[str, Callable]]:
    """The public functions, constructors and methods, by name."""
    for name in avi.__all__:
        value = getattr(avi, name)
        if inspect.isclass(value):
            yield name, value
            methods = inspect.getmembers(value, inspect.isfunction)
            ours = [(method, f) for method, f in methods if f.__module__.startswith("pyro_avi")]
            yield from ((f"{name}.{method}", f) for method, f in ours if not method.startswith("_"))
        elif callable(value):
            yield name, value


FUNCTIONS = dict(public_functions())


def faults(function: Callable) -> list[str]:
    """What is wrong with the options of a function."""
    parameters = inspect.signature(function).parameters
    options = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    shared = [name for name in parameters if name in LAST]
    found = [f"{name} is not keyword-only" for name in shared if name not in options]
    expected = [name for name in LAST if name in shared]
    if options[len(options) - len(expected) :] != expected:
        found.append(f"options end with {options[len(options) - len(expected) :]}, not {expected}")
    for name in DEFAULTS.keys() & set(options):
        if parameters[name].default != DEFAULTS[name]:
            found.append(f"{name} is {parameters[name].default!r} by default, not {DEFAULTS[name]!r}")
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shared_options_stand_last_and_have_one_default(name):
    assert faults(FUNCTIONS[name]) == []


def test_shared_options_have_one_annotation():
    for name in DEFAULTS:
        annotations = {
            parameter.annotation
            for function, f in FUNCTIONS.items()
            for parameter in inspect.signature(f).parameters.values()
            # Several trainings may have a seed each.
            if parameter.name == name and (function, name) != ("fit_many", "seed")
        }
        assert len(annotations) == 1, (name, annotations)


def test_what_takes_long_has_a_seed_and_a_bar():
    having = {
        option: {name for name, f in FUNCTIONS.items() if option in inspect.signature(f).parameters}
        for option in ("seed", "progress")
    }
    # It draws nothing itself: what it is given does.
    assert having["progress"] == LONG | {"results_by_row"}
    assert having["seed"] == LONG | {"Validation", "minibatches"}


def test_a_fault_is_found():
    def wrong(x, seed=0, *, progress: bool = False, lr: float = 0.1):
        pass

    def swapped(x, *, progress: bool = True, seed: int | None = 0):
        pass

    assert len(faults(wrong)) == 3 and len(faults(swapped)) == 1


X = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = avi.models.VAE(avi.models.DenseDecoder(2, (4,), (1, 4, 4)), size=6)
        return model, avi.AmortizedGuide(model, (4,)).setup(X)


def trained(seed, progress):
    model, guide = build()
    return avi.fit(model, guide, X, num_steps=3, seed=seed, progress=progress, compile=False).losses


def by_row(seed, progress):
    batches = avi.minibatches(X, batch_size=4)
    return build()[1].posterior_by_row(batches, num_samples=2, seed=seed, progress=progress)["z"]


def measured(f, read, **options):
    return lambda seed, progress: read(f(*build(), X, **options, seed=seed, progress=progress))


# The draws of one call, as a tensor. Replicas of `fit_many` are compiled, and tested by its own tests.
CALLS = {
    "fit": trained,
    "refine": measured(avi.refine, lambda guide: guide.table.detach(), num_steps=100, lr=0.3),
    "escalate": measured(avi.escalate, lambda answer: answer.draws["z"], num_samples=25, min_ess=20, max_nuts=0),
    "measure_gaps": measured(avi.measure_gaps, lambda gaps: gaps.elbo.rows, num_samples=26, num_steps=2, max_rounds=1),
    "ais": measured(avi.ais, lambda bound: bound.rows, num_chains=2, num_temperatures=3, num_leapfrog=1),
    "sbc": measured(avi.sbc, lambda found: found.ranks, num_simulations=2, num_samples=20),
    "log_weights": measured(avi.log_weights, lambda weights: weights.local, num_samples=2),
    "to_arviz": measured(avi.to_arviz, lambda data: torch.as_tensor(data["posterior"]["z"].values), num_samples=2),
    "posterior_predictive": measured(avi.posterior_predictive, lambda draws: draws["x"], num_samples=2),
    "gradient_variance": measured(
        avi.gradient_variance,
        lambda noise: torch.stack([each.flatten()[0] for each in noise["pathwise"].mean.values()]),
        num_samples=2,
        estimators=["pathwise"],
    ),
    "posterior_by_row": by_row,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_seed_decides_the_draws_and_leaves_the_program_its_own(name):
    call = CALLS[name]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, other = call(1, False), call(2, False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    assert torch.equal(call(1, False), first) and not torch.equal(first, other)


@pytest.mark.parametrize("name", CALLS)
def test_without_a_seed_the_draws_are_those_of_the_program_which_go_on(name):
    call = CALLS[name]
    torch.manual_seed(7)
    first, second = call(None, False), call(None, False)
    torch.manual_seed(7)
    assert torch.equal(call(None, False), first) and not torch.equal(first, second)


@pytest.mark.parametrize("name", CALLS)
def test_progress_shows_a_bar(name, capsys, monkeypatch):
    monkeypatch.setattr("pyro_avi.display.progress_bar._DELAY", 0.0)
    CALLS[name](0, False)
    assert capsys.readouterr().err == ""
    CALLS[name](0, True)
    # The time so far.
    assert "[00:" in capsys.readouterr().err


def test_what_is_done_at_once_shows_no_bar(capsys):
    CALLS["log_weights"](0, True)
    assert capsys.readouterr().err == ""
