"""The state of a compiled step, and its loss, without compiling anything."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_avi as avi
from pyro_avi.optimization.adam import Adam
from pyro_avi.optimization.gradient import LossAndGrads, RowGrads
from pyro_avi.optimization.step_state import StepState, Update
from pyro_avi.optimization.traced_step import surrogate_loss
from pyro_avi.tracing.operations import record


def state_of(clip_norm=None):
    """A vector that is not moved, one that is, and a table."""
    fixed, vector, table = torch.zeros(2), torch.ones(3), torch.arange(8.0).view(4, 2)
    updates = [Update(Adam(fixed), 0), Update(Adam(vector), 0)]
    state = StepState([fixed, vector], updates, {"table": Update(Adam(table, rows=True), 1)}, clip_norm)
    state.set_rates([0.1, 0.2])
    return state


def result(index=(3, 1)):
    rows = [RowGrads("table", torch.tensor(index), torch.tensor([[3.0, 0.0], [0.0, 4.0]]))]
    rows.append(RowGrads("elsewhere", None, torch.full((1, 2), 12.0)))
    return LossAndGrads(torch.tensor(7.0), [None, torch.zeros(3)], rows)


def copies(state):
    return [tensor.clone() for tensor in state.flat()]


def test_a_step_moves_the_rows_of_a_batch_by_the_rate_of_their_group_and_returns_what_is_elsewhere():
    state = state_of()
    rest = state.move(result(), state.tensors)
    fixed, vector, table = state.tensors.values
    assert torch.equal(fixed, torch.zeros(2)) and torch.equal(vector, torch.ones(3))
    # The first step of Adam is the rate, in the direction of the gradient.
    torch.testing.assert_close(table, torch.tensor([[0.0, 1.0], [2.0, 2.8], [4.0, 5.0], [5.8, 7.0]]))
    assert state.tensors.moments[2].visits.flatten().tolist() == [0, 1, 0, 1]
    assert [rows.table for rows in rest] == ["elsewhere"] and rest[0].grad.tolist() == [[12.0, 12.0]]


def test_the_norm_is_that_of_all_gradients_together_also_of_those_moved_elsewhere():
    # Of 3, 4, 12 and 12: 17.69.
    rest = state_of(clip_norm=1.0).move(result(), state_of().tensors)
    torch.testing.assert_close(rest[0].grad, torch.full((1, 2), 12 / (9 + 16 + 144 + 144) ** 0.5))


def test_a_trial_is_rolled_back_to_the_last_bit():
    state = state_of()
    state.move(result((0, 1)), state.tensors)
    before = copies(state)
    with state.rolled_back(result()):
        state.move(result(), state.tensors)
        assert not all(map(torch.equal, copies(state), before))
    assert all(map(torch.equal, copies(state), before))
    # Rows other than those of the result are not rolled back.
    with state.rolled_back(result((3, 2))):
        state.move(result(), state.tensors)
    changed = (state.tensors.values[2] != before[2]).any(1)
    assert changed.tolist() == [False, True, False, False]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_moves_nothing(loss):
    state = state_of()
    values = [tensor.clone() for tensor in state.tensors.values]
    grads = [None, torch.full((3,), float("nan"))]
    state.move(LossAndGrads(torch.tensor(loss), grads, result().rows), state.tensors)
    assert all(map(torch.equal, state.tensors.values, values))


def test_the_outcome_of_a_step_is_its_loss_and_its_gradients_as_first_moments():
    state = state_of()
    rest = state.move(result(), state.tensors)
    taken = LossAndGrads(torch.tensor(7.0), None, rest)
    loss, fixed, vector, table, elsewhere = state.outcome(result(), taken)
    assert loss.tolist() == [7.0] and not fixed.any() and not vector.any()
    # A tenth of the gradient, in the order of the batch.
    torch.testing.assert_close(table, torch.tensor([[0.3, 0.0], [0.0, 0.4]]))
    assert elsewhere.tolist() == [[12.0, 12.0]]


def test_other_memory_is_used_once_the_state_has_moved_there():
    state = state_of()
    state.move_to(copies(state))
    state.move(result(), state.tensors)
    assert state.parameters[2].data_ptr() == state.tensors.values[2].data_ptr()
    assert state.parameters[2][1, 1] == pytest.approx(2.8) and state.tensors.values[2].shape == (4, 2)


def normal(x, seen):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    seen.append(z.sum().item())
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(),
        TraceMeanField_ELBO(),
        avi.StickingTheLandingELBO(),
        Trace_ELBO(3),
        Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=0),
        avi.StickingTheLandingELBO(3, vectorize_particles=True, max_plate_nesting=0),
        avi.ScoreFunctionELBO(2),
        avi.LeaveOneOutELBO(3, continuous=True),
        avi.VimcoELBO(3, continuous=True),
        avi.DoublyReparameterizedELBO(1),
    ],
    ids=lambda elbo: f"{type(elbo).__name__}, {elbo.num_particles}{' at once' if elbo.vectorize_particles else ''}",
)
def test_the_surrogate_has_the_gradient_of_the_elbo(elbo):
    x, scale = torch.tensor([1.0, -2.0]), torch.tensor([0.3, 0.5], requires_grad=True)

    def guide(x, seen):
        pyro.sample("z", dist.Normal(x * scale, scale).to_event(1))

    losses = []
    for loss in (elbo.differentiable_loss, lambda *args: surrogate_loss(elbo, *args[:2], args[2:], {})):
        torch.manual_seed(0)
        seen = []
        losses.append(loss(normal, guide, x, seen))
        # The model itself still reads numbers.
        # Twice a draw by one of them.
        calls = 1 if elbo.vectorize_particles else elbo.num_particles
        assert len(seen) in (calls, 2 * calls) and all(type(number) is float for number in seen)
    one, two = (torch.autograd.grad(loss, scale)[0] for loss in losses)
    assert torch.equal(one, two)
    torch.testing.assert_close(losses[0], losses[1])


def test_the_surrogate_can_be_traced_though_pyro_reads_the_value_of_the_elbo():
    def model(x):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(x, 1.0)), 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x, 1.0))

    def trace(loss):
        with pyro.validation_enabled(False):
            return record(lambda x: [loss(model, guide, x)], [torch.tensor(1.0)], held_at=1)

    elbo = Trace_ELBO()
    trace(lambda model, guide, x: surrogate_loss(elbo, model, guide, (x,), {}))
    with pytest.raises(RuntimeError, match="data-dependent"):
        trace(elbo.differentiable_loss)


@pytest.mark.parametrize("swapped", [False, True])
def test_parameters_that_are_moved_at_once_move_as_each_alone(swapped):
    values = [x.double() for x in (torch.ones(3), torch.full((2, 2), 0.5), torch.tensor(2.0))] + [torch.ones(2)]
    rates = [torch.tensor([0.1], dtype=torch.double), torch.tensor([0.3], dtype=torch.double)]
    together, apart = ([Adam(x.clone()) for x in values] for _ in range(2))
    updates = [Update(adam, (i + swapped) % 2) for i, adam in enumerate(together)]
    state = StepState([adam.parameter for adam in together], updates, {}, None)
    state.tensors.rates.extend(rates)
    # One of them has been moved before.
    for adam in (together[1], apart[1]):
        adam.step(None, torch.full((2, 2), 0.25), 0.1)
    for step in range(3):
        grads = [x.sin() + step for x in values]
        state.move(LossAndGrads(torch.tensor(1.0), grads, []), state.tensors)
        for i, (adam, grad) in enumerate(zip(apart, grads, strict=True)):
            adam.step(None, grad, float(rates[i % 2]))
    for one, two in zip(together, apart, strict=True):
        assert torch.equal(one.moments.first, two.moments.first) and torch.equal(one.moments.visits, two.moments.visits)
        # The twin: by the rate of the other group it ends elsewhere.
        rtol = 1e-14 if one.values.dtype == torch.double else 1e-6
        assert torch.allclose(one.values, two.values, rtol=rtol, atol=0.0) is not swapped
