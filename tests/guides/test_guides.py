"""What every guide promises for every structure of a model."""

import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyro_avi as avi
from pyro_avi import guides
from pyro_avi.guide_bases.table_guide import TableGuide
from tests.all_guides import SMALL_GUIDES as GUIDES
from tests.all_guides import mostly_slow

ROWS = 5


def scalar(x):
    with pyro.plate("data", ROWS):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def vector(x):
    with pyro.plate("data", ROWS):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., :2], 0.5).to_event(1), obs=x)


def chain(x):
    with pyro.plate("data", ROWS):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        w = pyro.sample("w", dist.Normal(z.sum(-1), 0.3))
        pyro.sample("x", dist.Normal(w, 0.5), obs=x)


def bounded(x):
    with pyro.plate("data", ROWS):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        pyro.sample("x", dist.Normal(rate * share, 0.5), obs=x)


def simplex(x):
    with pyro.plate("data", ROWS):
        z = pyro.sample("z", dist.Dirichlet(torch.ones(3) * 2))
        pyro.sample("x", dist.Normal(z @ torch.arange(3.0), 0.5), obs=x)


def shared(x):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("features", 2):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    with pyro.plate("data", ROWS):
        z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        total = (z * weight.reshape(weight.shape[:-1] + (1,) * (z.dim() - weight.dim()) + (2,))).sum(-1)
        pyro.sample("x", dist.Normal(total, scale), obs=x)


def nested(x):
    with pyro.plate("data", ROWS, dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("inner", 3, dim=-1):
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 0.5), obs=x)


class Module(PyroModule):
    """Parameters of its own, plain and Pyro's, and a prior on a weight."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 2)
        self.linear.bias = PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))
        self.scale = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

    def forward(self, x):
        bias = self.linear.bias
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.linear.weight.t() + bias, self.scale).to_event(1), obs=x)


class Object:
    """A model that is a method."""

    def __init__(self):
        self.precision = 4.0

    def run(self, *, x):
        bias = pyro.param("bias", torch.zeros(()))
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + bias, self.precision**-0.5), obs=x)


def dotted(x):
    pyro.sample("global.loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data.rows", ROWS):
        z = pyro.sample("local.z", dist.Normal(0.0, 1.0))
        pyro.sample("x.1", dist.Normal(z, 0.5), obs=x)


def mixed(counts, labels, images):
    with pyro.plate("data", ROWS):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("counts", dist.Poisson(z[..., 0].exp()), obs=counts)
        pyro.sample("labels", dist.Categorical(logits=torch.stack([z[..., 0], z[..., 1], -z[..., 0]], -1)), obs=labels)
        loc = z[..., 1][..., None, None].expand(z.shape[:-1] + (2, 2))
        pyro.sample("images", dist.Normal(loc, 1.0).to_event(2), obs=images.float() / 255)


X = torch.linspace(-1, 2, ROWS)
PAIRS = torch.stack([X, X**2], -1)

MODELS = {
    "one real latent": lambda: (scalar, (X,), {}),
    "vector": lambda: (vector, (PAIRS,), {}),
    "one latent from another": lambda: (chain, (X,), {}),
    "positive and unit interval": lambda: (bounded, (X,), {}),
    "simplex": lambda: (simplex, (X,), {}),
    "global latents": lambda: (shared, (X,), {}),
    "rows and an inner plate": lambda: (nested, (torch.stack([X, X, -X], -1),), {}),
    "PyroModule": lambda: (Module(), (PAIRS,), {}),
    "method": lambda: (Object().run, (), {"x": X}),
    "names with dots": lambda: (dotted, (X,), {}),
    "observations of several dtypes": lambda: (
        mixed,
        (torch.arange(ROWS), torch.arange(ROWS) % 3, torch.arange(4 * ROWS, dtype=torch.uint8).view(ROWS, 2, 2)),
        {},
    ),
}
# Two plates with latents and observations: the rows have to be named.
PLATES = {"rows and an inner plate": "data"}

ELBOS = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "RenyiELBO": lambda **kwargs: RenyiELBO(num_particles=2),
}


@pytest.fixture(params=MODELS)
def case(request):
    return request.param


@pytest.fixture(params=GUIDES)
def kind(request):
    return request.param


def make(kind, case, **options):
    model, args, kwargs = MODELS[case]()
    return model, GUIDES[kind](model, plate=PLATES.get(case), **options), args, kwargs


def latents(trace):
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and type(site["fn"]).__name__ != "_Subsample"
    }


def test_no_public_guide_is_left_out():
    public = {name for name in guides.__all__ if inspect.isclass(getattr(guides, name))}
    assert public <= set(GUIDES)


def test_sites_and_plates_are_the_models(kind, case):
    model, guide, args, kwargs = make(kind, case)

    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)

    of_guide, of_model = latents(guide_trace), latents(model_trace)
    assert set(of_guide) == set(of_model)
    for name, site in of_model.items():
        mine = of_guide[name]
        assert {(f.name, f.dim, f.size, f.full_size) for f in mine["cond_indep_stack"]} == {
            (f.name, f.dim, f.size, f.full_size) for f in site["cond_indep_stack"]
        }
        assert mine["fn"].batch_shape == site["fn"].batch_shape
        assert mine["fn"].event_shape == site["fn"].event_shape
        assert site["fn"].support.check(mine["value"]).all()


def test_every_parameter_has_a_finite_gradient(kind, case):
    _, guide, args, kwargs = make(kind, case)
    model = guide.model
    guide.setup(*args, **kwargs)

    Trace_ELBO().differentiable_loss(model, guide, *args, **kwargs).backward()

    parameters = dict(guide.named_parameters())
    assert parameters
    for name, parameter in parameters.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert any(parameter.grad.any() for parameter in guide.local_parameters())


@pytest.mark.parametrize("kind", mostly_slow(GUIDES))
@pytest.mark.parametrize("elbo", ELBOS)
def test_every_elbo_is_finite(kind, case, elbo):
    model, guide, args, kwargs = make(kind, case)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), ELBOS[elbo]())

    assert all(torch.isfinite(torch.tensor(svi.step(*args, **kwargs))) for _ in range(2))


def z_score(model, guide, args, kwargs, batches=8):
    """The difference of two ELBOs in its standard errors, and that standard error."""
    guide(*args, **kwargs)
    elbos = [
        elbo(num_particles=50, vectorize_particles=True, max_plate_nesting=2)
        for elbo in (Trace_ELBO, TraceMeanField_ELBO)
    ]
    losses = torch.tensor(
        [[elbo.loss(model, guide, *args, **kwargs) for _ in range(batches)] for elbo in elbos]
    ).double()
    error = (losses.var(-1) / batches).sum().sqrt()
    return float((losses[0].mean() - losses[1].mean()).abs() / error), float(error)


@pytest.mark.parametrize("kind", mostly_slow(GUIDES))
def test_elbos_agree(kind, case):
    model, guide, args, kwargs = make(kind, case, init_scale=0.3)

    difference, error = z_score(model, guide, args, kwargs)

    assert error < 1.0
    assert difference < 5


def test_elbos_that_disagree_are_seen():
    # Pyro's own mean-field guide samples constrained sites through auxiliary ones.
    model, args, kwargs = MODELS["positive and unit interval"]()

    difference, error = z_score(model, AutoNormal(model, init_scale=0.3), args, kwargs)

    assert error < 1.0
    assert difference > 5


def test_particles_can_be_vectorized(kind, case):
    model, guide, args, kwargs = make(kind, case)
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=2)

    guide.setup(*args, **kwargs)
    with pyro.plate("particles", 2, dim=-3):
        values = guide(*args, **kwargs)

    assert all(value.shape[0] == 2 for value in values.values())
    assert torch.isfinite(torch.tensor(elbo.loss(model, guide, *args, **kwargs)))


def test_predictive_returns_every_site(kind, case):
    model, guide, args, kwargs = make(kind, case)
    guide.setup(*args, **kwargs)
    shapes = {
        name: site["value"].shape for name, site in latents(poutine.trace(model).get_trace(*args, **kwargs)).items()
    }

    draws = Predictive(model, guide=guide, num_samples=3, return_sites=list(shapes))(*args, **kwargs)

    assert set(draws) == set(shapes)
    for name, shape in shapes.items():
        # Pyro gives global latents a dimension of size 1 in the place of every plate.
        assert draws[name].shape in ((3, *shape), (3, *(1,) * (draws[name].dim() - len(shape) - 1), *shape))
    assert all((value[0] != value[1]).any() for value in draws.values())


def test_median_and_quantiles(kind, case):
    model, guide, args, kwargs = make(kind, case)
    trace = latents(poutine.trace(model).get_trace(*args, **kwargs))

    median = guide.median(*args, **kwargs)
    quantiles = guide.quantiles([0.05, 0.5, 0.95], *args, **kwargs)

    assert set(median) == set(quantiles) == set(trace)
    for name, site in trace.items():
        assert median[name].shape == site["value"].shape
        assert site["fn"].support.check(median[name]).all()
        assert quantiles[name].shape == (3, *site["value"].shape)
        torch.testing.assert_close(quantiles[name][1], median[name])
        if case != "simplex":
            assert (quantiles[name].diff(dim=0) > 0).all()


def test_quantiles_are_those_of_the_draws(kind):
    _, guide, args, kwargs = make(kind, "positive and unit interval", init_scale=0.5)
    guide.setup(*args, **kwargs)

    low, high = guide.quantiles([0.1, 0.7], *args, **kwargs)["rate"]
    with torch.no_grad(), pyro.plate("draws", 4000, dim=-2):
        draws = guide(*args, **kwargs)["rate"]

    for bound, share in ((low, 0.1), (high, 0.7)):
        assert ((draws < bound).double().mean(0) - share).abs().max() < 5 * (share * (1 - share) / 4000) ** 0.5


def test_all_rows_start_alike_unless_each_has_its_own(kind):
    start = torch.linspace(0.5, 3.0, ROWS)
    init = init_to_value(values={"rate": start, "share": torch.full((ROWS,), 0.25)})
    _, guide, args, kwargs = make(kind, "positive and unit interval", init_loc_fn=init, init_scale=0.2)
    if kind == "SemiAmortizedGuide":
        # Steps that move nothing, so that the start is seen.
        with torch.no_grad():
            guide.setup(*args, **kwargs).row_factors[0].function.log_step_size.fill_(-50.0)

    median = guide.median(*args, **kwargs)
    posterior = guide.posterior(*args, **kwargs)

    has_table = isinstance(guide, TableGuide)
    torch.testing.assert_close(median["rate"], start if has_table else start[:1].expand(ROWS))
    torch.testing.assert_close(median["share"], torch.full((ROWS,), 0.25))
    assert (posterior.batch_shape, posterior.event_shape) == ((ROWS,), (2,))
    torch.testing.assert_close(posterior.base_dist.scale, torch.full((ROWS, 2), 0.2))
    assert guide.variational_parameters(*args, **kwargs).shape == (ROWS, 4)


@pytest.mark.parametrize("kind", mostly_slow(GUIDES))
def test_training_with_svi_reaches_what_the_guide_can(kind):
    model, guide, args, kwargs = make(kind, "one real latent")
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.98}), TraceMeanField_ELBO())
    evidence = dist.Normal(torch.zeros(ROWS), 1.25**0.5).log_prob(X).sum()

    losses = [svi.step(*args, **kwargs) for _ in range(200)]

    assert sum(losses[-20:]) < sum(losses[:20])
    # A constant factor loses the spread of the exact posterior means, x / 1.25 with variance 0.2.
    spread = ((X - X.mean()) ** 2).sum().item() / 1.25**2 / (2 * 0.2)
    by_row = isinstance(guide, (avi.AmortizedGuide, avi.FactorizedGuide))
    # Of a guide of another kind it is not known whether rows have factors of their own.
    most, least = (0.0 if by_row else spread), (spread if kind == "ConstantGuide" else 0.0)
    q = guide.posterior(*args, **kwargs).base_dist
    exact = dist.Normal(q.loc[:, 0], 0.5).log_prob(X).sum() - (q.variance / 0.5).sum()
    exact -= torch.distributions.kl_divergence(q, dist.Normal(torch.zeros(ROWS, 1), 1.0)).sum()
    assert evidence - most - 0.25 < exact < evidence - least + 1e-3


@pytest.mark.parametrize(
    "make_global",
    [
        AutoNormal,
        AutoMultivariateNormal,
        lambda model: AutoDelta(model, init_loc_fn=init_to_value(values={"scale": torch.ones(())})),
        avi.MeanFieldNormal,
    ],
    ids=["AutoNormal", "AutoMultivariateNormal", "AutoDelta", "MeanFieldNormal"],
)
@pytest.mark.parametrize("as_guide", [False, True], ids=["function", "guide"])
def test_the_globals_may_have_any_guide(kind, make_global, as_guide):
    model, args, kwargs = MODELS["global latents"]()
    given = make_global(poutine.block(model, hide=["z"])) if as_guide else make_global
    guide = GUIDES[kind](model, global_guide=given)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())

    svi.step(*args, **kwargs)
    before = {name: value.clone() for name, value in guide.median(*args, **kwargs).items()}
    for _ in range(3):
        svi.step(*args, **kwargs)

    after = guide.median(*args, **kwargs)
    assert set(after) == {"loc", "scale", "weight", "z"}
    assert all((after[name] != before[name]).any() for name in after)


class GlobalModule(PyroModule):
    """A guide for the globals written by hand."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))

    def forward(self, *args, **kwargs):
        pyro.sample("loc", dist.Normal(self.loc, 0.1).to_event(1))
        pyro.sample("scale", dist.LogNormal(0.0, 0.1))
        with pyro.plate("features", 2):
            pyro.sample("weight", dist.Normal(0.0, 0.1))


def test_the_globals_may_have_a_guide_written_by_hand(kind):
    model, args, kwargs = MODELS["global latents"]()
    theirs = GlobalModule()
    guide = GUIDES[kind](model, global_guide=theirs)
    if kind == "SemiAmortizedGuide":
        with pytest.raises(ValueError, match="guide of the global latents that knows its median"):
            guide(*args, **kwargs)
        return

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(3):
        svi.step(*args, **kwargs)

    assert theirs.loc.abs().min() > 0
    assert any(parameter is theirs.loc for parameter in guide.parameters())
    assert not any(parameter is theirs.loc for parameter in guide.local_parameters())


def test_a_part_of_a_list_of_guides(kind):
    model, args, kwargs = MODELS["global latents"]()
    names = ["loc", "scale", "weight"]
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=names)))
    guide.append(GUIDES[kind](poutine.block(model, hide=names)))
    if kind == "SemiAmortizedGuide":
        # A part of a list does not know the other latents.
        with pytest.raises(ValueError, match="log joint is a function of its latents"):
            guide(*args, **kwargs)
        return
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())

    losses = [svi.step(*args, **kwargs) for _ in range(3)]

    assert torch.tensor(losses).isfinite().all()
    trace = poutine.trace(guide).get_trace(*args, **kwargs)
    assert {"loc", "scale", "weight", "z"} <= set(trace.nodes)
    (frame,) = trace.nodes["z"]["cond_indep_stack"]
    assert (frame.name, frame.size) == ("data", ROWS)
    assert set(guide.median(*args, **kwargs)) == {"loc", "scale", "weight", "z"}


def test_sites_of_the_guide_can_be_hidden(kind):
    _, guide, args, kwargs = make(kind, "global latents")

    trace = poutine.trace(poutine.block(guide, hide=["z"])).get_trace(*args, **kwargs)

    assert "z" not in trace.nodes and "loc" in trace.nodes
    assert set(trace.nodes["_RETURN"]["value"]) == {"loc", "scale", "weight", "z"}


@pytest.mark.parametrize("name", GUIDES)
def test_a_fixed_posterior_is_the_posterior_without_a_gradient_to_the_parameters(name):
    x, u = torch.randn(ROWS), torch.randn(ROWS, 1, requires_grad=True)
    guide = GUIDES[name](scalar).setup(x)

    fixed, free = guide.fixed_posterior(x), guide.posterior(x)

    assert torch.equal(fixed.log_prob(u), free.log_prob(u))
    fixed.log_prob(u).sum().backward()
    assert u.grad is not None and all(parameter.grad is None for parameter in guide.parameters())
    free.log_prob(u).sum().backward()
    assert any(parameter.grad is not None for parameter in guide.parameters())


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_knows_its_plate_of_rows_and_which_latents_it_is_for(name):
    x = torch.randn(ROWS)
    guide = GUIDES[name](scalar).setup(x)
    crossed = GUIDES[name](nested, plate=("data", "inner")).setup(torch.randn(ROWS, 3))

    assert guide.row_plate() == "data"
    with pytest.raises(ValueError, match=r"Expected rows of one plate, got those of \('data', 'inner'\)"):
        crossed.row_plate()
    guide.check_same_latents(avi.ConstantGuide(scalar).setup(x))
    with pytest.raises(
        ValueError, match=r"Expected a guide for the latents \[\['z'\]\].*got one for \[\['z'\], \['w'\]\]"
    ):
        guide.check_same_latents(crossed)
