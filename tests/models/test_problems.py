"""Problems with answers: every closed form against brute force, which uses the Pyro model and nothing else.

The log joint of a normal problem is quadratic in its latents. Its gradient and Hessian, taken by autograd from the model's
trace, give posterior, evidence and the ELBO of every normal without any formula of the problem.
"""

import copy
import math
import pickle
from dataclasses import dataclass
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy.integrate import quad
from torch import nn
from torch.nn.functional import pad

import pyro_avi as avi
from pyro_avi import models
from pyro_avi.models.joint_rows import JointNormal

N = 7


def real(values):
    """In double precision from the start: a float32 is another number."""
    return torch.tensor(values, dtype=torch.double)


LOADINGS = real([[1.0, 0.5], [-0.3, 0.8], [0.2, 0.1], [0.7, 1.1]])
SCALES = real([0.5, 1.3, 0.2, 0.9])
MEAN = real([0.3, -2.0, 0.0, 1.0])
TRANSITION = real([[0.9, 0.3], [-0.2, 0.7]])
EMISSION = real([[1.0, 0.5], [0.0, 1.0], [0.7, -0.4]])


def chain(size=N, **kwargs):
    options = {"size": size, "transition_scale": 0.6, "emission_scale": 0.8} | kwargs
    return models.LinearGaussianStateSpace(real([[0.8]]), torch.ones(1, 1).double(), **options)


def planar(**kwargs):
    scales = real([0.5, 1.0]), real([0.8, 1.2, 0.5])
    options = {"size": N, "transition_scale": scales[0], "emission_scale": scales[1]} | kwargs
    return models.LinearGaussianStateSpace(TRANSITION, EMISSION, **options)


def squared_exponential(grid):
    distance = (grid.unsqueeze(-1) - grid).square()
    return 1.5 * (-0.5 * distance / 2.0**2).exp() + 0.05 * torch.eye(len(grid)).to(grid)


def process(size=N):
    return models.GaussianProcess(squared_exponential, torch.arange(size).double(), 0.7)


def linear_vae():
    torch.manual_seed(3)
    return models.LinearVAE(2, 4, size=N, scale=0.6).double()


LOCAL = {
    "factor analysis": lambda: models.FactorAnalysis(LOADINGS, SCALES, size=N, mean=MEAN),
    "probabilistic principal components": lambda: models.FactorAnalysis(LOADINGS, 0.7, size=N),
    "correlated": lambda: models.FactorAnalysis.correlated(-0.8, size=N),
    "linear vae": linear_vae,
}
JOINT = {
    "chain": chain,
    "chain in the plane": planar,
    "chain from its start": lambda: planar(initial_scale=real([0.3, 2.0])),
    "process": process,
}
GLOBAL = {
    "flat": lambda: models.NormalNormal(2.0, 0.7, size=N).double(),
    "proper": lambda: models.NormalNormal(1.5, 0.8, size=N, prior_scale=2.0).double(),
}
NONLINEAR = {
    "nonlinear": lambda: models.Nonlinear1d(size=N, theta=0.4).double(),
    "nonlinear, flat": lambda: models.Nonlinear1d(size=N).double(),
}
NORMAL = LOCAL | JOINT | GLOBAL
ALL = NORMAL | NONLINEAR


def drawn(model):
    with torch.no_grad():
        return model()


# --- brute force


@dataclass
class Quadratic:
    """The log joint of a model as a function of all latents, one vector."""

    mean: torch.Tensor
    precision: torch.Tensor
    log_evidence: torch.Tensor

    @classmethod
    def of(cls, model, x):
        trace = poutine.trace(model).get_trace(x)
        sites = {
            name: node["value"].shape
            for name, node in trace.nodes.items()
            if node["type"] == "sample" and not node["is_observed"] and name not in ("data", "time")
        }

        def log_joint(flat):
            parts = flat.split([shape.numel() for shape in sites.values()])
            data = {name: part.reshape(shape) for (name, shape), part in zip(sites.items(), parts, strict=True)}
            return poutine.trace(poutine.condition(model, data=data)).get_trace(x).log_prob_sum()

        zero = torch.zeros(sum(shape.numel() for shape in sites.values())).double().requires_grad_()
        (slope,) = torch.autograd.grad(log_joint(zero), zero)
        precision = -torch.autograd.functional.hessian(log_joint, zero.detach())
        mean = torch.linalg.solve(precision, slope)
        constant = 0.5 * len(zero) * math.log(2 * math.pi) - 0.5 * precision.logdet()
        return cls(mean, precision, (log_joint(mean) + constant).detach())

    def elbo(self, loc, covariance):
        """Exact: the expectation of a quadratic, and the entropy of a normal."""
        deviation = loc - self.mean
        constant = self.log_evidence + 0.5 * self.precision.logdet() + 0.5 * len(loc)
        loss = deviation @ self.precision @ deviation + (self.precision * covariance).sum()
        return constant - 0.5 * loss + 0.5 * covariance.logdet()

    def elbo_of(self, q):
        """Of a factor as the problems return it: by row, by all rows, or a dictionary by site."""
        parts = list(q.values()) if isinstance(q, dict) else [q]
        loc = torch.cat([part.mean.reshape(-1) for part in parts])
        if isinstance(parts[0], dist.MultivariateNormal):
            covariance = parts[0].covariance_matrix
            covariance = torch.block_diag(*covariance) if covariance.dim() == 3 else covariance
            return self.elbo(loc, covariance)
        return self.elbo(loc, torch.cat([part.variance.reshape(-1) for part in parts]).diag())


def close(one, two, atol=1e-9):
    torch.testing.assert_close(one.detach(), two.detach(), rtol=0.0, atol=atol)


def maximum(function, *starts):
    """The largest value of a function of tensors, by LBFGS from some start."""
    parameters = [start.clone().requires_grad_() for start in starts]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=2000, tolerance_grad=1e-11, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = -function(*parameters)
        loss.backward()
        return loss

    optimizer.step(closure)
    return function(*parameters).detach()


@pytest.mark.parametrize("case", NORMAL)
def test_evidence_and_posterior_are_those_of_the_models_own_log_joint(case):
    model = NORMAL[case]()
    x = drawn(model)
    truth = Quadratic.of(model, x)
    close(model.log_evidence(x).sum(), truth.log_evidence)
    covariance = torch.linalg.inv(truth.precision)
    posterior = model.posterior(x)
    if case in GLOBAL:
        close(posterior["theta"].mean, truth.mean[0])
        close(posterior["theta"].variance, covariance[0, 0])
        close(posterior["z"].mean, truth.mean[1:])
        close(posterior["z"].covariance_matrix, covariance[1:, 1:])
        given = model.posterior(x, 0.3)
        conditional = models.FactorAnalysis(real([[model.tau]]), model.sigma, size=N, mean=real([0.3]))
        close(given.mean, conditional.posterior(x).mean)
        close(given.variance, conditional.posterior(x).variance)
        close(model.log_evidence(x, 0.3), conditional.log_evidence(x))
        return
    close(posterior.mean.reshape(-1), truth.mean)
    blocks = posterior.covariance_matrix
    close(torch.block_diag(*blocks) if blocks.dim() == 3 else blocks, covariance)
    assert model.log_evidence(x).shape == posterior.batch_shape == ((N,) if case in LOCAL else ())


@pytest.mark.parametrize("case", NORMAL)
def test_the_best_diagonal_is_the_best(case):
    model = NORMAL[case]()
    x = drawn(model)
    truth = Quadratic.of(model, x)
    best = model.best_diagonal(x)
    reached = truth.elbo_of(best)
    close(truth.log_evidence - reached, model.approximation_gap(x).sum())
    found = maximum(
        lambda loc, log_scale: truth.elbo(loc, (2 * log_scale).exp().diag()), *torch.randn(2, len(truth.mean)).double()
    )
    close(found, reached, atol=1e-7)
    # A twin: the marginal variances of the posterior are those of no optimum.
    twin = truth.elbo(truth.mean, torch.linalg.inv(truth.precision).diagonal().diag())
    assert reached - twin > 0.005
    assert model.approximation_gap(x).sum() > 0.01


@pytest.mark.parametrize("case", NORMAL)
def test_the_best_constant_is_the_best(case):
    model = NORMAL[case]()
    x = drawn(model)
    truth = Quadratic.of(model, x)
    reached = truth.elbo_of(model.best_constant(x))
    extra = 1 if case in GLOBAL else 0
    latents = (len(truth.mean) - extra) // N

    def elbo(loc, log_scale):
        def spread(v):
            return torch.cat([v[:extra], v[extra:].expand(N, latents).reshape(-1)])

        return truth.elbo(spread(loc), (2 * spread(log_scale)).exp().diag())

    close(maximum(elbo, *torch.randn(2, extra + latents).double()), reached, atol=1e-7)
    assert truth.elbo_of(model.best_diagonal(x)) - reached > 0.01


@pytest.mark.parametrize("case", NORMAL)
def test_the_inference_gap_of_any_normal_factor(case):
    model = NORMAL[case]()
    x = drawn(model)
    truth = Quadratic.of(model, x)
    best = model.best_diagonal(x)

    def moved(q):
        loc = q.mean + torch.randn(q.mean.shape).double()
        normal = dist.Normal(loc, q.stddev * (0.3 * torch.randn(loc.shape).double()).exp())
        return normal.to_event(loc.dim() - len(q.batch_shape))

    factors = [best, {name: moved(q) for name, q in best.items()} if case in GLOBAL else moved(best)]
    if case not in GLOBAL:
        posterior = model.posterior(x)
        factors.append(dist.MultivariateNormal(posterior.mean + 0.1, 2 * posterior.covariance_matrix))
        close(model.inference_gap(x, posterior).sum(), torch.zeros(()).double(), atol=1e-8)
    for q in factors:
        close(truth.log_evidence - truth.elbo_of(q), model.inference_gap(x, q).sum(), atol=1e-8)
    close(model.inference_gap(x, best), model.approximation_gap(x), atol=1e-8)


@pytest.mark.parametrize("case", NORMAL)
def test_the_tail_index_is_where_moments_of_the_weights_end(case):
    # E_q[w^a] is an integral over a normal density that exists as long as (1 - a) diag(precision) + a precision is positive
    # definite; the tail index is 1 / a of the last one.
    model = NORMAL[case]()
    x = drawn(model)
    precision = Quadratic.of(model, x).precision
    last = 1 / model.tail_index(x).reshape(-1)[0]
    for factor, exists in ((0.999, True), (1.001, False)):
        a = factor * last
        matrix = (1 - a) * precision.diagonal().diag() + a * precision
        assert bool(torch.linalg.eigvalsh(matrix)[0] > 0) is exists


# --- factor analysis


@pytest.mark.parametrize("rho", [-0.95, -0.3, 0.5, 0.9])
def test_two_latents_with_a_correlation(rho):
    model = models.FactorAnalysis.correlated(rho, size=3)
    x = drawn(model)
    covariance = model.posterior(x).covariance_matrix[0]
    close(covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt(), real(rho))
    close(model.approximation_gap(x), torch.full((3,), -0.5 * math.log(1 - rho**2), dtype=torch.double))
    close(model.tail_index(x), torch.full((3,), abs(rho), dtype=torch.double))


def test_the_gap_is_zero_if_and_only_if_the_weighted_columns_are_orthogonal():
    x = torch.randn(N, 4).double()
    columns = torch.linalg.qr(LOADINGS).Q * torch.tensor([2.0, 0.5])
    # Orthogonal as the noise's precisions weigh them.
    close(
        models.FactorAnalysis(SCALES[:, None] * columns, SCALES, size=N).approximation_gap(x), torch.zeros(N).double()
    )
    for loadings, scale in ((columns, SCALES), (LOADINGS, 1.0), (SCALES[:, None] * columns, 1.0)):
        assert (models.FactorAnalysis(loadings, scale, size=N).approximation_gap(x) > 1e-3).all()
    # The formula of the issue, which scales the precision by the noise's variance.
    matrix = LOADINGS.T @ LOADINGS + 0.7**2 * torch.eye(2).double()
    expected = 0.5 * (matrix.diagonal().log().sum() - matrix.logdet())
    close(models.FactorAnalysis(LOADINGS, 0.7, size=N).approximation_gap(x), expected.expand(N))


def wide():
    torch.manual_seed(1)
    return models.FactorAnalysis(torch.randn(6, 4).double(), 0.8, size=20, mean=torch.ones(6).double())


def test_the_rank_bound_over_all_k():
    model = wide()
    x = drawn(model)
    means, precision = model._moments(x)
    gaps = model.rank_gaps(x)
    assert gaps.shape == (5,) and (gaps.diff() < -1e-3).all()
    close(gaps[-1], torch.zeros(()).double())

    def loss(means_of_guide):
        deviation = means_of_guide - means
        return 0.5 * ((deviation @ precision) * deviation).sum()

    for rank in (0, 1, 2, 4):
        best = model.best_rank(x, rank)
        amortization = (model.inference_gap(x, best) - model.approximation_gap(x)).sum()
        close(amortization, gaps[rank])
        found = -maximum(
            lambda features, head, bias: -loss(features @ head + bias),
            torch.randn(20, rank).double(),
            torch.randn(rank, 4).double(),
            torch.randn(4).double(),
        )
        close(found, gaps[rank], atol=1e-6)
    # A twin: principal components of the means as they are, not as the posterior's precision weighs them.
    left, values, right = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    assert loss(means.mean(0) + (left[:, :2] * values[:2]) @ right[:2]) - gaps[2] > 0.01
    # Fewer rows than latents.
    assert (model.rank_gaps(x[:2])[1:].abs() < 1e-9).all() and model.rank_gaps(x[:2])[0] > 0.1


def test_a_linear_encoder_attains_the_rank_bound():
    model = wide()
    x = drawn(model)
    for rank in (1, 2, 3):
        best = model.best_rank(x, rank)
        loc, center = best.mean, best.mean.mean(0)
        _, _, right = torch.linalg.svd(loc - center, full_matrices=False)
        directions = right[:rank].T
        # Features of a row: the best means' coordinates, which are linear in the row.
        ones = torch.ones(20, 1).double()
        fitted = torch.linalg.lstsq(torch.cat([x, ones], 1), (loc - center) @ directions, driver="gelsd").solution
        encoder = nn.Linear(6, rank).double()
        guide = avi.AmortizedGuide(model, encoder).setup(x)
        function = guide.row_factors[0].function
        with torch.no_grad():
            encoder.weight.copy_(fitted[:-1].T)
            encoder.bias.copy_(fitted[-1])
            features = function.encoder(x)
            output = torch.cat([loc, best.stddev.log()], -1)
            # What head gives these parameters, however it scales its input.
            probe = torch.linalg.lstsq(torch.cat([features, ones], 1), output).solution
            function.head.bias.copy_(probe[-1])
            function.head.weight.copy_(probe[:-1].T)
            scaling = (guide.variational_parameters(x) - probe[-1]).norm() / (features @ probe[:-1]).norm()
            function.head.weight.div_(scaling)
        gap = (model.inference_gap(x, guide.posterior(x)) - model.approximation_gap(x)).sum()
        close(gap, model.rank_gaps(x)[rank], atol=1e-8)


# --- the linear variational autoencoder


def test_the_largest_elbo_is_the_largest_likelihood():
    torch.manual_seed(4)
    x = torch.randn(30, 5).double() @ torch.randn(5, 5).double() + 2
    model = models.LinearVAE(2, 5, size=30).double()
    best = model.best(x)
    close(best.log_evidence(x).sum(), model.maximum_elbo(x))
    close(best.approximation_gap(x), torch.zeros(30).double())
    assert not model.maximum_elbo(x).isclose(model.log_evidence(x).sum(), rtol=1e-3)

    def likelihood(loadings, mean, log_scale):
        covariance = loadings @ loadings.T + (2 * log_scale).exp() * torch.eye(5)
        return dist.MultivariateNormal(mean, covariance).log_prob(x).sum()

    found = maximum(likelihood, torch.randn(5, 2).double(), torch.zeros(5).double(), torch.zeros(()).double())
    close(found, model.maximum_elbo(x), atol=1e-6)
    # A rotation of the latents: the same likelihood, a smaller bound.
    rotation = real([[0.8, 0.6], [-0.6, 0.8]])
    rotated = models.FactorAnalysis(best.loadings @ rotation, best.likelihood.scale, size=30, mean=best.mean)
    close(rotated.log_evidence(x), best.log_evidence(x))
    assert (rotated.approximation_gap(x) > 0.01).all()

    def bound(loadings, mean, log_scale, loc, log_scales):
        latents = loc, (2 * log_scales).exp()
        reconstruction = ((x - mean - loc @ loadings.T).square().sum(-1) + latents[1] @ loadings.square().sum(0)) / 2
        noise = -reconstruction * (-2 * log_scale).exp() - 5 * log_scale - 2.5 * math.log(2 * math.pi)
        divergence = 0.5 * (latents[1] + loc.square() - 1 - 2 * log_scales).sum(-1)
        return (noise - divergence).sum()

    starts = torch.randn(5, 2).double(), torch.zeros(5).double(), torch.zeros(()).double()
    found = maximum(bound, *starts, torch.randn(30, 2).double(), torch.zeros(30, 2).double())
    close(found, model.maximum_elbo(x), atol=1e-5)


def test_the_likelihood_has_no_slope_at_its_maximum():
    torch.manual_seed(4)
    x = torch.randn(30, 5).double() @ torch.randn(5, 5).double()
    model = models.LinearVAE(2, 5, size=30).double()
    best = model.best(x)
    with torch.no_grad():
        model.decoder.weight.copy_(best.loadings)
        model.decoder.bias.copy_(best.mean)
        model.likelihood.log_scale.copy_(best.likelihood.scale[0].log())
    (model.log_evidence(x) - model.approximation_gap(x)).sum().backward()
    assert max(parameter.grad.abs().max() for parameter in model.parameters()) < 1e-8


# --- normal-normal


@pytest.mark.parametrize("size", [1, 2, 50, 1000])
def test_the_price_of_cutting_theta_and_z_apart_is_the_same_for_every_n(size):
    tau, sigma = 1.155, 2.43
    model = models.NormalNormal(tau, sigma, size=size)
    x = drawn(model)
    expected = real(0.5 * math.log(1 + tau**2 / sigma**2))
    close(model.approximation_gap(x), expected)
    s_xx = (x.double() - x.double().mean()).square().sum()
    lost = s_xx * tau**2 / (2 * sigma**2 * (sigma**2 + tau**2))
    close(model.inference_gap(x, model.best_constant(x)), expected + lost)
    # Not so under a proper prior; nearly so under a wide one.
    proper = models.NormalNormal(tau, sigma, size=size, prior_scale=3.0)
    assert 0 < expected - proper.approximation_gap(x) < 0.1
    wide = models.NormalNormal(tau, sigma, size=size, prior_scale=1e4)
    close(wide.approximation_gap(x), expected, atol=1e-6)
    of_prior = 0.5 * math.log(2 * math.pi) + math.log(1e4)
    close(wide.log_evidence(x) + of_prior, model.log_evidence(x), atol=1e-4)


# --- rows that are tied


def test_the_joint_normal_is_a_chain_of_conditionals():
    covariance = process()._exact[0] @ process()._exact[0].T
    z = torch.randn(3, N).double()
    ours = JointNormal(process()._exact[0]).expand((3, N)).log_prob(z)
    close(ours.sum(-1), dist.MultivariateNormal(torch.zeros(N).double(), covariance).log_prob(z))
    for n in range(N):
        before, at = covariance[:n, :n], covariance[n, :n]
        gain = torch.linalg.solve(before, at)
        conditional = dist.Normal(z[:, :n] @ gain, (covariance[n, n] - at @ gain).sqrt())
        close(ours[:, n], conditional.log_prob(z[:, n]))


@pytest.mark.parametrize("event_shape", [(), (2,)])
def test_draws_of_the_joint_normal_have_its_covariance(event_shape):
    model = planar() if event_shape else process()
    scale_tril = model._exact[0]
    fn = JointNormal(scale_tril, event_shape)
    count = 20_000
    draws = fn.sample((count,))
    assert draws.shape == (count, N, *event_shape)
    covariance = scale_tril @ scale_tril.T
    found = draws.reshape(count, -1).T @ draws.reshape(count, -1) / count
    se = ((covariance.diagonal().outer(covariance.diagonal()) + covariance.square()) / count).sqrt()
    assert ((found - covariance).abs() < 5 * se).all()
    # Resolved: independent rows are told apart.
    assert (covariance - covariance.diagonal().diag()).abs().max() > 20 * se.max()


def test_the_chain_is_that_of_pyros_hidden_markov_model():
    model = planar(size=12)
    x = drawn(model)
    noise = real([0.5, 1.0])
    stationary = model._exact[0][:2, :2]
    hmm = dist.GaussianHMM(
        dist.MultivariateNormal(torch.zeros(2).double(), scale_tril=stationary),
        TRANSITION.T,
        dist.Normal(torch.zeros(2).double(), noise).to_event(1),
        EMISSION.T,
        dist.Normal(torch.zeros(3).double(), real([0.8, 1.2, 0.5])).to_event(1),
        duration=12,
    )
    # Its first state is one step after its initial one, which a stationary chain does not notice.
    close(model.log_evidence(x), hmm.log_prob(x), atol=1e-8)


def kalman(x, first):
    """Filter and smoother (Rauch, Tung and Striebel), step by step: means, covariances, log evidence."""
    q = real([0.5, 1.0]).square().diag()
    r = real([0.8, 1.2, 0.5]).square().diag()
    mean, covariance, log_evidence, filtered = torch.zeros(2).double(), first, 0.0, []
    for t, row in enumerate(x):
        if t:
            mean, covariance = TRANSITION @ mean, TRANSITION @ covariance @ TRANSITION.T + q
        predicted = mean, covariance
        of_row = EMISSION @ covariance @ EMISSION.T + r
        log_evidence += dist.MultivariateNormal(EMISSION @ mean, of_row).log_prob(row)
        gain = covariance @ EMISSION.T @ torch.linalg.inv(of_row)
        mean, covariance = mean + gain @ (row - EMISSION @ mean), covariance - gain @ EMISSION @ covariance
        filtered.append((*predicted, mean, covariance))
    means, covariances = [mean], [covariance]
    for now, after in zip(filtered[-2::-1], filtered[:0:-1], strict=True):
        gain = now[3] @ TRANSITION.T @ torch.linalg.inv(after[1])
        means.insert(0, now[2] + gain @ (means[0] - after[0]))
        covariances.insert(0, now[3] + gain @ (covariances[0] - after[1]) @ gain.T)
    return torch.stack(means), torch.stack(covariances), log_evidence


def test_the_posterior_of_the_chain_is_the_kalman_smoothers():
    first = real([0.3, 2.0])
    model = planar(size=12, initial_scale=first)
    x = drawn(model)
    means, covariances, log_evidence = kalman(x, first.square().diag())
    posterior = model.posterior(x)
    close(log_evidence, model.log_evidence(x))
    close(means, posterior.mean.reshape(12, 2))
    for t in range(12):
        close(covariances[t], posterior.covariance_matrix[2 * t : 2 * t + 2, 2 * t : 2 * t + 2])


@pytest.mark.parametrize("case", JOINT)
def test_the_best_full_normals_of_single_rows(case):
    model = JOINT[case]()
    x = drawn(model)
    truth = Quadratic.of(model, x)
    best = model.best_full(x)
    reached = truth.elbo_of(best)
    close(truth.log_evidence - reached, model.inference_gap(x, best))
    latents = best.event_shape[0]

    def elbo(loc, factors):
        factors = factors.tril(-1) + factors.diagonal(dim1=-2, dim2=-1).exp().diag_embed()
        return truth.elbo(loc, torch.block_diag(*(factors @ factors.mT)))

    starts = torch.randn(N * latents).double(), 0.1 * torch.randn(N, latents, latents).double()
    close(maximum(elbo, *starts), reached, atol=1e-7)
    better = reached - truth.elbo_of(model.best_diagonal(x))
    assert better > 0.01 if latents > 1 else better.abs() < 1e-9


def windows(x, half_width):
    """``[N, (2 w + 1) D]``, with zeros beyond the ends."""
    x = x.reshape(len(x), -1)
    return pad(x.T, (half_width, half_width)).unfold(-1, 2 * half_width + 1, 1).movedim(1, 0).flatten(1)


@pytest.mark.parametrize("case", ["chain", "process"])
def test_the_best_linear_function_of_a_window(case):
    model = JOINT[case](12)
    x = drawn(model)
    truth = Quadratic.of(model, x)
    gaps = []
    for half_width in (0, 1, 2):
        inputs = windows(x, half_width)
        best = model.best_linear(x, inputs)
        reached = truth.elbo_of(best)
        found = maximum(
            lambda weights, bias, log_scale, inputs=inputs: truth.elbo(
                inputs @ weights + bias, (2 * log_scale).exp().expand(12).diag()
            ),
            torch.zeros(inputs.shape[1]).double(),
            *torch.zeros(2, 1).double(),
        )
        close(found, reached, atol=1e-7)
        gaps.append((model.inference_gap(x, best) - model.approximation_gap(x)).item())
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] > 0
    # Who reads the answer knows it, but for the scales of the first rows and the last.
    told = model.inference_gap(x, model.best_linear(x, model.posterior(x).mean.unsqueeze(-1)))
    assert told - model.approximation_gap(x) < gaps[-1]


@pytest.mark.parametrize("case", ["chain", "chain in the plane", "process"])
def test_the_expected_gap_of_a_window(case):
    model = JOINT[case](size=8)
    covariance = model._covariance(torch.zeros(()))
    # Expectations of squares over the data are sums over the columns of a root of their covariance.
    series = torch.linalg.cholesky(covariance).T.reshape(len(covariance), 8, -1)
    event = series.shape[2:] if case != "process" else ()
    means = torch.stack([model._moments(one.reshape(8, *event))[0] for one in series])
    precision = model._moments(series[0].reshape(8, *event))[1]
    root = torch.linalg.cholesky(precision).T
    latents = len(precision) // 8
    shared = 8 * (precision.diagonal().reshape(8, latents).mean(0).log().sum()) - precision.diagonal().log().sum()
    gaps = [model.window_gap(half_width) for half_width in (0, 1, 3, 20)]
    for half_width, gap in zip((0, 1, 3, 20), gaps, strict=True):
        designs = [root @ torch.kron(windows(one, half_width), torch.eye(latents).double()) for one in series]
        design, target = torch.cat(designs), (means @ root.T).reshape(-1)
        solution = torch.linalg.lstsq(design, target.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
        close(gap, 0.5 * ((target - design @ solution).square().sum() + shared), atol=1e-8)
    assert gaps[0] > gaps[1] > gaps[2] >= gaps[3] > 0


def test_a_window_closes_the_gap_geometrically_on_a_chain_and_late_on_a_process():
    def a_step(make):
        # What the ends cost cancels in the difference.
        return torch.stack([(make(80).window_gap(w) - make(40).window_gap(w)) / 40 for w in range(4)])

    def smooth(size):
        return models.GaussianProcess(lambda grid: squared_exponential(grid / 2), torch.arange(size).double(), 0.7)

    of_chain, of_process = a_step(chain), a_step(smooth)
    # The precision is tridiagonal: the weights of the smoother fall by its root from step to step, the gap by its square.
    half = ((1 + 0.8**2) / 0.6**2 + 1 / 0.8**2) / (2 * 0.8 / 0.6**2)
    root = half - math.sqrt(half**2 - 1)
    assert ((of_chain[1:] / of_chain[:-1] - root**2).abs() < 0.04).all()
    assert of_process[3] / of_process[0] > 4 * of_chain[3] / of_chain[0]


# --- the nonlinear problem

DEVIATIONS = [-20.0, -3.0, 0.0, 2.5, 7.0, 40.0]


def by_hand(z, x):
    scale = math.exp(math.cos(z))
    return -0.5 * z**2 - 0.5 * ((x - z * math.sin(z) - z) / scale) ** 2 - math.log(scale) - math.log(2 * math.pi)


def nonlinear(values=DEVIATIONS, theta=0.4):
    x = real(values).unsqueeze(-1)
    return models.Nonlinear1d(size=len(x), theta=theta).double(), x + theta


def test_the_nonlinear_log_joint_is_the_one_written_by_hand():
    model, x = nonlinear()
    z = torch.randn(len(x), 1).double()
    trace = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(x)
    expected = sum(by_hand(a.item(), b.item() - 0.4) for a, b in zip(z, x, strict=True))
    assert trace.log_prob_sum().item() == pytest.approx(expected, abs=1e-10)
    # The scale's logarithm is part of it: cos z, which the published code leaves out.
    assert abs(trace.log_prob_sum().item() - expected - z.cos().sum().item()) > 0.1
    flat = models.Nonlinear1d(size=len(x)).double()
    data = {"z": z, "theta": real(0.4)}
    assert poutine.trace(poutine.condition(flat, data=data)).get_trace(x).log_prob_sum().item() == pytest.approx(
        expected
    )
    for exact in ("log_evidence", "approximation_gap"):
        close(getattr(flat, exact)(x[1:4], 0.4), getattr(model, exact)(x[1:4]))


def test_evidence_and_moments_by_adaptive_quadrature():
    model, x = nonlinear()
    posterior = model.posterior(x)
    close(posterior.log_prob(posterior.mean), posterior.log_prob(posterior.mean[None])[0])
    z = torch.linspace(-32, 32, 64_001).double()
    for n, deviation in enumerate(DEVIATIONS):
        peak = max(by_hand(point, deviation) for point in z[::20].tolist())
        integrals = []
        for power in range(3):
            parts = [
                quad(lambda z, k=power, d=deviation, p=peak: z**k * math.exp(by_hand(z, d) - p), a, a + 1, epsabs=1e-13)
                for a in range(-20, 20)
            ]
            integrals.append(sum(part[0] for part in parts))
        assert model.log_evidence(x)[n].item() == pytest.approx(peak + math.log(integrals[0]), abs=1e-10)
        mean = integrals[1] / integrals[0]
        assert posterior.mean[n].item() == pytest.approx(mean, abs=1e-9)
        assert posterior.variance[n].item() == pytest.approx(integrals[2] / integrals[0] - mean**2, abs=1e-8)


def test_draws_of_the_nonlinear_posterior_have_its_moments():
    model, x = nonlinear()
    posterior = model.posterior(x)
    count = 20_000
    draws = posterior.sample((count,))
    assert draws.shape == (count, len(x), 1)
    assert ((draws.mean(0) - posterior.mean).abs() < 5 * (posterior.variance / count).sqrt()).all()
    assert ((draws.var(0) - posterior.variance).abs() < 5 * draws.square().std(0) / count**0.5 + 1e-4).all()


def test_the_best_normal_of_a_nonlinear_row():
    model, x = nonlinear(DEVIATIONS[:-1])
    best = model.best_diagonal(x)
    reached = model.elbo(x, best)
    assert (model.approximation_gap(x) > 1e-6).all()
    close(model.inference_gap(x, best), model.log_evidence(x) - reached)
    # The ELBO itself, by adaptive quadrature.
    for n in (1, 3):
        mean, scale = best.mean[n].item(), best.stddev[n].item()
        expectation, _ = quad(
            lambda u, m=mean, s=scale, d=DEVIATIONS[n]: by_hand(m + s * u, d) * math.exp(-0.5 * u**2),
            -10,
            10,
            epsabs=1e-12,
            limit=200,
        )
        entropy = math.log(scale) + 0.5 * (1 + math.log(2 * math.pi))
        assert reached[n].item() == pytest.approx(expectation / math.sqrt(2 * math.pi) + entropy, abs=1e-9)
    # Of many starts none leads higher.
    starts = torch.linspace(-12, 12, 41).double().repeat_interleave(len(x)).unsqueeze(-1)
    rows = x.repeat(41, 1)
    loc, log_scale = starts.requires_grad_(), torch.full_like(starts, -1.0).requires_grad_()
    optimizer = torch.optim.Adam([loc, log_scale], lr=0.05)
    for _ in range(120):
        optimizer.zero_grad()
        (-model.elbo(rows, dist.Normal(loc, log_scale.exp()).to_event(1)).sum()).backward()
        optimizer.step()
    with torch.no_grad():
        found = model.elbo(rows, dist.Normal(loc, log_scale.exp()).to_event(1)).reshape(41, -1).amax(0)
    assert (found <= reached + 1e-9).all() and (reached - found).max() < 0.05
    # The starts are needed: many lead to another, lower maximum.
    with torch.no_grad():
        everywhere = model.elbo(rows, dist.Normal(loc, log_scale.exp()).to_event(1)).reshape(41, -1)
    assert ((reached - everywhere) > 0.2).any(0).all()


# --- guides on the problems


def plate_of(model, case):
    return "time" if case.startswith("chain") else "data"


@pytest.mark.parametrize("case", ALL)
def test_a_table_at_the_best_diagonal_has_its_elbo(case):
    model = ALL[case]()
    x = drawn(model)
    guide = avi.FactorizedGuide(model).setup(x)
    theta = (0.4,) if case == "nonlinear, flat" else ()
    best = model.best_diagonal(x, *theta)
    of_rows = best["z"] if case in GLOBAL else best
    with torch.no_grad():
        guide.table.copy_(torch.cat([of_rows.mean, of_rows.stddev.log()], -1))
    if case in GLOBAL:
        with torch.no_grad():
            parameters = torch.stack([best["theta"].mean, best["theta"].stddev.log()])
            next(guide.global_guide.parameters()).copy_(parameters)
    if theta:
        with torch.no_grad():
            # A point, nearly: what is left of its own terms is known.
            next(guide.global_guide.parameters()).copy_(real([0.4, -12.0]))
    count = 300 if case in NONLINEAR else 150
    weights = avi.log_weights(model, guide, x, num_samples=count)
    local, evidence = weights.local, model.log_evidence(x, *theta)
    gap = model.approximation_gap(x, *theta)
    total = local.sum(-1) + (weights.global_ if case in GLOBAL else 0.0)
    value, se = total.mean(), total.std() / count**0.5
    assert (value - (evidence.sum() - gap.sum())).abs() < 5 * se
    # Resolved: the gap is seen.
    assert 5 * se < gap.sum()
    assert (value - evidence.sum()).abs() > 5 * se


@pytest.mark.parametrize("guide", [avi.ConstantGuide, avi.AmortizedGuide, avi.FactorizedGuide])
@pytest.mark.parametrize("case", ALL)
def test_every_guide_works_on_every_problem(case, guide):
    model = ALL[case]()
    x = drawn(model)
    guide = guide(model)
    vectorized = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO(), vectorized):
        fit = avi.fit(model, guide, x, num_steps=2, lr=1e-2, elbo=elbo, progress=False)
        assert all(math.isfinite(loss) for loss in fit.losses)
    posterior = guide.posterior(x)
    assert posterior.batch_shape == (N,) and posterior.mean.dtype == torch.double
    if case in LOCAL or case == "nonlinear":
        assert model.inference_gap(x, posterior).shape == (N,)
    elif case in JOINT:
        assert model.inference_gap(x, posterior) > model.approximation_gap(x)
    if case in JOINT:
        with pytest.raises(ValueError, match="The prior ties the rows"):
            model(x[:2], torch.arange(2))
        return
    index = torch.tensor([5, 0, 2])
    fit = avi.fit(model, guide, x[index], index, num_steps=2, lr=1e-2, progress=False)
    assert all(math.isfinite(loss) for loss in fit.losses)
    assert avi.log_weights(model, guide, x[index], index, num_samples=2).scale == pytest.approx(N / 3)


@pytest.mark.parametrize("case", ALL)
def test_a_problem_is_an_ordinary_pyro_model(case):
    model = ALL[case]()
    torch.manual_seed(5)
    x = model()
    torch.manual_seed(5)
    assert torch.equal(x, copy.deepcopy(model)()) and not torch.equal(x, model())
    assert len(x) == N and x.dtype == torch.double
    trace = poutine.trace(model).get_trace()
    assert plate_of(model, case) in trace.nodes
    assert trace.nodes["z"]["fn"].batch_shape == trace.nodes["x"]["fn"].batch_shape == (N,)
    again = pickle.loads(pickle.dumps(model))
    theta = (0.4,) if case == "nonlinear, flat" else ()
    assert torch.equal(again.log_evidence(x, *theta), model.log_evidence(x, *theta))
    # In single precision the same to single precision; exact answers stay in double.
    single = copy.deepcopy(model).float()
    assert single().dtype == torch.float32
    answer = single.log_evidence(x.float(), *theta)
    assert answer.dtype == torch.double
    torch.testing.assert_close(answer, model.log_evidence(x, *theta).detach(), rtol=1e-4, atol=1e-4, check_dtype=False)


def falling(lr, steps):
    return lambda step: lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def test_trained_guides_reach_what_the_closed_forms_say_on_normal_normal():
    model = models.NormalNormal(1.5, 0.8, size=30).double()
    x = drawn(model)
    least = model.approximation_gap(x)
    constant = model.inference_gap(x, model.best_constant(x))
    for make, expected in (
        (avi.ConstantGuide, constant),
        (lambda model: avi.AmortizedGuide(model, nn.Identity()), least),
        (avi.FactorizedGuide, least),
    ):
        guide = make(model).setup(x)
        avi.fit(
            model,
            guide,
            x,
            num_steps=200,
            lr=falling(0.1, 200),
            elbo=TraceMeanField_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1),
            progress=False,
        )
        loc, log_scale = next(guide.global_guide.parameters()).detach()
        q = {"theta": dist.Normal(loc, log_scale.exp()), "z": guide.posterior(x)}
        gap = model.inference_gap(x, q)
        assert expected - 1e-9 < gap < expected + 0.1
    assert constant - least > 5


def test_a_trained_encoder_of_windows_reaches_the_best_linear_function_of_them():
    model = chain(60)
    x = drawn(model)
    reached = {}
    for half_width in (0, 2):
        inputs = windows(x, half_width)
        guide = avi.AmortizedGuide(model, nn.Identity(), inputs=lambda x, w=half_width: windows(x, w)).setup(x)
        avi.fit(
            model,
            guide,
            x,
            num_steps=250,
            lr=falling(0.05, 250),
            elbo=Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1),
            progress=False,
        )
        expected = model.inference_gap(x, model.best_linear(x, inputs))
        reached[half_width] = model.inference_gap(x, guide.posterior(x)).item()
        # Its scales, too, may follow the window: a little better than one scale for all is possible.
        assert abs(reached[half_width] - expected.item()) < 0.3
    assert reached[0] - reached[2] > 2


# --- errors

ONE = torch.ones(1, 1)
REFUSED = {
    "loadings": (lambda: models.FactorAnalysis(torch.ones(3), 1.0, size=2), r"Expected loadings \[D, K\]"),
    "loadings with nan": (
        lambda: models.FactorAnalysis(torch.full((2, 1), math.nan), 1.0, size=2),
        "finite real numbers",
    ),
    "noise": (lambda: models.FactorAnalysis(ONE, -1.0, size=2), "Expected scale to be positive and finite, got -1.0"),
    "noise shape": (lambda: models.FactorAnalysis(ONE, torch.ones(3), size=2), "Expected scale of shape .* got .3,"),
    "mean shape": (lambda: models.FactorAnalysis(ONE, 1.0, size=2, mean=torch.ones(3)), "Expected mean of shape"),
    "no rows": (lambda: models.FactorAnalysis(ONE, 1.0, size=0), "Expected size to be the number of rows"),
    "correlation": (lambda: models.FactorAnalysis.correlated(1.0, size=2), "Expected a correlation between -1 and 1"),
    "rank": (lambda: models.FactorAnalysis(ONE, 1.0, size=2).best_rank(ONE, -1), "Expected a rank of at least 0"),
    "x of another width": (
        lambda: models.FactorAnalysis(ONE, 1.0, size=2).log_evidence(torch.ones(2, 3)),
        r"Expected x of shape \[N, 1\], got \(2, 3\)",
    ),
    "x with nan": (
        lambda: models.FactorAnalysis(ONE, 1.0, size=2).log_evidence(torch.tensor([[1.0], [math.nan]])),
        "nan or infinity in 1 of 2 rows, the first is row 1",
    ),
    "x without rows": (
        lambda: models.FactorAnalysis(ONE, 1.0, size=2).log_evidence(torch.ones(0, 1)),
        "Expected at least one row",
    ),
    "flow": (
        lambda: models.FactorAnalysis(ONE, 1.0, size=1).inference_gap(ONE, dist.Laplace(0.0, 1.0)),
        "Expected a normal factor, independent or multivariate, got Laplace",
    ),
    "latents": (lambda: models.LinearVAE(3, 3, size=2), "Expected latent_dim between 1 and data_dim - 1 = 2, got 3"),
    "too few rows": (
        lambda: models.LinearVAE(1, 3, size=2).best(torch.eye(3)[:2]),
        "Expected rows that vary in more than latent_dim = 1 dimensions, got 2 rows",
    ),
    "tau": (lambda: models.NormalNormal(0.0, 1.0, size=2), "Expected tau to be positive and finite, got 0"),
    "prior": (lambda: models.NormalNormal(1.0, 1.0, size=2, prior_scale=0.0), "Expected prior_scale to be positive"),
    "no theta": (lambda: models.Nonlinear1d(size=1).log_evidence(ONE), "Expected one theta, got None here"),
    "two thetas": (lambda: models.Nonlinear1d(size=1, theta=0.0).log_evidence(ONE, 1.0), "Expected one theta, got 1.0"),
    "transition": (
        lambda: models.LinearGaussianStateSpace(
            ONE, torch.ones(1, 2), size=3, transition_scale=1.0, emission_scale=1.0
        ),
        r"Expected transition \[H, H\] and emission \[D, H\], got \(1, 1\) and \(1, 2\)",
    ),
    "random walk": (
        lambda: models.LinearGaussianStateSpace(ONE, ONE, size=3, transition_scale=1.0, emission_scale=1.0),
        "smaller than 1 in modulus, got 1: such a chain has no stationary distribution.\nPass initial_scale",
    ),
    "no steps": (lambda: chain(0), "Expected size to be the number of time steps, got 0"),
    "transition scale shape": (
        lambda: chain(transition_scale=torch.ones(2)),
        r"Expected transition_scale of shape \(\) or \(1,\), got \(2,\)",
    ),
    "emission scale": (lambda: chain(emission_scale=0.0), "Expected the noise's scale to be positive"),
    "part of a series": (lambda: chain()(torch.ones(3, 1)), "Expected all 7 rows of plate 'time' and x of shape"),
    "part of a series, exactly": (lambda: chain().log_evidence(torch.ones(3, 1)), r"Expected x of shape \[7, 1\]"),
    "window": (lambda: chain().window_gap(-1), "Expected half_width of at least 0"),
    "inputs": (lambda: chain().best_linear(torch.ones(7, 1), torch.ones(3, 1)), r"Expected x of shape \[7, 1\]"),
    "kernel": (lambda: models.GaussianProcess(lambda t: t, torch.arange(3.0), 1.0), r"covariance \[3, 3\]"),
    "singular kernel": (
        lambda: models.GaussianProcess(lambda t: torch.ones(len(t), len(t)), torch.arange(3.0), 1.0),
        "not at point 1 of 3.\nA smooth kernel on a fine grid",
    ),
    "grid": (
        lambda: models.GaussianProcess(squared_exponential, torch.arange(3), 1.0),
        "Expected a grid of real numbers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_problem_or_no_data_is_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_every_problem_is_tested():
    # Problems of discrete latents have tests of their own.
    public = {name for name in models.__all__ if hasattr(getattr(models, name), "log_evidence")}
    discrete = {"NormalMixture", "SigmoidBelief"}
    assert public - discrete == {type(make()).__name__ for make in ALL.values()}
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert all(f"models.{name}(" in tests for name in discrete)
