"""A training that is saved goes on as if it had never stopped; a guide beside another model's parameters is told."""

import copy
import json
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_avi as avi
from tests.all_guides import GUIDES, TO_TRAIN
from tests.marks import needs_compiler

N = 12
X = torch.rand(N, 1, 4, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))


class Decoder(nn.Module):
    """One with running statistics beside its parameters."""

    def __init__(self, hidden=5):
        super().__init__()
        self.inner = avi.models.DenseDecoder(2, (hidden,), (1, 4, 4))
        self.norm = nn.BatchNorm1d(2)

    def forward(self, z):
        return self.inner(self.norm(z))


class Model(pyro.nn.PyroModule):
    def __init__(self, hidden=5):
        super().__init__()
        self.decoder = Decoder(hidden)

    def forward(self, x, index=None):
        with pyro.plate("data", N, subsample=index):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(3), obs=x)


def build(guide="amortized", seed=0, hidden=5, **options):
    torch.manual_seed(seed)
    model = Model(hidden).double()
    return model, GUIDES[guide](model, **options, **({"encoder": (6,)} if guide == "amortized" else {}))


def train(pair, num_steps, **options):
    defaults = {"lr": lambda step: 0.05 / (1 + step), "seed": 3, "progress": False, "compile": False}
    batches = {"batches": avi.minibatches(X, batch_size=5, seed=1)}
    return avi.fit(*pair, num_steps=num_steps, **{**defaults, **batches, **options})


def state(pair):
    return {(i, name): value.clone() for i, m in enumerate(pair) for name, value in m.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


OPTIMIZERS = {
    "ours": None,
    "AdamW": torch.optim.AdamW,
    "SGD": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9),
    "RAdam": torch.optim.RAdam,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("guide", TO_TRAIN)
def test_what_goes_on_is_what_never_stopped(guide, optimizer, tmp_path):
    # Plain gradients of sums over the data are large.
    rate = 1e-5 if optimizer in ("SGD", "RAdam") else 0.05
    options = {"optimizer": OPTIMIZERS[optimizer], "lr": lambda step: rate / (1 + step)}
    whole, begun, again = (build(guide, seed) for seed in (0, 0, 1))
    expected = train(whole, 9, **options)
    train(begun, 4, **options).save(tmp_path / "file")

    fit = train(again, 9, resume=tmp_path / "file", **options)

    assert torch.equal(fit.losses, expected.losses) and fit.steps == 9
    assert same(state(again), state(whole))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    # The twin: with the moments left out it would come to something else.
    fresh = build(guide)
    train(fresh, 4, **options)
    train(fresh, 5, **options)
    assert not same(state(fresh), state(whole))


def test_a_callback_may_save_and_a_stopped_training_goes_on(tmp_path):
    def save(fit):
        if fit.steps == 3:
            fit.save(tmp_path / "file")
            raise KeyboardInterrupt

    whole, stopped, again = build(), build(), build(seed=1)
    expected = train(whole, 7)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, 7, callbacks=[save])
    assert torch.equal(train(again, 7, resume=tmp_path / "file").losses, expected.losses)
    assert same(state(again), state(whole))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("ways", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("guide", ["amortized", "factorized"])
def test_compiled_and_eager_steps_go_on_from_each_other(guide, ways, tmp_path):
    whole, begun, again = (build(guide, seed) for seed in (0, 0, 1))
    expected = train(whole, 9)
    train(begun, 4, compile=ways[0]).save(tmp_path / "file")
    fit = train(again, 9, resume=tmp_path / "file", compile=ways[1])
    torch.testing.assert_close(fit.losses, expected.losses, rtol=1e-9, atol=0.0)
    for name, value in state(whole).items():
        torch.testing.assert_close(state(again)[name], value, rtol=1e-7, atol=1e-9)


def test_rows_in_host_memory_and_parameters_of_statements(tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        pyro.clear_param_store()

        def model(x, index=None):
            scale = pyro.param("scale", torch.rand((), dtype=torch.double), constraint=dist.constraints.positive)
            with pyro.plate("data", N, subsample=index):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=x.dtype), 1.0))
                pyro.sample("x", dist.Normal(z, scale), obs=x.mean((1, 2, 3)))

        return model, avi.FactorizedGuide(model, rows_on="cpu")

    def tensors_of(pair):
        return pyro.param("scale").detach().clone(), pair[1].table.detach().clone()

    pair = make(0)
    losses = train(pair, 8).losses
    expected = tensors_of(pair)
    train(make(0), 4).save(tmp_path / "file")
    pair = make(5)
    assert torch.equal(train(pair, 8, resume=tmp_path / "file").losses, losses)
    assert all(torch.equal(one, other) for one, other in zip(tensors_of(pair), expected, strict=True))


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=[needs_compiler, pytest.mark.slow])])
def test_running_statistics_count_steps_and_nothing_else(compile):
    pair = build()
    pair[1].setup(X)
    train(pair, 4, compile=compile)
    assert pair[0].decoder.norm.num_batches_tracked == 4
    pyro.clear_param_store()
    other = build()
    other[1].setup(X)
    svi = SVI(*other, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    torch.manual_seed(3)
    batches = avi.minibatches(X, batch_size=5, seed=1)
    for _ in range(4):
        svi.step(*next(batches))
    again = build()
    again[1].setup(X)
    pyro.clear_param_store()
    train(again, 4, lr=0.05, compile=compile)
    for name, value in other[0].state_dict().items():
        torch.testing.assert_close(again[0].state_dict()[name], value, rtol=1e-7, atol=1e-9)


# --- errors


def test_the_file_holds_no_code(tmp_path):
    from safetensors import safe_open

    train(build(), 2, optimizer=torch.optim.AdamW).save(tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        header = json.loads(file.metadata()["pyro_avi_training"])
    assert header["steps"] == 2 and header["optimizer"] == "torch.optim.adamw.AdamW"


REFUSED = {
    "no file": (lambda path: train(build(), 9, resume=path.with_name("none")), FileNotFoundError, "found none at"),
    "steps": (lambda path: train(build(), 3, resume=path), ValueError, "num_steps of more than the 3 taken"),
    "other widths": (
        lambda path: train(build(hidden=4), 9, resume=path),
        ValueError,
        r"where model.decoder.inner.* is \(5.* got \(4",
    ),
    "other guide": (lambda path: train(build("constant"), 9, resume=path), ValueError, "parameters and buffers of"),
    "other part": (lambda path: train(build(), 9, resume=path, lr={"local": 0.1}), ValueError, "state of Adam of the"),
    "other optimizer": (
        lambda path: train(build(), 9, resume=path, optimizer=torch.optim.AdamW),
        ValueError,
        "the optimizer None of the training at .*, got torch.optim.adamw.AdamW",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    call, error, message = REFUSED[case]
    train(build(), 3).save(tmp_path / "file")
    with pytest.raises(error, match=f"(?s){message}"):
        call(tmp_path / "file")


def test_other_and_damaged_files_are_refused(tmp_path):
    pair = build()
    train(pair, 3).save(tmp_path / "file")
    avi.save(pair[1], tmp_path / "guide")
    with pytest.raises(ValueError, match="without the header of a training"):
        train(build(), 9, resume=tmp_path / "guide")
    whole = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="Expected a whole file written by avi.fit"):
        train(build(), 9, resume=tmp_path / "file")


class Odd(torch.optim.SGD):
    """An optimizer with a state that is neither tensors nor numbers."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["seen"] = {1, 2}
        return super().step(closure)


def test_what_cannot_be_saved_is_said(tmp_path):
    fit = train(build(), 2, optimizer=Odd)
    with pytest.raises(
        TypeError, match="whose state is tensors and numbers, to be saved, got a set at state/state/0/seen"
    ):
        fit.save(tmp_path / "file")
    assert not list(tmp_path.iterdir())
    again = pickle.loads(pickle.dumps(train(build(), 2)))
    assert again.steps == 2
    with pytest.raises(
        ValueError, match="the Fit that avi.fit returned, to be saved, got one of avi.fit_many or a copy"
    ):
        again.save(tmp_path / "file")


# --- a guide's file beside a model


def test_a_guide_beside_other_parameters_of_the_model_is_told(tmp_path):
    model, guide = build()
    train((model, guide), 3)
    avi.save(guide, tmp_path / "guide")
    avi.load(tmp_path / "guide", copy.deepcopy(model), X)
    for other in (build(seed=1)[0], copy.deepcopy(model)):
        with torch.no_grad():
            other.decoder.norm.bias.add_(1e-3)
        with pytest.warns(
            UserWarning, match="parameters of the model are not those that the guide at .* was saved beside"
        ):
            avi.load(tmp_path / "guide", other)
