"""Discrete latents: enumerated by the model, or with a categorical factor in the guide."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from tests.measured.exact import array, integral_2d, log_normal, mixed
from tests.measured.rows import NOISE
from tests.measured.structure import DISCRETE, TIED, add

__all__ = ["LOCS", "SUM_OUT", "component"]

ROWS = 3
X = torch.tensor([-1.5, 0.3, 2.0])
SUM_OUT = {"enumerate": "parallel"}
PROBS, LOCS = [0.3, 0.7], [-1.5, 1.0]
WIDE = math.hypot(1.0, NOISE)


def of_components(x):
    return mixed([log_normal(x, loc, WIDE) for loc in LOCS], PROBS)


def component(label):
    """The location of a label, which may have dimensions of its enumeration."""
    return torch.where(label > 0, LOCS[1], LOCS[0])


def labelled(infer):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            label = pyro.sample("label", dist.Categorical(torch.tensor(PROBS)), infer=infer)
            pyro.sample("x", dist.Normal(z + component(label), NOISE), obs=x)

    return model


SAMPLED = dict(brute_force="wide", num_samples=800, refused=DISCRETE)

add(
    "an enumerated label beside a normal",
    labelled(SUM_OUT),
    (X,),
    of_components(array(X)),
    brute_force="wide",
)
add("a label beside a normal", labelled({}), (X,), of_components(array(X)), **SAMPLED)


def labels_alone(x):
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(torch.zeros(()), 2.0))
    with pyro.plate("data", len(x)):
        label = pyro.sample("label", dist.Categorical(torch.tensor(PROBS)), infer=SUM_OUT)
        loc = torch.where(label > 0, locs[..., 1:], locs[..., :1])
        pyro.sample("x", dist.Normal(loc, NOISE), obs=x)


def of_labels(a, b):
    return sum(mixed([log_normal(x, a, NOISE), log_normal(x, b, NOISE)], PROBS) for x in array(X))


add(
    "enumerated labels and no other latent in the rows",
    labels_alone,
    (X,),
    integral_2d(lambda a, b: log_normal(a, 0, 2) + log_normal(b, 0, 2) + of_labels(*np.broadcast_arrays(a, b))),
    blocks=(0,),
    warning="(?s)",
    brute_force="wide",
    num_samples=800,
)


def regime(x):
    state = pyro.sample("state", dist.Bernoulli(torch.tensor(0.3)), infer=SUM_OUT)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z + component(state), NOISE), obs=x)


add(
    "an enumerated latent of all rows",
    regime,
    (X,),
    mixed([log_normal(array(X), loc, WIDE).sum() for loc in LOCS], [0.7, 0.3]),
    blocks=(0,) * ROWS,
    refused=TIED,
    brute_force="wide",
)


def bernoulli(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        on = pyro.sample("on", dist.Bernoulli(torch.tensor(0.7)))
        pyro.sample("x", dist.Normal(z + component(on), NOISE), obs=x)


add("a switch beside a normal", bernoulli, (X,), of_components(array(X)), **SAMPLED)


def one_hot(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        label = pyro.sample("label", dist.OneHotCategorical(torch.tensor(PROBS)))
        pyro.sample("x", dist.Normal(z + label @ torch.tensor(LOCS), NOISE), obs=x)


add("a one-hot label beside a normal", one_hot, (X,), of_components(array(X)), **SAMPLED)


def switches(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        on = pyro.sample("on", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
        pyro.sample("x", dist.Normal(z + on @ torch.tensor([-2.0, 1.0]), NOISE), obs=x)


def of_switches(x):
    cases = [(0.0, 0.7 * 0.4), (-2.0, 0.3 * 0.4), (1.0, 0.7 * 0.6), (-1.0, 0.3 * 0.6)]
    return mixed([log_normal(x, loc, WIDE) for loc, _ in cases], [probability for _, probability in cases])


def switches_apart(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        one, two = (pyro.sample(f"on_{i}", dist.Bernoulli(torch.tensor(p))) for i, p in enumerate((0.3, 0.6)))
        pyro.sample("x", dist.Normal(z - 2 * one + two, NOISE), obs=x)


add("a binary vector beside a normal", switches, (X,), of_switches(array(X)), restated=switches_apart, **SAMPLED)


def labels_without_normal(x):
    with pyro.plate("data", len(x)):
        label = pyro.sample("label", dist.Categorical(torch.tensor(PROBS)))
        pyro.sample("x", dist.Normal(component(label), 1.0), obs=x)


add(
    "a label alone",
    labels_without_normal,
    (X,),
    mixed([log_normal(array(X), loc, 1.0) for loc in LOCS], PROBS),
    refused=DISCRETE,
    brute_force=None,
)

KNOWN = torch.arange(ROWS) % 2 == 0
LABELS = torch.tensor([0, 1, 1])


def partly_labelled(x, labels, known):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        fn = dist.Categorical(torch.tensor(PROBS))
        label = pyro.sample("label", fn, obs=labels, obs_mask=known, infer=SUM_OUT)
        pyro.sample("x", dist.Normal(z + component(label), NOISE), obs=x)


def partly_masked(x, labels, known):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        label = pyro.sample("label", dist.Categorical(torch.tensor(PROBS)))
        # What is known has probability 0 of being otherwise.
        pyro.factor("known", torch.where(known & (label != labels), -1e3, 0.0))
        pyro.sample("x", dist.Normal(z + component(label), NOISE), obs=x)


def of_known(x, label):
    return math.log(PROBS[label]) + log_normal(x, LOCS[label], WIDE)


add(
    "labels known in some rows",
    partly_labelled,
    (X, LABELS, KNOWN),
    [
        of_known(x, label) if known else of_components(x)
        for x, label, known in zip(array(X), LABELS.tolist(), KNOWN.tolist(), strict=True)
    ],
    restated=partly_masked,
    **{**SAMPLED, "refused": {**DISCRETE, "sbc": "(?s)draws follow its density.*mask"}},
)
