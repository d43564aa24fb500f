"""The guide's rows are the model's rows: in minibatches of every origin, for new data, in predictions."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList
from torch import nn

import pyro_avi as avi

N = 8
# A row's value is its number.
X = torch.arange(float(N))[:, None]
INDEX = torch.tensor([5, 0, 3])


def given(x, index=None):
    with pyro.plate("data", N, subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 10.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)


def given_whole(x, index=None):
    with pyro.plate("data", N, subsample=index) as rows:
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 10.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x[rows])


def given_in_bytes(x, index=None):
    with pyro.plate("data", N, subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 10.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x.flip(0).flip(0).byte().float())


def drawn(x):
    with pyro.plate("data", N, subsample_size=3) as rows:
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 10.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x[rows])


def drawn_by_statement(x):
    with pyro.plate("data", N, subsample_size=3):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 10.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=pyro.subsample(x, event_dim=1))


def open_ended(x, index=None):
    with pyro.plate("data", len(x) if index is None else N, subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 10.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)


def batches(whole):
    for index in (INDEX, torch.tensor([7, 1, 2]), torch.tensor([4, 6])):
        yield (X if whole else X[index]), index
    yield (X,)


# (model, calls): minibatches, a smaller last one, the full batch after them.
CALLS = {
    "rows given": (given, list(batches(False))),
    "rows given, data whole": (given_whole, list(batches(True))[:3]),
    "rows given, values cast": (given_in_bytes, list(batches(False))),
    "rows drawn": (drawn, [(X,)] * 4),
    "rows drawn, pyro.subsample": (drawn_by_statement, [(X,)] * 4),
    "first the full batch": (given, list(batches(False))[::-1]),
}

GUIDES = {
    "ConstantGuide": avi.ConstantGuide,
    "AmortizedGuide": lambda model, **kwargs: avi.AmortizedGuide(model, nn.Identity(), **kwargs),
    "FactorizedGuide": avi.FactorizedGuide,
}


@torch.no_grad()
def point_at_rows(guide):
    """Make the guide put the latent of every row near the number of the row."""
    if isinstance(guide, avi.FactorizedGuide):
        guide.table[:, 0] = torch.arange(N)
        guide.table[:, 1] = -7.0
    else:
        guide.head.weight.copy_(torch.tensor([[1.0], [0.0]]))
        guide.head.bias.copy_(torch.tensor([0.0, -7.0]))


def pair(model, guide, args):
    guide_trace = poutine.trace(guide).get_trace(*args)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    return model_trace.nodes["z"], model_trace.nodes["x"]


def same_rows(model, guide, args):
    z, x = pair(model, guide, args)
    return z["value"].shape == x["value"].shape and bool((z["value"] - x["value"]).abs().max() < 0.1)


@pytest.mark.parametrize("kind", ["AmortizedGuide", "FactorizedGuide"])
@pytest.mark.parametrize("name", CALLS)
def test_the_guides_rows_are_the_models(kind, name):
    model, calls = CALLS[name]
    guide = GUIDES[kind](model).setup(*calls[0])
    point_at_rows(guide)

    assert all(same_rows(model, guide, args) for args in calls)


def test_rows_that_are_not_the_models_are_seen():
    def shifted(x, index=None):
        with pyro.plate("data", N, subsample=index):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 10.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x.roll(1, 0))

    guide = avi.FactorizedGuide(shifted).setup(X)
    point_at_rows(guide)

    assert not same_rows(shifted, guide, (X[INDEX], INDEX))


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("name", CALLS)
def test_minibatches_are_scaled(kind, name):
    model, calls = CALLS[name]
    guide = GUIDES[kind](model).setup(*calls[0])

    for args in calls:
        trace = poutine.trace(guide).get_trace(*args)
        site = trace.nodes["z"]
        (frame,) = site["cond_indep_stack"]
        assert float(site["scale"]) == N / frame.size
        model_site, _ = pair(model, guide, args)
        assert frame == model_site["cond_indep_stack"][0]


@pytest.mark.parametrize("name", ["rows drawn", "rows drawn, pyro.subsample"])
def test_drawn_rows_are_different_ones_without_repetition(name):
    model, calls = CALLS[name]
    guide = avi.FactorizedGuide(model).setup(*calls[0])

    draws = [poutine.trace(guide).get_trace(X).nodes["data"]["value"] for _ in range(30)]

    assert all(len(set(rows.tolist())) == 3 for rows in draws)
    assert {row for rows in draws for row in rows.tolist()} == set(range(N))


@pytest.mark.parametrize("kind", ["AmortizedGuide", "FactorizedGuide"])
def test_predictions_keep_latents_and_data_together(kind):
    guide = GUIDES[kind](drawn).setup(X)
    point_at_rows(guide)

    draws = Predictive(drawn, guide=guide, num_samples=6, return_sites=["z", "x"])(X)

    assert draws["z"].shape == draws["x"].shape == (6, 3, 1)
    assert (draws["z"] - draws["x"]).abs().max() < 0.1
    assert (draws["x"] != draws["x"][0]).any()


def drawn_beside_globals(x):
    with pyro.plate("features", 2, dim=-1):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0))
    with pyro.plate("data", N, subsample_size=3, dim=-2) as rows:
        z = pyro.sample("z", dist.Normal(torch.zeros(1, 1), 10.0))
        pyro.sample("x", dist.Normal(z + w.sum(-1, keepdim=True), 0.1), obs=x[rows])


def test_predictions_with_plates_of_more_dimensions():
    guide = avi.FactorizedGuide(drawn_beside_globals).setup(X)
    point_at_rows(guide)

    draws = Predictive(drawn_beside_globals, guide=guide, num_samples=4, return_sites=["z", "x"])(X)

    assert (draws["z"] - draws["x"]).abs().max() < 0.1


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, RenyiELBO])
@pytest.mark.parametrize("kind", GUIDES)
def test_every_elbo_takes_drawn_rows(kind, elbo):
    guide = GUIDES[kind](drawn_beside_globals)
    svi = SVI(drawn_beside_globals, guide, pyro.optim.Adam({"lr": 1e-3}), elbo(num_particles=2))

    assert torch.tensor([svi.step(X) for _ in range(2)]).isfinite().all()


@pytest.mark.parametrize("kind", GUIDES)
def test_where_the_model_draws_its_rows_answers_are_for_all(kind):
    guide = GUIDES[kind](drawn).setup(X)

    assert guide.median(X)["z"].shape == (N, 1)
    assert guide.quantiles([0.1, 0.9], X)["z"].shape == (2, N, 1)
    assert guide.variational_parameters(X).shape == (N, 2)


@pytest.mark.parametrize("kind", GUIDES)
def test_training_by_loader_keeps_rows_together(kind):
    guide = GUIDES[kind](given).setup(X[INDEX], INDEX)
    svi = SVI(given, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    loader = avi.minibatches(X, batch_size=3)

    for _ in range(200):
        svi.step(*next(loader))

    means = guide.median(X)["z"][:, 0]
    if kind == "ConstantGuide":
        assert (means == means[0]).all()
    else:
        assert torch.corrcoef(torch.stack([means, X[:, 0]]))[0, 1] > 0.99


@pytest.mark.parametrize("kind", ["ConstantGuide", "AmortizedGuide"])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_new_rows_of_any_number(kind, count):
    guide = GUIDES[kind](open_ended).setup(X)

    new = 100 + torch.rand(count, 1)
    assert guide(new)["z"].shape == (count, 1)
    assert guide.posterior(new).batch_shape == (count,)
    if kind == "AmortizedGuide":
        point_at_rows(guide)
        torch.testing.assert_close(guide.median(new)["z"], new)


def test_a_factorized_guide_says_what_to_do_with_other_rows():
    guide = avi.FactorizedGuide(open_ended).setup(X)

    with pytest.raises(ValueError) as error:
        guide(X[:7])

    assert str(error.value).splitlines() == [
        'Expected all 8 rows of plate "data", got 7.',
        "A FactorizedGuide has one row of parameters for each row it was fitted to.",
        "Try one of the following fixes:",
        "- for a minibatch, pass the positions of its rows, or let the model subsample its plate",
        "- for held-out rows: avi.refine(model, guide, x_new, num_steps=...)",
    ]


def test_inputs_of_the_call_and_of_all_rows():
    guide = avi.AmortizedGuide(given, nn.Identity(), inputs=lambda x, index=None: x).setup(X[INDEX], INDEX)
    point_at_rows(guide)
    assert same_rows(given, guide, (X[INDEX], INDEX))

    guide = avi.AmortizedGuide(drawn, nn.Identity(), inputs=lambda x: x).setup(X)
    point_at_rows(guide)
    assert same_rows(drawn, guide, (X,))


@pytest.mark.parametrize("kind", ["AmortizedGuide", "FactorizedGuide"])
def test_plates_may_be_created_by_the_caller(kind):
    def plates(x, index=None):
        return pyro.plate("data", N, subsample=index)

    guide = GUIDES[kind](given, create_plates=plates).setup(X[INDEX], INDEX)
    point_at_rows(guide)

    assert all(same_rows(given, guide, args) for args in batches(False))


def noisy(x, index=None):
    # Other values at every run, so that they are not known as data.
    given(x + 0.1 * torch.randn_like(x), index)


def test_with_inputs_and_plates_the_model_is_not_searched():
    def plates(x, index=None):
        return pyro.plate("data", N, subsample=index)

    options = {"plate": "data", "inputs": lambda x, index=None: x}
    guide = avi.AmortizedGuide(noisy, nn.Identity(), create_plates=plates, **options)
    guide.setup(X[INDEX], INDEX)
    point_at_rows(guide)

    assert all(same_rows(given, guide, args) for args in batches(False))
    assert guide(X)["z"].shape == (N, 1)

    guide = avi.AmortizedGuide(noisy, nn.Identity(), create_plates=lambda *args: [], **options)
    with pytest.raises(ValueError, match=r"create_plates\(\) to return plate 'data', got \[\]"):
        guide(X)


def masked(x, index=None):
    with poutine.mask(mask=x[:, 0] > 0):
        given(x, index)


def test_masks_are_searched_for_even_then():
    guide = avi.AmortizedGuide(
        masked, nn.Identity(), inputs=lambda x: x, create_plates=lambda x: pyro.plate("data", N)
    ).setup(X)

    assert torch.equal(poutine.trace(guide).get_trace(X).nodes["z"]["mask"], X[:, 0] > 0)


@pytest.mark.parametrize("kind", ["ConstantGuide", "FactorizedGuide"])
def test_without_arguments_the_answer_is_for_all_rows(kind):
    guide = GUIDES[kind](given).setup(X[INDEX], INDEX)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.normal_()

    expected = guide.median(X, torch.arange(N))["z"]

    assert torch.equal(guide.median()["z"], expected)
    assert guide.quantiles([0.1, 0.9])["z"].shape == (2, *expected.shape)


def test_without_arguments_an_amortized_guide_has_nothing_to_read():
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        avi.AmortizedGuide(given).setup(X).median()


def with_loc(x, index=None):
    pyro.sample("loc", dist.Normal(0.0, 1.0))
    given(x, index)


@pytest.mark.parametrize("kind", ["AmortizedGuide", "FactorizedGuide"])
def test_a_list_of_guides_needs_the_plates_for_minibatches(kind):
    def parts(**kwargs):
        guide = AutoGuideList(with_loc, **kwargs)
        guide.append(AutoDelta(poutine.block(with_loc, expose=["loc"])))
        guide.append(GUIDES[kind](poutine.block(with_loc, hide=["loc"])))
        return guide

    guide = parts(create_plates=lambda x, index=None: pyro.plate("data", N, subsample=index))
    guide(X[INDEX], INDEX)
    point_at_rows(guide[1])
    assert all(same_rows(with_loc, guide, args) for args in batches(False))

    guide = parts()
    with pytest.raises(ValueError, match="(?s)plate 'data' to hold the 3 rows that the model works on.*create_plates="):
        guide(X[INDEX], INDEX)


def misaligned(x, index=None):
    return pyro.plate("data", N, subsample=None if index is None else index.flip(0))


@pytest.mark.parametrize(
    "create_plates, error, message",
    [
        (misaligned, ValueError, "(?s)plate 'data' to hold the 3 rows.*create_plates= a function that returns"),
        (
            lambda x, index: pyro.plate("data", N),
            ValueError,
            "to hold the 3 rows that the model works on, got 8 others",
        ),
        (lambda x, index: ["data"], TypeError, r"create_plates\(\) to return plates, got str"),
    ],
)
@pytest.mark.parametrize("kind", GUIDES)
def test_plates_of_other_rows_are_refused(kind, create_plates, error, message):
    guide = GUIDES[kind](given, create_plates=create_plates)

    with pytest.raises(error, match=message):
        guide(X[INDEX], INDEX)
