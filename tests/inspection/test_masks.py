"""Masks anywhere: which elements of a site count, what a guide leaves out, and which masks are refused."""

from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import nn
from torch.distributions import transforms

import pyro_avi as avi
from pyro_avi.inspection.masks import Mask, site_mask
from tests.all_guides import READING, mostly_slow, takes
from tests.all_guides import SMALL_GUIDES as GUIDES

B, K = 4, 3
ROWS = torch.tensor([True, False, True, False])
ELEMENTS = torch.arange(B * K).reshape(B, K) % 5 > 1
MATRIX = torch.arange(B * K * 2).reshape(B, K, 2) % 3 > 0


def normal(*shape):
    return dist.Normal(torch.zeros(shape), 1.0)


# A distribution, a mask around the site, and the number of event dimensions that the mask tells apart.
SITES = {
    "none": (lambda: normal(B, K).to_event(1), None, None),
    "true": (lambda: normal(B, K).mask(True).to_event(1), True, None),
    "around": (lambda: normal(B, K).to_event(1), ROWS, 0),
    "false around": (lambda: normal(B, K).to_event(1), False, 0),
    "on the distribution": (lambda: normal(B, K).to_event(1).mask(ROWS), None, 0),
    "inside, rows": (lambda: normal(B, K).mask(ROWS[:, None]).to_event(1), None, 0),
    "inside, false": (lambda: normal(B, K).mask(False).to_event(1), None, 0),
    "inside, elements": (lambda: normal(B, K).mask(ELEMENTS).to_event(1), None, 1),
    "inside, float": (lambda: normal(B, K).mask(ELEMENTS.float()).to_event(1), None, 1),
    "inside twice": (lambda: normal(B, K, 2).mask(MATRIX).to_event(1).mask(ELEMENTS).to_event(1), None, 2),
    "inside two dimensions, rows of them": (lambda: normal(B, K, 2).mask(ELEMENTS[..., None]).to_event(2), None, 1),
    "at every level": (lambda: normal(B, K).mask(ELEMENTS).to_event(1).mask(ROWS), ROWS.flip(0), 1),
    "of an expanded distribution": (lambda: normal(1, K).mask(ELEMENTS[:1]).to_event(1).expand([B]), None, 1),
    "of Pyro's expanded distribution": (
        lambda: dist.torch_distribution.ExpandedDistribution(normal(1, K).mask(ELEMENTS[:1]).to_event(1), [B]),
        None,
        1,
    ),
    "of a transformed distribution": (
        lambda: dist.TransformedDistribution(normal(B, K), [transforms.ExpTransform()]).mask(ELEMENTS).to_event(1),
        None,
        1,
    ),
    "of vectors": (
        lambda: dist.MultivariateNormal(torch.zeros(B, K, 2), torch.eye(2)).mask(ELEMENTS).to_event(1),
        None,
        1,
    ),
}


def traced(fn, around):
    outside = nullcontext() if around is None else poutine.mask(mask=around)
    with poutine.trace() as capture, pyro.plate("data", B), outside:
        value = pyro.sample("z", fn)
    return capture.trace.nodes["z"], value


@pytest.mark.parametrize("name", SITES)
def test_the_elements_that_count_are_those_that_the_density_depends_on(name):
    make, around, event_dim = SITES[name]
    torch.manual_seed(0)
    site, value = traced(make(), around)
    value = value.detach().requires_grad_()
    log_prob = scale_and_mask(site["fn"].log_prob(value), mask=site["mask"]).sum()
    counted = torch.zeros_like(value)
    if log_prob.requires_grad:
        counted = torch.autograd.grad(log_prob, value)[0]

    mask = site_mask(site)

    assert (mask is None) == (event_dim is None)
    mask = mask or Mask(True)
    assert mask.event_dim == (event_dim or 0)
    elements = torch.as_tensor(mask.of_elements(site["fn"].event_dim)).expand_as(value)
    assert torch.equal(elements, counted != 0)


@pytest.mark.parametrize(
    "fn",
    [
        dist.TransformedDistribution(normal(B, K).mask(ELEMENTS), [transforms.ExpTransform()]).to_event(1),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(B, 2)), normal(B, 2).mask(ELEMENTS[:, :2])),
    ],
    ids=["transformed", "mixture"],
)
def test_a_mask_of_a_part_of_a_density_is_refused(fn):
    with pytest.raises(ValueError, match=r"(?s)masks of whole elements at site 'z', got a mask inside.*Put \.mask"):
        site_mask({"name": "z", "fn": fn, "mask": None})


# --- what a guide leaves out

NOISE = 0.5
X = torch.tensor([0.5, -1.0, 2.0]).expand(B, K).clone()
# Of independent normals, the exact posterior and evidence of every element.
LOC, SCALE = X / (1 + NOISE**2), (NOISE**2 / (1 + NOISE**2)) ** 0.5
EVIDENCE = dist.Normal(0.0, (1 + NOISE**2) ** 0.5).log_prob(X)


def inside(x, mask):
    with pyro.plate("data", B):
        z = pyro.sample("z", normal(B, K).mask(mask).to_event(1))
        pyro.sample("x", dist.Normal(z, NOISE).mask(mask).to_event(1), obs=x)


def around_and_inside(x, mask, rows):
    with pyro.plate("data", B), poutine.mask(mask=rows):
        z = pyro.sample("z", normal(B, K).mask(mask).to_event(1))
        pyro.sample("x", dist.Normal(z, NOISE).mask(mask).to_event(1), obs=x)


def positive(x, mask):
    with pyro.plate("data", B):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(B, K), 1.0).mask(mask).to_event(1))
        pyro.sample("x", dist.Normal(z.log(), NOISE).mask(mask).to_event(1), obs=x)


MODELS = {"inside": inside, "around and inside": around_and_inside, "on positive numbers": positive}
MASKS = {"rows": ROWS[:, None], "elements": ELEMENTS}


@torch.no_grad()
def at_posterior(guide, *args):
    """All rows of the data are alike, so that every guide holds their posterior; parameters are those of the family."""
    guide.setup(*args)
    exact = guide.family.initial(LOC[0], SCALE)
    if isinstance(guide, avi.AmortizedGuide):
        guide.head.weight.zero_()
        guide.head.bias.copy_(exact)
    else:
        (guide.table if isinstance(guide, avi.FactorizedGuide) else guide.vector).copy_(exact)
    return guide


def check_evidence(weights, counted):
    expected = (EVIDENCE * counted).sum(-1).double()
    torch.testing.assert_close(weights.local, expected.expand_as(weights.local), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", mostly_slow(GUIDES))
def test_at_the_posterior_every_draw_weighs_the_evidence_of_what_counts(kind, model, mask):
    counted, args = MASKS[mask].expand(B, K), (X, MASKS[mask])
    if model == "around and inside":
        counted, args = counted & ROWS.flip(0)[:, None], (*args, ROWS.flip(0))
    guide = at_posterior(GUIDES[kind](MODELS[model]), *args)

    weights = avi.log_weights(MODELS[model], guide, *args, num_samples=5)

    check_evidence(weights, counted)


@pytest.mark.parametrize("kind", GUIDES)
def test_a_later_call_has_its_own_mask(kind):
    guide = at_posterior(GUIDES[kind](inside), X, ELEMENTS)
    for mask in (ELEMENTS.flip(0), torch.ones(B, K).bool(), ELEMENTS.T.contiguous().T):
        weights = avi.log_weights(inside, guide, X, mask, num_samples=2)
        check_evidence(weights, mask)


def test_a_mask_that_was_the_same_for_all_elements_may_differ_later():
    guide = avi.ConstantGuide(inside)
    at_posterior(guide, X, ROWS[:, None].expand(B, K))
    mask = ELEMENTS.T.contiguous().T
    assert not mask.is_contiguous()
    weights = avi.log_weights(inside, guide, X, mask, num_samples=2)
    check_evidence(weights, mask)


JOINT = {"full": avi.MultivariateNormal(), "low rank": avi.LowRankNormal(rank=1)}


@pytest.mark.parametrize(
    "kind, name", [(kind, name) for kind in GUIDES for name, family in JOINT.items() if takes(kind, family=family)]
)
def test_a_joint_family_leaves_out_whole_rows(kind, name):
    family = JOINT[name]
    guide = GUIDES[kind](inside, family=family).setup(X, MASKS["rows"])
    model_free = poutine.trace(guide).get_trace(X, MASKS["rows"])
    model_free.compute_log_prob()
    auxiliary = next(site for site in model_free.nodes.values() if site.get("infer", {}).get("is_auxiliary"))
    assert torch.equal(auxiliary["log_prob"] != 0, ROWS)

    with pytest.raises(ValueError, match=r"(?s)one mask for whole rows with the joint family.*DiagonalNormal"):
        GUIDES[kind](inside, family=family)(X, ELEMENTS)


def test_a_global_latent_is_left_out_by_elements():
    seen = torch.tensor([True, False, True])

    def model(x, seen):
        theta = pyro.sample("theta", normal(K).mask(seen).to_event(1))
        with pyro.plate("data", B):
            pyro.sample("z", normal(B))
            pyro.sample("x", dist.Normal(theta, 1.0).to_event(1), obs=x)

    guide = avi.ConstantGuide(model)
    trace = poutine.trace(guide).get_trace(X, seen)
    fn, value = trace.nodes["theta"]["fn"], trace.nodes["theta"]["value"].detach().requires_grad_()
    (slope,) = torch.autograd.grad(fn.log_prob(value), value)
    assert torch.equal(slope != 0, seen)


def test_discrete_latents_are_left_out_by_elements():
    def model(x, mask):
        with pyro.plate("data", B):
            k = pyro.sample("k", dist.Bernoulli(torch.full((B, K), 0.5)).mask(mask).to_event(1))
            pyro.sample("x", dist.Normal(k, 1.0).to_event(1), obs=x)

    guide = avi.ConstantGuide(model).setup(X, ELEMENTS)
    trace = poutine.trace(guide).get_trace(X, ELEMENTS)
    trace.compute_log_prob()
    expected = torch.tensor(0.5).log() * ELEMENTS.sum(-1)
    torch.testing.assert_close(trace.nodes["k"]["log_prob"], expected)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_leaves_the_parameters_of_what_is_left_out_alone(compiled):
    guide = avi.FactorizedGuide(inside).setup(X, ELEMENTS)
    before = guide.table.detach().clone()
    avi.fit(inside, guide, X, ELEMENTS, num_steps=3, lr=0.1, compile=compiled, progress=False)
    moved = (guide.table.detach() != before).unflatten(-1, (2, K))
    assert torch.equal(moved.all(1), ELEMENTS)
    assert torch.equal(moved.any(1), ELEMENTS)


# --- what the encoder reads


def test_the_encoder_reads_masks_by_elements():
    read = []

    class Spy(nn.Module):
        def forward(self, inputs):
            read.append(inputs)
            return inputs

    guide = avi.AmortizedGuide(inside, Spy()).setup(X, ELEMENTS)
    guide(X, ELEMENTS)
    torch.testing.assert_close(read[-1], torch.cat([X * ELEMENTS, ELEMENTS.float()], -1))


# --- masks that follow a latent


def following(form):
    def model(x):
        with pyro.plate("data", B):
            z = pyro.sample("z", normal(B))
            on = z > 0
            if form == "poutine.mask":
                with poutine.mask(mask=on):
                    w = pyro.sample("w", normal(B))
            elif form == ".mask()":
                w = pyro.sample("w", normal(B).mask(on))
            elif form == "inside":
                w = pyro.sample("w", normal(B, 2).mask(on[:, None]).to_event(1)).sum(-1)
            elif form == "with data":
                w = pyro.sample("w", normal(B, 2).mask(on[:, None] & (x[:, :2] > 0)).to_event(1)).sum(-1)
            else:
                with poutine.mask(mask=bool(z.sum().item() > 0)):
                    w = pyro.sample("w", normal(B))
            pyro.sample("x", dist.Normal((z + w)[:, None], 1.0).to_event(1), obs=x)

    return model


@pytest.mark.parametrize("form", ["poutine.mask", ".mask()", "inside", "with data", "a number"])
@pytest.mark.parametrize("kind", GUIDES)
def test_a_mask_that_follows_a_latent_is_refused(kind, form):
    with pytest.raises(ValueError, match=r"Expected a mask of latent 'w' that does not depend on latents"):
        GUIDES[kind](following(form))(X)


@pytest.mark.parametrize("kind", GUIDES)
def test_an_observation_may_be_masked_by_a_latent_where_nobody_reads_it(kind):
    def model(x):
        with pyro.plate("data", B):
            z = pyro.sample("z", normal(B))
            pyro.sample("x", dist.Normal(z, 1.0).mask(z > 0), obs=x)

    x = X[:, 0]
    if kind in READING:
        with pytest.raises(ValueError, match=r"(?s)mask of observed site 'x' that does not depend on latents.*inputs="):
            GUIDES[kind](model)(x)
    guide = GUIDES[kind](model, **({"inputs": lambda x: x[:, None]} if kind in READING else {}))
    assert guide(x)["z"].shape == (B,)


def test_a_shape_taken_from_a_latent_is_no_dependence():
    def model(x):
        with pyro.plate("data", B):
            z = pyro.sample("z", normal(B))
            with poutine.mask(mask=torch.ones_like(z).bool() & (x[:, 0] > 0)):
                w = pyro.sample("w", normal(B))
            pyro.sample("x", dist.Normal((z + w)[:, None], 1.0).to_event(1), obs=x)

    with pytest.warns(UserWarning, match="could not be traced"):
        trace = poutine.trace(avi.ConstantGuide(model)).get_trace(X)
    assert torch.equal(trace.nodes["w"]["mask"], X[:, 0] > 0)
