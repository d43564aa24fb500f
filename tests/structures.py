"""Models of every structure that the guides promise to take, by name: what the contract test runs over.

Each has `ROWS` rows of tiny data. Plates of a dimension are written with it, values are indexed from the right, so that
every model also runs under plates of particles.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints, transforms
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyro_avi as avi

__all__ = ["ELBOS", "NEW_ROWS", "ROWS", "STRUCTURES", "ModelStructure"]

ROWS, NEW_ROWS = 8, 5

# The names of the ELBOs that a structure may exclude.
ELBOS = ("Trace_ELBO", "vectorized", "TraceMeanField_ELBO", "TraceGraph_ELBO", "TraceEnum_ELBO", "RenyiELBO")


@dataclass(frozen=True)
class ModelStructure:
    """A model, calls of it, and what is expected of a guide for it.

    Attributes:
        name: what is special about it, in words.
        make: makes the model.
        latents: the shape of every latent in a full-batch call, in the order of the model; enumerated ones left out.
        args, kwargs: a full-batch call.
        batches: calls with other rows, a smaller last one, each with the rows, ``None`` where the model draws them.
        new: a call with `NEW_ROWS` new rows.
        unobserved: a call without observations that samples them.
        local: the latents with a value for each row.
        options: arguments of all three guides.
        amortized: arguments of the amortized guide alone.
        row_sets: the plates of each row set, where there are several.
        discrete: the latents with a categorical factor.
        joint: whether joint families apply; they do not to masks of single elements.
        elbos: the ELBOs that apply.
        nesting: the number of plate dimensions.
        warning: what the guide warns of, where it reads the data by running the model again.
    """

    name: str
    make: Callable[[], Callable]
    latents: Mapping[str, tuple[int, ...]]
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    batches: tuple[tuple[tuple, torch.Tensor | None], ...] = ()
    new: tuple | None = None
    unobserved: tuple | None = None
    local: tuple[str, ...] = ("z",)
    options: Mapping[str, Any] = field(default_factory=dict)
    amortized: Mapping[str, Any] = field(default_factory=dict)
    row_sets: tuple[tuple[str, ...], ...] = ()
    discrete: tuple[str, ...] = ()
    joint: bool = True
    elbos: tuple[str, ...] = ELBOS
    nesting: int = 1
    warning: str | None = None


STRUCTURES: dict[str, ModelStructure] = {}


def add(name: str, model: Callable, latents: Mapping[str, tuple[int, ...]], args: tuple = (), **more) -> None:
    """Enter a structure; ``model`` is a function that is one for all tests."""
    add_made(name, lambda: model, latents, args, **more)


def add_made(name: str, make: Callable[[], Callable], latents, args: tuple = (), **more) -> None:
    """Enter a structure whose model has a state of its own, and is made for every test."""
    if name in STRUCTURES:
        raise ValueError(f"Expected structures of different names, got {name!r} twice.")
    STRUCTURES[name] = ModelStructure(name, make, latents, args, **more)


def without(*names: str) -> tuple[str, ...]:
    """All ELBOs but these."""
    return tuple(name for name in ELBOS if name not in names)


# --- data: no two rows alike

Y = torch.linspace(-1.0, 2.0, ROWS)
X = torch.stack([Y, Y**2 - 1], -1)
NEW_Y = torch.linspace(-0.5, 1.0, NEW_ROWS)
NEW_X = torch.stack([NEW_Y, -NEW_Y], -1)
TABLE = torch.stack([Y, -Y, Y**2], -1)
NEW_TABLE = torch.stack([NEW_Y, NEW_Y, NEW_Y**2], -1)
COUNTS = torch.arange(ROWS) % 4
INDICES = (torch.tensor([5, 0, 3]), torch.tensor([7, 1, 2]), torch.tensor([4, 6]))


def by_loader(*data) -> tuple:
    """Calls of a loader: rows of the data and their positions."""
    return tuple(((*(values[index] for values in data), index), index) for index in INDICES)


def whole_with_index(*data) -> tuple:
    """Calls with all data and the positions of the rows to work on."""
    return tuple(((*data, index), index) for index in INDICES)


def rows(x, index=None, dim=-1):
    """The plate of the rows: all that are given, or those of a loader."""
    return pyro.plate("data", ROWS if x is None or index is not None else len(x), subsample=index, dim=dim)


def normal(*shape):
    """A standard normal event."""
    return dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))


Z, Z2 = {"z": (ROWS,)}, {"z": (ROWS, 2)}
ROWS_OF_Y = dict(batches=by_loader(Y), new=(NEW_Y,), unobserved=(None,))
ROWS_OF_X = dict(batches=by_loader(X), new=(NEW_X,), unobserved=(None,))
ROWS_OF_TABLE = dict(batches=by_loader(TABLE), new=(NEW_TABLE,), unobserved=(None,))


# --- what a model may be


def scalar(x=None, index=None):
    with rows(x, index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


add("function", scalar, Z, (Y,), **ROWS_OF_Y)


def with_noise(scale):
    def model(x=None, index=None):
        with rows(x, index):
            z = pyro.sample("z", normal(2))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    return model


add_made("closure", lambda: with_noise(0.5), Z2, (X,), **ROWS_OF_X)


class Bound:
    """A model that is a method, with a parameter of its own and arguments by keyword."""

    def __init__(self):
        self.scale = 0.5

    def run(self, *, x=None, index=None):
        bias = pyro.param("bias", torch.tensor(0.3))
        with rows(x, index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + bias, self.scale), obs=x)


add_made("bound method", lambda: Bound().run, Z, kwargs={"x": Y})


class Module(PyroModule):
    """Parameters of its own, plain and Pyro's, and a prior on the weights of a submodule: a site name with a dot."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 2)
        nn.init.eye_(self.linear.weight)
        self.linear.bias = PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))
        self.scale = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    def forward(self, x=None, index=None):
        bias = self.linear.bias
        with rows(x, index):
            z = pyro.sample("z", normal(2))
            loc = z @ self.linear.weight.T + bias
            pyro.sample("x", dist.Normal(loc, self.scale).to_event(1), obs=x)


add_made("PyroModule with parameters", Module, {"linear.bias": (2,), **Z2}, (X,), **ROWS_OF_X)


def vae():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return avi.models.VAE(avi.models.DenseDecoder(2, (4,), (2,)), size=ROWS)


add_made("variational autoencoder", vae, Z2, (X,), batches=by_loader(X), unobserved=())


def dotted(x=None, index=None):
    shift = pyro.sample("global.loc", dist.Normal(0.0, 1.0))
    with rows(x, index):
        z = pyro.sample("local.z", dist.Normal(0.0, 1.0))
        pyro.sample("x.1", dist.Normal(z + shift, 0.5), obs=x)


add("names with dots", dotted, {"global.loc": (), "local.z": (ROWS,)}, (Y,), local=("local.z",), **ROWS_OF_Y)


# --- latents of a row


def several(x=None, index=None):
    with rows(x, index):
        z = pyro.sample("z", normal(2))
        w = pyro.sample("w", dist.Normal(0.5, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        pyro.sample("x", dist.Normal(z + w[..., None], scale[..., None]).to_event(1), obs=x)


add(
    "several latents",
    several,
    {"z": (ROWS, 2), "w": (ROWS,), "scale": (ROWS,)},
    (X,),
    local=("z", "w", "scale"),
    **ROWS_OF_X,
)


def chain(x=None, index=None):
    with rows(x, index):
        z = pyro.sample("z", normal(2))
        w = pyro.sample("w", dist.Normal(z.sum(-1), 0.3))
        rate = pyro.sample("rate", dist.LogNormal(0.2 * w, 0.5))
        pyro.sample("x", dist.Normal(w, rate), obs=x)


add(
    "latents that depend on one another",
    chain,
    {"z": (ROWS, 2), "w": (ROWS,), "rate": (ROWS,)},
    (Y,),
    local=("z", "w", "rate"),
    **ROWS_OF_Y,
)


def vector(x=None, index=None):
    with rows(x, index):
        z = pyro.sample("z", normal(3))
        pyro.sample("x", dist.Normal(z[..., :2] * z[..., 2:], 0.5).to_event(1), obs=x)


add("vector event", vector, {"z": (ROWS, 3)}, (X,), **ROWS_OF_X)


def matrix(x=None, index=None):
    with rows(x, index):
        z = pyro.sample("z", normal(2, 3))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.5).to_event(1), obs=x)


add("matrix event", matrix, {"z": (ROWS, 2, 3)}, (X,), **ROWS_OF_X)


def positive(x=None, index=None):
    with rows(x, index):
        one = pyro.sample("one", dist.LogNormal(0.0, 0.5))
        two = pyro.sample("two", dist.Gamma(torch.full((2,), 2.0), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(one - two.sum(-1), 0.5), obs=x)


add(
    "positive numbers",
    positive,
    {"one": (ROWS,), "two": (ROWS, 2)},
    (Y,),
    local=("one", "two"),
    **ROWS_OF_Y,
)


def shares(x=None, index=None):
    with rows(x, index):
        z = pyro.sample("z", dist.Beta(2.0, 3.0))
        pyro.sample("x", dist.Normal(4 * z - 1, 0.5), obs=x)


add("unit interval", shares, Z, (Y,), **ROWS_OF_Y)


def simplex(x=None, index=None):
    with rows(x, index):
        z = pyro.sample("z", dist.Dirichlet(torch.full((3,), 2.0)))
        pyro.sample("x", dist.Normal(z @ torch.arange(3.0), 0.5), obs=x)


add("simplex", simplex, {"z": (ROWS, 3)}, (Y,), **ROWS_OF_Y)


def correlations(x=None, index=None):
    with rows(x, index):
        z = pyro.sample("z", dist.LKJCholesky(3, 2.0))
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=z), obs=x)


add("Cholesky factor of a correlation matrix", correlations, {"z": (ROWS, 3, 3)}, (TABLE,), **ROWS_OF_TABLE)


def ordered(x=None, index=None):
    with rows(x, index):
        z = pyro.sample("z", dist.TransformedDistribution(normal(3), [transforms.OrderedTransform()]))
        pyro.sample("x", dist.Normal(z[..., 1:], 0.5).to_event(1), obs=x)


add("ordered vector", ordered, {"z": (ROWS, 3)}, (X,), **ROWS_OF_X)


def intervals(x=None, index=None):
    with rows(x, index):
        z = pyro.sample("z", dist.Uniform(-2.0, 3.0))
        bound = pyro.sample("bound", dist.Pareto(torch.tensor(1.0), torch.tensor(3.0)))
        pyro.sample("x", dist.Normal(z, bound), obs=x)


add(
    "interval and half-line",
    intervals,
    {"z": (ROWS,), "bound": (ROWS,)},
    (Y,),
    local=("z", "bound"),
    **ROWS_OF_Y,
)


def labelled(x=None, index=None):
    locs = torch.tensor([-1.0, 0.0, 2.0])
    with rows(x, index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        label = pyro.sample("label", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("x", dist.Normal(z + locs[label], 0.5), obs=x)


add(
    "discrete latent",
    labelled,
    {"z": (ROWS,), "label": (ROWS,)},
    (Y,),
    local=("z", "label"),
    discrete=("label",),
    # It takes reparameterized guides only.
    elbos=without("TraceMeanField_ELBO"),
    **ROWS_OF_Y,
)


def one_hot(x=None, index=None):
    with rows(x, index):
        label = pyro.sample("label", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        z = pyro.sample("z", normal(2))
        pyro.sample("x", dist.Normal(z.sum(-1) + label @ torch.tensor([-1.0, 0.0, 2.0]), 0.5), obs=x)


add(
    "one-hot latent",
    one_hot,
    {"label": (ROWS, 3), "z": (ROWS, 2)},
    (Y,),
    local=("label", "z"),
    discrete=("label",),
    elbos=without("TraceMeanField_ELBO"),
    **ROWS_OF_Y,
)


def switches(x=None, index=None):
    with rows(x, index):
        on = pyro.sample("on", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
        z = pyro.sample("z", normal(2))
        pyro.sample("x", dist.Normal(on * z, 0.5).to_event(1), obs=x)


add(
    "binary vector",
    switches,
    {"on": (ROWS, 2), "z": (ROWS, 2)},
    (X,),
    local=("on", "z"),
    discrete=("on",),
    elbos=without("TraceMeanField_ELBO"),
    **ROWS_OF_X,
)


def semi_supervised(x, label, known, index=None):
    with rows(x, index):
        label = pyro.sample("label", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])), obs=label, obs_mask=known)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + torch.tensor([-1.0, 0.0, 2.0])[label], 0.5), obs=x)


LABELS, KNOWN = torch.arange(ROWS) % 3, torch.arange(ROWS) % 2 > 0

add(
    "labels of some rows, obs_mask",
    semi_supervised,
    {"label_unobserved": (ROWS,), "z": (ROWS,)},
    (Y, LABELS, KNOWN),
    local=("label_unobserved", "z"),
    discrete=("label_unobserved",),
    elbos=without("TraceMeanField_ELBO"),
    batches=by_loader(Y, LABELS, KNOWN),
    new=(NEW_Y, LABELS[:NEW_ROWS], KNOWN[:NEW_ROWS]),
)


def two_peaks(x=None, index=None):
    weights = dist.Categorical(torch.tensor([0.3, 0.7]))
    with rows(x, index):
        z = pyro.sample("z", dist.MixtureSameFamily(weights, dist.Normal(torch.tensor([-1.0, 1.0]), 0.4)))
        rate = pyro.sample("rate", dist.MixtureSameFamily(weights, dist.Gamma(torch.tensor([2.0, 9.0]), 3.0)))
        pyro.sample("x", dist.Normal(z, rate), obs=x)


add(
    "mixture as the prior of a row",
    two_peaks,
    {"z": (ROWS,), "rate": (ROWS,)},
    (Y,),
    local=("z", "rate"),
    **ROWS_OF_Y,
)


def mixture(x=None, index=None):
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 2.0))
    with rows(x, index):
        z = pyro.sample("z", dist.Normal(0.0, 0.5))
        label = pyro.sample("label", dist.Categorical(torch.tensor([0.4, 0.6])), infer={"enumerate": "parallel"})
        # By hand: `locs` has dimensions of particles and of Predictive before its own.
        loc = torch.where(label == 0, locs[..., :1], locs[..., 1:])
        pyro.sample("x", dist.Normal(z + loc, 0.5), obs=x)


add(
    "enumerated latent",
    mixture,
    {"locs": (2,), "z": (ROWS,)},
    (Y,),
    elbos=("TraceEnum_ELBO",),
    **ROWS_OF_Y,
)


# --- global latents alongside


def shared(x=None, index=None):
    loc = pyro.sample("loc", normal(2))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with rows(x, index):
        z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, scale[..., None]).to_event(1), obs=x)


add("global latents", shared, {"loc": (2,), "scale": (), **Z2}, (X,), **ROWS_OF_X)


def features(x=None, index=None):
    with pyro.plate("features", 2):
        weight = pyro.sample("weight", dist.Normal(1.0, 0.5))
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
    with rows(x, index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        # The rows' dimension comes before that of the plate, which is an event's here, particles' before both.
        loc, scale = z[..., None] * weight[..., None, :], rate[..., None, :]
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


add("global latents in a plate of their own", features, {"weight": (2,), "rate": (2,), **Z}, (X,), **ROWS_OF_X)


# --- plates


def slots(x=None, index=None):
    with rows(x, index, dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
        with pyro.plate("slots", 3, dim=-1):
            w = pyro.sample("w", dist.Normal(z, 0.5))
        pyro.sample("x", dist.Normal(w.sum(-1, keepdim=True), 0.5), obs=x)


COLUMN, NEW_COLUMN = Y[:, None], NEW_Y[:, None]

add(
    "fixed plate inside the rows'",
    slots,
    {"z": (ROWS, 1), "w": (ROWS, 3)},
    (COLUMN,),
    local=("z", "w"),
    batches=by_loader(COLUMN),
    new=(NEW_COLUMN,),
    unobserved=(None,),
    nesting=2,
)


def repeated(x=None, index=None):
    with rows(x, index, dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
        with pyro.plate("repeats", 3, dim=-1):
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)


add("inner plate of observations", repeated, {"z": (ROWS, 1)}, (TABLE,), nesting=2, **ROWS_OF_TABLE)


def nested(x=None, index=None):
    size = ROWS if x is None or index is not None else len(x)
    with pyro.plate("outer", size, subsample=index, dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
        with pyro.plate("inner", 3, dim=-1):
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 0.5), obs=x)


NESTED = {"z": (ROWS, 1), "w": (ROWS, 3)}

add(
    "nested plates, one row set",
    nested,
    NESTED,
    (TABLE,),
    local=("z", "w"),
    options={"plate": "outer"},
    nesting=2,
    **ROWS_OF_TABLE,
)
add(
    "nested plates, two row sets",
    nested,
    NESTED,
    (TABLE,),
    local=("z", "w"),
    options={"plate": ("outer", "inner")},
    row_sets=(("outer",), ("outer", "inner")),
    nesting=2,
    **ROWS_OF_TABLE,
)


def responses(x=None, index=None):
    size = ROWS if x is None or index is not None else len(x)
    people, items = pyro.plate("persons", size, subsample=index, dim=-2), pyro.plate("items", 3, dim=-1)
    with people:
        ability = pyro.sample("ability", dist.Normal(torch.zeros(1), 1.0))
    with items:
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
    with people, items:
        pyro.sample("x", dist.Bernoulli(logits=ability - difficulty), obs=x)


ANSWERS = (TABLE > 0.3).float()
NEW_ANSWERS = (NEW_TABLE > 0.3).float()
RESPONSES = {"ability": (ROWS, 1), "difficulty": (3,)}

add(
    "crossed plates, two row sets",
    responses,
    RESPONSES,
    (ANSWERS,),
    local=("ability", "difficulty"),
    options={"plate": ("persons", "items")},
    row_sets=(("persons",), ("items",)),
    unobserved=(None,),
    nesting=2,
)
add(
    "crossed plates, one of them",
    responses,
    RESPONSES,
    (ANSWERS,),
    local=("ability",),
    options={"plate": "persons"},
    batches=by_loader(ANSWERS),
    new=(NEW_ANSWERS,),
    unobserved=(None,),
    nesting=2,
)


# --- rows of a call


def drawn(x, size=None):
    with pyro.plate("data", len(x), subsample_size=size) as index:
        z = pyro.sample("z", normal(2))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x[index])


DRAWN = (((X, 3), None), ((X, 2), None))

add("rows drawn by the model", drawn, Z2, (X,), batches=DRAWN, new=(NEW_X,))


def drawn_by_statement(x, size=None):
    with pyro.plate("data", len(x), subsample_size=size):
        z = pyro.sample("z", normal(2))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=pyro.subsample(x, event_dim=1))


add("rows drawn, pyro.subsample", drawn_by_statement, Z2, (X,), batches=DRAWN, new=(NEW_X,))


def whole_data(x, index=None):
    with pyro.plate("data", len(x), subsample=index) as batch:
        z = pyro.sample("z", normal(2))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x[batch])


add("rows given, data whole", whole_data, Z2, (X,), batches=whole_with_index(X), new=(NEW_X,))


def given_by_statement(x, index=None):
    with pyro.plate("data", len(x), subsample=index):
        z = pyro.sample("z", normal(2))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=pyro.subsample(x, event_dim=1))


add("rows given, pyro.subsample", given_by_statement, Z2, (X,), batches=whole_with_index(X), new=(NEW_X,))


# --- masks, scales, factors, other sites


def masked(x, present, index=None):
    with rows(x, index, dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
        with pyro.plate("times", 3, dim=-1), poutine.mask(mask=present):
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)


PRESENT = torch.arange(3 * ROWS).reshape(ROWS, 3) % 4 > 0
NEW_PRESENT = PRESENT[:NEW_ROWS].flip(0)

add(
    "masked observations",
    masked,
    {"z": (ROWS, 1)},
    (TABLE, PRESENT),
    batches=by_loader(TABLE, PRESENT),
    new=(NEW_TABLE, NEW_PRESENT),
    nesting=2,
)


def missing(x, present, index=None):
    with rows(x, index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x, obs_mask=present)


SEEN = torch.arange(ROWS) % 3 > 0

add(
    "missing observations, obs_mask",
    missing,
    # The missing ones are latents of the model, masked where the value is there.
    {"z": (ROWS,), "x_unobserved": (ROWS,)},
    (Y, SEEN),
    local=("z", "x_unobserved"),
    batches=by_loader(Y, SEEN),
    new=(NEW_Y, SEEN[:NEW_ROWS]),
    joint=False,
)


def padded(x, lengths, index=None):
    with rows(x, index, dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
        with pyro.plate("times", 3, dim=-1), poutine.mask(mask=torch.arange(3) < lengths):
            w = pyro.sample("w", dist.Normal(z, 0.5))
            pyro.sample("x", dist.Normal(w, 0.5), obs=x)


LENGTHS = 1 + torch.arange(ROWS)[:, None] % 3
PADDED = dict(
    local=("z", "w"),
    batches=by_loader(TABLE, LENGTHS),
    new=(NEW_TABLE, LENGTHS[:NEW_ROWS]),
    nesting=2,
)

add(
    "masked latents, one row set",
    padded,
    {"z": (ROWS, 1), "w": (ROWS, 3)},
    (TABLE, LENGTHS),
    options={"plate": "data"},
    joint=False,
    **PADDED,
)
add(
    "masked latents, two row sets",
    padded,
    {"z": (ROWS, 1), "w": (ROWS, 3)},
    (TABLE, LENGTHS),
    options={"plate": ("data", "times")},
    # The mask is of whole rows of the inner row set.
    row_sets=(("data",), ("data", "times")),
    **PADDED,
)


def masked_rows(x, valid, index=None):
    with rows(x, index), poutine.mask(mask=valid):
        z = pyro.sample("z", normal(2))
        w = pyro.sample("w", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, w[..., None]).to_event(1), obs=x)


add(
    "masked rows",
    masked_rows,
    {"z": (ROWS, 2), "w": (ROWS,)},
    (X, SEEN),
    local=("z", "w"),
    batches=by_loader(X, SEEN),
    new=(NEW_X, SEEN[:NEW_ROWS]),
)


def masked_inside(x, present, index=None):
    with rows(x, index):
        z = pyro.sample("z", dist.Normal(torch.zeros(x.shape), 1.0).mask(present).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).mask(present).to_event(1), obs=x)


add(
    "rows masked inside events",
    masked_inside,
    {"z": (ROWS, 3)},
    (TABLE, SEEN[:, None]),
    batches=by_loader(TABLE, SEEN[:, None]),
    new=(NEW_TABLE, SEEN[:NEW_ROWS, None]),
)
add(
    "elements masked inside events",
    masked_inside,
    {"z": (ROWS, 3)},
    (TABLE, PRESENT),
    batches=by_loader(TABLE, PRESENT),
    new=(NEW_TABLE, NEW_PRESENT),
    joint=False,
)


def annealed(x, weight, index=None):
    with poutine.scale(scale=weight):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with rows(x, index):
        with poutine.scale(scale=weight):
            z = pyro.sample("z", normal(2))
        pyro.sample("x", dist.Normal(z, scale[..., None]).to_event(1), obs=x)


add(
    "annealed prior",
    annealed,
    {"scale": (), **Z2},
    (X, torch.tensor(0.25)),
    batches=tuple(((x, torch.tensor(0.5), index), index) for (x, index), _ in by_loader(X)),
    new=(NEW_X, torch.tensor(1.0)),
    unobserved=(None, torch.tensor(1.0)),
)


def factored(x=None, index=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.factor("outside", -(loc**2))
    with rows(x, index):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.factor("inside", -0.1 * z**4)
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


add("factors in and out of the plate", factored, {"loc": (), **Z}, (Y,), **ROWS_OF_Y)


def computed(x=None, index=None):
    loc = pyro.deterministic("loc", pyro.sample("theta", dist.Normal(0.0, 1.0)).exp())
    with rows(x, index):
        z = pyro.deterministic("z", loc * pyro.sample("raw", dist.Normal(0.0, 1.0)))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


add("deterministic sites", computed, {"theta": (), "raw": (ROWS,)}, (Y,), local=("raw",), **ROWS_OF_Y)


# --- observations


def counts(x=None, index=None):
    with rows(x, index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Poisson(z.exp()), obs=x)


add("counts", counts, Z, (COUNTS,), batches=by_loader(COUNTS), new=(COUNTS[:NEW_ROWS],), unobserved=(None,))


def mixed(number=None, label=None, image=None, index=None):
    with rows(number, index):
        z = pyro.sample("z", normal(2))
        pyro.sample("number", dist.Poisson(z[..., 0].exp()), obs=number)
        logits = torch.stack([z[..., 0], z[..., 1], -z[..., 0]], -1)
        pyro.sample("label", dist.Categorical(logits=logits), obs=label)
        loc = z[..., 1, None, None].expand(z.shape[:-1] + (2, 2))
        pyro.sample("image", dist.Normal(loc, 1.0).to_event(2), obs=None if image is None else image.float() / 255)


MIXED = (COUNTS, torch.arange(ROWS) % 3, (60 * torch.arange(4 * ROWS) % 256).to(torch.uint8).reshape(ROWS, 2, 2))

add(
    "observations of several dtypes",
    mixed,
    Z2,
    MIXED,
    batches=by_loader(*MIXED),
    new=tuple(values[:NEW_ROWS] for values in MIXED),
    unobserved=(),
)


def fields(batch, index=None):
    with rows(batch["x"], index):
        z = pyro.sample("z", normal(2))
        pyro.sample("x", dist.Normal(z, batch["scale"][..., None]).to_event(1), obs=batch["x"])


def read_fields(batch, index=None):
    return torch.cat([batch["x"], batch["scale"][:, None]], -1)


SCALES = 0.5 + torch.arange(ROWS) / ROWS

add(
    "observations in a dictionary",
    fields,
    Z2,
    ({"x": X, "scale": SCALES},),
    batches=tuple((({"x": X[index], "scale": SCALES[index]}, index), index) for index in INDICES),
    new=({"x": NEW_X, "scale": SCALES[:NEW_ROWS]},),
    amortized={"inputs": read_fields},
)


def with_data(x):
    def model():
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(2))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    return model


add_made("data of a closure", lambda: with_data(X), Z2, warning="could not be traced to the model's arguments")
