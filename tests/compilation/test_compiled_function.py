"""The log joint as one compiled graph: the same numbers, by a count, and only where it can be."""

import pytest
import torch

import pyro_avi as avi
from pyro_avi.compilation.compiled_function import compile_function
from pyro_avi.compilation.cost import saves_time
from pyro_avi.densities import log_joint as joint_module
from pyro_avi.densities.log_joint import LocalJoint
from pyro_avi.evidence.ais import isolated_sampling
from tests.marks import needs_compiler


def images():
    torch.manual_seed(0)
    decoder = avi.models.DenseDecoder(2, (5,), (1, 3, 3))
    vae = avi.models.VAE(decoder, size=6, likelihood=avi.models.BernoulliLikelihood())
    x = torch.rand(6, 1, 3, 3).round()
    return vae, avi.AmortizedGuide(vae, (4,)).setup(x), x


def weights(model, guide, x, *, num_samples=40, max_memory=1):
    with isolated_sampling(0):
        joint = LocalJoint(model, (x,), {}, plate="data")
        factors = guide.fixed_posterior(x)
        return joint.log_weights(factors, symmetric=True, num_samples=num_samples, max_memory=max_memory).local, joint


@needs_compiler
@pytest.mark.slow
def test_a_graph_gives_the_same_weights(monkeypatch):
    call = images()
    eager, joint = weights(*call)
    assert not joint._graphs
    monkeypatch.setattr(joint_module, "_COST_OF_COMPILING", 0.0)
    compiled, joint = weights(*call)
    assert joint._graphs[1] is not None
    torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-5)


def test_it_pays_by_a_count_of_work():
    assert not saves_time(10**9, calls=10, overhead=0.0, cost=9.0) and saves_time(
        10**9, calls=1000, overhead=0.0, cost=9.0
    )
    assert saves_time(0, calls=10**5, overhead=1e-3, cost=9.0) and not saves_time(
        0, calls=10**5, overhead=1e-5, cost=9.0
    )
    assert not saves_time(10**9, calls=1000, overhead=0.0, cost=11.0)


def test_a_cpu_evaluates_pieces_that_fit_its_cache(monkeypatch):
    call, counts = images(), []
    weigh = LocalJoint._log_weight
    monkeypatch.setattr(LocalJoint, "_log_weight", lambda joint, q, u: counts.append(len(u)) or weigh(joint, q, u))
    _, joint = weights(*call, max_memory=2**30)
    assert counts == [20, 20]
    counts.clear()
    monkeypatch.setattr(joint_module, "_CACHE", 2 * 3 * joint.memory())
    weights(*call, max_memory=2**30)
    assert counts == [3] * 12 + [2] * 2


def test_without_a_graph_the_weights_are_those_of_the_model(monkeypatch):
    call = images()
    eager, _ = weights(*call)
    monkeypatch.setattr(joint_module, "_COST_OF_COMPILING", 0.0)
    monkeypatch.setattr(joint_module, "compile_function", lambda *args: None)
    same, joint = weights(*call)
    assert torch.equal(eager, same) and joint._graphs == {1: None}


@needs_compiler
def test_what_branches_on_its_argument_is_refused():
    with pytest.warns(UserWarning, match="The log joint is evaluated eagerly, not compiled"):
        assert compile_function(lambda u: (u * float(u.max() > 0.5),), torch.zeros(2), torch.ones(2)) is None


@needs_compiler
def test_a_graph_with_other_numbers_is_refused():
    # What a graph holds of Python at its tracing is no part of the function.
    state = iter([1.0, 2.0])
    with pytest.warns(UserWarning, match="its graph gives other numbers"):
        assert compile_function(lambda u: (u * next(state),), torch.ones(2), torch.ones(2)) is None


@needs_compiler
def test_the_log_tells_graphs_from_what_is_evaluated_in_their_place(monkeypatch, caplog):
    caplog.set_level("INFO", logger="pyro_avi")
    assert compile_function(lambda u: (u + 1,), torch.ones(2), torch.zeros(2)) is not None
    monkeypatch.setattr("pyro_avi.compilation.compiled_function.has_compiler", lambda: False)
    assert compile_function(lambda u: (u + 1,), torch.ones(2), torch.zeros(2)) is None
    assert [(told.what, told.fallback) for told in caplog.records] == [
        ("The log joint", None),
        ("The log joint", "there is no C++ compiler"),
    ]
    assert caplog.messages[1] == "The log joint is evaluated eagerly, not compiled: there is no C++ compiler."
