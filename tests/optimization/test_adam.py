"""Adam, as a whole and row by row, against ``torch.optim.Adam`` and against itself on a table of one row."""

import pytest
import torch

from pyro_avi.optimization.adam import Adam

N, P, STEPS = 7, 3, 40


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("order", ["none", "in order", "any order"])
@pytest.mark.parametrize("options", [{}, {"betas": (0.5, 0.7), "eps": 1e-3}, {"betas": (0.0, 0.9)}])
def test_with_every_row_in_every_batch_it_is_adam(draw, order, options):
    ours = draw(N, P)
    theirs = torch.nn.Parameter(ours.clone())
    adam = torch.optim.Adam([theirs], **options)
    rowwise = Adam(ours, rows=True, **options)
    for step in range(STEPS):
        # Rates that change, gradients of any size.
        lr, grad = 0.1 / (1 + step), draw(N, P) * 10.0 ** (step % 5 - 2)
        index = {"none": None, "in order": torch.arange(N), "any order": torch.randperm(N)}[order]
        rowwise.step(index, grad if index is None else grad[index], lr)
        adam.param_groups[0]["lr"] = lr
        theirs.grad = grad
        adam.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (P,), (2, 3, P)])
def test_as_a_whole_it_is_adam(draw, shape):
    ours = draw(*shape)
    theirs = torch.nn.Parameter(ours.clone())
    adam, mine = torch.optim.Adam([theirs], lr=0.05), Adam(ours)
    for _ in range(STEPS):
        grad = draw(*shape)
        theirs.grad = grad
        mine.step(None, grad, 0.05)
        adam.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=0.0, atol=1e-12)
    assert mine.moments.visits == STEPS


def test_a_row_moves_as_if_it_were_alone(draw):
    start = draw(N, P)
    table = start.clone()
    rowwise = Adam(table, rows=True)
    alone = [Adam(row.clone()[None], rows=True) for row in start]
    for step in range(STEPS):
        # Row 0 is in every batch, row 6 in none, the others now and then.
        index = torch.tensor([n for n in torch.randperm(N - 1).tolist() if n == 0 or step % (n + 1) == 0])
        grad, before = draw(len(index), P), table.clone()
        rowwise.step(index, grad, lr=0.05)
        for n, row_grad in zip(index.tolist(), grad, strict=True):
            alone[n].step(None, row_grad[None], lr=0.05)
        others = torch.ones(N, dtype=torch.bool).index_fill(0, index, False)
        assert torch.equal(table[others], before[others]) and (table[index] != before[index]).all()
    assert torch.equal(table, torch.cat([each.parameter for each in alone]))
    assert torch.equal(table[6], start[6])


def test_dense_adam_on_the_same_batches_moves_other_rows(draw):
    # The twin of the test above: it would notice momentum of batches that are long gone.
    table = torch.nn.Parameter(draw(N, P))
    adam = torch.optim.Adam([table])
    for rows in ([0, 1], [2, 3]):
        before = table.detach().clone()
        table.grad = torch.zeros(N, P, dtype=torch.float64).index_copy_(0, torch.tensor(rows), draw(2, P))
        adam.step()
    assert (table[:2] != before[:2]).all()


def test_a_parameter_is_changed_in_place_without_a_graph(draw):
    table = torch.nn.Parameter(draw(N, P))
    view, before = table.data, table.detach().clone()
    Adam(table, rows=True).step(torch.tensor([2]), draw(1, P), lr=0.1)
    assert table.grad is None and table.requires_grad and table.is_leaf
    assert view.data_ptr() == table.data_ptr() and (table[2] != before[2]).all()


def test_the_first_step_of_a_row_is_the_learning_rate_whenever_it_comes():
    table = torch.zeros(2, 1, dtype=torch.float64)
    rowwise = Adam(table, rows=True)
    for _ in range(100):
        rowwise.step(torch.tensor([0]), torch.ones(1, 1, dtype=torch.float64), lr=1e-3)
    rowwise.step(torch.tensor([1]), -5 * torch.ones(1, 1, dtype=torch.float64), lr=1e-3)
    torch.testing.assert_close(table[1].item(), 1e-3, rtol=1e-6, atol=0.0)
    assert rowwise.moments.visits.flatten().tolist() == [100.0, 1.0]


# --- a row several times in a batch


def test_gradients_of_equal_rows_are_added_up_and_count_as_one_visit(draw):
    index = torch.tensor([4, 1, 4, 0, 1, 4])
    different = index.unique()
    one, other = (Adam(draw(N, P) * 0, rows=True) for _ in range(2))
    for _ in range(3):
        grad = draw(len(index), P)
        sums = torch.stack([grad[index == row].sum(0) for row in different])
        one.step(index, grad, lr=0.1)
        other.step(different, sums, lr=0.1)
    torch.testing.assert_close(one.parameter, other.parameter, rtol=0.0, atol=1e-14)
    assert torch.equal(one.moments.visits, other.moments.visits) and one.moments.visits.max() == 3


def test_opposite_gradients_of_one_row_leave_it_where_it_is():
    table = torch.zeros(3, 1)
    Adam(table, rows=True).step(torch.tensor([1, 2, 1]), torch.tensor([[5.0], [1.0], [-5.0]]), lr=0.99)
    # The twin, row 2, moves by the rate.
    torch.testing.assert_close(table.flatten(), torch.tensor([0.0, 0.0, -0.99]))
