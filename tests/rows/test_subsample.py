"""Which rows a call is about: positions that are none, batches without positions, created plates, plates without a size."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import pyro_avi as avi
from pyro_avi.rows.subsample import check_positions
from tests.all_guides import READING
from tests.all_guides import SMALL_GUIDES as GUIDES

N, B = 8, 3
# A row's value is its number.
X = torch.arange(float(N))
INDEX = torch.tensor([5, 0, 3])


@pytest.fixture(params=GUIDES)
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    torch.manual_seed(0)


# --- positions


def given(x, index):
    with pyro.plate("data", N, subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(B), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


NO_POSITIONS = {
    "data": (torch.tensor([0.2, 1.5, 2.0]), r"type torch.float32 and shape \(3,\)"),
    "rows of data": (torch.zeros(3, 2), r"type torch.float32 and shape \(3, 2\)"),
    "integer data": (torch.tensor([[0, 1], [2, 3], [4, 5]]), r"type torch.int64 and shape \(3, 2\)"),
    "a mask": (torch.tensor([True, False, True]), r"type torch.bool"),
    "bytes": (torch.tensor([0, 1, 2], dtype=torch.uint8), r"type torch.uint8"),
    "too large": (torch.tensor([0, 1, N]), "from 0 to 8"),
    "negative": (torch.tensor([0, -1, 2]), "from -1 to 2"),
}


@pytest.mark.parametrize("name", NO_POSITIONS)
@pytest.mark.parametrize("when", ["first", "later"])
def test_what_is_no_position_is_refused_by_every_guide(kind, name, when):
    index, got = NO_POSITIONS[name]
    guide = GUIDES[kind](given)
    if when == "later":
        guide(X[INDEX], INDEX)
    with pytest.raises(
        ValueError, match=rf"(?s)plate 'data' as positions \[B\], whole numbers from 0 to 7, got .*{got}"
    ):
        guide(X[:B], index)
    assert guide(X[INDEX], INDEX)["z"].shape == (B,)


def test_positions_are_checked_where_no_latent_reads_them(kind):
    def model(x, index):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample=index):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.warns(UserWarning, match="every latent is global"), pytest.raises(ValueError, match="from -1 to 2"):
        GUIDES[kind](model)(X[:B], torch.tensor([0, -1, 2]))


def test_positions_of_created_plates_are_checked(kind):
    options = {"create_plates": lambda x: pyro.plate("data", N, subsample=torch.tensor([0, 1, N]))}
    if kind in READING:
        options["inputs"] = lambda x: x[:, None]
    with pytest.raises(ValueError, match="whole numbers from 0 to 7, got whole numbers from 0 to 8"):
        GUIDES[kind](loader, **options)(X[:B])


def test_within_graphs_positions_have_no_values():
    index = torch.tensor([0, N])
    with pytest.raises(ValueError, match="from 0 to 8"):
        check_positions("data", N, index)
    torch.func.vmap(lambda i: (check_positions("data", N, i), i)[1])(index[None])
    make_fx = torch.fx.experimental.proxy_tensor.make_fx
    for mode in ("real", "fake"):
        make_fx(lambda i: (check_positions("data", N, i), i + 1)[1], tracing_mode=mode)(index)


# --- a batch whose positions nobody knows


def loader(x):
    """As single-cell libraries write it: a batch is given, and the plate draws rows that nobody reads."""
    with pyro.plate("data", N, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x)


def loader_by_value(x):
    groups = int(x.max()) + 1
    with pyro.plate("data", N, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0 + 0.0 * groups))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x)


@pytest.mark.parametrize("model", [loader, loader_by_value])
@pytest.mark.filterwarnings("ignore:.*could not be traced:UserWarning")
def test_a_table_refuses_a_batch_without_positions(model):
    guide = avi.FactorizedGuide(model)
    with pytest.raises(
        ValueError, match=r"(?s)reads the rows it draws in plate 'data'.*subsample=index.*create_plates="
    ):
        guide.setup(X[:B])
    with pytest.raises(ValueError, match="reads the rows it draws"):
        guide(X[:B])


@pytest.mark.parametrize("model", [loader, loader_by_value])
@pytest.mark.parametrize("kind", ["ConstantGuide", *sorted(READING)])
@pytest.mark.filterwarnings("ignore:.*could not be traced:UserWarning")
def test_the_others_take_it_for_a_data_set_of_its_own(kind, model):
    guide = GUIDES[kind](model).setup(X[:B])
    assert guide.variational_parameters(X[INDEX]).shape == (B, 2)
    assert guide.posterior(X[INDEX]).batch_shape == (B,)
    assert guide.median(X[INDEX])["z"].shape == (B,)
    trace = poutine.trace(poutine.replay(model, poutine.trace(guide).get_trace(X[INDEX]))).get_trace(X[INDEX])
    assert trace.nodes["x"]["scale"] == N / B and trace.nodes["z"]["value"].shape == (B,)
    together = guide.posterior_by_row([(X[:3],), (X[3:6],), (X[6:],)])["z"]
    torch.testing.assert_close(together, guide.median(X)["z"])


def test_a_table_takes_the_positions_by_plates_of_its_own():
    def model(x, index):
        loader(x)

    guide = avi.FactorizedGuide(model, create_plates=lambda x, index: pyro.plate("data", N, subsample=index))
    batches = avi.minibatches(X, batch_size=B)
    avi.fit(model, guide, batches=batches, num_steps=200, lr=0.3, progress=False)

    assert guide.table.shape == (N, 2)
    torch.testing.assert_close(guide.table[:, 0].detach(), X / 1.01, rtol=0.03, atol=0.2)


def test_rows_that_are_read_are_no_such_batch(kind):
    def constant(x):
        with pyro.plate("data", N, subsample_size=B) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(B), 1.0))
            # All values alike, so that a look at them would not tell.
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide = GUIDES[kind](constant).setup(torch.ones(N))
    assert guide.variational_parameters(torch.ones(N)).shape == (N, 2)


def drawn_by_value(x):
    groups = int(x.max()) + 1
    with pyro.plate("data", N, subsample_size=B) as index:
        z = pyro.sample("z", dist.Normal(torch.zeros(B), 1.0 + 0.0 * groups))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x[index])


@pytest.mark.filterwarnings("ignore:.*could not be traced:UserWarning")
def test_a_model_that_draws_rows_and_reads_values_into_python(kind):
    guide = GUIDES[kind](drawn_by_value).setup(X)
    of_guide = poutine.trace(guide).get_trace(X)
    of_model = poutine.trace(poutine.replay(drawn_by_value, of_guide)).get_trace(X)
    assert torch.equal(of_model.nodes["x"]["value"], X[of_guide.nodes["data"]["value"]])
    if kind in READING:
        with pytest.raises(ValueError, match=r"(?s)a call for 3 of the 8 rows of plate 'data'.*subsample=index"):
            guide.posterior(X)
    else:
        assert guide.posterior(X).batch_shape == (N,)


# --- minibatches drawn in the plate of the guide


def whole(x):
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.1), obs=pyro.subsample(x, event_dim=0))


def draw_plates(x):
    return pyro.plate("data", N, subsample_size=B)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
def test_created_plates_may_draw_the_rows(kind, elbo):
    guide = GUIDES[kind](whole, create_plates=draw_plates)
    rows = set()
    for _ in range(20):
        of_guide = poutine.trace(guide).get_trace(X)
        of_model = poutine.trace(poutine.replay(whole, of_guide)).get_trace(X)
        index = of_guide.nodes["data"]["value"]
        assert len(index) == B and torch.equal(of_model.nodes["x"]["value"], X[index])
        assert of_model.nodes["x"]["scale"] == of_guide.nodes["z"]["scale"] == N / B
        rows.update(index.tolist())
    assert rows == set(range(N))
    loss = SVI(whole, guide, pyro.optim.Adam({"lr": 0.01}), elbo()).step(X)
    assert loss == loss


def test_created_plates_that_draw_train_a_table_row_by_row():
    guide = avi.FactorizedGuide(whole, create_plates=draw_plates)
    avi.fit(whole, guide, X, num_steps=200, lr=0.3, progress=False)
    torch.testing.assert_close(guide.table[:, 0].detach(), X / 1.01, rtol=0.03, atol=0.2)


# --- plates without a size


def without_size(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data"):
        z = pyro.sample("z", dist.Normal(loc, 1.0).expand([len(x)]))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x)


def with_size(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0).expand([len(x)]))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO])
def test_a_plate_without_a_size_has_the_rows_of_its_sites(kind, elbo):
    losses, parameters = [], []
    for model in (without_size, with_size):
        torch.manual_seed(0)
        guide = GUIDES[kind](model).setup(X)
        torch.manual_seed(1)
        options = {"strict_enumeration_warning": False} if elbo is TraceEnum_ELBO else {}
        losses.append(elbo(**options).differentiable_loss(model, guide, X).item() if elbo is not TraceGraph_ELBO else 0)
        parameters.append(guide.variational_parameters(X))
        if elbo is TraceGraph_ELBO:
            losses[-1] = elbo().loss(model, guide, X)
    assert losses[0] == losses[1]
    assert torch.equal(*parameters) and len(parameters[0]) == N


def test_a_plate_without_a_size_takes_other_rows():
    for guide in (avi.ConstantGuide(without_size), avi.AmortizedGuide(without_size, (4,))):
        assert guide.setup(X)(X[:B])["z"].shape == (B,)
        weights = avi.log_weights(without_size, guide, X[:B], num_samples=2)
        assert weights.local.shape == (2, B) and weights.scale == 1
    with pytest.raises(ValueError, match='Expected all 8 rows of plate "data", got 3'):
        avi.FactorizedGuide(without_size).setup(X)(X[:B])


def test_one_value_for_all_rows_of_a_plate_without_a_size_is_global(kind):
    def model(x):
        with pyro.plate("data"):
            shared = pyro.sample("shared", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(shared, 1.0).expand([len(x)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = GUIDES[kind](model)
    values = guide(X)
    assert values["shared"].shape == () and values["z"].shape == (N,)
    assert guide.global_latents == ("shared",)


# --- models of the package and error messages


def vae():
    return avi.models.VAE(avi.models.DenseDecoder(2, (4,), (3,)), size=20)


@pytest.mark.parametrize("kind", [*GUIDES, "by hand"])
def test_rows_that_the_data_set_of_a_model_does_not_have_are_refused(kind):
    model, x = vae(), torch.rand(40, 3)

    def by_hand(x, index):
        with pyro.plate("data", 20, subsample=index):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = by_hand if kind == "by hand" else GUIDES[kind](model)
    with pytest.raises(
        ValueError, match="plate 'data' as positions .*whole numbers from 0 to 19, got whole numbers from "
    ):
        avi.fit(model, guide, batches=avi.minibatches(x, batch_size=16), num_steps=2, progress=False)


def test_a_list_of_positions_of_a_model_of_the_package():
    with pytest.raises(ValueError, match="one position in index for each of the 3 rows of x, got 2"):
        vae()(torch.rand(3, 3), torch.tensor([0, 1]))


WRONG_CALLS = {
    "a guide": lambda kind: GUIDES[kind](given)(X[:B], torch.tensor([0, 1, N])),
    "a traced guide": lambda kind: poutine.trace(GUIDES[kind](given)).get_trace(X[:B], torch.tensor([0, 1, N])),
    "a loss": lambda kind: Trace_ELBO().loss(given, GUIDES[kind](given), X[:B], torch.tensor([0, 1, N])),
    "a traced model": lambda kind: poutine.trace(vae()).get_trace(torch.rand(4, 2)),
    "a guide whose model refuses": lambda kind: GUIDES[kind](vae())(torch.rand(20, 2)),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_sentence_of_ours_is_all_that_is_said(kind, name):
    with pytest.raises(ValueError, match="Expected") as raised:
        WRONG_CALLS[name](kind)
    assert "Trace Shapes" not in str(raised.value) and "Param Sites" not in str(raised.value)


def test_the_table_of_a_models_own_error_is_kept(kind):
    def broken(x):
        pyro.sample("z", dist.Normal(torch.zeros(B), 1.0).to_event(1))
        raise ValueError("of the model")

    with pytest.raises(ValueError, match=r"(?s)of the model.*Trace Shapes:.*z dist"):
        GUIDES[kind](broken)(X)
