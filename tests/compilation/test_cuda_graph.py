"""One launch of all kernels of a step. Without a CUDA device its bookkeeping alone is tested, on stand-ins."""

import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

import pyro_avi as avi
from pyro_avi.compilation.cuda_graph import GraphedFunction, make_graphed, warn_not_graphed


class _Stream:
    def wait_stream(self, other):
        assert isinstance(other, _Stream)


@pytest.fixture
def device(monkeypatch):
    """Stands in for CUDA: a graph repeats the calls of `recorded`, into the memory of the first results."""
    state = {"capturing": None, "replays": 0}

    class Graph:
        def replay(self):
            state["replays"] += 1
            for place, value in zip(self.results, self.function(), strict=True):
                place.copy_(value)

    @contextmanager
    def graph(one):
        state["capturing"] = one
        yield
        state["capturing"] = None

    def recorded(function):
        def call(*tensors):
            results = function(*tensors)
            if state["capturing"] is not None:
                state["capturing"].results, state["capturing"].function = results, lambda: function(*tensors)
            return results

        return call

    for name, stand_in in {
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    state["recorded"] = recorded
    return state


def test_a_replay_is_the_call(device):
    held = torch.zeros(2)

    def function(x, y):
        held.add_(x)
        return [x * y, held.sum()]

    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    captured = GraphedFunction(device["recorded"](function), [x, y])
    # Called twice: once for what cannot be captured, once for what can.
    assert held.tolist() == [2.0, 4.0]
    held.zero_()
    product, total = captured(x, y)
    assert product.tolist() == [3.0, 10.0] and total.item() == 3.0 and device["replays"] == 1
    # Other tensors, and the same ones with other values.
    assert captured(torch.tensor([2.0, 2.0]), y)[0].tolist() == [6.0, 10.0]
    y.mul_(10)
    assert captured(x, y)[0].tolist() == [30.0, 100.0]
    # Memory is that of before: what is to be kept is copied.
    assert product.tolist() == [30.0, 100.0] and held.tolist() == [4.0, 6.0]


def test_what_stays_as_it_is_is_copied_once(device, monkeypatch):
    copies = []
    x, y = torch.ones(3), torch.ones(3)
    captured = GraphedFunction(device["recorded"](lambda x, y: [x + y]), [x, y])
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: (copies.append(other), copy(self, other))[1])
    captured._graph.replay = lambda: None
    for _ in range(3):
        captured(x, y)
    assert [id(one) for one in copies] == [id(x), id(y)]
    x.add_(1)
    captured(x, y)
    assert [id(one) for one in copies[2:]] == [id(x)]
    with torch.inference_mode():
        unversioned = torch.ones(3)
    for _ in range(2):
        captured(x, unversioned)
    assert [id(one) for one in copies[3:]] == [id(unversioned)] * 2


def test_overlapping_arguments_are_refused(device):
    with pytest.raises(RuntimeError, match="share memory"):
        GraphedFunction(lambda x: [x], [torch.ones(1, 3).expand(4, 3)])


def test_elsewhere_the_function_stays_itself():
    def function(x):
        return [x]

    assert make_graphed(function, [torch.ones(2)], [torch.ones(3)]) == (function, None)
    assert make_graphed(function, [], []) == (function, None)
    warn_not_graphed(None)
    with pytest.warns(UserWarning, match="launched one after another: it waits.$"):
        warn_not_graphed("it waits")


# --- on a device


def train(compile, *, guide_class=avi.FactorizedGuide, device="cuda", steps=8, precision="float32"):
    torch.manual_seed(0)
    decoder = avi.models.DenseDecoder(2, (5,), (1, 4, 4))
    model = avi.models.VAE(decoder, size=12, likelihood=avi.models.GaussianLikelihood(0.5, learned=True)).to(device)
    guide = guide_class(model, **({"encoder": (6,)} if guide_class is avi.AmortizedGuide else {})).to(device)
    x = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)).to(device)
    options = {"num_steps": steps, "lr": 0.01, "elbo": TraceMeanField_ELBO(), "progress": False, "seed": 3}
    batches = avi.minibatches(x, batch_size=5, seed=1)
    return avi.fit(model, guide, batches=batches, compile=compile, precision=precision, **options)


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("guide_class", [avi.ConstantGuide, avi.AmortizedGuide, avi.FactorizedGuide])
def test_captured_steps_are_the_eager_ones(guide_class, monkeypatch):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(self), replay(self))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = train(True, guide_class=guide_class)
    # Batches of one shape, so one graph, compared once before its steps.
    assert len(replays) == 8 + 1 and len(set(replays)) == 1
    torch.testing.assert_close(compiled.losses, train(False, guide_class=guide_class).losses, rtol=1e-4, atol=0.0)
    assert compiled.losses.equal(train(True, guide_class=guide_class).losses)
    assert len(set(compiled.losses.tolist())) == 8
    assert 0 < compiled.compile_seconds < compiled.seconds


@pytest.mark.cuda
@pytest.mark.slow
def test_tf32_reaches_captured_products():
    """Rounding to 11 bits, seen in the loss: the products of a captured step are not those of single precision."""
    single, rounded = (train(True, precision=precision, steps=2).losses for precision in ("float32", "tf32"))
    assert not rounded.equal(single)
    torch.testing.assert_close(rounded, single, rtol=1e-2, atol=0.0)


@pytest.mark.cuda
@pytest.mark.slow
def test_replicas_on_a_device_are_what_each_is_alone():
    def make(seed):
        torch.manual_seed(seed)
        model = avi.models.VAE(avi.models.DenseDecoder(2, (5,), (1, 4, 4)), size=12).cuda()
        return model, avi.AmortizedGuide(model, encoder=(6,)).cuda()

    x = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)).cuda()
    options = {"num_steps": 6, "lr": 0.01, "elbo": TraceMeanField_ELBO(), "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = avi.fit_many([make(seed) for seed in range(3)], x, seed=[5, 6, 7], **options)
    for seed, fit in enumerate(together):
        alone = avi.fit(*make(seed), x, seed=5 + seed, compile=False, **options)
        torch.testing.assert_close(fit.losses, alone.losses, rtol=1e-4, atol=0.0)


@pytest.mark.cuda
def test_callbacks_do_not_wait_for_the_device(monkeypatch):
    waits = []
    synchronize = torch.cuda.synchronize
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: (waits.append(args), synchronize(*args)))
    fit = train(False, steps=5)
    assert not waits and fit.seconds > 0
