"""Where rows and observed values come from: replayed, read from the model again, or refused, and never stale."""

import re

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_avi as avi
from pyro_avi.calls.call_reader import CallReader
from pyro_avi.calls.replay import CannotReplayError, Recorder, Replay
from pyro_avi.rows.subsample import Subsample

N = 6
X = torch.arange(2.0 * N).view(N, 2)
OTHER = 100 - 3 * X
INDEX = torch.tensor([4, 0, 3])


class Model:
    """Rows observed at the site "x" in the plate "data"; ``runs`` counts how often the likelihood was computed."""

    def __init__(self, find, size=N, subsample_size=None):
        self.find, self.size, self.subsample_size, self.runs = find, size, subsample_size, 0

    def __call__(self, *args, **kwargs):
        given = {} if self.subsample_size is None else {"subsample_size": self.subsample_size}
        if "index" in kwargs:
            given["subsample"] = kwargs["index"]
        with pyro.plate("data", self.size, **given) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            self.runs += 1
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=self.find(rows, *args, **kwargs))

    def reader(self):
        return CallReader(self, ["data"], ["x"], inputs=True)


def batch(rows, batch):
    return batch["x"]


def index_outside(rows, x, *, index):
    return x


def index_inside(rows, x, *, index):
    return x[index]


def named_index(rows, x, *, index):
    return x.index_select(0, rows)


def masked(rows, x, seen):
    with poutine.mask(mask=seen):
        return torch.where(seen[:, None], x, torch.zeros(()))


def joined(rows, x, y):
    return torch.cat([x[:, :1], y[:, 1:]], -1)


SEEN = torch.tensor([True, False, True, True, True, False])

# (what the model observes, a first call, another one, what the other one observes): nothing runs but the operations.
REPLAYED = {
    "obs=x": (lambda rows, x: x, (X,), (OTHER,), OTHER),
    "keyword": (lambda rows, *, x: x, {"x": X}, {"x": OTHER}, OTHER),
    "batch['x']": (batch, ({"y": -X, "x": X},), ({"y": -X, "x": OTHER},), OTHER),
    "tuple": (lambda rows, pair: pair[1], ((X, -X),), ((X, OTHER),), OTHER),
    "cast": (lambda rows, x: x.float(), (X.double(),), (OTHER.double(),), OTHER),
    "cast that returns its argument": (lambda rows, x: x.float().to(torch.float32), (X,), (OTHER,), OTHER),
    "cast of bytes, scaled": (lambda rows, x: x.float() / 255, (X.byte(),), ((X + 9).byte(),), (X + 9) / 255),
    "transposed": (lambda rows, x: x.t(), (X.t(),), (OTHER.t(),), OTHER),
    "permuted": (lambda rows, x: x.permute(1, 0), (X.t(),), (OTHER.t(),), OTHER),
    "contiguous": (lambda rows, x: x.contiguous().view(-1, 2), (X,), (OTHER.t().contiguous().t(),), OTHER),
    "slice": (lambda rows, x: x[1:, :2], (torch.ones(7, 3),), (torch.arange(21.0).view(7, 3),), None),
    "flipped": (lambda rows, x: x.flip(0)[torch.arange(N)], (X,), (OTHER,), OTHER.flip(0)),
    "masked": (masked, (X, SEEN), (OTHER, ~SEEN), OTHER * ~SEEN[:, None]),
    "two arguments": (joined, (X, X), (X, OTHER), torch.stack([X[:, 0], OTHER[:, 1]], -1)),
    "scalar argument": (lambda rows, x, c: x * c, (X, 2.0), (OTHER, 2.0), OTHER * 2),
    "0-dimensional argument": (lambda rows, x, c: x * c, (X, torch.tensor(2.0)), (X, torch.tensor(5.0)), X * 5),
    "made in the model": (lambda rows: torch.arange(12.0).view(6, 2) / 2, (), (), X / 2),
    "made in the model for an argument": (
        lambda rows, x: x + torch.ones(2).cumsum(0),
        (X,),
        (OTHER,),
        OTHER + X[1] - 1,
    ),
    "split": (lambda rows, x: x.chunk(2, -1)[1], (torch.ones(6, 4),), (torch.cat([X, OTHER], -1),), OTHER),
    "missing values": (lambda rows, x: x.nan_to_num(0.0), (X,), (OTHER,), OTHER),
}


def call(arguments):
    return ((), arguments) if isinstance(arguments, dict) else (arguments, {})


@pytest.mark.parametrize("name", REPLAYED)
def test_replayed(name):
    find, first, other, expected = REPLAYED[name]
    model = Model(find)
    reader = model.reader()
    if expected is None:
        expected = find(None, *other)

    reader.read(*call(first))
    runs = model.runs
    found = reader.read(*call(other))

    assert torch.equal(found.values["x"], expected)
    assert found.rows["data"] == Subsample(N, None)
    again = reader.read(*call(first))
    assert torch.equal(again.values["x"], find(None, *call(first)[0], **call(first)[1]))
    if name != "contiguous":  # the layout of a tensor is part of the signature
        assert model.runs == runs


def test_only_the_operations_that_matter_are_kept():
    def model(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            for _ in range(20):
                z = (z + x).tanh()
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x / 255)

    for recorded, steps in ((model, 1), (Model(lambda rows, x: x), 0)):
        reader = CallReader(recorded, ["data"], ["x"])
        reader.read((X,), {})
        (found,) = reader._readers.values()
        assert len(found._replay._steps) == steps


@pytest.mark.parametrize("find, values", [(index_outside, None), (index_inside, X), (named_index, X)])
def test_rows_given_by_the_caller(find, values):
    model = Model(find)
    reader = model.reader()
    x = X[INDEX] if values is None else values
    reader.read((x,), {"index": INDEX})
    runs = model.runs

    other = torch.tensor([1, 5, 2])
    found = reader.read((X[other] if values is None else values,), {"index": other})

    assert model.runs == runs
    assert torch.equal(found.rows["data"].index, other)
    assert torch.equal(found.values["x"], X[other])
    assert reader.draws_rows((x,), {"index": other}) == {}


@pytest.mark.parametrize("find", [lambda rows, x: x[rows], lambda rows, x: pyro.subsample(x, event_dim=1)])
def test_rows_drawn_by_the_guide(find):
    model = Model(find, subsample_size=3)
    reader = model.reader()

    assert reader.draws_rows((X,), {}) == {"data": (N, 3)}
    runs = model.runs
    for rows in (INDEX, INDEX.flip(0), torch.arange(N)):
        found = reader.read((OTHER,), {}, {"data": rows})
        assert torch.equal(found.rows["data"].index, rows)
        assert torch.equal(found.values["x"], OTHER[rows])
    assert model.runs == runs


class Holder:
    """What a model keeps outside its arguments."""

    def __init__(self, x):
        self.x = x
        self.array = x.numpy()
        self.list = x.tolist()

    def tensor(self, rows):
        return self.x

    def scaled_tensor(self, rows):
        return self.x / 255

    def as_tensor(self, rows):
        return torch.as_tensor(self.array)

    def from_numpy(self, rows):
        return torch.from_numpy(self.array)

    def computed_by_numpy(self, rows):
        return torch.as_tensor(self.array * 2)

    def from_list(self, rows):
        return torch.tensor(self.list)

    def shifted(self, rows, x):
        return x - self.x

    def indexed_by_numpy(self, rows, x):
        return x[numpy.argsort(self.array[:, 0])]


@pytest.mark.parametrize(
    "find, args",
    [
        (Holder.tensor, ()),
        (Holder.scaled_tensor, ()),
        (Holder.as_tensor, ()),
        (Holder.from_numpy, ()),
        (Holder.computed_by_numpy, ()),
        (Holder.from_list, ()),
        (Holder.shifted, (X,)),
        (Holder.indexed_by_numpy, (X,)),
    ],
)
def test_data_that_are_no_argument_are_read_from_the_model_again(find, args):
    holder = Holder(X)
    model = Model(lambda rows, *args: find(holder, rows, *args))
    reader = model.reader()

    with pytest.warns(UserWarning, match=r"values \['x'\] of plate 'data'(.|\n)*inputs=") as caught:
        first = reader.read(args, {})
    assert len(caught) == 1
    assert torch.equal(first.values["x"], find(holder, None, *args))

    holder.__init__(OTHER)
    assert torch.equal(reader.read(args, {}).values["x"], find(Holder(OTHER), None, *args))


def test_one_warning_for_calls_of_all_kinds():
    model = Model(lambda rows, x, *, index: x + model.shift)
    model.shift = torch.ones(())
    reader = model.reader()

    with pytest.warns(UserWarning, match="no argument of the model") as caught:
        for size in (3, 2, 1):
            rows = INDEX[:size]
            found = reader.read((X[rows],), {"index": rows})
            assert torch.equal(found.values["x"], X[rows] + 1)
    assert len(caught) == 1


def test_arrays_as_arguments_are_followed():
    model = Model(lambda rows, x: torch.as_tensor(x) / 2)
    reader = model.reader()

    for x in (X, OTHER, X):
        array = x.numpy().copy()
        assert torch.equal(reader.read((array,), {}).values["x"], x / 2)
        array *= 3
        assert torch.equal(reader.read((array,), {}).values["x"], x * 3 / 2)


def bool_of_data(rows, x):
    return x if x.sum() > 100 else -x


def written(rows, x):
    y = x.clone()
    y[0] = 0.0
    return y


def written_through_a_view(rows, x):
    y = x.clone()
    # Without effect on the first call's data.
    y.view(-1).clamp_(max=50.0)
    return y


def written_by_out(rows, x):
    y = torch.empty(N, 2)
    torch.div(x, 2, out=y)
    return y


def filled(rows, x):
    y = torch.zeros(N, 2)
    y += x
    return y


READ = {
    "item": (lambda rows, x: x * x.max().item(), "item"),
    "int": (lambda rows, x: x / int(x.max()), "__int__"),
    "float": (lambda rows, x: x / float(x.max()), "__float__"),
    "bool": (bool_of_data, "__bool__"),
    "tolist": (lambda rows, x: torch.tensor(x.tolist()), "tolist"),
    "numpy": (lambda rows, x: torch.as_tensor(x.numpy() * 2), "numpy"),
    "array": (lambda rows, x: torch.as_tensor(numpy.asarray(x) + 1), "__array__|ndarray"),
    "equal": (lambda rows, x: -x if torch.equal(x, X) else x, "equal"),
    "chosen": (lambda rows, x: x[x[:, 0] >= 0][:N], "__getitem__"),
    "nonzero": (lambda rows, x: x[(x[:, 1] > -1000).nonzero()[:, 0]], "nonzero"),
    "slice": (lambda rows, x: x[: (x[:, 0].argmax() * 0 + N)], "__index__|slice|Tensor"),
    "setitem": (written, "__setitem__ changes a tensor in place"),
    "view": (written_through_a_view, "clamp_ changes a tensor in place"),
    "out": (written_by_out, "div changes a tensor in place"),
    "iadd": (filled, "add_ changes a tensor in place"),
}


@pytest.mark.parametrize("name", READ)
def test_content_that_python_sees_is_read_from_the_model_again(name):
    find, reason = READ[name]
    model = Model(find)
    reader = model.reader()

    with pytest.warns(UserWarning, match=reason) as caught:
        assert torch.equal(reader.read((X.clone(),), {}).values["x"], find(None, X))
    assert len(caught) == 1
    other = torch.cat([OTHER[3:], X[:3] - 2])
    assert torch.equal(reader.read((other,), {}).values["x"], find(None, other))


def test_a_number_of_rows_that_follows_the_data_is_read_again():
    def model(x):
        kept = x[x[:, 0] >= 0]
        with pyro.plate("data", len(kept)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=kept)

    reader = CallReader(model, ["data"])
    with pytest.warns(UserWarning, match="reads data into Python"):
        assert reader.read((X,), {}).rows["data"].size == 6
    assert reader.read((X - 5,), {}).rows["data"].size == 3


def draws(generate):
    def model(x):
        with pyro.plate("data", N, subsample=generate()) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[rows])

    return model


GENERATOR = numpy.random.default_rng(0)


@pytest.mark.parametrize(
    "model",
    [
        draws(lambda: torch.randperm(N)[:5]),
        draws(lambda: torch.as_tensor(GENERATOR.permutation(N)[:5])),
        Model(lambda rows, x: x + torch.randn(N, 2)),
        Model(lambda rows, x: x + torch.as_tensor(GENERATOR.normal(size=(N, 2)))),
        Model(lambda rows, x: torch.bernoulli(torch.full((N, 2), 0.5))),
    ],
    ids=["rows by torch", "rows by numpy", "noise by torch", "noise by numpy", "binarized"],
)
def test_rows_and_data_that_the_model_draws_are_refused(model):
    with pytest.raises(
        ValueError, match="(?s)same rows, observed values, masks and scales of plate 'data'.*Draw them outside"
    ):
        CallReader(model, ["data"], ["x"]).read((X,), {})


def test_missing_values_do_not_look_like_random_ones():
    x = X.clone()
    x[2] = torch.nan
    found = Model(lambda rows, x: x / 2).reader().read((x,), {})
    assert found.values["x"].isnan().sum() == 2


@pytest.mark.parametrize(
    "find, first, other",
    [
        (lambda rows, x, y: x, ((X, X), {}), ((OTHER, X), {})),
        (lambda rows, x, y: x, ((), {"x": X, "y": -X}), ((), {"y": -X, "x": OTHER})),
        (lambda rows, x: x["a"], (({"a": X, "b": -X},), {}), (({"b": -X, "a": OTHER},), {})),
        (lambda rows, pair: pair[0], (([X, -X],), {}), (((OTHER, -X),), {})),
        (lambda rows, x, k: x * k, ((X, 1), {}), ((X, True), {})),
    ],
    ids=["one tensor twice", "order of keywords", "order of a dict", "list and tuple", "type of a number"],
)
def test_calls_that_look_alike_are_told_apart(find, first, other):
    reader = Model(find).reader()

    reader.read(*first)

    assert torch.equal(reader.read(*other).values["x"], find(None, *other[0], **other[1]))


def test_an_object_among_the_arguments_is_known_by_identity():
    double, halve = (lambda x: x * 2), (lambda x: x / 2)
    reader = Model(lambda rows, x, transform: transform(x)).reader()

    assert torch.equal(reader.read((X, double), {}).values["x"], X * 2)
    assert torch.equal(reader.read((X, halve), {}).values["x"], X / 2)
    assert torch.equal(reader.read((OTHER, double), {}).values["x"], OTHER * 2)


def test_a_number_that_changes_every_step_warns_once():
    model = Model(lambda rows, x, temperature: x * temperature)
    reader = model.reader()
    reader.max_signatures = 3

    with pytest.warns(UserWarning, match="more than 3 kinds of arguments(.|\n)*0-dimensional tensor") as caught:
        for step in range(10):
            assert torch.equal(reader.read((X, step / 10), {}).values["x"], X * (step / 10))
            assert len(reader._readers) <= 3
    assert len(caught) == 1


def test_an_observation_left_out_is_asked_for_by_name():
    reader = Model(lambda rows, x: x).reader()
    reader.read((X,), {})

    with pytest.raises(ValueError, match="(?s)observed value at site 'x', got none.*inputs="):
        reader.read((None,), {})


def test_a_plate_that_draws_from_data_of_another_size_is_refused():
    held = {"x": X}

    def model():
        with pyro.plate("data", len(held["x"]), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=held["x"][rows])

    reader = CallReader(model, ["data"], ["x"])
    with pytest.warns(UserWarning, match="no argument"):
        reader.read((), {}, {"data": torch.tensor([1, 2])})
    held["x"] = torch.cat([X, OTHER])

    with pytest.raises(
        ValueError, match=r"as in the first call, \(N, B\) = {'data': \(6, 2\)}, got {'data': \(12, 2\)}"
    ):
        reader.read((), {}, {"data": torch.tensor([1, 2])})


def test_rows_as_a_list_are_right():
    model = Model(lambda rows, x, *, index: x)
    reader = model.reader()

    with pytest.warns(UserWarning, match="as_tensor makes a tensor from a list"):
        reader.read((X[:3],), {"index": [0, 1, 2]})
    assert reader.read((X[:3],), {"index": [3, 5, 4]}).rows["data"].index.tolist() == [3, 5, 4]


@pytest.mark.parametrize("guide", [avi.ConstantGuide, avi.AmortizedGuide, avi.FactorizedGuide])
def test_a_call_of_a_guide_does_not_run_the_likelihood(guide):
    model = Model(lambda rows, x, *, index: x / 255)
    guide = guide(model).setup(X, index=torch.arange(N))

    guide(X[INDEX], index=INDEX)
    runs = model.runs
    for _ in range(5):
        guide(OTHER[INDEX], index=INDEX.flip(0))
    assert model.runs == runs


def test_the_random_state_and_the_gradient_are_left_alone():
    state = torch.get_rng_state()
    x = X.clone().requires_grad_()
    reader = Model(lambda rows, x: x * 2).reader()

    found = reader.read((x,), {})

    assert torch.equal(torch.get_rng_state(), state)
    assert not found.values["x"].requires_grad
    assert torch.is_grad_enabled()


def test_a_replay_is_a_function_of_its_inputs():
    a, b, constant = torch.tensor(2.0), torch.tensor(3.0), torch.tensor(1.0)
    with Recorder() as recorder:
        (a * 100).exp()
        total = [a + b, b, "text"]

    replay = Replay(recorder, (a, b), total)

    assert replay((torch.tensor(10.0), torch.tensor(5.0))) == [torch.tensor(15.0), torch.tensor(5.0), "text"]
    assert Replay(recorder, (a, b), [b, None])((a, constant)) == [constant, None]
    with pytest.raises(CannotReplayError), Recorder() as recorder:
        Replay(recorder, (a,), [constant])


def test_every_guide_is_told_once():
    for _ in range(2):
        reader = Model(lambda rows: X).reader()
        with pytest.warns(UserWarning, match="no argument") as caught:
            reader.read((), {})
            reader.read((), {})
        assert len(caught) == 1


# --- what helps where nothing can be traced


def kept_rows(x):
    kept = x[x[:, 0] >= 0]
    with pyro.plate("data", len(kept)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=kept)


def held_values(x):
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=HELD)


HELD = X.clone()


ADVICE = {
    "values": (
        lambda: avi.AmortizedGuide(held_values),
        "The observed values .* of plate 'data'",
        "inputs=",
        "create_plates=",
    ),
    "rows": (
        lambda: avi.AmortizedGuide(kept_rows),
        "The rows and observed values .* of plate 'data'",
        "create_plates=",
        None,
    ),
    "rows beside inputs": (
        lambda: avi.AmortizedGuide(kept_rows, inputs=lambda x: x[x[:, 0] >= 0]),
        "The rows of plate 'data'",
        "create_plates=",
        None,
    ),
    "rows of a constant guide": (
        lambda: avi.ConstantGuide(kept_rows),
        "The rows of plate 'data'",
        "arguments",
        "inputs=",
    ),
}


@pytest.mark.parametrize("name", ADVICE)
def test_the_advice_is_one_that_helps(name):
    make, what, helps, not_said = ADVICE[name]
    with pytest.warns(UserWarning) as caught:
        make().setup(X)
    (message,) = {str(warning.message) for warning in caught}
    assert re.search(what, message) and helps in message
    assert not_said is None or not_said not in message


def test_followed_advice_ends_the_warning():
    def inputs(x):
        return x[x[:, 0] >= 0]

    guide = avi.AmortizedGuide(kept_rows, inputs=inputs, create_plates=lambda x: pyro.plate("data", len(inputs(x))))
    assert guide.setup(X)(X)["z"].shape == (len(inputs(X)), 2)


@pytest.mark.filterwarnings("ignore:.*every latent is global:UserWarning")
def test_latents_are_named_where_there_is_no_plate():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc, 1.0 + (x.sum().item() > 0)).expand([N, 2]).to_event(2), obs=x)

    with pytest.warns(UserWarning, match=r"What masks and scales the latents \['loc'\] could not be traced"):
        avi.ConstantGuide(model).setup(X)
