"""Families against closed forms."""

import pytest
import torch
from torch.distributions import Normal

import pyro_avi as avi
from pyro_avi.families import Family


@pytest.fixture
def parameters():
    return torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_diagonal_normal_is_a_product_of_normals(parameters):
    q = avi.DiagonalNormal().distribution(parameters)
    value = torch.linspace(-2, 2, 3, dtype=torch.float64)

    loc, log_scale = parameters[..., :3], parameters[..., 3:]
    expected = -0.5 * ((value - loc) / log_scale.exp()) ** 2 - log_scale - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    assert (q.batch_shape, q.event_shape) == ((4, 5), (3,))
    torch.testing.assert_close(q.log_prob(value), expected.sum(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(q.log_prob(value), Normal(loc, log_scale.exp()).log_prob(value).sum(-1))
    torch.testing.assert_close(q.mean, loc)
    torch.testing.assert_close(q.stddev, log_scale.exp())
    assert q.has_rsample


def test_coordinates_are_the_same_normals_one_by_one(parameters):
    family = avi.DiagonalNormal()

    q = family.coordinates(parameters)

    assert (q.batch_shape, q.event_shape) == ((4, 5, 3), ())
    value = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(value).sum(-1), family.distribution(parameters).log_prob(value))


@pytest.mark.parametrize("shape", [(3,), (7, 3), (2, 7, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_initial_parameters_give_the_location_and_the_scale(shape, dtype):
    family = avi.DiagonalNormal()
    loc = torch.arange(torch.Size(shape).numel(), dtype=dtype).view(shape)

    parameters = family.initial(loc, 0.2)
    q = family.distribution(parameters)

    assert parameters.shape == (*shape[:-1], family.num_parameters(shape[-1]))
    assert parameters.dtype == dtype
    torch.testing.assert_close(q.mean, loc)
    torch.testing.assert_close(q.stddev, torch.full_like(loc, 0.2))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_two_parameters_a_latent(count):
    assert avi.DiagonalNormal().num_parameters(count) == 2 * count


def test_gradients_reach_every_parameter(parameters):
    parameters.requires_grad_()
    torch.manual_seed(0)
    avi.DiagonalNormal().distribution(parameters).rsample().pow(2).sum().backward()
    assert parameters.grad.isfinite().all() and (parameters.grad != 0).all()


def test_a_family_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Family()
