"""The contract: every guide, with every family, on models of every structure."""

import copy
import inspect
import itertools
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoDelta, AutoDiscreteParallel, AutoGuide, AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import init_to_sample, init_to_value
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch.distributions import biject_to, kl_divergence

import pyro_avi as avi
from pyro_avi import families
from pyro_avi.families import Family
from tests.all_guides import READING, takes
from tests.all_guides import SMALL_GUIDES as GUIDES
from tests.discovery import classes_in
from tests.marks import number_of
from tests.structures import ELBOS, NEW_ROWS, ROWS, STRUCTURES

FAMILIES = {
    **classes_in(families, Family),
    "LowRankNormal": lambda: avi.LowRankNormal(rank=2),
    "MarkovNormal": lambda: avi.MarkovNormal(order=1),
    "Conditional": lambda: avi.Conditional(avi.DiagonalNormal()),
    "Flow": lambda: avi.Flow(transforms=2, hidden=(8,), context=2, bins=4),
    "RowFlow": lambda: avi.RowFlow(transforms=2, hidden=3, bins=4),
}
# The outermost plates of the structures, which minibatches are taken from.
ROW_PLATES = ("data", "outer", "persons")
INDEPENDENT = [name for name, family in FAMILIES.items() if family().independent]
JOINT = [name for name in FAMILIES if name not in INDEPENDENT]
# Those that can leave out a part of a row.
OF_ELEMENTS = [name for name, family in FAMILIES.items() if family().independent or family().sequential]


def structures(wanted=lambda structure: True, *, every=(), kinds=tuple(GUIDES), one_kind=False):
    """Run a test for structures each with a family by its name, about every second time the default.

    It is a conditional family where there is something to condition on, and may be a sequential one where elements are masked.
    Slow runs take every family with every structure: the default by every guide, another by one of the guides in turn, so
    that all pairs of guide, family and structure are met.

    Args:
        wanted: chooses structures.
        every: families that are never left to slow runs.
        kinds: the guides.
        one_kind: whether a structure's name decides on the guide as well.
    """
    cases = []
    for name, structure in STRUCTURES.items():
        number = number_of(name)
        families = list(FAMILIES) if structure.joint else OF_ELEMENTS
        family_in_turn = JOINT[number // 2 % len(JOINT)] if structure.joint and number % 2 == 0 else "DiagonalNormal"
        if structure.discrete:
            family_in_turn = "Conditional"
        elif not structure.joint and number % 2:
            family_in_turn = "MarkovNormal"
        pairs = [
            (kind, family)
            for kind, family in itertools.product(kinds, families if wanted(structure) else ())
            if takes(kind, family=FAMILIES[family](), discrete=bool(structure.discrete))
        ]
        # One runs the model several times a call, and is otherwise as the guide that it goes on from.
        turns = [kind for kind in kinds if kind != "SemiAmortizedGuide" or number % 3 == 0]
        able = [kind for kind in turns if (kind, family_in_turn) in pairs]
        kind_in_turn = able[number // (2 * len(JOINT)) % len(able)] if able else None
        for kind, family in pairs:
            if kind not in turns and family != "DiagonalNormal":
                continue
            now = family in {family_in_turn, *every} and (kind == kind_in_turn if one_kind else kind in turns)
            takers = [each for each, other in pairs if other == family and each in turns]
            later = takers[(number + list(FAMILIES).index(family)) % len(takers)] if takers else kind
            if not now and family != "DiagonalNormal" and kind != later:
                continue
            marks = () if now else pytest.mark.slow
            cases.append(pytest.param(kind, name, family, marks=marks, id=f"{kind}, {family}, {name}"))
    return pytest.mark.parametrize("kind, name, family", cases)


@pytest.fixture(params=GUIDES)
def kind(request):
    return request.param


def make(kind, name, family="DiagonalNormal", **options):
    """A model and a guide that has never been called."""
    structure = STRUCTURES[name]
    model = structure.make()
    return model, GUIDES[kind](model, **arguments(kind, structure, family, **options))


def arguments(kind, structure, family, **options):
    own = structure.amortized if kind in READING else {}
    return {"family": FAMILIES[family](), **structure.options, **own, **options}


def set_up(kind, name, family="DiagonalNormal", **options):
    """A model and a guide that has seen the full batch; it may warn of what its structure says, and of nothing else."""
    structure = STRUCTURES[name]
    model, guide = make(kind, name, family, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guide.setup(*structure.args, **structure.kwargs)
    messages = [str(warning.message) for warning in caught]
    assert all(structure.warning is not None and structure.warning in message for message in messages), messages
    assert len(messages) <= 1
    if structure.warning is not None and kind in READING:
        assert messages and "inputs=" in messages[0]
    return model, guide


@torch.no_grad()
def stir(guide, scale=0.2):
    """Move every parameter: at its start the head of an encoder is zero, and all rows are alike."""
    for parameter in guide.parameters():
        parameter.add_(scale * torch.randn_like(parameter))


def traces(model, guide, *args, **kwargs):
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return guide_trace, model_trace


def latents(trace):
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("is_auxiliary")
        and not site["infer"].get("enumerate")
    }


def observed(trace):
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
        and not isinstance(site["fn"], dist.Unit)
    }


def frames(site):
    return {(frame.name, frame.dim, frame.size, frame.full_size) for frame in site["cond_indep_stack"]}


def row_dim(site, event_dim=None):
    """The dimension of a site's value that holds the rows."""
    found = [frame.dim for frame in site["cond_indep_stack"] if frame.name in ROW_PLATES]
    return found[0] - (site["fn"].event_dim if event_dim is None else event_dim) if found else None


def check_sites(model, guide, *args, **kwargs):
    """The guide samples the model's latents, each in its plates, with its shape, support, mask and scale."""
    guide_trace, model_trace = traces(model, guide, *args, **kwargs)
    mine, theirs = latents(guide_trace), latents(model_trace)
    assert list(guide_trace.nodes["_RETURN"]["value"]) and set(guide_trace.nodes["_RETURN"]["value"]) == set(theirs)
    assert set(mine) == set(theirs)
    for name, site in theirs.items():
        assert frames(mine[name]) == frames(site), name
        assert mine[name]["fn"].batch_shape == site["fn"].batch_shape, name
        assert mine[name]["fn"].event_shape == site["fn"].event_shape, name
        assert mine[name]["value"].shape == site["value"].shape, name
        assert site["fn"].support.check(mine[name]["value"]).all(), name
        assert guide_trace.nodes["_RETURN"]["value"][name] is mine[name]["value"]
        torch.testing.assert_close(torch.as_tensor(mine[name]["scale"]), torch.as_tensor(site["scale"]))
    for trace in (guide_trace, model_trace):
        assert torch.as_tensor(trace.log_prob_sum()).isfinite()
    return mine


def make_elbo(name, structure, **options):
    options = {"max_plate_nesting": structure.nesting, **options}
    if name == "vectorized":
        return infer.Trace_ELBO(num_particles=2, vectorize_particles=True, **options)
    if name == "RenyiELBO":
        return infer.RenyiELBO(num_particles=2, **options)
    if name == "TraceEnum_ELBO":
        options["strict_enumeration_warning"] = False
    return getattr(infer, name)(**options)


# --- nothing is left out


def test_no_public_guide_or_family_is_left_out():
    public = {name: getattr(avi, name) for name in avi.__all__}
    classes = {
        name: value for name, value in public.items() if inspect.isclass(value) and not inspect.isabstract(value)
    }
    # The factor of the globals has no rows.
    guides = {name for name, value in classes.items() if issubclass(value, AutoGuide)} - {"MeanFieldNormal"}
    families = {name for name, value in classes.items() if issubclass(value, Family)}

    assert guides == set(GUIDES)
    assert families == set(FAMILIES)
    assert len(STRUCTURES) >= 24


# --- what a call does


@structures(every=["DiagonalNormal"])
def test_a_call(kind, name, family):
    structure = STRUCTURES[name]
    model, guide = set_up(kind, name, family)
    stir(guide)

    mine = check_sites(model, guide, *structure.args, **structure.kwargs)
    assert {label: tuple(site["value"].shape) for label, site in mine.items()} == dict(structure.latents)
    check_gradients(model, guide, structure)
    check_factors(guide, structure)
    check_particles(model, guide, structure)


def check_gradients(model, guide, structure):
    """Every parameter of the guide takes part in the loss."""
    elbo = make_elbo(next(elbo for elbo in structure.elbos if elbo in ("Trace_ELBO", "TraceEnum_ELBO")), structure)
    parameters = dict(guide.named_parameters())
    elbo.differentiable_loss(model, guide, *structure.args, **structure.kwargs).backward()
    assert set(map(id, guide.local_parameters())) <= set(map(id, parameters.values()))
    for label, parameter in parameters.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), label


def check_factors(guide, structure):
    """Variational parameters and local factors have the rows as batch dimensions, the coordinates as event."""
    parameters = guide.variational_parameters(*structure.args, **structure.kwargs)
    posterior = guide.posterior(*structure.args, **structure.kwargs)
    if not structure.row_sets:
        parameters, posterior = {("data",): parameters}, {("data",): posterior}
    assert set(parameters) == set(posterior) == set(structure.row_sets or [("data",)])
    coordinates = 0
    for plates, values in parameters.items():
        assert values.shape[:-1] == tuple(ROWS if plate in ROW_PLATES else 3 for plate in plates)
        assert posterior[plates].batch_shape == values.shape[:-1]
        draw = posterior[plates].sample()
        assert draw.shape == values.shape[:-1] + posterior[plates].event_shape
        assert posterior[plates].log_prob(draw).isfinite().all()
        coordinates += draw.numel()
    # Supports such as the simplex have fewer coordinates than elements.
    shapes = [structure.latents[label] for label in structure.local if label not in structure.discrete]
    assert len(shapes) <= coordinates <= sum(torch.Size(shape).numel() for shape in shapes)


def check_particles(model, guide, structure):
    """Under an outer plate of particles every latent has its draws, which can be replayed."""
    with pyro.plate("particles", 3, dim=-structure.nesting - 1):
        guide_trace, model_trace = traces(model, guide, *structure.args, **structure.kwargs)
        again = poutine.trace(poutine.replay(guide, trace=guide_trace)).get_trace(*structure.args, **structure.kwargs)
    for label, site in latents(guide_trace).items():
        batch = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
        assert batch == site["fn"].batch_shape and len(batch) == structure.nesting + 1 and batch[0] == 3, label
        assert site["value"].numel() == 3 * torch.Size(structure.latents[label]).numel(), label
        assert label in structure.discrete or (site["value"][0] != site["value"][1]).any(), label
        assert torch.equal(again.nodes[label]["value"], site["value"]), label
    for trace in (guide_trace, model_trace):
        assert torch.as_tensor(trace.log_prob_sum()).isfinite()
    torch.testing.assert_close(again.log_prob_sum(), guide_trace.log_prob_sum())


@structures(one_kind=True)
def test_every_elbo_is_finite(kind, name, family):
    structure = STRUCTURES[name]
    model, guide = set_up(kind, name, family)

    for elbo in structure.elbos:
        loss = make_elbo(elbo, structure).loss_and_grads(model, guide, *structure.args, **structure.kwargs)
        assert torch.as_tensor(loss).isfinite(), elbo
    for args, _ in structure.batches[-1:]:
        assert torch.as_tensor(make_elbo(elbo, structure).loss_and_grads(model, guide, *args)).isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in guide.parameters())
    assert set(structure.elbos) <= set(ELBOS)


JIT = [
    ("JitTrace_ELBO", "function", "DiagonalNormal"),
    ("JitTrace_ELBO", "rows given, data whole", "MultivariateNormal"),
    ("JitTrace_ELBO", "nested plates, two row sets", "MultivariateNormal"),
    ("JitTraceGraph_ELBO", "several latents", "LowRankNormal"),
    ("JitTrace_ELBO", "global latents", "DiagonalNormal"),
    ("JitTraceMeanField_ELBO", "global latents", "DiagonalNormal"),
    ("JitTraceEnum_ELBO", "enumerated latent", "DiagonalNormal"),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("elbo, name, family", JIT)
def test_elbos_can_be_traced(kind, elbo, name, family):
    structure = STRUCTURES[name]
    model, guide = set_up(kind, name, family if takes(kind, family=FAMILIES[family]()) else "DiagonalNormal")
    traced = make_elbo(elbo, structure, ignore_jit_warnings=True)
    if kind == "SemiAmortizedGuide":
        with pytest.raises(ValueError, match=r"(?s)outside of torch.jit.trace.*compile=True"):
            traced.loss_and_grads(model, guide, *structure.args)
        return
    eager = make_elbo(elbo.removeprefix("Jit"), structure)

    # The first call compiles. Pyro's JitTraceMeanField_ELBO compiles at every call, and draws twice before the answer.
    traced.loss_and_grads(model, guide, *structure.args)
    torch.manual_seed(1)
    loss = traced.loss_and_grads(model, guide, *structure.args)
    torch.manual_seed(1)
    if elbo == "JitTraceMeanField_ELBO":
        eager.loss(model, guide, *structure.args)
        eager.loss(model, guide, *structure.args)
    assert loss == pytest.approx(eager.loss(model, guide, *structure.args), rel=1e-4)


def losses(name, model, guide, structure, batches=10, particles=200):
    elbo = make_elbo(name, structure, num_particles=particles, vectorize_particles=True)
    values = [elbo.loss(model, guide, *structure.args, **structure.kwargs) for _ in range(batches)]
    return torch.tensor(values, dtype=torch.double)


def differences(model, guide, structure):
    """How far each ELBO is from `Trace_ELBO`, in standard errors, and the largest of them."""
    estimates = {
        name: losses(name, model, guide, structure)
        for name in ("Trace_ELBO", "TraceMeanField_ELBO", "TraceGraph_ELBO", "TraceEnum_ELBO")
    }
    reference = estimates.pop("Trace_ELBO")
    error = {name: ((x.var() + reference.var()) / len(x)).sqrt().item() for name, x in estimates.items()}
    return {name: abs(x.mean() - reference.mean()).item() / error[name] for name, x in estimates.items()}, max(
        error.values()
    )


AGREE = [
    "several latents",
    "positive numbers",
    "simplex",
    "Cholesky factor of a correlation matrix",
    "ordered vector",
    "global latents",
    "nested plates, two row sets",
    "masked latents, one row set",
    "masked latents, two row sets",
    "masked rows",
    "rows masked inside events",
    "elements masked inside events",
    "missing observations, obs_mask",
    "annealed prior",
    "factors in and out of the plate",
]


@structures(lambda structure: structure.name in AGREE, kinds=["FactorizedGuide"])
def test_elbos_agree(kind, name, family):
    # Away from the origin, where many a transform has no share in the density.
    model, guide = set_up(kind, name, family, init_scale=0.03, init_loc_fn=init_to_sample)
    stir(guide, 0.1)

    difference, error = differences(model, guide, STRUCTURES[name])

    assert error < 1.0
    assert max(difference.values()) < 5, difference


def test_elbos_that_disagree_are_seen():
    # Pyro's own mean-field guide samples constrained sites through auxiliary ones.
    structure = STRUCTURES["unit interval"]
    model = structure.make()
    guide = AutoNormal(model, init_scale=0.3)
    guide(*structure.args)

    difference, error = differences(model, guide, structure)

    assert error < 1.0
    assert max(difference.values()) > 5


@pytest.mark.parametrize("name", ["several latents", "global latents", "masked rows", "nested plates, two row sets"])
def test_closed_form_divergences_apply(kind, name):
    structure = STRUCTURES[name]
    model, guide = set_up(kind, name)

    guide_trace, model_trace = traces(model, guide, *structure.args)

    for site, theirs in latents(model_trace).items():
        divergence = kl_divergence(guide_trace.nodes[site]["fn"], theirs["fn"])
        assert divergence.shape == theirs["fn"].batch_shape
        assert (divergence >= 0).all()


# --- answers


@structures(one_kind=True)
def test_answers(kind, name, family):
    structure = STRUCTURES[name]
    model, guide = set_up(kind, name, family)
    stir(guide)

    check_quantiles(model, guide, structure, structure.args, structure.kwargs)
    check_draws_and_means(model, guide, structure)
    check_predictions(model, guide, structure.latents, structure, structure.args, structure.kwargs)
    for args, index in structure.batches[:1]:
        check_predictions(model, guide, structure.latents, structure, args, {}, rows_are_drawn=index is None)
        if index is None:
            # Where the model draws its rows, the answer is for all of them.
            check_quantiles(model, guide, structure, args, {})
            assert {label: draw.shape for label, draw in guide.sample(*args, num_samples=2).items()} == {
                label: (2, *shape) for label, shape in structure.latents.items()
            }
    if structure.unobserved is not None:
        data = observed(poutine.trace(model).get_trace(*structure.args, **structure.kwargs))
        if kind in READING:
            with pytest.raises(ValueError, match=f"(?s)site '{next(iter(data))}'.*inputs="):
                guide(*structure.unobserved)
        else:
            check_predictions(model, guide, [*structure.latents, *data], structure, structure.unobserved, {})


def check_quantiles(model, guide, structure, args, kwargs):
    sites = latents(poutine.trace(model).get_trace(*structure.args, **structure.kwargs))
    median = guide.median(*args, **kwargs)
    quantiles = guide.quantiles([0.1, 0.5, 0.9], *args, **kwargs)
    assert set(median) == set(quantiles) == set(structure.latents)
    for label, shape in structure.latents.items():
        assert median[label].shape == shape and quantiles[label].shape == (3, *shape), label
        assert not median[label].requires_grad, label
        for value in (median[label], *quantiles[label]):
            assert sites[label]["fn"].support.check(value).all(), label
        torch.testing.assert_close(quantiles[label][1], median[label])
        if torch.Size(shape) == sites[label]["fn"].batch_shape:
            steps = quantiles[label].diff(dim=0)
            assert (steps >= 0).all() if label in structure.discrete else (steps > 0).all(), label


def check_draws_and_means(model, guide, structure):
    """Draws are distributed as those of calls, each by itself and together, and their mean is the mean."""
    args, kwargs = structure.args, structure.kwargs
    sites = latents(poutine.trace(model).get_trace(*args, **kwargs))
    draws, mean = guide.sample(*args, num_samples=DRAWS, **kwargs), guide.mean(*args, **kwargs)
    with pyro.plate("particles", DRAWS, dim=-structure.nesting - 1):
        called = {name: value.detach() for name, value in guide(*args, **kwargs).items()}
    assert list(draws) == list(mean) == list(structure.latents)
    for label, shape in structure.latents.items():
        assert draws[label].shape == (DRAWS, *shape) and mean[label].shape == shape, label
        assert not draws[label].requires_grad and not mean[label].requires_grad, label
        assert sites[label]["fn"].support.check(draws[label]).all(), label
        called[label] = called[label].reshape(draws[label].shape)
        # The mean may itself be that of 1,000 draws.
        error = draws[label].double().std(0) * (1 / DRAWS + 1 / 1000) ** 0.5
        assert ((draws[label].double().mean(0) - mean[label]).abs() <= 6 * error + 1e-5).all(), label
    assert difference_of_draws(draws, called) < 6


DRAWS = 500


def difference_of_draws(one, two):
    """The largest difference of means of elements and their squares, and of those of all elements together, in errors."""
    parts = []
    for draws in (one, two):
        values = torch.cat([draws[label].double().reshape(len(draws[label]), -1) for label in one], 1)
        parts.append(torch.cat([values, values.sum(1, keepdim=True)], 1))
    center, spread = parts[0].mean(0), parts[0].std(0) + 1e-9
    # Of tails as heavy as a log-normal's the squares have no use.
    parts = [torch.cat([x, x.square()], 1) for x in (((part - center) / spread).clamp(-3, 3) for part in parts)]
    error = sum(x.var(0) / len(x) for x in parts).sqrt() + 1e-6
    return ((parts[0].mean(0) - parts[1].mean(0)).abs() / error).max().item()


def test_draws_of_another_distribution_are_seen():
    torch.manual_seed(0)
    normal, other = torch.randn(2, DRAWS, 20)
    assert difference_of_draws({"z": normal}, {"z": other}) < 6
    assert difference_of_draws({"z": normal}, {"z": other + 0.5}) > 6
    assert difference_of_draws({"z": normal}, {"z": 1.5 * other}) > 6
    # Each as it should be, but not together.
    together = normal[:, :1].expand(-1, 20)
    assert difference_of_draws({"z": together}, {"z": together[torch.randint(DRAWS, (DRAWS, 1)), torch.arange(20)]}) < 6
    apart = torch.stack([together[torch.randperm(DRAWS), i] for i in range(20)], 1)
    assert difference_of_draws({"z": together}, {"z": apart}) > 6


def check_predictions(model, guide, sites, structure, args, kwargs, rows_are_drawn=False):
    prior = poutine.trace(model).get_trace(*args, **kwargs).nodes
    missing = {site: (1,) * (structure.nesting - len(prior[site]["fn"].batch_shape)) for site in sites}
    # Not in parallel where the model draws its rows: every particle has rows of its own, and one plate.
    for parallel in (False,) if rows_are_drawn else (False, True):
        predictive = Predictive(model, guide=guide, num_samples=4, return_sites=list(sites), parallel=parallel)
        draws = predictive(*args, **kwargs)
        assert set(draws) == set(sites)
        for site, draw in draws.items():
            assert tuple(draw.shape) == (4, *missing[site], *prior[site]["value"].shape), site
            assert draw.isfinite().all(), site
            assert site in structure.discrete or (draw != draw[0]).any(), site


# --- rows


def rows_in_order(trace, structure):
    """A value for every local latent that tells the rows apart, within its support."""
    values = {}
    for name in structure.local:
        site = trace.nodes[name]
        if name in structure.discrete:
            continue
        transform = biject_to(site["fn"].support)
        free = transform.inv(site["value"])
        dim = row_dim(site, free.dim() - len(site["fn"].batch_shape))
        if dim is None:
            continue
        numbers = torch.linspace(-1.0, 1.0, ROWS).reshape((ROWS,) + (1,) * (-dim - 1))
        others = 0.1 * torch.arange(free[0].numel()).reshape(free[0].shape) / free[0].numel()
        values[name] = transform((numbers + others).expand(free.shape).contiguous())
    return values


def index_of(call_index, guide_trace):
    return guide_trace.nodes["data"]["value"] if call_index is None else call_index


@structures(lambda structure: structure.batches, kinds=["FactorizedGuide"])
def test_a_tables_rows_are_the_models_rows(kind, name, family):
    structure = STRUCTURES[name]
    model = structure.make()
    full = poutine.trace(model).get_trace(*structure.args)
    values = rows_in_order(full, structure)
    model, guide = set_up(kind, name, family, init_scale=1e-5, init_loc_fn=init_to_value(values=values))

    calls = [*structure.batches, (structure.args, torch.arange(ROWS))]
    for args, index in calls:
        guide_trace, model_trace = traces(model, guide, *args)
        index = index_of(index, guide_trace)
        for label, known in values.items():
            dim, draw = row_dim(full.nodes[label]), guide_trace.nodes[label]["value"]
            torch.testing.assert_close(draw, known.index_select(dim, index), atol=1e-3, rtol=0.0)
            # The test can tell rows apart.
            assert (draw - known.index_select(dim, index.roll(1))).abs().max() > 1e-2
        for label, site in observed(full).items():
            rows_of_call = site["value"].index_select(row_dim(site), index)
            if model_trace.nodes[label]["value"].shape == rows_of_call.shape:
                assert torch.equal(model_trace.nodes[label]["value"], rows_of_call)


@structures(lambda structure: structure.batches or structure.new)
def test_other_rows(kind, name, family):
    structure = STRUCTURES[name]
    model, guide = set_up(kind, name, family)
    stir(guide)

    for args, index in structure.batches:
        check_sites(model, guide, *args)
        if kind == "SemiAmortizedGuide":
            # Numbers among the arguments may weigh the bound along which it steps.
            of_all = structure.args + args[len(structure.args) :]
            args = tuple(
                whole if torch.is_tensor(x) and x.dim() == 0 else x for x, whole in zip(args, of_all, strict=True)
            )
        check_minibatch(guide, structure, args, index)
    if structure.new is not None and kind == "FactorizedGuide":
        with pytest.raises(ValueError, match=r"(?s)Expected all 8 rows.*got 5.*avi\.refine\("):
            guide(*structure.new)
    elif structure.new is not None:
        mine = check_sites(model, guide, *structure.new)
        check_number_of_rows(mine, structure, NEW_ROWS)
        assert set(guide.median(*structure.new)) == set(structure.latents)
    # And the rows it was set up with, again.
    check_sites(model, guide, *structure.args)


def check_number_of_rows(sites, structure, number):
    sizes = {label: sites[label]["value"].shape[row_dim(sites[label])] for label in structure.local}
    assert set(sizes.values()) == {number}


def check_minibatch(guide, structure, args, index):
    """The parameters of a minibatch are rows of those of the full batch, and so is what is drawn from them."""
    full, some = guide.variational_parameters(*structure.args), guide.variational_parameters(*args)
    if not structure.row_sets:
        full, some = {("data",): full}, {("data",): some}
    for plates, values in full.items():
        assert not isinstance(guide, (avi.AmortizedGuide, avi.FactorizedGuide)) or (values != values[0]).any()
        torch.testing.assert_close(some[plates], values if index is None else values[index])
    if index is None:
        # Where the model draws its rows, the answers are for all of them.
        trace = poutine.trace(guide).get_trace(*args)
        drawn = trace.nodes["data"]["value"]
        draws = torch.zeros(ROWS, 2).index_copy(0, drawn, trace.nodes["z"]["value"])
        expected = guide.posterior(*args).log_prob(draws)[drawn].sum() * ROWS / len(drawn)
        torch.testing.assert_close(torch.as_tensor(trace.log_prob_sum()), expected)


@pytest.mark.parametrize("name", ["function", "global latents", "positive numbers", "fixed plate inside the rows'"])
@pytest.mark.parametrize("family", ["DiagonalNormal", "MultivariateNormal"])
def test_minibatches_are_unbiased(kind, family, name):
    """Over batches that make up the data, the loss at the same draws is the full batch's on average."""
    structure = STRUCTURES[name]
    model, guide = set_up(kind, name, family)
    stir(guide)

    def loss(args, draws):
        guide_trace = poutine.trace(poutine.replay(guide, trace=draws)).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
        return guide_trace.log_prob_sum() - model_trace.log_prob_sum()

    draws = poutine.trace(guide).get_trace(*structure.args)
    parts = []
    for index in torch.arange(ROWS).roll(3).reshape(4, 2):
        of_rows = prune_subsample_sites(draws)
        for site_name, site in of_rows.nodes.items():
            if site["type"] == "sample" and row_dim(site) is not None:
                of_rows.nodes[site_name] = {**site, "value": site["value"].index_select(row_dim(site), index)}
        parts.append(loss((*(data[index] for data in structure.args), index), of_rows))

    torch.testing.assert_close(torch.stack(parts).mean(), loss(structure.args, draws))


@structures(
    lambda structure: structure.batches and structure.elbos == ELBOS and not structure.row_sets,
    kinds=["FactorizedGuide"],
)
def test_only_rows_of_the_batch_move(kind, name, family):
    structure = STRUCTURES[name]
    model, guide = set_up(kind, name, family)
    (table,) = guide.row_tables().values()
    before = table.detach().clone()
    args, index = structure.batches[0]

    avi.fit(model, guide, batches=[args], num_steps=1, progress=False)

    moved = (table != before).any(-1)
    if index is None:
        assert moved.sum() == 3
    else:
        assert set(moved.nonzero().flatten().tolist()) <= set(index.tolist())
        assert moved.any()


@structures(lambda structure: structure.new is not None and structure.elbos == ELBOS, kinds=["FactorizedGuide"])
def test_new_rows_can_be_refined(kind, name, family):
    structure = STRUCTURES[name]
    model, guide = set_up(kind, name, family)

    refined = avi.refine(model, guide, *structure.new, num_steps=1)

    mine = check_sites(model, refined, *structure.new)
    check_number_of_rows(mine, structure, NEW_ROWS)


# --- life


def draw(guide, structure):
    torch.manual_seed(1)
    return guide(*structure.args, **structure.kwargs)


def equal_draws(one, two):
    return set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


def can_be_pickled(model):
    try:
        pickle.dumps(model)
    except (AttributeError, TypeError, pickle.PicklingError):
        return False
    return True


@structures(one_kind=True)
def test_copies_and_loaded_guides_draw_the_same(kind, name, family):
    structure = STRUCTURES[name]
    model, guide = set_up(kind, name, family)
    stir(guide)
    expected = draw(guide, structure)

    twin = copy.deepcopy(guide)
    pickled = pickle.loads(pickle.dumps(guide))
    late = set_up(kind, name, family)[1]
    late.load_state_dict(guide.state_dict())
    _, early = make(kind, name, family)
    early.load_state_dict(guide.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if structure.warning else "error")
        early.setup(*structure.args, **structure.kwargs)

    for other in (twin, late, early):
        assert equal_draws(draw(other, structure), expected)
    assert twin.model is model
    if can_be_pickled(model):
        assert equal_draws(draw(pickled, structure), expected)
    else:
        with pytest.raises(ValueError, match="model"):
            draw(pickled, structure)
    # What was copied is alive, and nothing of it is shared.
    stir(twin)
    assert guide.model is model
    assert equal_draws(draw(guide, structure), expected)
    assert not equal_draws(draw(twin, structure), expected)
    check_sites(model, guide, *structure.args, **structure.kwargs)


@structures(lambda structure: not structure.amortized and structure.warning is None, one_kind=True)
def test_saved_guides_draw_the_same(kind, name, family, tmp_path):
    structure = STRUCTURES[name]
    model, guide = set_up(kind, name, family)
    stir(guide)

    avi.save(guide, tmp_path / "guide.safetensors")
    loaded = avi.load(tmp_path / "guide.safetensors", model)

    assert equal_draws(draw(loaded, structure), draw(guide, structure))


# --- together with other guides


@structures(lambda structure: set(structure.latents) - set(structure.local), one_kind=True)
def test_a_part_of_a_list_of_guides(kind, name, family):
    structure = STRUCTURES[name]
    model = structure.make()
    shared = [label for label in structure.latents if label not in structure.local]
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=shared)))
    local = GUIDES[kind](poutine.block(model, hide=shared), **arguments(kind, structure, family))
    guide.append(local)
    if kind == "SemiAmortizedGuide":
        with pytest.raises(ValueError, match=r"(?s)log joint is a function of its latents.*list of guides"):
            guide(*structure.args)
        return
    elbo = make_elbo(structure.elbos[0], structure)

    guide(*structure.args)
    assert torch.as_tensor(elbo.loss_and_grads(model, guide, *structure.args)).isfinite()

    assert all(parameter.grad is not None for parameter in local.parameters())
    guide_trace, model_trace = traces(model, guide, *structure.args)
    assert set(latents(guide_trace)) >= set(structure.latents)
    for label in structure.local:
        assert frames(guide_trace.nodes[label]) == frames(model_trace.nodes[label])
    assert set(guide.median(*structure.args)) == set(structure.latents)


def test_enumerated_latents_may_have_a_guide_of_their_own(kind):
    structure = STRUCTURES["enumerated latent"]
    model = structure.make()
    guide = AutoGuideList(model)
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["label"])))
    guide.append(GUIDES[kind](poutine.block(model, hide=["label"])))
    guide(*structure.args)

    loss = infer.TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(model, guide, *structure.args)

    assert torch.as_tensor(loss).isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in guide.parameters())


@structures(lambda structure: structure.name in ("several latents", "global latents"), every=FAMILIES)
def test_sites_can_be_hidden(kind, name, family):
    structure = STRUCTURES[name]
    _, guide = set_up(kind, name, family)
    others = set(structure.latents) - {"z"}

    hidden = poutine.trace(poutine.block(guide, hide=["z"])).get_trace(*structure.args)
    exposed = poutine.trace(poutine.block(guide, expose=["z"])).get_trace(*structure.args)

    assert set(latents(hidden)) == others
    assert set(latents(exposed)) == {"z"}
    for trace in (hidden, exposed):
        assert set(trace.nodes["_RETURN"]["value"]) == set(structure.latents)


# --- what is refused, and what is warned of


ELEMENTWISE = [name for name, structure in STRUCTURES.items() if not structure.joint]


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("family", [name for name in JOINT if name not in OF_ELEMENTS])
def test_a_joint_family_refuses_masks_of_single_elements(kind, family, name):
    structure = STRUCTURES[name]
    _, guide = make(kind, name, family)
    why = "mask" if takes(kind, family=guide.family) else "Fisher information"

    with pytest.raises(ValueError, match=f"(?s){why}.*{family}.*DiagonalNormal"):
        guide(*structure.args)


def without_rows(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_a_plate_of_rows_has_globals_only(kind, family):
    x = torch.linspace(-1.0, 1.0, ROWS)
    guide = GUIDES[kind](without_rows, family=FAMILIES[family]())

    with pytest.warns(UserWarning, match="(?s)global") as caught:
        guide.setup(x)

    assert len(caught) == 1
    mine = check_sites(without_rows, guide, x)
    assert set(mine) == set(guide.median(x)) == {"loc", "scale"}
    infer.Trace_ELBO().loss_and_grads(without_rows, guide, x)
    assert all(parameter.grad.any() for parameter in guide.parameters())


def infinite(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Poisson(3.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_discrete_latent_of_infinitely_many_values_is_refused(kind):
    with pytest.raises(ValueError, match="(?s)'z'.*enumerate"):
        GUIDES[kind](infinite)(torch.arange(4.0))
