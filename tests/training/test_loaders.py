"""Batches of a DataLoader: epochs without end, the order by the seed, positions of rows or a clear error."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

import pyro_avi as avi
from tests.all_guides import GUIDES, TO_TRAIN

N = 12
X = torch.rand(N, 1, 4, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
INDEX = torch.arange(N)


def build(guide="amortized", model=avi.models.VAE, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        likelihood = avi.models.GaussianLikelihood(0.5, learned=True)
        model = model(avi.models.DenseDecoder(2, (5,), (1, 4, 4)), size=N, likelihood=likelihood).double()
        options = {"encoder": (6,), **options} if guide == "amortized" else options
        return model, GUIDES[guide](model, **options)


def train(pair, batches, num_steps=7, **options):
    options = {"lr": 0.05, "seed": 3, "progress": False, "compile": False, **options}
    return avi.fit(*pair, batches=batches, num_steps=num_steps, **options)


def state(pair):
    return {(i, name): value.clone() for i, m in enumerate(pair) for name, value in m.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def loader(**options):
    return DataLoader(TensorDataset(X, INDEX), **{"batch_size": 5, "shuffle": True, **options})


class Recorded(avi.models.VAE):
    """A model that tells the positions of its batches."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = []

    def forward(self, x=None, index=None):
        self.seen.append(index)
        return super().forward(x, index)


def orders(batches, num_steps=7, **options):
    """The positions in every step."""
    pair = build("constant", Recorded)
    pair[1].setup(X)
    seen = []

    def callback(fit):
        seen.append(pair[0].seen[-1].tolist())

    train(pair, batches, num_steps, callbacks=[callback], **options)
    return seen


@pytest.mark.parametrize("guide", TO_TRAIN)
@pytest.mark.parametrize("model", [avi.models.VAE, avi.models.BayesianDecoder])
def test_a_loader_in_order_trains_as_the_same_tuples(guide, model):
    tuples = [(X[index], index) for index in INDEX.split(5)]
    expected, pair = build(guide, model), build(guide, model)
    losses = train(expected, itertools.cycle(tuples)).losses
    # A loader's batches are lists.
    assert torch.equal(losses, train(pair, loader(shuffle=False)).losses) and same(state(expected), state(pair))
    # Whatever can be iterated over again is.
    pair = build(guide, model)
    assert torch.equal(losses, train(pair, tuples).losses) and same(state(expected), state(pair))


def test_epochs_go_on_without_end_in_an_order_by_the_seed():
    state = torch.get_rng_state()
    first = orders(loader(), 9)
    for epoch in (first[:3], first[3:6], first[6:]):
        assert [len(index) for index in epoch] == [5, 5, 2]
        assert sorted(itertools.chain(*epoch)) == list(range(N))
    assert first[:3] != first[3:6] != first[6:]
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    assert first == orders(loader(), 9) != orders(loader(), 9, seed=4)


@pytest.mark.parametrize("where", ["loader", "sampler"])
def test_generators_of_its_own_follow_the_seed_and_are_given_back(where):
    generator = torch.Generator().manual_seed(11)
    if where == "loader":
        batches = loader(generator=generator)
    else:
        sampler = torch.utils.data.RandomSampler(range(N), generator=generator)
        batches = loader(sampler=sampler, shuffle=False)
    before = generator.get_state()
    first = orders(batches)
    assert torch.equal(before, generator.get_state())
    assert first == orders(batches) != orders(batches, seed=4)
    # Without a seed they go on where they are.
    assert orders(batches, seed=None) != orders(batches, seed=None)
    assert not torch.equal(before, generator.get_state())


class Noisy(Dataset):
    """Rows with noise, drawn as they are read."""

    def __len__(self):
        return N

    def __getitem__(self, row):
        return X[row] + 0.1 * torch.randn(X[row].shape, dtype=X.dtype), row


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("guide", TO_TRAIN)
@pytest.mark.parametrize("stop", [3, 4])
def test_what_goes_on_is_what_never_stopped(guide, own, stop, tmp_path):
    def batches():
        return DataLoader(Noisy(), batch_size=5, shuffle=True, generator=torch.Generator() if own else None)

    whole, begun, again = (build(guide) for _ in range(3))
    expected = train(whole, batches(), 9)
    kept = batches()
    train(begun, kept, stop).save(tmp_path / "file")
    fit = train(again, kept, 9, resume=tmp_path / "file")
    assert torch.equal(fit.losses, expected.losses) and same(state(again), state(whole))
    # The twin: other batches come to something else.
    twin = build(guide)
    assert not torch.equal(train(twin, batches(), 9, seed=4).losses, expected.losses)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("stays", [False, True])
def test_workers_bring_rows_by_the_seed(stays):
    def batches():
        return loader(num_workers=2, persistent_workers=stays)

    first = orders(batches(), 4)
    assert first == orders(batches(), 4) != orders(batches(), 4, seed=4)
    assert first[:3] == orders(loader(), 3)
    # Workers that stay are not seeded again, so that their later epochs are others.
    assert stays or first == orders(loader(), 4)


def test_the_last_batch_counts_for_its_rows():
    # With closed-form divergences and hardly any noise the loss hardly depends on the draws.
    options = {"elbo": pyro.infer.TraceMeanField_ELBO(), "lr": 0.0}
    for guide in GUIDES:
        pair = build(guide, avi.models.BayesianDecoder, init_scale=1e-7)
        whole = avi.fit(*pair, X, num_steps=1, progress=False, **options).losses
        parts = train(pair, loader(), 3, **options).losses
        sizes = torch.tensor([5, 5, 2])
        torch.testing.assert_close((parts * sizes).sum() / N, whole[0], rtol=1e-6, atol=0.0)


class Subsample(Dataset):
    """Rows as ``get`` makes them."""

    def __init__(self, get):
        self.get = get

    def __len__(self):
        return N

    def __getitem__(self, row):
        return self.get(row)


@pytest.mark.filterwarnings("ignore:.*losses are those of a batch:UserWarning")
def test_a_batch_may_be_one_tensor_or_arguments_by_name():
    alone = train(build(), DataLoader(Subsample(lambda row: X[row]), batch_size=5)).losses
    assert torch.equal(alone, train(build(), DataLoader(TensorDataset(X), batch_size=5)).losses)
    named = DataLoader(Subsample(lambda row: {"index": row, "x": X[row]}), batch_size=5)
    assert torch.equal(train(build(), named).losses, train(build(), loader(shuffle=False)).losses)

    def model(x, scale=1.0, index=None):
        assert scale == 1.0
        with pyro.plate("data", N, subsample=index):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x[:, 0, 0, 0])

    losses = train((model, avi.FactorizedGuide(model)), named).losses
    assert losses.isfinite().all()


class Streamed(IterableDataset):
    def __iter__(self):
        return iter([(X[row], row) for row in range(N)])


def test_a_stream_is_read_again():
    streamed = train(build(), DataLoader(Streamed(), batch_size=5)).losses
    assert torch.equal(streamed, train(build(), loader(shuffle=False)).losses)


LABELS = INDEX % 3

BAD = {
    "rows alone": lambda: DataLoader(TensorDataset(X), batch_size=5, shuffle=True),
    "all rows, shuffled": lambda: DataLoader(TensorDataset(X), batch_size=N, shuffle=True),
    "labels for positions": lambda: DataLoader(TensorDataset(X, LABELS), batch_size=5, shuffle=True),
    "labels for positions, one a batch": lambda: DataLoader(TensorDataset(X, LABELS), batch_size=1, shuffle=True),
}


@pytest.mark.parametrize("same_rows", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_tables_need_positions(case, same_rows):
    pair = build("factorized", same_rows=same_rows)
    with pytest.raises(ValueError, match=r"(?s)positions of their rows among the 12.*\(x, index\).*avi.minibatches"):
        train(pair, BAD[case](), 4)


@pytest.mark.parametrize("guide", TO_TRAIN)
def test_all_rows_in_order_need_no_positions(guide):
    batches = DataLoader(TensorDataset(X), batch_size=N)
    assert torch.equal(train(build(guide), batches).losses, avi.fit(*build(guide), X, num_steps=7, lr=0.05, seed=3,
                       compile=False, progress=False).losses)  # fmt: skip


def test_rows_drawn_again_are_the_samplers_business():
    sampler = WeightedRandomSampler(torch.ones(N), num_samples=20)
    train(build("factorized"), loader(sampler=sampler, shuffle=False))


def test_positions_of_a_part_of_the_data_are_those_of_all():
    part = torch.utils.data.Subset(TensorDataset(X, INDEX), [3, 5, 7, 9])
    pair = build("factorized")
    pair[1].setup(X)
    before = pair[1].table.detach().clone()
    train(pair, DataLoader(part, batch_size=2, shuffle=True))
    assert (before != pair[1].table).any(1).nonzero().flatten().tolist() == [3, 5, 7, 9]


def grouped(x, index=None, group=None):
    with pyro.plate("groups", 4, subsample=group):
        u = pyro.sample("u", dist.Normal(torch.zeros((), dtype=X.dtype), 1.0))
    with pyro.plate("data", N, subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=X.dtype), 1.0))
        pyro.sample("x", dist.Normal(z + u.sum(), 1.0), obs=x[:, 0, 0, 0])


def test_rows_of_another_plate_may_come_back():
    batches = DataLoader(
        TensorDataset(X, INDEX), batch_size=4, collate_fn=lambda rows: (*map(torch.stack, zip(*rows, strict=True)),
                                                                         torch.tensor([0, 1])))  # fmt: skip
    train((grouped, avi.FactorizedGuide(grouped, plate=("data", "groups"))), batches)


@pytest.mark.parametrize("guide", ["constant", "amortized"])
def test_a_batch_is_not_taken_for_the_data_beside_global_latents(guide):
    pair = build(guide, avi.models.BayesianDecoder)
    rows = DataLoader(TensorDataset(X), batch_size=4)
    with pytest.raises(ValueError, match="(?s)have the 12 rows.*got 4.*3 times too often.*subsample_size=len"):
        train(pair, rows)

    def model(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=X.dtype), 1.0))
        with pyro.plate("data", N, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0, 0, 0])

    train((model, GUIDES[guide](model)), rows)
    # Without such latents nothing but the loss is another.
    with pytest.warns(UserWarning, match="(?s)have the 12 rows.*got 4: losses are those of a batch.*3 times smaller"):
        train(build(guide), rows)
    labels = DataLoader(TensorDataset(X, INDEX % 3), batch_size=4, shuffle=True)
    train(build(guide, avi.models.BayesianDecoder), labels)


@pytest.mark.parametrize("guide", TO_TRAIN)
def test_answers_for_a_loader_are_put_together(guide):
    pair = build(guide)
    train(pair, loader())
    expected = pair[1].posterior_by_row([(X,)])["z"]
    torch.testing.assert_close(pair[1].posterior_by_row(loader())["z"], expected)
    if guide != "factorized":
        torch.testing.assert_close(pair[1].posterior_by_row(DataLoader(X, batch_size=5))["z"], expected)


REFUSED = {
    "a data set": (
        lambda: TensorDataset(X, INDEX),
        TypeError,
        "batches of rows, got the data set TensorDataset.*DataLoader",
    ),
    "no batch": (lambda: loader(batch_size=20, drop_last=True), ValueError, "none in epoch 0.*drop_last"),
    "an empty list": (lambda: [], ValueError, "got none in epoch 0 of a list"),
    "a string": (lambda: DataLoader(Subsample(lambda row: "row"), batch_size=None), TypeError, "got a str.*collate_fn"),
    "unknown fields": (
        lambda: DataLoader(Subsample(lambda row: {"x": X[row], "label": row}), batch_size=4),
        TypeError,
        r"arguments of the model, \['x', 'index'\], got \['x', 'label'\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_batch_is_refused(case):
    batches, error, message = REFUSED[case]
    with pytest.raises(error, match=f"(?s)Expected.*{message}"):
        train(build(), batches())


def test_trainings_do_not_take_batches_from_each_other():
    pairs = [build(), build()]
    for batches, what in (
        (avi.minibatches(X, batch_size=5), "an iterator"),
        (loader(num_workers=1, persistent_workers=True), "a loader with persistent_workers"),
    ):
        with pytest.raises(ValueError, match=f"do not take from each other, got {what}"):
            avi.fit_many(pairs, batches=batches, num_steps=2, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("guide", TO_TRAIN)
def test_many_go_through_one_loader_each_by_its_seed(guide):
    pairs = [build(guide) for _ in range(2)]
    fits = avi.fit_many(pairs, batches=loader(), num_steps=7, lr=0.05, seed=[3, 4], progress=False)
    for seed, fit in zip([3, 4], fits, strict=True):
        torch.testing.assert_close(fit.losses, train(build(guide), loader(), seed=seed).losses, rtol=1e-8, atol=0.0)


def test_many_are_told_what_tables_need_as_well():
    pairs = [build("factorized") for _ in range(2)]
    with pytest.raises(ValueError, match="positions of their rows"):
        avi.fit_many(pairs, batches=BAD["rows alone"](), num_steps=2, progress=False)
