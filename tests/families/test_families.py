"""What every family promises, and each against its closed forms."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import Normal
from torch.fx.experimental.proxy_tensor import make_fx
from zuko.transforms import MonotonicRQSTransform

import pyro_avi as avi
from pyro_avi import families
from pyro_avi.families import Family
from tests.discovery import classes_in
from tests.own_family import SkewedFamily

# Families that ask for settings, and settings that make a difference.
SETTINGS = {
    "LowRankNormal": lambda: avi.LowRankNormal(2),
    "LowRankNormal of rank 1": lambda: avi.LowRankNormal(rank=1),
    "LowRankNormal of full rank and more": lambda: avi.LowRankNormal(rank=5),
    "MarkovNormal": lambda: avi.MarkovNormal(1),
    "MarkovNormal of order 2": lambda: avi.MarkovNormal(order=2),
    "Conditional": lambda: avi.Conditional(avi.MultivariateNormal()),
    "Flow": lambda: avi.Flow(transforms=2, hidden=(8, 6), context=3, bins=4),
    "Flow of one transform": lambda: avi.Flow(transforms=1, hidden=[7], context=1, bins=2),
    "RowFlow": lambda: avi.RowFlow(transforms=2, hidden=5, bins=4),
    "RowFlow of one transform": lambda: avi.RowFlow(transforms=1, hidden=3, bins=2),
    "a family of the test's own": SkewedFamily,
}
_CLASSES = classes_in(families, Family)
FAMILIES = {**_CLASSES, **SETTINGS}
# Those whose members are normals, and those that start as the product of normals.
NORMAL = (avi.DiagonalNormal, avi.MultivariateNormal, avi.LowRankNormal, avi.MarkovNormal)
NORMAL_AT_FIRST = {*NORMAL, avi.Conditional, avi.Flow, avi.RowFlow} - {avi.LowRankNormal}
SHAPES = [(), (5,), (5, 1), (2, 5)]


@pytest.fixture(params=FAMILIES)
def kind(request):
    return request.param


def prepare(kind, num_latents, dtype=torch.float64):
    """A family ready for use, its shared weights anything but those it starts with."""
    family = FAMILIES[kind]()
    family.prepare(num_latents)
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return family.to(dtype)


def prepared(family, num_latents):
    family.prepare(num_latents)
    return family.double()


def random(family, num_latents, shape=(4,), dtype=torch.float64):
    return torch.randn(*shape, family.num_parameters(num_latents), dtype=dtype) / 2


def test_no_public_family_is_left_out():
    public = set(families.__all__) - {"Family"}
    assert public <= set(_CLASSES)
    assert set(families.__all__) <= set(avi.__all__)


@pytest.mark.parametrize("num_latents, dtype", [(1, torch.float64), (3, torch.float32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(kind, shape, num_latents, dtype):
    family = prepare(kind, num_latents, dtype)
    parameters = random(family, num_latents, shape, dtype)

    q = family.distribution(parameters)
    assert (q.batch_shape, q.event_shape, q.has_rsample) == (shape, (num_latents,), True)
    for sample_shape in [(), (7,), (2, 3)]:
        z = q.rsample(sample_shape)
        assert (z.shape, z.dtype) == ((*sample_shape, *shape, num_latents), dtype)
        assert q.log_prob(z).shape == (*sample_shape, *shape)
        assert q.log_prob(z).dtype == dtype
    assert q.log_prob(torch.zeros(num_latents, dtype=dtype)).shape == shape


@pytest.mark.parametrize(
    "num_latents, shape, target", [(3, (), (4,)), (1, (5,), (4, 5)), (3, (5, 1), (5, 6)), (3, (2, 5), (3, 2, 5))]
)
def test_expanded_it_is_the_same_many_times(kind, num_latents, shape, target):
    family = prepare(kind, num_latents)
    q = family.distribution(random(family, num_latents, shape))

    wide = q.expand(target)

    z = wide.rsample()
    assert z.shape == (*target, num_latents)
    # Draws of their own, not one draw repeated.
    assert z.unique().numel() == z.numel()
    assert wide.log_prob(z).shape == target
    torch.testing.assert_close(wide.log_prob(z), q.log_prob(z.clone()))


def test_a_row_is_a_row_alone(kind):
    family = prepare(kind, 3)
    parameters, z = random(family, 3), torch.randn(4, 3, dtype=torch.float64)

    together = family.distribution(parameters).log_prob(z)

    alone = [family.distribution(row).log_prob(value) for row, value in zip(parameters, z, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize("num_latents, dtype", [(1, torch.float64), (6, torch.float32)])
@pytest.mark.parametrize("shape", [(), (2, 5)])
def test_initially_location_and_scale(kind, shape, num_latents, dtype):
    family = FAMILIES[kind]()
    family.prepare(num_latents)
    family = family.to(dtype)
    loc = torch.randn(*shape, num_latents, dtype=dtype)
    state = torch.get_rng_state()

    parameters = family.initial(loc, 0.2)

    assert torch.equal(torch.get_rng_state(), state)
    assert parameters.shape == (*shape, family.num_parameters(num_latents))
    assert parameters.dtype == dtype
    q = family.distribution(parameters)
    if type(family) not in NORMAL_AT_FIRST:
        torch.testing.assert_close(q.mean, loc)
        torch.testing.assert_close(q.stddev, torch.full_like(loc, 0.2))
    else:
        normal = Normal(loc, 0.2)
        z = normal.sample((9,))
        torch.testing.assert_close(q.log_prob(z), normal.log_prob(z).sum(-1), rtol=1e-5, atol=1e-4)


def test_initial_draws_of_a_flow_are_those_of_a_normal():
    family = prepared(avi.Flow(), 3)
    q = family.distribution(family.initial(torch.arange(3.0).double(), 0.2))

    z = q.rsample((1000,))

    torch.manual_seed(0)
    prepared(avi.Flow(), 3)
    torch.testing.assert_close(z, torch.arange(3.0) + 0.2 * torch.randn(1000, 3, dtype=torch.float64))


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("num_latents", [1, 2, 50])
def test_the_initial_factor_is_no_saddle(rank, num_latents):
    family = avi.LowRankNormal(rank)
    q = family.distribution(family.initial(torch.zeros(num_latents).double(), 1.0))
    assert (q.cov_factor.abs() > 1e-5).all()
    columns = q.cov_factor.T
    assert torch.unique(columns, dim=0).shape == columns.shape
    # Close to independent: the factor explains a fifth of a variance at most.
    assert (q.cov_factor.square().sum(-1) < 0.2 + 1e-9).all()


def loss_of(family, parameters, target):
    q = family.distribution(parameters)
    z = q.rsample((16,))
    return (q.log_prob(z) - target.log_prob(z)).mean()


@pytest.mark.parametrize("num_latents", [1, 3])
def test_gradients_reach_every_parameter(kind, num_latents):
    family = FAMILIES[kind]()
    family.prepare(num_latents)
    family = family.double()
    parameters = family.initial(torch.ones(2, num_latents).double(), 0.3).requires_grad_()
    mix = torch.eye(num_latents).double() + 0.3
    target = dist.MultivariateNormal(torch.zeros(num_latents).double(), mix @ mix.T)
    trained = [parameters, *family.parameters()]

    # Of a flow, the first step moves the last layers off the zero that hides what is before them, the second the context
    # off the zero that hides the weights which read it.
    for _ in range(3):
        grads = torch.autograd.grad(loss_of(family, parameters, target), trained)
        with torch.no_grad():
            for parameter, grad in zip(trained, grads, strict=True):
                parameter.sub_(grad, alpha=0.1)

    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0] != 0).all()
    masks = {id(m.weight): m.mask for m in family.modules() if "mask" in dict(m.named_buffers(recurse=False))}
    for parameter, grad in zip(trained, grads, strict=True):
        # Of an unmasked weight only: the others are no connection.
        assert ((grad != 0) | ~masks.get(id(parameter), torch.ones_like(grad).bool())).all()


def test_the_first_step_moves_what_the_rest_waits_for():
    family = prepared(avi.Flow(transforms=2, hidden=(8,), context=3), 2)
    parameters = family.initial(torch.ones(2, 2).double(), 0.3).requires_grad_()
    loss = loss_of(family, parameters, dist.Normal(torch.zeros(2), 1.0).to_event(1))

    rows, *weights = torch.autograd.grad(loss, [parameters, *family.parameters()])

    assert not parameters[:, 4:].any()
    assert rows[:, :4].all() and not rows[:, 4:].any()
    moved = {name for (name, _), grad in zip(family.named_parameters(), weights, strict=True) if grad.any()}
    assert moved == {name for name, weight in family.named_parameters() if not weight.any()}


def test_it_can_be_traced_as_a_graph(kind):
    family = prepare(kind, 2)
    parameters = random(family, 2)

    def draw_and_weigh(parameters):
        q = family.distribution(parameters)
        z = q.rsample()
        return z.sum() + q.log_prob(z).sum()

    with pyro.validation_enabled(False):
        graph = make_fx(draw_and_weigh)(parameters)

    torch.manual_seed(1)
    expected = draw_and_weigh(parameters + 1)
    torch.manual_seed(1)
    torch.testing.assert_close(graph(parameters + 1), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_it_can_be_traced_by_jit(kind):
    family = prepare(kind, 2).requires_grad_(False)
    parameters = random(family, 2)

    def draw_and_weigh(parameters):
        q = family.distribution(parameters)
        z = q.rsample()
        return z.sum() + q.log_prob(z).sum()

    with pyro.validation_enabled(False):
        traced = torch.jit.trace(draw_and_weigh, (parameters,), check_trace=False)

    torch.manual_seed(1)
    expected = draw_and_weigh(parameters + 1)
    torch.manual_seed(1)
    torch.testing.assert_close(traced(parameters + 1), expected)


def test_every_tensor_is_where_the_parameters_are(kind):
    family = prepare(kind, 3, torch.float32).to("meta")
    parameters = random(family, 3, dtype=torch.float32).to("meta")

    with pyro.validation_enabled(False):
        q = family.distribution(parameters)
        z = q.rsample()
        of_draw, of_other = q.log_prob(z), q.log_prob(torch.empty_like(z))

    # A tensor left elsewhere would have raised an error.
    assert {x.device.type for x in (z, of_draw, of_other)} == {"meta"}
    assert family.initial(torch.zeros(4, 3, device="meta"), 0.1).shape == parameters.shape


def test_settings_make_the_same_family_again(kind):
    family = FAMILIES[kind]()

    again = type(family)(**family.settings())

    assert again.describe() == family.describe()
    assert repr(again) == repr(family)
    assert again.num_parameters(3) == family.num_parameters(3)
    plain = (int, float, str, list, Family)
    assert all(isinstance(value, plain) for value in family.settings().values())
    # As in Python: what is printed makes it, too.
    assert eval(repr(family), {**_CLASSES, "SkewedFamily": SkewedFamily}).describe() == family.describe()


def test_how_a_family_is_printed():
    assert repr(avi.DiagonalNormal()) == "DiagonalNormal()"
    assert repr(avi.Flow(hidden=(8,))) == "Flow(transforms=2, hidden=[8], context=8, bins=8)"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda family: pickle.loads(pickle.dumps(family))])
def test_a_copy_is_the_same_and_another(kind, copied):
    family = prepare(kind, 3)
    parameters, z = random(family, 3), torch.randn(4, 3).double()
    expected = family.distribution(parameters).log_prob(z)

    again = copied(family)

    assert again.describe() == family.describe()
    torch.testing.assert_close(again.distribution(parameters).log_prob(z), expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    torch.testing.assert_close(family.distribution(parameters).log_prob(z), expected, rtol=0, atol=0)


def test_weights_are_state(kind):
    family, other = prepare(kind, 3), prepare(kind, 3)
    parameters, z = random(family, 3), torch.randn(4, 3).double()

    other.load_state_dict(family.state_dict())

    expected = family.distribution(parameters).log_prob(z)
    torch.testing.assert_close(other.distribution(parameters).log_prob(z), expected, rtol=0, atol=0)


def test_quantiles_are_those_of_the_draws(kind):
    family = prepare(kind, 2)
    parameters, q = random(family, 2, (2, 3)), torch.tensor([[0.1], [0.5], [0.9]])
    state = torch.get_rng_state()

    quantiles = family.quantile(parameters, q)

    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(family.quantile(parameters, q), quantiles)
    assert quantiles.shape == (3, 1, 2, 3, 2)
    assert family.quantile(parameters, torch.tensor(0.5)).shape == (2, 3, 2)
    below = (family.distribution(parameters).sample((4000,))[:, None, None] <= quantiles).double().mean(0)
    # Of 4,000 draws, where the quantiles may be those of 2,000 others.
    error = 0.5 * (1 / 4000 + 1 / 2000) ** 0.5
    assert error < 0.02
    assert (below - q[..., None, None, None]).abs().max() < 5 * error


def test_marginals_are_those_of_the_draws(kind):
    family = prepare(kind, 3)
    parameters = random(family, 3, (2,))
    normals = family.marginals(parameters)
    if normals is None:
        assert type(family) not in NORMAL and not family.independent
        return
    assert (normals.batch_shape, normals.event_shape) == ((2, 3), ())
    scores = (family.distribution(parameters).sample((4000,)) - normals.loc) / normals.scale
    # Means and variances of standard normals, with their standard errors.
    assert scores.mean(0).abs().max() < 5 / 4000**0.5
    assert (scores.var(0) - 1).abs().max() < 5 * (2 / 4000) ** 0.5


# The normals.


def covariance_of(scale, lower):
    """Of a multivariate normal, number by number."""
    count = len(scale)
    factor = torch.zeros(count, count, dtype=torch.float64)
    entries = iter(lower)
    for i in range(count):
        for j in range(i):
            factor[i, j] = scale[i] * next(entries)
        factor[i, i] = scale[i]
    return factor @ factor.T


def test_the_diagonal_normal_is_a_product_of_normals():
    parameters = torch.randn(4, 5, 6, dtype=torch.float64)
    q = avi.DiagonalNormal().distribution(parameters)
    value = torch.linspace(-2, 2, 3, dtype=torch.float64)

    loc, log_scale = parameters[..., :3], parameters[..., 3:]
    expected = -0.5 * ((value - loc) / log_scale.exp()) ** 2 - log_scale - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    assert (q.batch_shape, q.event_shape) == ((4, 5), (3,))
    torch.testing.assert_close(q.log_prob(value), expected.sum(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(q.log_prob(value), Normal(loc, log_scale.exp()).log_prob(value).sum(-1))
    torch.testing.assert_close(q.mean, loc)
    torch.testing.assert_close(q.stddev, log_scale.exp())


def test_coordinates_are_the_same_normals_one_by_one():
    family, parameters = avi.DiagonalNormal(), torch.randn(4, 5, 6, dtype=torch.float64)

    q = family.coordinates(parameters)

    assert (q.batch_shape, q.event_shape) == ((4, 5, 3), ())
    value = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(value).sum(-1), family.distribution(parameters).log_prob(value))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_the_multivariate_normal_has_the_covariance_of_its_formula(count):
    parameters = random(avi.MultivariateNormal(), count)
    q, z = avi.MultivariateNormal().distribution(parameters), torch.randn(4, count).double()

    loc, log_scale, lower = parameters.split([count, count, count * (count - 1) // 2], -1)
    covariance = torch.stack([covariance_of(*row) for row in zip(log_scale.exp(), lower, strict=True)])
    expected = torch.distributions.MultivariateNormal(loc, covariance)
    torch.testing.assert_close(q.covariance_matrix, covariance)
    torch.testing.assert_close(q.log_prob(z), expected.log_prob(z))
    torch.testing.assert_close(q.mean, loc)


@pytest.mark.parametrize("count, rank", [(1, 1), (3, 1), (5, 2), (2, 3)])
def test_the_low_rank_normal_has_the_covariance_of_its_formula(count, rank):
    family = avi.LowRankNormal(rank)
    parameters = random(family, count)
    q, z = family.distribution(parameters), torch.randn(4, count).double()

    loc, log_scale, factor = parameters.split([count, count, count * rank], -1)
    factor = factor.reshape(4, count, rank) * log_scale.exp()[..., None]
    covariance = factor @ factor.mT + torch.diag_embed((2 * log_scale).exp())
    expected = torch.distributions.MultivariateNormal(loc, covariance)
    torch.testing.assert_close(q.covariance_matrix, covariance)
    torch.testing.assert_close(q.log_prob(z), expected.log_prob(z))
    torch.testing.assert_close(q.mean, loc)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_normal_is_a_member(count):
    root = torch.randn(count, count).double()
    covariance = root @ root.T + 0.1 * torch.eye(count)
    cholesky = torch.linalg.cholesky(covariance)
    scale = cholesky.diagonal()
    row, column = torch.tril_indices(count, count, -1)

    parameters = torch.cat([torch.ones(count).double(), scale.log(), (cholesky / scale[:, None])[row, column]])

    torch.testing.assert_close(avi.MultivariateNormal().distribution(parameters).covariance_matrix, covariance)


def test_every_normal_of_low_rank_is_a_member():
    factor, scale = torch.randn(6, 2).double(), torch.rand(6).double() + 0.1

    parameters = torch.cat([torch.ones(6).double(), scale.log(), (factor / scale[:, None]).flatten()])

    expected = factor @ factor.T + scale.square().diag()
    torch.testing.assert_close(avi.LowRankNormal(2).distribution(parameters).covariance_matrix, expected)


@pytest.mark.parametrize("count", range(1, 40))
def test_the_number_of_latents_follows_from_that_of_parameters(count):
    normals = (
        avi.DiagonalNormal(),
        avi.MultivariateNormal(),
        avi.LowRankNormal(3),
        avi.MarkovNormal(1),
        avi.MarkovNormal(7),
    )
    for family in normals:
        assert family.distribution(torch.zeros(family.num_parameters(count))).event_shape == (count,)


def test_numbers_of_parameters():
    count = 10
    counts = [family.num_parameters(count) for family in (avi.DiagonalNormal(), avi.MultivariateNormal())]
    assert counts == [20, 65]
    assert avi.LowRankNormal(3).num_parameters(count) == 50
    assert avi.Flow(context=7).num_parameters(count) == 27
    assert avi.DiagonalNormal().num_parameters(0) == 0


# The flow.


@pytest.fixture
def inversions(monkeypatch):
    """The calls that invert a spline."""
    calls, inverse = [], MonotonicRQSTransform._inverse
    monkeypatch.setattr(MonotonicRQSTransform, "_inverse", lambda self, y: calls.append(y) or inverse(self, y))
    return calls


def grid(count, size, width):
    axis = torch.linspace(-width, width, size, dtype=torch.float64)
    return torch.stack(torch.meshgrid([axis] * count, indexing="ij"), -1), (2 * width / (size - 1)) ** count


@pytest.mark.parametrize("kind", ["Flow", "Flow of one transform"])
@pytest.mark.parametrize("num_latents, size", [(1, 2001), (2, 181)])
@torch.no_grad()
def test_the_density_of_a_flow_integrates_to_one(kind, num_latents, size):
    family = prepare(kind, num_latents)
    q = family.distribution(random(family, num_latents, ()))
    # The splines map [-5, 5] onto itself.
    points, volume = grid(num_latents, size, width=6.0)
    points, volume = q.loc + q.log_scale.exp() * points, volume * q.log_scale.sum().exp()

    mass = float((q.log_prob(points).exp() * volume).sum())

    assert abs(mass - 1) < 2e-3
    # The grid would see it, if the slope were left out.
    density = q._density
    q._density = lambda eps, log_slope: density(eps, 0 * log_slope)
    assert abs(float((q.log_prob(points).exp() * volume).sum()) - 1) > 2e-2


@pytest.mark.parametrize("kind", ["Flow", "Flow of one transform"])
@pytest.mark.parametrize("num_latents", [1, 2, 4])
def test_the_density_of_a_draw_is_that_of_the_change_of_variables(kind, num_latents, monkeypatch):
    family = prepare(kind, num_latents)
    q = family.distribution(random(family, num_latents, (6,)))
    eps = (2 * torch.randn(6, num_latents, dtype=torch.float64)).requires_grad_()
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: eps)

    z = q.rsample()

    slopes = [torch.autograd.grad(z[:, k].sum(), eps, retain_graph=True)[0] for k in range(num_latents)]
    jacobian = torch.stack(slopes, 1)
    expected = Normal(0.0, 1.0).log_prob(eps).sum(-1) - jacobian.det().abs().log()
    torch.testing.assert_close(q.log_prob(z), expected)
    torch.testing.assert_close(q.log_prob(z.clone()), expected)
    # Far from a diagonal normal, or this would be no test.
    assert num_latents == 1 or jacobian.flatten(1).abs().amin(0).sort().values[-1] > 0
    assert (expected - Normal(q.loc, q.log_scale.exp()).log_prob(z).sum(-1)).abs().max() > 0.1


@pytest.mark.parametrize("num_latents", [1, 3])
def test_a_draw_is_weighed_without_inverting_the_flow(num_latents, inversions):
    family = prepare("Flow", num_latents)
    parameters = random(family, num_latents, (5,)).requires_grad_()

    def guide():
        with pyro.plate("particles", 4, dim=-2), pyro.plate("data", 5, dim=-1):
            return pyro.sample("z", family.distribution(parameters), infer={"is_auxiliary": True})

    trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    trace.compute_score_parts()
    with torch.no_grad():
        q = family.distribution(parameters)
        q.log_prob(q.sample((3,)))

    assert trace.nodes["z"]["log_prob"].shape == (4, 5)
    assert not inversions
    # The counter counts.
    q.log_prob(torch.zeros(num_latents).double())
    assert len(inversions) == 2 * num_latents


def test_only_the_last_draw_is_remembered():
    family = prepare("Flow", 3)
    parameters = random(family, 3)
    q = family.distribution(parameters)
    first, second = q.rsample(), q.rsample()

    for z in (first, second):
        torch.testing.assert_close(q.log_prob(z), family.distribution(parameters).log_prob(z))


def test_a_draw_without_gradient_has_a_density_with_one():
    family = prepare("Flow", 3)
    parameters = random(family, 3).requires_grad_()
    q = family.distribution(parameters)

    z = q.sample()

    one, two = (torch.autograd.grad(q.log_prob(value).sum(), parameters)[0] for value in (z, z.clone()))
    torch.testing.assert_close(one, two)
    assert one.all()


def test_a_draw_with_gradient_carries_it_into_the_density():
    family = prepare("Flow", 3)
    parameters = random(family, 3).requires_grad_()
    q = family.distribution(parameters)

    z = q.rsample()

    # Through the value and directly: the inverse of the same value gives the same.
    one, two = (
        torch.autograd.grad(q.log_prob(value).sum(), parameters, retain_graph=True)[0] for value in (z, z.clone())
    )
    torch.testing.assert_close(one, two)


def test_rows_differ_in_shape_by_their_context():
    family = prepare("Flow", 2)
    parameters = random(family, 2, (1,)).repeat(3, 1)
    parameters[1, -3:] += 1

    log_prob = family.distribution(parameters).log_prob(torch.randn(9, 1, 2).double())

    assert torch.equal(log_prob[:, 0], log_prob[:, 2])
    assert (log_prob[:, 0] != log_prob[:, 1]).all()


def test_in_a_flow_of_two_transforms_every_latent_depends_on_every_other(monkeypatch):
    family = prepare("Flow", 3)
    q = family.distribution(random(family, 3, ()))
    eps = torch.randn(3, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: eps)

    z = q.rsample()

    assert torch.stack([torch.autograd.grad(z[k], eps, retain_graph=True)[0] for k in range(3)]).all()


def test_weights_come_from_the_random_state_and_once():
    one, two, other = avi.Flow(hidden=(4,)), avi.Flow(hidden=(4,)), avi.Flow(hidden=(4,))
    for family, seed in [(one, 0), (two, 0), (other, 1)]:
        torch.manual_seed(seed)
        family.prepare(3)
    weights = [torch.cat([p.flatten() for p in family.parameters()]) for family in (one, two, other)]

    one.prepare(3)

    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.cat([p.flatten() for p in one.parameters()]), weights[0])


def test_a_flow_comes_closer_to_a_skewed_density_than_any_normal(monkeypatch):
    family = prepared(avi.Flow(transforms=1, hidden=(16,), context=2), 1)
    parameters = family.initial(torch.zeros(1).double(), 1.0).requires_grad_()
    target = dist.Gumbel(torch.zeros(1).double(), 1.0).to_event(1)
    optimizer = torch.optim.Adam([parameters, *family.parameters()], lr=0.05)
    # Draws without noise: the quantiles of the normal.
    eps = torch.special.ndtri((torch.arange(128).double() + 0.5) / 128)[:, None]
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: eps)
    for _ in range(30):
        q = family.distribution(parameters)
        z = q.rsample((128,))
        optimizer.zero_grad()
        (q.log_prob(z) - target.log_prob(z)).mean().backward()
        optimizer.step()

    points, volume = grid(1, 4001, width=14.0)
    with torch.no_grad():
        log_q, log_p = family.distribution(parameters).log_prob(points), target.log_prob(points)
    divergence = float((log_q.exp() * (log_q - log_p).clamp(min=-1e3)).sum() * volume)
    # That of the best normal, N(1/2, 1).
    of_normal = 1.5 - 0.5 * math.log(2 * math.pi * math.e)
    assert 0.08 < of_normal < 0.082
    assert 0 < divergence < 0.05


# What is refused.

REFUSED = [
    (lambda: Family(), TypeError, "abstract"),
    (lambda: avi.LowRankNormal(0), ValueError, "Expected rank of at least 1, got 0"),
    (lambda: avi.LowRankNormal(True), TypeError, "rank to be a whole number, got True"),
    (lambda: avi.LowRankNormal(1.0), TypeError, "rank to be a whole number, got 1.0"),
    (lambda: avi.LowRankNormal(2).distribution(torch.zeros(7)), ValueError, "K (2 + rank) = 4 K parameters"),
    (lambda: avi.LowRankNormal(2).distribution(torch.zeros(3, 0)), ValueError, "got 0"),
    (lambda: avi.MultivariateNormal().distribution(torch.zeros(3, 6)), ValueError, "K (K + 3) / 2"),
    (lambda: avi.MultivariateNormal().distribution(torch.zeros(3, 0)), ValueError, "got 0"),
    (lambda: avi.DiagonalNormal().prepare(0), ValueError, "num_latents of at least 1, got 0"),
    (lambda: avi.MarkovNormal(0), ValueError, "Expected order of at least 1, got 0"),
    (lambda: avi.MarkovNormal(1).distribution(torch.zeros(3)), ValueError, "with order=1 for K > order, got 3"),
    (lambda: avi.Conditional("DiagonalNormal"), TypeError, "Expected the family of the members"),
    (lambda: avi.Flow(transforms=0), ValueError, "transforms of at least 1, got 0"),
    (lambda: avi.Flow(context=0), ValueError, "context of at least 1, got 0"),
    (lambda: avi.Flow(bins=1), ValueError, "bins of at least 2, got 1"),
    (lambda: avi.Flow(hidden=(4, 0)), ValueError, "every width in hidden of at least 1, got 0"),
    (lambda: avi.Flow(hidden=()), ValueError, "at least one width in hidden, got none"),
    (lambda: avi.Flow(hidden=64), TypeError, "the widths of a network, e.g. (64, 64), got 64"),
    (lambda: avi.Flow(hidden="64"), TypeError, "got '64'"),
    (lambda: avi.Flow().distribution(torch.zeros(14)), ValueError, "Call flow.prepare(num_latents) first."),
    (lambda: prepared(avi.Flow(), 3).prepare(2), ValueError, "Expected num_latents=3"),
    (lambda: prepared(avi.Flow(), 3).distribution(torch.zeros(13)), ValueError, "2 K + context = 14 parameters"),
]


@pytest.mark.parametrize("call, error, message", REFUSED)
def test_refused(call, error, message):
    with pytest.raises(error) as raised:
        call()

    assert message in str(raised.value)


def test_parameters_that_are_no_numbers_are_refused_where_pyro_validates(kind):
    family = prepare(kind, 2)
    parameters = random(family, 2)
    parameters[0, 0] = torch.nan
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="Expected parameter loc"):
        family.distribution(parameters)


# What families say of themselves.


def test_a_symmetric_family_has_its_median_at_its_mean(kind):
    family = prepare(kind, 2)
    q = family.distribution(random(family, 2))
    if not family.symmetric:
        try:
            center, apart = q.mean, torch.ones(4, 2).double()
        except NotImplementedError:
            return
        assert ((q.log_prob(center + apart) - q.log_prob(center - apart)).abs() > 0.01).all()
        return
    center = q.mean
    offset = torch.randn(9, 4, 2).double()
    torch.testing.assert_close(q.log_prob(center + offset), q.log_prob(center - offset))


def test_an_independent_family_is_the_product_of_its_coordinates(kind):
    family = prepare(kind, 2)
    parameters = random(family, 2)
    if not family.independent:
        with pytest.raises(NotImplementedError):
            family.coordinates(parameters)
        return
    z = torch.randn(4, 2).double()
    torch.testing.assert_close(
        family.coordinates(parameters).log_prob(z).sum(-1), family.distribution(parameters).log_prob(z)
    )


def test_a_cheap_density_inverts_nothing(kind, inversions):
    family = prepare(kind, 2)

    family.distribution(random(family, 2)).log_prob(torch.randn(4, 2).double())

    assert family.cheap_density == (not inversions)


# The autoregressive normal.


def band_to_factor(scale, coefficients):
    """Of an autoregressive normal, number by number: each row of the factor is a combination of those before it."""
    count, order = coefficients.shape
    rows = []
    for k in range(count):
        row = torch.zeros(count).double()
        row[k] = 1
        for j in range(min(order, k)):
            row = row + coefficients[k, j] * rows[k - 1 - j]
        rows.append(row)
    return scale[:, None] * torch.stack(rows)


@pytest.mark.parametrize("count, order", [(1, 1), (2, 1), (8, 1), (7, 2), (9, 4), (4, 6)])
def test_the_markov_normal_has_the_covariance_of_its_formula(count, order):
    family = avi.MarkovNormal(order)
    q, z = family.distribution(random(family, count)), torch.randn(4, count).double()

    factor = torch.stack([band_to_factor(*row) for row in zip(q.scale, q.coefficients, strict=True)])
    covariance = factor @ factor.mT
    expected = torch.distributions.MultivariateNormal(q.loc, covariance)
    torch.testing.assert_close(q.log_prob(z), expected.log_prob(z))
    torch.testing.assert_close(q.variance, expected.variance)
    # A draw is that of the same noise.
    torch.manual_seed(1)
    draw = q.rsample((3,))
    torch.manual_seed(1)
    noise = torch.randn(3, 4, count, dtype=torch.float64)
    torch.testing.assert_close(draw, q.loc + (factor @ noise[..., None]).squeeze(-1))
    # The precision is a band.
    precision = torch.linalg.inv(covariance)
    far = torch.ones(count, count).triu(order + 1).bool()
    assert precision[:, far].abs().max() < 1e-6 * precision.abs().max() if far.any() else order >= count - 1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_normal_is_a_markov_normal_of_full_order(count):
    family = avi.MarkovNormal(order=max(count - 1, 1))
    parameters = random(avi.MultivariateNormal(), count)
    normal = avi.MultivariateNormal().distribution(parameters)
    # z = m + s (I + L) eps = m + s v with v = -((I + L)^-1 - I) v + eps.
    scale = parameters[:, count : 2 * count].exp()
    inverse = torch.linalg.inv(normal.scale_tril / scale[..., None])
    row, column = torch.tril_indices(count, count - 1, -1)
    same = torch.cat([parameters[:, : 2 * count], -inverse[:, row, row - 1 - column]], -1)

    q, z = family.distribution(same), torch.randn(4, count).double()

    assert family.num_parameters(count) == avi.MultivariateNormal().num_parameters(count)
    torch.testing.assert_close(q.log_prob(z), normal.log_prob(z))


def test_a_product_of_normals_is_a_markov_normal_without_coefficients():
    family, parameters, z = avi.MarkovNormal(2), random(avi.DiagonalNormal(), 6), torch.randn(4, 6).double()
    same = torch.cat([parameters, torch.zeros(4, family.num_parameters(6) - 12).double()], -1)
    torch.testing.assert_close(
        family.distribution(same).log_prob(z), avi.DiagonalNormal().distribution(parameters).log_prob(z)
    )
    torch.manual_seed(1)
    one = family.distribution(same).rsample()
    torch.manual_seed(1)
    torch.testing.assert_close(one, avi.DiagonalNormal().distribution(parameters).rsample())
