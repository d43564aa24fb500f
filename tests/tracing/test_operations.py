"""A recorded graph computes what the function does, from the same draws, and holds nothing that may change."""

import pytest
import torch
from torch import nn

from pyro_avi.tracing.lift_draws import lift_draws
from pyro_avi.tracing.operations import record

aten = torch.ops.aten
X, Y = torch.linspace(-1.0, 1.0, 6).reshape(2, 3), torch.linspace(0.5, 2.0, 3)


def replayed(function, *inputs, held_at=None):
    """What the graph of a function gives for other inputs of these shapes, what the function gives, and the graph."""
    held_at = len(inputs) if held_at is None else held_at
    traced, held = record(function, [x.clone() for x in inputs], held_at=held_at)
    others = [(x * 1.5 + 0.25).to(x.dtype) for x in inputs]
    mine = [x.clone() for x in others]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = function(*others)
        torch.manual_seed(0)
        found = traced(*mine[:held_at], *held, *mine[held_at:])
    # With what is written into the inputs.
    return [*found, *mine], [*expected, *others], traced


def gradient(x, y):
    leaf = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad((leaf.exp() * y).sum().log(), [leaf])
    return [grad]


def in_place(x, y):
    rows = x[0]
    rows += y
    x.mul_(2)
    return [rows.sum(), y.clone().add_(x[1])]


def drawn(x, y):
    noise = torch.empty(3).normal_()
    return [x + noise, torch.bernoulli(y.sigmoid()), torch.randn(2)]


def several(x, y):
    one, two = x.split([1, 2], 1)
    values, places = y.sort()
    return [one, two @ two.t(), values, places, *torch.linalg.eigh(x @ x.t())]


def of_constants(x, y):
    written = torch.tensor([1.0, 2.0, 3.0])
    read = float(torch.tensor(2.0).exp()) + int(torch.arange(3).sum())
    written += 1
    return [x * written + read, y * torch.tensor(0.5), torch.tensor(7), None]


def normalized(x, y):
    return [nn.functional.layer_norm(x, (3,), y, y), torch.where(x > 0, x, -x), x.bfloat16().float()]


FUNCTIONS = [gradient, in_place, drawn, several, of_constants, normalized]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_graph_gives_the_bits_of_the_function(function):
    found, expected, traced = replayed(function, X, Y)
    for one, two in zip(found, expected, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)
    assert not [node for node in traced.graph.nodes if node.op == "get_attr"]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_node_has_an_example_of_its_value(function):
    _, _, traced = replayed(function, X, Y)

    class Checked(torch.fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if isinstance(value, torch.Tensor):
                example = node.meta["val"]
                assert (example.shape, example.stride(), example.dtype) == (value.shape, value.stride(), value.dtype)
            return value

    held = len(traced.graph.find_nodes(op="placeholder")) - 2
    Checked(traced).run(X.clone(), Y.clone(), *[torch.ones(3)] * held)


def test_tensors_that_a_function_holds_are_one_input_each():
    weight, other = torch.tensor([1.0, 2.0, 3.0]), nn.Parameter(torch.ones(3))

    def function(x, y):
        return [weight * (x + weight.exp()) * other, weight * y]

    traced, held = record(function, [X, Y], held_at=1)
    assert [x.data_ptr() for x in held] == [weight.data_ptr(), other.data_ptr()]
    assert not any(x.requires_grad for x in held)
    weight.fill_(3.0)
    for one, two in zip(traced(X, *held, Y), function(X, Y), strict=True):
        assert torch.equal(one, two)


def test_tensors_that_nobody_reads_are_no_inputs():
    """On another device they would be the only ones on the CPU."""
    weight, other = torch.ones(3), torch.ones(3)

    def function(x):
        torch.tensor([]), torch.tensor([1.0, 2.0]) + 1, weight * 2
        return [x * other]

    traced, held = record(function, [torch.ones(3)], held_at=1)
    assert [x.data_ptr() for x in held] == [other.data_ptr()] and len(traced.graph.find_nodes(op="placeholder")) == 2


def test_views_of_all_of_a_tensor_are_the_tensor():
    def function(x):
        same = x.detach().view(2, 3).expand(2, 3)
        same.add_(1)
        return [x.exp(), same, x.view(3, 2).detach()]

    found, expected, traced = replayed(function, X)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == [aten.add_.Tensor, aten.exp.default, aten.view.default]


def test_equal_inputs_have_places_of_their_own():
    traced, _ = record(lambda x, y: [x - 2 * y], [Y, Y], held_at=2)
    assert torch.equal(traced(Y, X[0])[0], Y - 2 * X[0])


def test_what_nobody_reads_is_left_out_but_for_draws_and_checks():
    def function(x):
        x.exp().log()
        torch.randn(2)
        torch.linalg.cholesky(x)
        return [x + torch.randn(())]

    (result, _), _, traced = replayed(function, torch.eye(2))
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert aten.exp.default not in targets and targets.count(aten.randn.default) == 2
    assert aten._linalg_check_errors.default in targets
    with pytest.raises(RuntimeError, match="positive-definite"):
        traced(-torch.eye(2))


BUFFER, EVEN = torch.ones(3), torch.tensor([2.0])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [x * float(x.sum())],
        lambda x: [x if x.sum() > 0 else -x],
        lambda x: [x + torch.randn(()).item()],
        # A buffer may change between steps.
        lambda x: [x if BUFFER.all() else -x],
        lambda x: [x if torch.equal(x, BUFFER) else -x],
        # What is written down, and then written over, through another view.
        lambda x: [x + (lambda one: (one.view(1).copy_(x[:1]), one.item())[1])(torch.tensor(2.0))],
        lambda x: [x + torch.empty(()).normal_().item()],
    ],
)
def test_numbers_that_may_change_are_not_read_out(function):
    with pytest.raises(RuntimeError, match="data-dependent"):
        record(function, [torch.ones(3)], held_at=1)


def test_numbers_that_are_known_are_read_out():
    def function(x):
        one = torch.tensor(2.0)
        one.view(1).mul_(3)
        # As torch's own tracer does, the only one of a tensor that is held.
        return [x * one.item() * EVEN.item() if torch.zeros(2).sum() == 0 else x]

    found, expected, _ = replayed(function, torch.ones(3))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[0], 1.75 * torch.full((3,), 12.0))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            lambda x: [torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))],
            "cond takes functions|torch.compiler.disable",
        ),
        (lambda x: [x + torch.randn(3, generator=torch.Generator())], "an argument of type Generator"),
        (lambda x: [torch.mv(torch.eye(3).to_sparse(), x)], "sparse"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(function, words):
    # Of torch's compiler where that has been imported, which runs conditions.
    with pytest.raises(RuntimeError, match=words):
        record(function, [torch.ones(3)], held_at=1)


def test_draws_become_inputs_in_their_order():
    def function(x):
        first = torch.empty(3).normal_()
        return [x + first * torch.rand(3)]

    traced, _ = record(function, [Y], held_at=1)
    program, complete = lift_draws(traced)
    assert complete
    torch.manual_seed(3)
    draws = program()
    torch.manual_seed(3)
    assert torch.equal(traced(Y, *draws)[0], function(Y)[0])
    traced, _ = record(lambda x: [x + torch.bernoulli(x.sigmoid())], [Y], held_at=1)
    assert lift_draws(traced)[1] is False


def test_replicas_are_recorded_below_their_vectorization():
    traced, _ = record(lambda x: [torch.func.vmap(lambda one: (one**2).sum())(x)], [X], held_at=1)
    assert torch.equal(traced(2 * X)[0], (4 * X**2).sum(1))
