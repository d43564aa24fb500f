"""Models as they come: each is found, its data stay, its guides run; and the best guide is as good as Pyro's own (slow)."""

import math
import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.cevae import Model
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import nn

import pyro_avi as avi
from gallery import Row, zoo
from gallery.zoo import cevae

PAGE = Path(__file__).resolve().parents[2] / "docs" / "zoo.md"
COLUMNS = ("constant", "amortized", "factorized", "pyro")


@pytest.mark.parametrize("name", zoo.names())
def test_every_guide_runs(name):
    outcome = zoo.solve(zoo.problem(name), num_steps=1, num_samples=2)
    assert tuple(outcome.rows) == COLUMNS
    for guide, row in outcome.rows.items():
        assert isinstance(row, Row), f"{guide}: {row}"
        assert math.isfinite(row.before) and math.isfinite(row.elbo), guide


@pytest.mark.parametrize("name", zoo.names())
def test_data_and_the_first_parameters_are_the_same_every_time(name):
    state = torch.get_rng_state()
    once, again = zoo.problem(name), zoo.problem(name)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, once.args, again.args))


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.names())
def test_the_best_of_three_guides_is_as_good_as_pyros_own(name):
    outcome = zoo.solve(zoo.problem(name))
    for guide, row in outcome.rows.items():
        assert isinstance(row, Row), f"{guide}: {row}"
        assert math.isfinite(row.elbo) and row.elbo > row.before, row
    best, own = outcome.best, outcome.rows["pyro"]
    # Precise enough to tell guides apart, then within two standard errors of the difference.
    error = math.hypot(best.se, own.se)
    assert error < 0.02 * abs(own.elbo) + 2, outcome
    assert best.elbo > own.elbo - 2 * error, outcome


def test_the_page_has_every_model():
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^\| (?!model )(\w+) \|", page, re.MULTILINE) == list(zoo.names())
    assert zoo.table({}) in page and "python -m gallery.zoo\n" in page
    assert len(zoo.names()) >= 12


@pytest.mark.parametrize("kind", [avi.ConstantGuide, avi.AmortizedGuide, avi.FactorizedGuide])
def test_features_handed_to_a_plate_are_not_taken_for_positions(kind):
    model, args = Model(cevae.CONFIG), cevae.data()
    with pytest.raises(ValueError, match="positions"):
        kind(model)(*args)
    assert kind(cevae.CEVAE(cevae.CONFIG))(*args)["z"].shape == (cevae.NUM_PERSONS, 3)


# --- the comparison itself


X = torch.tensor([0.5, -1.0, 2.0])


def conjugate(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Posterior(nn.Module):
    """The rows' posteriors, moved by ``shift``."""

    def __init__(self, shift):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x):
        pyro.module("posterior", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + self.shift, 0.5**0.5))


def toy(**options):
    fields = {
        "origin": "here",
        "rows": "3 rows",
        "make_model": lambda: conjugate,
        "args": (X,),
        "pyro_guide": "by hand",
        "make_pyro_guide": lambda model: Posterior(0.0),
        "num_steps": 1,
        "lr": 1e-9,
    }
    return zoo.Problem(**fields | options)


def test_the_exact_posterior_reaches_the_evidence():
    evidence = dist.Normal(0.0, 2**0.5).log_prob(X).sum().item()
    exact = zoo.solve(toy()).rows["pyro"]
    assert exact.elbo == pytest.approx(evidence, abs=1e-5) and exact.se < 1e-5
    # A mean that is off by .3 costs .3 ** 2 / (2 * .5) nats a row.
    off = zoo.solve(toy(make_pyro_guide=lambda model: Posterior(0.3)), num_samples=400).rows["pyro"]
    assert off.elbo == pytest.approx(evidence - 0.27, abs=4 * off.se)
    assert off.elbo < evidence - 4 * off.se


def test_a_guide_is_measured_with_its_own_parameters():
    def bare(model):
        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 0.5**0.5))

        return guide

    row = zoo.solve(toy(make_pyro_guide=bare, num_steps=300, lr=0.1)).rows["pyro"]
    assert row.elbo == pytest.approx(dist.Normal(0.0, 2**0.5).log_prob(X).sum().item(), abs=0.05)
    assert "loc" not in pyro.get_param_store()


def test_a_guide_that_diverges_or_refuses_leaves_its_sentence():
    def two_plates(x):
        conjugate(x)
        with pyro.plate("others", 2):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(w, 1.0), obs=torch.zeros(2))

    outcome = zoo.solve(toy(make_model=lambda: two_plates, make_pyro_guide=AutoNormal))
    assert isinstance(outcome.rows["constant"], str) and isinstance(outcome.rows["factorized"], Row)
    assert outcome.best is outcome.rows["factorized"]
    text = zoo.table({"toy": outcome})
    assert f"- *toy, constant*: {outcome.rows['constant']}" in text.splitlines()
    bound = f"{outcome.rows['pyro'].elbo:.1f} ± {outcome.rows['pyro'].se:.1f}"
    assert (
        f"| toy | none | none | {bound} | {bound} | by hand | 3 rows | 1 | 1e-09 | nothing | here |"
        in text.splitlines()
    )


def test_arguments_that_were_given_are_named():
    options = {"plate": "data", "init_loc_fn": init_to_value(values={})}
    given = toy(options=options, inputs=conjugate).given
    assert given == "`plate='data'`, `init_loc_fn=init_to_value`, `inputs=conjugate`"


def test_an_error_that_is_no_sentence_is_raised():
    with pytest.raises(RuntimeError, match="broken"):
        zoo.solve(toy(make_pyro_guide=broken))


def broken(model):
    raise RuntimeError("broken")
