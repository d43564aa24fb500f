"""The life of a guide: parameters and their names, copies, pickles, precision, and what is refused on the way."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_avi as avi
from tests.all_guides import READING
from tests.all_guides import SMALL_GUIDES as GUIDES

N = 6
X = torch.linspace(-1, 1, 3 * N).view(N, 3)
INDEX = torch.tensor([4, 0])

LOCAL = {
    kind: {f"row_factors.0.function.{name}" for name in names}
    for kind, names in {
        "ConstantGuide": ["vector"],
        "AmortizedGuide": ["encoder.layers.0.weight", "encoder.layers.0.bias", "head.weight", "head.bias"],
        "FactorizedGuide": ["table"],
        "SemiAmortizedGuide": [
            "log_step_size",
            "encoder.layers.0.weight",
            "encoder.layers.0.bias",
            "head.weight",
            "head.bias",
        ],
    }.items()
}


@pytest.fixture(params=GUIDES)
def kind(request):
    return request.param


def scaled(x, index=None):
    """Two globals; observed values that are not the argument itself."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", N, subsample=index):
        z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x * 2)


def module():
    return avi.models.BayesianDecoder(avi.models.DenseDecoder(2, (4,), (3,)), size=N)


def train(model, guide, x=X, steps=2):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(steps):
        svi.step(x)


def values(guide):
    return {name: value.clone() for name, value in guide.state_dict().items()}


def moved(guide, before):
    return {name for name, value in guide.state_dict().items() if not torch.equal(value, before[name])}


def trained(kind):
    return LOCAL[kind] | {"global_guide.vector"}


def test_parameters_are_there_after_setup(kind):
    guide = GUIDES[kind](scaled)
    assert not list(guide.parameters())

    assert guide.setup(X) is guide

    assert {name for name, _ in guide.named_parameters()} == LOCAL[kind] | {"global_guide.vector"}
    assert set(map(id, guide.local_parameters())) == {id(p) for n, p in guide.named_parameters() if n in LOCAL[kind]}
    before = values(guide)
    guide.setup(-X)
    assert not moved(guide, before)


def test_setup_leaves_the_random_state_and_the_store_alone(kind):
    pyro.param("mine", torch.ones(2))
    model = module()
    state = torch.get_rng_state()

    GUIDES[kind](model).setup(X)

    assert torch.equal(torch.get_rng_state(), state)
    assert list(pyro.get_param_store()) == ["mine"]


def test_a_first_step_inside_training_is_like_any_other(kind):
    model = module()
    guides = [GUIDES[kind](model), GUIDES[kind](model).setup(X)]
    draws = []
    for guide in guides:
        torch.manual_seed(1)
        draws.append(guide(X))
    if kind not in READING:  # its encoder is initialized at random, at setup
        assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])
    torch.manual_seed(1)
    again = guides[1](X)
    assert all(torch.equal(draws[1][name], again[name]) for name in again)


def test_a_failed_setup_leaves_nothing_behind(kind):
    guide = GUIDES[kind](scaled, global_guide=lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        guide.setup(X)

    with pytest.raises(ValueError, match="never seen the model's arguments"):
        _ = guide.row_plates


@pytest.mark.parametrize("setup", [True, False], ids=["set up", "fresh"])
def test_a_deepcopy_is_a_guide_of_its_own(kind, setup):
    guide = GUIDES[kind](scaled)
    if setup:
        train(scaled, guide)

    twin = copy.deepcopy(guide)

    assert guide.model is twin.model is scaled
    assert twin._pyro_name != guide._pyro_name
    assert list(twin.state_dict()) == list(guide.state_dict())
    twin.setup(X)
    before = values(guide.setup(X)), values(twin)
    train(scaled, twin)
    assert moved(guide, before[0]) == set()
    assert moved(twin, before[1]) == trained(kind)
    before = values(guide), values(twin)
    train(scaled, guide)
    assert moved(guide, before[0]) == trained(kind)
    assert moved(twin, before[1]) == set()


def test_a_copy_reads_its_own_calls(kind):
    model = scaled
    guide = GUIDES[kind](model).setup(X)
    guide(X[INDEX], INDEX)
    with torch.no_grad():
        for parameter in guide.local_parameters():
            parameter.normal_()

    for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        other = torch.tensor([5, 2])
        torch.testing.assert_close(
            twin.variational_parameters(-X[other], other), guide.variational_parameters(-X[other], other)
        )


def test_a_model_that_is_copied_along_stays_together(kind):
    model = module()
    model, guide = copy.deepcopy((model, GUIDES[kind](model).setup(X)))

    assert guide.model is model


def test_a_copy_takes_any_guide_of_the_globals_along(kind):
    guide = GUIDES[kind](scaled, global_guide=AutoNormal)
    train(scaled, guide)

    for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        before = values(guide), values(twin)
        train(scaled, twin)
        assert moved(guide, before[0]) == set()
        assert moved(twin, before[1]) == {name for name, _ in twin.named_parameters()}
        before = values(guide), values(twin)
        train(scaled, guide)
        assert moved(guide, before[0]) == {name for name, _ in guide.named_parameters()}
        assert moved(twin, before[1]) == set()


@pytest.mark.parametrize("make", [module, lambda: scaled], ids=["module", "function"])
def test_a_pickle_is_a_guide_of_its_own(kind, make):
    model = make()
    guide = GUIDES[kind](model)
    train(model, guide)

    twin = pickle.loads(pickle.dumps(guide))

    assert guide.model is model
    assert twin._pyro_name != guide._pyro_name
    assert not moved(guide, values(twin))
    before = values(guide), values(twin)
    train(model, guide)
    assert moved(guide, before[0]) == trained(kind)
    assert moved(twin, before[1]) == set()
    before = values(guide), values(twin)
    train(twin.model, twin)
    assert moved(guide, before[0]) == set()
    assert moved(twin, before[1]) == trained(kind)


def test_two_guides_of_one_class_share_nothing(kind):
    guides = [GUIDES[kind](scaled).setup(X) for _ in range(2)]
    train(scaled, guides[0])
    before = [values(guide) for guide in guides]

    train(scaled, guides[1])

    assert moved(guides[0], before[0]) == set()
    assert moved(guides[1], before[1]) == trained(kind)
    names = list(pyro.get_param_store())
    assert len(names) == 2 * len(trained(kind))
    store = {id(value) for _, value in pyro.get_param_store().named_parameters()}
    assert store == {id(parameter) for guide in guides for parameter in guide.parameters()}


def test_parameters_of_another_guide_part_survive_a_late_setup(kind):
    # Setup happens inside a step, after the first part's parameters were registered.
    first, second = avi.ConstantGuide(scaled).setup(X), GUIDES[kind](scaled)

    def both(x):
        with pyro.poutine.block(hide_types=["sample"]):
            first(x)
        second(x)

    svi = SVI(scaled, both, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    assert torch.tensor(svi.step(X)).isfinite()


def test_double_precision(kind):
    model = module()
    guide = GUIDES[kind](model).setup(X)
    guide(X[INDEX], INDEX)

    guide.double()
    model.double()

    x = X.double()
    assert {value.dtype for value in guide(x).values()} == {torch.float64}
    assert guide.median(x)["z"].dtype == torch.float64
    train(model, guide, x)
    assert {parameter.dtype for parameter in guide.parameters()} == {torch.float64}


@pytest.mark.parametrize("move", [lambda g: g.double(), lambda g: g.to(torch.float64), lambda g: g.to("cpu").double()])
def test_a_precision_asked_for_before_the_first_call_is_kept(kind, move):
    model, x = module().double(), X.double()
    guide = move(GUIDES[kind](model))
    assert copy.deepcopy(guide)(x)["z"].dtype == torch.float64

    # The latents of this model are in single precision, whatever the guide was asked for.
    guide = pickle.loads(pickle.dumps(move(GUIDES[kind](scaled))))
    guide.setup(X)
    assert {parameter.dtype for parameter in guide.parameters()} == {torch.float64}
    assert {parameter.dtype for parameter in GUIDES[kind](scaled).to("cpu").setup(X).parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in GUIDES[kind](scaled).double().float().setup(X).parameters()} == {
        torch.float32
    }


@pytest.mark.cuda
def test_a_device_asked_for_before_the_first_call_is_kept(kind):
    guide = GUIDES[kind](scaled).to("cuda").setup(X)
    assert {parameter.device.type for parameter in guide.parameters()} == {"cuda"}


def test_what_could_not_be_loaded_is_never_answered_for(kind):
    model = module()
    trained = GUIDES[kind](model).setup(X)
    train(model, trained)
    state = trained.state_dict()

    lacking = dict(list(state.items())[1:])
    guide = GUIDES[kind](model)
    guide.load_state_dict(lacking)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Missing key"):
            guide(X)

    # Parameters of another shape: a first call that does not fit, then one that does.
    guide = GUIDES[kind](model)
    guide.load_state_dict(state)
    if kind != "ConstantGuide":
        with pytest.raises((RuntimeError, ValueError)):
            guide.setup(X[:, :2] if kind in READING else X[:3])
    guide(X)
    assert all(torch.equal(value, guide.state_dict()[name]) for name, value in state.items())


def test_a_guide_of_the_globals_that_could_not_be_loaded_is_never_answered_for():
    def model():
        return pyro.sample("theta", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    guide = avi.MeanFieldNormal(model)
    guide.load_state_dict({"vector": torch.ones(4)})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="size mismatch for vector"):
            guide()
    guide.load_state_dict({"vector": torch.ones(6)})
    guide()
    assert torch.equal(guide.vector.detach(), torch.ones(6))


def test_state_dict_of_one_loads_into_another(kind):
    model = module()
    one, other = GUIDES[kind](model).setup(X), GUIDES[kind](model).setup(X)
    train(model, one)

    other.load_state_dict(one.state_dict())

    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    torch.manual_seed(1)
    draws = one(X)
    torch.manual_seed(1)
    assert all(torch.equal(draws[name], value) for name, value in other(X).items())


def without_plate(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(N, 3), 1.0).to_event(2))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(2), obs=x)


def without_latents(x):
    with pyro.plate("data", N):
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)


def locals_only(x):
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def unobserved(x=None):
    with pyro.plate("data", N):
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def unobserved_at_first(x=None):
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        if x is not None:
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


class Flat(nn.Module):
    def forward(self, x):
        return x.sum(-1)


class Transposed(nn.Module):
    def forward(self, x):
        return x.t()


AMORTIZED, CONSTANT, FACTORIZED = avi.AmortizedGuide, avi.ConstantGuide, avi.FactorizedGuide
ALL = (CONSTANT, AMORTIZED, FACTORIZED)

# (guides, call, error, fragment of the message)
REFUSED = [
    (ALL, lambda g: g(scaled, init_scale=0.0), ValueError, "init_scale > 0, got 0.0"),
    (ALL, lambda g: g(scaled, init_scale=float("nan")), ValueError, "init_scale > 0, got nan"),
    (ALL, lambda g: g(scaled, plate=3), TypeError, "plate= to be the name of a plate or several names, got 3"),
    (ALL, lambda g: g(scaled, plate=()), TypeError, "plate= to be the name of a plate or several names, got ()"),
    (ALL, lambda g: g(scaled, plate=("data", "other")).setup(X), ValueError, "plates ['data'], got 'other'"),
    (ALL, lambda g: g(scaled, family=dist.Normal), TypeError, "family= to be a Family such as DiagonalNormal(), got"),
    (ALL, lambda g: g(scaled, family=avi.DiagonalNormal), TypeError, "family= to be a Family such as"),
    (ALL, lambda g: g(scaled, plate="dota").setup(X), ValueError, "plates ['data'], got 'dota'"),
    (ALL, lambda g: g(without_latents, plate="data").setup(X), ValueError, "a latent in plate='data', found none"),
    (ALL, lambda g: g(without_latents).setup(X), ValueError, "a latent, found none"),
    (ALL, lambda g: g(locals_only, global_guide=AutoNormal).setup(X), ValueError, "global_guide=None for a model"),
    (ALL, lambda g: g(scaled).row_plates, ValueError, "Call guide.setup(*args) with the arguments of the model first."),
    ((AMORTIZED,), lambda g: g(unobserved, plate="data").setup(), ValueError, "inputs=lambda *args, **kwargs: ..."),
    ((AMORTIZED,), lambda g: g(scaled, ()), ValueError, "at least one width, got none"),
    ((AMORTIZED,), lambda g: g(scaled, (4, 0)), ValueError, "at least 1, got 0 in (4, 0)"),
    ((AMORTIZED,), lambda g: g(scaled, (True,)), ValueError, "at least 1, got True"),
    ((AMORTIZED,), lambda g: g(scaled, (2.5,)), ValueError, "at least 1, got 2.5"),
    ((AMORTIZED,), lambda g: g(scaled, "64"), TypeError, "an encoder as a module or as the widths of an MLP"),
    ((AMORTIZED,), lambda g: g(scaled, 64), TypeError, "e.g. (64, 64), got 64"),
    ((AMORTIZED,), lambda g: g(scaled, Flat()).setup(X), ValueError, "features of shape (6, H), got (6,)"),
    ((AMORTIZED,), lambda g: g(scaled, Transposed()).setup(X), ValueError, "features of shape (6, H), got (3, 6)"),
    (
        (AMORTIZED,),
        lambda g: g(scaled, inputs=lambda x, index=None: X).setup(X[:2], INDEX),
        ValueError,
        "inputs= to return the 2 rows of the call in dimension 0, got shape (6, 3)",
    ),
    (
        (AMORTIZED,),
        lambda g: g(avi.models.VAE(avi.models.DenseDecoder(2, (4,), (3,)), size=N)).setup(X)(None),
        ValueError,
        "observed value at site 'x', got none",
    ),
]


@pytest.mark.parametrize(
    "guide, call, error, message",
    [(guide, *refused) for guides, *refused in REFUSED for guide in guides],
)
def test_refused(guide, call, error, message):
    with pytest.raises(error) as raised:
        call(guide)

    assert message in str(raised.value)


def test_a_model_without_rows_has_globals_only(kind):
    guide = GUIDES[kind](without_plate)

    with pytest.warns(UserWarning, match="every latent is global") as warned:
        guide.setup(X)
        guide(X)

    assert len(warned) == 1
    assert guide.row_plates == () and not guide.local_parameters()
    assert isinstance(guide.global_guide, avi.MeanFieldNormal)
    assert guide.median(X)["z"].shape == (N, 3)


@pytest.mark.filterwarnings("ignore:.*every latent is global:UserWarning")
def test_guides_of_globals_alone_answer_for_no_rows(kind, tmp_path):
    guide = GUIDES[kind](without_plate).setup(X)

    assert guide.variational_parameters(X) == guide.posterior(X) == {}
    assert guide.quantiles([0.1, 0.9], X)["z"].shape == (2, N, 3)
    with pytest.raises(ValueError, match=r"among the local latents \[\], got"):
        guide.posterior_by_row([(X,)])
    avi.save(guide, tmp_path / "guide")
    again = avi.load(tmp_path / "guide", without_plate, X)
    assert torch.equal(again.median(X)["z"], guide.median(X)["z"])
    assert again.describe() == guide.describe()
    train(without_plate, guide)


def test_a_model_that_observes_nothing_has_globals_only(kind):
    guide = GUIDES[kind](unobserved)

    with pytest.warns(UserWarning, match=r"observes nothing.*every latent is global.*plates are \['data'\]: choose by"):
        guide()

    assert guide.row_plates == () and guide.median()["z"].shape == (N, 3)


def test_nothing_to_read_is_said_again_at_the_next_call():
    guide = AMORTIZED(unobserved, plate="data")
    for _ in range(2):
        with pytest.raises(ValueError, match="for the encoder to read, found none"):
            guide()


def test_it_does_not_take_data_later(kind):
    with pytest.warns(UserWarning, match="observes nothing"):
        guide = GUIDES[kind](unobserved_at_first).setup()
    with pytest.raises(ValueError, match=r"(?s)no observations, as in the call.*values at sites \['x'\].*new guide"):
        guide(X)


def test_without_observations_constant_and_factorized_guides_answer():
    for guide in (CONSTANT, FACTORIZED):
        model = module()
        guide = guide(model).setup(X)
        assert guide(None)["z"].shape == guide.median()["z"].shape == (N, 2)


# --- rows that come later


class Growing:
    """A data set whose size the model knows."""

    size = N

    def __call__(self, x, index=None):
        with pyro.plate("data", self.size, subsample=index):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def test_rows_are_appended_and_trained_without_the_others():
    model, x = Growing(), torch.randn(N + 3, 2)
    guide = avi.FactorizedGuide(model)
    avi.fit(model, guide, x[:N], num_steps=20, lr=0.1, progress=False)
    before, name = guide.table.detach().clone(), guide._pyro_name

    model.size = N + 3
    guide.append_rows(3)
    assert torch.equal(guide.table[:N], before) and torch.equal(guide.table[N:], before.mean(0).expand(3, -1))
    assert guide._pyro_name != name
    new = torch.arange(N, N + 3)
    avi.fit(model, guide, x[N:], new, num_steps=200, lr={"local": 0.1}, progress=False)

    assert torch.equal(guide.table[:N], before)
    # The exact posterior means are 0.8 x.
    assert (guide.posterior(x[N:], new).mean - 0.8 * x[N:]).abs().max() < 0.2
    assert guide.posterior(x).batch_shape == (N + 3,) and guide.median()["z"].shape == (N + 3, 2)


def test_appended_rows_may_start_anywhere():
    model = Growing()
    guide = avi.FactorizedGuide(model).setup(torch.randn(N, 2))
    start = torch.randn(2, 4)
    guide.append_rows(2, start)
    assert torch.equal(guide.table[N:], start)
    with pytest.raises(ValueError, match=r"start of shape \(2, 4\) or \(4,\), got 2 rows and \(3, 4\)"):
        guide.append_rows(2, torch.randn(3, 4))
    with pytest.raises(ValueError, match="at least one row"):
        guide.append_rows(0)
    with pytest.raises(ValueError, match="setup"):
        avi.FactorizedGuide(model).append_rows(1)
