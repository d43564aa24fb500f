"""The problem of the sweep `nonlinear`: `Nonlinear1d` on data as published, and the best of all factors by quadrature."""

import math
from functools import cached_property, partial

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

import pyro_avi as avi
from pyro_avi.encoders import MLP

__all__ = ["Nonlinear"]

DATA_SEED, LATENT_SCALE = 1789, 5.0
LOG_TWO_PI = math.log(2 * math.pi)
#: The starts of F-VI by several: every mean with every scale.
MEANS, SCALES = torch.arange(-12.0, 12.01, 0.25), torch.tensor([0.1, 0.2, 0.4, 0.8])

Guide = avi.AmortizedGuide | avi.ConstantGuide | avi.FactorizedGuide
#: Mean and standard deviation of theta, and the rows' factors.
Factors = tuple[Tensor, Tensor, dist.TorchDistribution]


class Nonlinear:
    """x_n ~ N(theta + z_n sin z_n + z_n, exp(cos z_n)^2), a flat prior on theta: a `comparison.training.Problem`.

    The bound of normals is exact: given theta that of the rows is `model.elbo`, by quadrature, and a parabola in theta, whose
    mean under N(t, s^2) is the mean of its values at t - s and t + s.
    """

    def __init__(self, rows: int):
        self.model = avi.models.Nonlinear1d(size=rows)
        self.x = _simulate(self.model)
        self.optimum = self._climb(*self._best_of_modes())
        self.best = self._elbo(*self.optimum).item()
        self.evidence = self._evidence()
        self.spread = self._spread()

    def _given(self, theta: Tensor, q: dist.TorchDistribution) -> Tensor:
        """The exact ELBO of the rows given theta."""
        return self.model.elbo(self.x, q, theta.item()).sum()

    def _elbo(self, theta: Tensor, theta_scale: Tensor, q: dist.TorchDistribution) -> Tensor:
        """The exact ELBO of normals for theta and the rows."""
        below, above = (self._given(at, q) for at in (theta - theta_scale, theta + theta_scale))
        return 0.5 * (below + above) + theta_scale.log() + 0.5 * (1 + LOG_TWO_PI)

    @torch.no_grad()
    def _best_theta(self, near: Tensor, q: dist.TorchDistribution) -> tuple[Tensor, Tensor]:
        """The best normal for theta beside factors of the rows: the top of the parabola and its curvature."""
        below, middle, above = (self._given(near + step, q) for step in (-1, 0, 1))
        precision = 2 * middle - below - above
        return near + 0.5 * (above - below) / precision, precision.rsqrt()

    def _best_of_modes(self) -> Factors:
        """Of many theta the one whose rows have the best modes, all of which are looked at."""
        first = torch.zeros(()).double()
        second, _ = self._best_theta(first, self.model.best_diagonal(self.x, first.item()))
        third, scale = self._best_theta(second, self.model.best_diagonal(self.x, second.item()))
        # Where turns of rows and theta lead to, if each goes the same share of the way that is left (Aitken).
        middle = third + (third - second).square() / (2 * second - first - third)
        found: list[Factors] = []
        for at in middle + scale * torch.arange(-1, 1.1, 0.5):
            q = self.model.best_diagonal(self.x, at.item())
            found.append((*self._best_theta(at, q), q))
        return max(found, key=lambda factors: self._elbo(*factors).item())

    def _climb(self, theta: Tensor, theta_scale: Tensor, q: dist.TorchDistribution) -> Factors:
        """The maximum near by, of theta and all rows together."""
        # In these units the bound is about as curved in every direction.
        moves = torch.zeros(len(self.x), 2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([moves], max_iter=100, tolerance_grad=1e-9, tolerance_change=1e-13,
                                      line_search_fn="strong_wolfe")  # fmt: skip

        def moved() -> Factors:
            loc, log_scale = moves.split(1, -1)
            rows = dist.Normal(q.mean + q.stddev * loc, q.stddev * log_scale.exp()).to_event(1)
            return *self._best_theta(theta, rows), rows

        def loss() -> Tensor:
            optimizer.zero_grad()
            # Where theta is at its best the slope in the rows is the whole slope.
            value = -self._elbo(*moved())
            value.backward()
            return value

        optimizer.step(loss)
        with torch.no_grad():
            return moved()

    def _evidence(self) -> float:
        """The log of the integral of p(x | theta), by the trapezoidal rule: a bell about as wide as the best normal."""
        theta, scale, _ = self.optimum
        step = 0.5 * scale
        nodes = theta + step * torch.arange(-20, 21)
        return (torch.stack([self.model.log_evidence(self.x, at.item()).sum() for at in nodes]).logsumexp(0)
                + step.log()).item()  # fmt: skip

    def _spread(self) -> float:
        """The standard deviation of the log weight at the optimum.

        Given theta rows are independent, and theta itself adds nothing: there the bound's parabola is that of log q(theta). The
        variance of a row is of degree four in theta, so that three Gauss-Hermite nodes are exact.
        """
        theta, scale, q = self.optimum
        nodes = 0.1 * torch.arange(-90, 91).double()
        weights = 0.1 * (-0.5 * nodes.square() - 0.5 * LOG_TWO_PI).exp()
        z = q.mean + q.stddev * nodes.view(-1, 1, 1)
        variances = []
        for step in (-(3**0.5), 0.0, 3**0.5):
            posterior = self.model.posterior(self.x, (theta + step * scale).item())
            log_weights = posterior.log_prob(z) + posterior.log_evidence - q.log_prob(z)
            variances.append((weights @ (log_weights - weights @ log_weights).square()).sum().item())
        return (variances[0] / 6 + 2 * variances[1] / 3 + variances[2] / 6) ** 0.5

    @cached_property
    def starts(self) -> Tensor:
        """``[N, 2]`` mean and logarithm of the scale of every row's best start, by the ELBO that it has there."""
        starts = torch.cartesian_prod(MEANS, SCALES)
        at_zero = self.x.new_zeros(self.x.shape)
        bounds = [self.model.elbo(self.x, dist.Normal(at_zero + loc, at_zero + scale).to_event(1), 0.0)
                  for loc, scale in starts]  # fmt: skip
        best = starts[torch.stack(bounds).argmax(0)]
        return torch.stack([best[:, 0], best[:, 1].log()], -1)

    def guide(self, arm: str) -> Guide:
        """The guide of an arm."""
        if arm == "F-VI":
            return avi.FactorizedGuide(self.model)
        if arm == "F-VI, several starts":
            guide = avi.FactorizedGuide(self.model).setup(self.x)
            with torch.no_grad():
                guide.table.copy_(self.starts)
            return guide
        if arm == "constant":
            return avi.ConstantGuide(self.model)
        width = int(arm.removeprefix("x_n, "))
        # Published are ReLUs, of which all can die at once in a narrow layer.
        encoder: nn.Module = MLP(1, (width, width), activation=partial(nn.LeakyReLU, 0.2))
        return avi.AmortizedGuide(self.model, encoder, standardize=True)

    def bound(self, guide: Guide) -> float:
        """The exact ELBO."""
        theta, q = guide.global_guide.posterior_by_site()["theta"], guide.fixed_posterior(self.x)
        with torch.no_grad():
            return self._elbo(theta.mean.double(), theta.stddev.double(), q).item()

    def predicted(self, arm: str) -> float | None:
        """No closed form of what an arm loses is known."""
        return None


def _simulate(model: avi.models.Nonlinear1d) -> Tensor:
    """Data at theta = 0, whose latents are spread wider than the model has them, as published."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(DATA_SEED)
        return poutine.condition(model, {"z": LATENT_SCALE * torch.randn(model.size, 1)})()
