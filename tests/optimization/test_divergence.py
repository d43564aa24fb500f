"""A training that diverges says what went first, and gives its last finite state back."""

import itertools
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

import pyro_avi as avi
from pyro_avi.training import training_state
from tests.marks import needs_compiler

N = 6
X = torch.linspace(-2.0, 3.0, N, dtype=torch.double)


class Rows(PyroModule):
    """Rows with a latent each, and a weight."""

    trouble = None

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0, dtype=torch.double))

    def forward(self, x, index=None):
        loc = 0.0
        if self.trouble == "gradient":
            # Zero, with an infinite slope.
            loc = (self.weight - self.weight.detach()).abs().sqrt()
        elif self.trouble == "likelihood":
            loc = torch.inf
        with pyro.plate("data", N, subsample=index):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 0.0 if self.trouble == "prior" else 1.0))
            pyro.sample("x", dist.Normal(self.weight * z + loc, 1.0), obs=x)


class Encoder(nn.Module):
    """Features that may become nan."""

    sound = True

    def forward(self, x):
        return x.unsqueeze(-1) * (1.0 if self.sound else torch.nan)


class Recorder:
    """A callback that makes trouble after some steps, and knows the state after each."""

    def __init__(self, after, make, *modules):
        self.after, self.make, self.modules, self.states = after, make, modules, {0: state(*modules)}

    def __call__(self, fit):
        self.states[fit.steps] = state(*self.modules)
        if fit.steps == self.after:
            self.make()


def state(*modules):
    return {(i, name): value.clone() for i, m in enumerate(modules) for name, value in m.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def build(guide="amortized"):
    torch.manual_seed(0)
    model = Rows()
    if guide == "amortized":
        return model, avi.AmortizedGuide(model, encoder=Encoder()).setup(X)
    return model, avi.FactorizedGuide(model, same_rows=True).setup(X)


TROUBLE = {
    "likelihood": r"The log likelihood of the data at site 'x' of the model is -inf\.",
    "prior": r"The log density of the latent at site 'z' of the model is nan\.",
    "gradient": r"The gradient of step 130 was not finite: it moved model.weight to nan or infinity\.",
    "encoder": r"The guide draws nan at site 'z'",
}


@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam])
@pytest.mark.parametrize("trouble", TROUBLE)
def test_what_went_first_is_said_and_the_last_finite_state_given_back(trouble, optimizer, monkeypatch):
    monkeypatch.setattr(training_state, "_SHARE", float("inf"))
    model, guide = build()

    def make():
        model.trouble = trouble
        guide.row_factors[0].function.encoder.sound = trouble != "encoder"

    told = Recorder(130, make, model, guide)
    step = 131 if trouble == "gradient" else 130
    message = f"at step {step}.\n{TROUBLE[trouble]}(.|\n)*as they were after 100 steps"
    with pytest.raises(avi.DivergedError, match=message) as error:
        avi.fit(model, guide, X, num_steps=300, lr=0.05, progress=False, optimizer=optimizer, callbacks=[told])
    assert error.value.step == step and error.value.kept == 100
    assert same(state(model, guide), told.states[100]) and not same(told.states[100], told.states[130])
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value) and again.kept == 100


@pytest.mark.parametrize("guide", ["amortized", "factorized"])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=[needs_compiler, pytest.mark.slow])])
def test_data_that_are_not_finite_are_named_with_their_place(guide, compile, monkeypatch):
    monkeypatch.setattr(training_state, "_SHARE", float("inf"))
    model, guide = build(guide)
    bad = X.clone()
    bad[4] = torch.nan
    told = Recorder(0, None, model, guide)
    batches = itertools.chain(itertools.repeat((X,), 103), [(bad,)], itertools.repeat((X,)))
    message = r"got nan at step 103.\nThe data at site 'x' are not finite: 1 of 6 numbers, the first at \(4,\)\.\n"
    with pytest.raises(avi.DivergedError, match=message):
        avi.fit(
            model,
            guide,
            batches=batches,
            num_steps=300,
            lr=0.05,
            compile=compile,
            progress=False,
            callbacks=[told],
        )
    assert same(state(model, guide), told.states[100])


def test_nan_in_the_first_call_is_named_whether_torch_validates_or_not():
    for validated in (True, False):
        model = Rows()
        with (
            pyro.validation_enabled(validated),
            pytest.raises(avi.DivergedError, match="at step 0.\nThe data at site 'x'"),
        ):
            avi.fit(model, avi.AmortizedGuide(model, encoder=Encoder()), X * torch.nan, num_steps=2, progress=False)


def test_nan_of_an_encoder_is_named_in_the_first_call_too():
    model, guide = build()
    guide.row_factors[0].function.encoder.sound = False
    with (
        pyro.validation_enabled(True),
        pytest.raises(avi.DivergedError, match="step 0.\nThe guide draws nan at site 'z'"),
    ):
        avi.fit(model, guide, X, num_steps=2, progress=False)


def test_nan_behind_a_mask_is_no_trouble():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            known = ~x.isnan()
            pyro.sample("x", dist.Normal(z, 1.0).mask(known), obs=torch.where(known, x, 0.0))

    x = torch.tensor([1.0, torch.nan, 2.0])
    assert avi.fit(model, avi.ConstantGuide(model), x, num_steps=3, progress=False).losses.isfinite().all()


def test_a_buffer_may_hold_infinity(monkeypatch):
    monkeypatch.setattr(training_state, "_SHARE", float("inf"))
    model, guide = build()
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    assert avi.fit(model, guide, X, num_steps=3, progress=False).steps == 3
    model.trouble = "likelihood"
    with pytest.raises(avi.DivergedError) as error:
        avi.fit(model, guide, X, num_steps=3, progress=False)
    assert error.value.kept == 0


def test_a_last_step_to_nan_is_told():
    model, guide = build()
    told = Recorder(2, lambda: setattr(model, "trouble", "gradient"), model, guide)
    with pytest.raises(
        avi.DivergedError, match="at step 3.\nThe gradient of step 2 was not finite: it moved model.weight"
    ):
        avi.fit(model, guide, X, num_steps=3, progress=False, callbacks=[told])
    assert same(state(model, guide), told.states[0])


def test_without_a_copy_the_state_is_that_before_the_loss():
    model, guide = build()
    told = Recorder(3, lambda: setattr(model, "trouble", "likelihood"), model, guide)
    with pytest.raises(avi.DivergedError, match="at step 3.\nThe log likelihood") as error:
        avi.fit(model, guide, X, num_steps=9, progress=False, keep=False, callbacks=[told])
    assert error.value.kept is None and "as they were" not in str(error.value)
    assert same(state(model, guide), told.states[3])


class Plain:
    """A state without an optimizer."""

    def values(self):
        return self.parameters()

    def moments(self):
        return {}

    def optimizer_state(self):
        return None

    def load(self, values, moments, optimizer):
        for name, value in self.values().items():
            value.copy_(values[name])


def test_copies_are_made_as_often_as_their_share_of_the_time_allows(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training_state.time, "perf_counter", lambda: now[0])

    class State(Plain):
        def parameters(self):
            # Every copy takes a second.
            now[0] += 1.0
            return {"w": torch.full((2,), now[0])}

        def values(self):
            return {"w": torch.full((2,), now[0])}

    backup = training_state.StateBackup(State())
    steps = []
    for step in range(1000):
        backup.update(step)
        now[0] += 1.0
        steps.append(backup.step)
    # The first, and from then on about one in a hundred seconds.
    made = sorted(set(steps))
    assert len(made) == 11 and {after - before for before, after in zip(made, made[1:], strict=False)} <= {99, 100}


def test_a_state_that_is_not_finite_is_not_kept():
    class State(Plain):
        value = torch.ones(2)

        def parameters(self):
            return {"w": self.value, "count": torch.tensor(3)}

    state = State()
    backup = training_state.StateBackup(state)
    backup._began -= 1e9
    backup.update(1)
    state.value = torch.tensor([1.0, torch.nan])
    backup.update(2)
    assert backup.step == 1
    backup.restore()
    assert state.value.tolist() == [1.0, 1.0]
