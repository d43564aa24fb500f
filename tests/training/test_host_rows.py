"""Tables in host memory: the same trainings as with tables where the model is, and they stay where they are."""

import copy
import itertools
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule

import pyro_avi as avi
from tests.marks import needs_compiler

N, B = 12, 5
X = torch.rand(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)


class Given(PyroModule):
    """A model whose rows are given by their positions."""

    def __init__(self, size=N):
        super().__init__()
        self.size, self.weight = size, torch.nn.Parameter(torch.eye(2, 3, dtype=torch.double))

    def rows(self, x, index):
        return pyro.plate("data", self.size, subsample=index), x

    def forward(self, x, index=None):
        plate, x = self.rows(x, index)
        with plate as index:
            x = x if len(x) == len(index) else x[index]
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.weight[:, 0]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight, 0.5).to_event(1), obs=x)


class Drawn(Given):
    """A model that draws its rows."""

    def rows(self, x, index):
        return pyro.plate("data", self.size, subsample_size=B), x


def train(model_class, rows_on, device="cpu", rows_path=None, **options):
    x = X.to(device)
    torch.manual_seed(1)
    model = model_class().to(device)
    guide = avi.FactorizedGuide(model, rows_on=rows_on, rows_path=rows_path)
    args = (x,) if model_class is Drawn else ()
    if not args:
        options.setdefault("batches", avi.minibatches(x, batch_size=B))
    options = {"num_steps": 9, "lr": 0.02, "elbo": TraceMeanField_ELBO(), "progress": False, **options}
    losses = avi.fit(model, guide, *args, **options).losses
    assert list(guide.parameters()) == [guide.table]
    return losses, torch.cat([p.detach().cpu().flatten() for p in (*model.parameters(), guide.table)])


def twice(rows=(3, 7, 3, 0, 7)):
    """Batches with rows that are in them twice, as from sampling with replacement."""
    index = torch.tensor(rows)
    return itertools.cycle([(X[index], index), (X[:B], torch.arange(B))])


OPTIONS = {
    "one rate": {},
    "clipped": {"clip_norm": 0.7},
    "rates": {"lr": {"local": lambda step: 0.02 / (1 + step), "global": 0.001}},
    "the table alone": {"lr": {"local": 0.02}},
    "two particles": {"elbo": Trace_ELBO(num_particles=2)},
    "dense": {"optimizer": torch.optim.Adam},
}


@pytest.mark.parametrize("model_class", [Given, Drawn])
@pytest.mark.parametrize("name", OPTIONS)
def test_eager_steps_are_bit_equal_to_those_of_a_table_with_the_model(name, model_class):
    host, ordinary = (train(model_class, rows_on, compile=False, **OPTIONS[name]) for rows_on in ("cpu", None))

    assert torch.equal(host[0], ordinary[0]) and torch.equal(host[1], ordinary[1])


def assert_compiled_alike(model_class, **options):
    eager = train(model_class, None, compile=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host = train(model_class, "cpu", compile=True, **options)
    torch.testing.assert_close(host[0], eager[0], rtol=1e-9, atol=0.0)
    torch.testing.assert_close(host[1], eager[1], rtol=1e-7, atol=1e-9)


@needs_compiler
def test_a_graph_is_given_the_rows_and_gives_their_gradient():
    assert_compiled_alike(Drawn, clip_norm=0.7)


@pytest.mark.parametrize("rows_on", ["cpu", None])
@pytest.mark.parametrize("clip_norm", [None, 0.7])
def test_a_row_twice_in_a_batch_moves_by_the_sum_of_its_gradients(clip_norm, rows_on):
    one, dense = (
        train(Given, rows_on, batches=twice(), num_steps=1, clip_norm=clip_norm, optimizer=optimizer, compile=False)
        for optimizer in (None, torch.optim.Adam)
    )
    torch.testing.assert_close(one[1], dense[1], rtol=0.0, atol=1e-9)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("rows_on", ["cpu", None])
@pytest.mark.parametrize("clip_norm", [None, 0.7])
def test_rows_twice_in_a_batch_are_compiled_as_eager(clip_norm, rows_on):
    options = {"batches": twice(), "clip_norm": clip_norm}
    eager = train(Given, None, compile=False, batches=twice(), clip_norm=clip_norm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Other rows, of the same shapes, than those that the graph is traced with.
        host = train(Given, rows_on, compile=True, **options)
    torch.testing.assert_close(host[0], eager[0], rtol=1e-9, atol=0.0)
    torch.testing.assert_close(host[1], eager[1], rtol=1e-7, atol=1e-9)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["one rate", "clipped", "rates", "the table alone", "two particles"])
def test_compiled_steps_are_the_eager_ones(name):
    assert_compiled_alike(Given, **OPTIONS[name])


def test_particles_that_draw_rows_are_taken_eagerly():
    eager = train(Drawn, "cpu", compile=False, **OPTIONS["two particles"])
    with pytest.warns(UserWarning, match="not compiled: each of its particles draws rows"):
        host = train(Drawn, "cpu", compile=True, **OPTIONS["two particles"])
    # Adam is its own, torch's in the other, and rounds differently.
    torch.testing.assert_close(host[0], eager[0], rtol=1e-12, atol=0.0)
    torch.testing.assert_close(host[1], eager[1], rtol=1e-12, atol=1e-12)


def test_plates_made_anew_for_every_call_are_taken_eagerly():
    def plates(x):
        return pyro.plate("data", N, subsample_size=B)

    model = Drawn()
    guide = avi.FactorizedGuide(model, rows_on="cpu", create_plates=plates)
    with pytest.warns(UserWarning, match="not compiled: create_plates= draws rows"):
        avi.fit(model, guide, X, num_steps=2, compile=True, progress=False)


def test_the_table_stays_when_the_guide_is_moved():
    index = torch.tensor([3, 1])
    guides = {rows_on: avi.FactorizedGuide(Given(), rows_on=rows_on).setup(X) for rows_on in ("cpu", None)}
    values = guides["cpu"].table.detach().clone()
    for guide in guides.values():
        guide.float().to("meta")

    # The twin moves with the guide.
    assert guides[None].table.device.type == "meta"
    table = guides["cpu"].table
    assert table.device.type == "cpu" and table.dtype == torch.float32 and torch.equal(table, values.float())
    # What is read of it is where the model is.
    (row_factor,) = guides["cpu"].row_factors
    assert row_factor.function.read(index).device.type == row_factor.function.device.type == "meta"
    assert guides["cpu"].gather_rows(X, index).indices["data"].device.type == "cpu"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda guide: pickle.loads(pickle.dumps(guide))])
def test_copies_keep_their_tables_in_host_memory(copied):
    guide = avi.FactorizedGuide(Given(), rows_on="cpu").setup(X)

    twin = copied(guide).to("meta")

    assert twin.rows_on == "cpu" and torch.equal(twin.table, guide.table)
    assert list(twin.state_dict()) == list(avi.FactorizedGuide(Given()).setup(X).state_dict())


def test_files_say_where_the_rows_are(tmp_path):
    model = Given()
    for rows_on in ("cpu", None):
        guide = avi.FactorizedGuide(model, rows_on=rows_on).setup(X)
        avi.save(guide, tmp_path / "guide")
        again = avi.load(tmp_path / "guide", model, X)
        assert again.rows_on == guide.describe()["rows_on"] == rows_on
        assert torch.equal(again.table, guide.table)


def test_rows_are_appended_where_the_table_is():
    model = Given()
    guide = avi.FactorizedGuide(model, rows_on="cpu").setup(X)
    model.size = N + 2

    guide.append_rows(2)

    more = torch.cat([X, X[:2]])
    avi.fit(model, guide, more, num_steps=3, lr={"local": 0.1}, progress=False)
    assert guide.table.shape == (N + 2, 4)
    assert guide.to("meta").table.device.type == "cpu"


def test_svi_and_answers_read_the_table_too():
    index = torch.tensor([7, 2, 0])
    answers = []
    for rows_on in ("cpu", None):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = Given()
        guide = avi.FactorizedGuide(model, rows_on=rows_on)
        svi = SVI(model, guide, pyro.optim.DCTAdam({"lr": 0.1, "subsample_aware": True}), Trace_ELBO())
        losses = [svi.step(X[index], index) for _ in range(3)]
        answers.append((losses, guide.median(X[index], index)["z"], avi.refine(model, guide, X, num_steps=2).table))
    assert answers[0][0] == answers[1][0]
    assert all(torch.equal(one, two) for one, two in zip(answers[0][1:], answers[1][1:], strict=True))


def test_other_places_are_refused():
    with pytest.raises(ValueError, match="rows_on to be None .where the model is., 'cpu' or 'disk', got 'cuda'"):
        avi.FactorizedGuide(Given(), rows_on="cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("model_class", [Given, Drawn])
def test_on_a_device_training_is_that_of_a_table_on_it(model_class, compile):
    ordinary = train(model_class, None, "cuda", compile=False)
    host = train(model_class, "cpu", "cuda", compile=compile)

    torch.testing.assert_close(host[0], ordinary[0], rtol=1e-7, atol=0.0)
    torch.testing.assert_close(host[1], ordinary[1], rtol=1e-6, atol=1e-8)
