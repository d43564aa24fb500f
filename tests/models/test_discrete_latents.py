"""Models with discrete latents: their answers by the Pyro model itself, and trainings that come to them."""

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_avi as avi

MEANS = torch.tensor([[-2.0, 0.0], [0.5, 1.0], [2.0, -1.0]], dtype=torch.double)
SHARES = torch.tensor([1.0, 2.0, 1.0], dtype=torch.double)


def mixture(size=40):
    torch.manual_seed(0)
    model = avi.models.NormalMixture(MEANS, 0.9, weights=SHARES, size=size).double()
    return model, model().detach()


def log_joint_of_the_program(model, x, label):
    z = torch.nn.functional.one_hot(torch.tensor(label), 3).double().expand(len(x), -1)
    trace = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(x)
    trace.compute_log_prob()
    return trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]


def test_a_mixture_knows_its_answers():
    model, x = mixture()
    joint = torch.stack([log_joint_of_the_program(model, x, label) for label in range(3)], -1)
    torch.testing.assert_close(model.log_joint(x), joint)
    torch.testing.assert_close(model.log_evidence(x), joint.logsumexp(-1))
    torch.testing.assert_close(model.posterior(x).probs, joint.softmax(-1))
    best = model.best_constant(x)
    gap = model.inference_gap(x, best).sum()
    logits = best.logits[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(
        model.inference_gap(x, dist.OneHotCategorical(logits=logits.expand(len(x), 3))).sum(), logits
    )
    assert slope.abs().max() < 1e-10
    for _ in range(5):
        other = dist.OneHotCategorical(logits=(best.logits[0] + 0.3 * torch.randn(3)).expand(len(x), 3))
        assert model.inference_gap(x, other).sum() > gap > 1


@pytest.mark.parametrize(
    "elbo",
    [avi.EnumeratedELBO(), avi.LeaveOneOutELBO(8, vectorize_particles=True, max_plate_nesting=1)],
    ids=["enumerated", "leave one out"],
)
def test_trainings_come_to_the_best_factors(elbo):
    model, x = mixture()
    for kind, best in ((avi.FactorizedGuide, model.posterior(x)), (avi.ConstantGuide, model.best_constant(x))):
        guide = kind(model).setup(x)
        avi.fit(model, guide, x, num_steps=150, lr=0.1, elbo=elbo, compile=False, progress=False)
        gap = model.inference_gap(x, dist.OneHotCategorical(logits=guide.variational_parameters(x).detach()))
        assert (gap - model.inference_gap(x, best)).mean() < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"means": MEANS[0]}, r"means of shape \[C, D\], got \(2,\)"),
        ({"weights": SHARES[:2]}, r"weights of shape \[3\], one for each mean, got \(2,\)"),
        ({"scale": 0.0}, "scale to be positive"),
        ({"weights": -SHARES}, "weights to be positive"),
    ],
)
def test_what_is_no_mixture_is_refused(options, message):
    options = {"means": MEANS, "scale": 1.0, "weights": SHARES, "size": 2} | options
    means, scale = options.pop("means"), options.pop("scale")
    with pytest.raises(ValueError, match=message):
        avi.models.NormalMixture(means, scale, **options)
