"""What the library draws is what torch draws: the same state is left, and numbers differ by rounding alone."""

import ctypes
import itertools

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from pyro_avi.native import draws
from pyro_avi.native.draws import Drawing, drawings_of, natively
from tests.marks import needs_compiler

NORMAL, UNIFORM = torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default
# By operation the rounding of the library, which takes shorter ways in single precision.
ROUNDING = {(NORMAL, torch.float32): 4e-6, (NORMAL, torch.float64): 1e-14, (UNIFORM, torch.float32): 1e-6}
SIZES = [*range(1, 40), 511, 512, 513, 624, 625, 1_000, 12_345]


def program(*calls, returned=None):
    """A program that draws into tensors that it holds; the output is their list, or those at some places of it."""
    graph, root, made = Graph(), nn.Module(), []
    for at, (operation, tensor, *numbers) in enumerate(calls):
        root.register_buffer(f"into_{at}", tensor)
        made.append(graph.call_function(operation, (graph.get_attr(f"into_{at}"), *numbers)))
    graph.output(made if returned is None else [made[at] for at in returned])
    return GraphModule(root, graph)


def drawn_by_torch(calls):
    return [operation(torch.empty_like(tensor), *numbers) for operation, tensor, *numbers in calls]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operation", [NORMAL, UNIFORM])
def test_numbers_and_state_are_those_of_torch(operation, dtype):
    for size in SIZES:
        call = (operation, torch.empty(size, dtype=dtype), -0.5, 2.0)
        draw = natively(program(call))
        torch.manual_seed(size)
        # From anywhere in the words of a state, and where a normal number is left over.
        torch.rand(5 * size), torch.randn(size % 3)
        state = torch.get_rng_state()
        (expected,) = drawn_by_torch([call])
        left = torch.get_rng_state()
        torch.set_rng_state(state)
        (found,) = draw()
        assert torch.equal(torch.get_rng_state(), left), size
        rounding = ROUNDING.get((operation, dtype), 1e-14)
        torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding, msg=str(size))


@needs_compiler
def test_a_program_is_drawn_in_its_order_into_the_same_memory():
    calls = [
        (NORMAL, torch.empty(3, 7)),
        (NORMAL, torch.empty(())),
        (UNIFORM, torch.empty(5, dtype=torch.double), 1.0, 3.0),
        (NORMAL, torch.empty(2, 50), 2.0, 0.1),
    ]
    draw = natively(program(*calls))
    torch.manual_seed(1)
    expected = [drawn_by_torch(calls) for _ in range(3)]
    torch.manual_seed(1)
    for each in expected:
        found = draw()
        torch.testing.assert_close(found, each, rtol=1e-5, atol=1e-5)
        assert [x.data_ptr() for x in found] == [tensor.data_ptr() for _, tensor, *_ in calls]
    # Here words are drawn before words of others, in both.
    twin = natively(program(*calls[::-1]))
    torch.manual_seed(1)
    assert not torch.allclose(twin()[-1], expected[0][0])


@needs_compiler
def test_the_tails_are_as_precise_as_the_middle():
    """Against the formula in double precision: no number is further off than torch's own are."""
    count = 1 << 18
    draw = natively(program((NORMAL, torch.empty(count))))
    torch.manual_seed(0)
    (found,) = draw()
    torch.manual_seed(0)
    first, second = torch.empty(count).uniform_().double().view(-1, 2, 8).unbind(1)
    radius, angle = (-2 * (1 - first).log()).sqrt(), 2 * torch.pi * second
    exact = torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten()
    torch.manual_seed(0)
    error, of_torch = ((x.double() - exact).abs().max() for x in (found, torch.randn(count)))
    assert exact.abs().max() > 4.5 and error < 1e-6 and error <= of_torch


@needs_compiler
def test_a_step_without_draws_leaves_the_state():
    state = torch.get_rng_state()
    assert natively(program())() == [] and torch.equal(torch.get_rng_state(), state)


def test_other_programs_are_left_to_torch():
    normal, empty = (NORMAL, torch.empty(20)), torch.empty(4, 6)
    assert [each.operation for each in drawings_of(program(normal, (UNIFORM, empty)))] == [NORMAL, UNIFORM]
    assert drawings_of(program(normal, normal[:2], returned=[1, 0])) is None
    assert drawings_of(program((torch.ops.aten.exponential_.default, empty))) is None
    for other in (empty.T, torch.empty(20, dtype=torch.half), torch.empty(20, device="meta")):
        assert natively(program(normal, (NORMAL, other))) is None


@pytest.fixture
def unknown():
    """Nothing is known of the library before and after the test."""
    draws._draw_all.cache_clear()
    yield
    draws._draw_all.cache_clear()


def test_without_a_compiler_torch_draws(unknown, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert natively(program((NORMAL, torch.empty(20)))) is None


@needs_compiler
def test_a_library_that_draws_otherwise_is_not_used():
    draw_all, spare = draws._draw_all(), torch.empty(1)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(draws.Draw), ctypes.c_int64)
    assert draws._draws_as_torch(draw_all)

    @function
    def of_one_word_more(state, each, count):
        draw_all(state, each, count)
        draw_all(state, (draws.Draw * 1)(Drawing(UNIFORM, spare, 0.0, 1.0).draw()), 1)

    @function
    def of_other_numbers(state, each, count):
        draw_all(state, each, count)
        for at in range(count):
            memory = (ctypes.c_double if each[at].is_double else ctypes.c_float).from_address(each[at].to)
            memory.value += 1e-3

    assert not draws._draws_as_torch(of_one_word_more) and not draws._draws_as_torch(of_other_numbers)


@needs_compiler
def test_the_same_seed_gives_the_same_bits():
    draw = natively(program((NORMAL, torch.empty(1_001)), (NORMAL, torch.empty(3))))
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append([x.clone() for x in draw()])
    assert all(map(torch.equal, *found[:2])) and not any(map(torch.equal, *found[1:]))


@needs_compiler
def test_numbers_are_normal_whatever_was_drawn_before():
    """Correlations of a draw with the one before it, and its moments: 10^6 numbers, five standard errors of 1e-3."""
    draw = natively(program((NORMAL, torch.empty(100_003))))
    torch.manual_seed(0)
    before, count = None, 0
    moments = torch.zeros(4, dtype=torch.double)
    for x in itertools.islice(iter(lambda: draw()[0].double(), None), 10):
        moments[:3] += torch.stack([x.sum(), (x**2 - 1).sum(), (x**3).sum()])
        moments[3] += 0.0 if before is None else (x * before).sum()
        before, count = x, count + len(x)
    errors = torch.tensor([1.0, 2.0, 15.0, 1.0], dtype=torch.double).sqrt() / count**0.5
    assert (moments / count / errors).abs().max() < 5
