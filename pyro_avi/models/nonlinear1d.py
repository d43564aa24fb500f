"""A one-dimensional nonlinear model: no closed form, but quadrature to machine precision."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.func import grad, jacrev, vmap

from pyro_avi.models.checks import check_rows
from pyro_avi.models.flat import Flat
from pyro_avi.models.latent_decoder import LatentDecoder
from pyro_avi.models.normal_posterior import in_double

__all__ = ["Nonlinear1d"]

LOG_TWO_PI = math.log(2 * math.pi)
# How many numbers are worked on at once: what fits into a cache.
CHUNK = 1_000_000


class Nonlinear1d(LatentDecoder):
    r"""One latent a row, seen through a nonlinear mean and a nonlinear scale; posteriors may have several modes.

    .. math:: z_n \sim N(0, 1), \qquad x_n \sim N(\theta + z_n \sin z_n + z_n, \, e^{2 \cos z_n})

    :math:`\theta` has a flat prior or is fixed; exact answers are given :math:`\theta`, by row ``[N]``, in nats and double
    precision. They are integrals over one real number, by the trapezoidal rule with a spacing of 0.01 on
    :math:`|z| \le 12 + \max_n |x_n - \theta| / 2`. The integrands are analytic, so its error falls exponentially in the
    spacing; at this one it is below :math:`10^{-10}` nats for :math:`|x_n - \theta| \le 40`. What is cut off is less.

    Args:
        size: ``N``, the number of rows of the data set.
        theta: :math:`\theta`; by default a global latent with a flat prior of density 1. That has no draws: called without
            ``x``, the model then simulates at :math:`\theta = 0`.

    References:
        Margossian and Blei, "Amortized Variational Inference: When and Why?", 2024, https://arxiv.org/abs/2307.11018; their
        data are drawn with latents of standard deviation 5: ``poutine.condition(model, {"z": 5 * torch.randn(N, 1)})()``.
        Trefethen and Weideman, "The Exponentially Convergent Trapezoidal Rule", 2014, https://doi.org/10.1137/130932132.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> model = avi.models.Nonlinear1d(size=3, theta=0.0)
        >>> x = torch.tensor([[-4.0], [0.0], [4.0]])
        >>> model.log_evidence(x).shape, model.best_diagonal(x).mean.shape
        (torch.Size([3]), torch.Size([3, 1]))
        >>> bool((model.approximation_gap(x) > 0).all())
        True
    """

    def __init__(self, *, size: int, theta: float | None = None):
        super().__init__(1, size=size, likelihood=_location_and_scale)
        self.theta = theta

    def _decode(self) -> Callable[[Tensor], Tensor]:
        theta = pyro.sample("theta", Flat(self.zero)) if self.theta is None else self.zero + self.theta
        # Location and logarithm of the scale.
        return lambda z: torch.cat([theta.unsqueeze(-1) + _curve(z), z.cos()], -1)

    def log_evidence(self, x: Tensor, theta: float | None = None) -> Tensor:
        r"""``[N]`` the exact :math:`\log p(x_n \mid \theta)`.

        Args:
            x: ``[N, 1]``.
            theta: :math:`\theta`, where the model does not fix it.

        Raises:
            ValueError: if :math:`\theta` is missing, or given twice.
        """
        return self.posterior(x, theta).log_evidence

    def posterior(self, x: Tensor, theta: float | None = None) -> "QuadraturePosterior":
        r"""The exact posterior of the latents given :math:`\theta`: batch ``[N]``, event ``[1]``, with moments and draws.

        Args:
            x: ``[N, 1]``.
            theta: :math:`\theta`, where the model does not fix it.

        Raises:
            ValueError: if :math:`\theta` is missing, or given twice.
        """
        return QuadraturePosterior(self._deviation(x, theta))

    def elbo(self, x: Tensor, q: dist.TorchDistribution, theta: float | None = None) -> Tensor:
        r"""``[N]`` the exact ELBO of normal factors given :math:`\theta`.

        Args:
            x: ``[N, 1]``.
            q: independent normals with batch ``[N]`` and event ``[1]``.
            theta: :math:`\theta`, where the model does not fix it.

        Raises:
            ValueError: if ``q`` is no normal; if :math:`\theta` is missing, or given twice.
        """
        q = in_double(q)
        deviation = self._deviation(x, theta)
        return _elbo(torch.cat([q.mean, q.stddev.log()], -1), deviation)

    def inference_gap(self, x: Tensor, q: dist.TorchDistribution, theta: float | None = None) -> Tensor:
        r"""``[N]`` the evidence minus the ELBO of normal factors given :math:`\theta`.

        Args:
            x, q, theta: as for :meth:`elbo`.

        Raises:
            ValueError: as :meth:`elbo`.
        """
        return self.log_evidence(x, theta) - self.elbo(x, q, theta)

    def approximation_gap(self, x: Tensor, theta: float | None = None) -> Tensor:
        r"""``[N]`` what the normals cannot express, given :math:`\theta`.

        Args:
            x: ``[N, 1]``.
            theta: :math:`\theta`, where the model does not fix it.

        Raises:
            ValueError: if :math:`\theta` is missing, or given twice.
        """
        return self.inference_gap(x, self.best_diagonal(x, theta), theta)

    def best_diagonal(self, x: Tensor, theta: float | None = None) -> dist.TorchDistribution:
        r"""The best normal of every row given :math:`\theta`: batch ``[N]``, event ``[1]``.

        There is no closed form: the best point of a grid (spacing 0.02 in the mean, 0.1 in the log scale), from which Newton's
        method goes to the maximum. A maximum that is narrower than the grid, or within 0.01 nats of another, may be missed.

        Args:
            x: ``[N, 1]``.
            theta: :math:`\theta`, where the model does not fix it.

        Raises:
            ValueError: if :math:`\theta` is missing, or given twice.
        """
        deviation = self._deviation(x, theta)
        start = _best_of_grid(deviation)
        loc, log_scale = _newton(start, deviation).split(1, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def _deviation(self, x: Tensor, theta: float | None) -> Tensor:
        """``[N]`` what is left of the rows without theta: all that the posteriors depend on."""
        if (theta is None) == (self.theta is None):
            raise ValueError(
                f"Expected one theta, got {theta} here and {self.theta} in the model.\n"
                "Exact answers are given theta: fix it in the model, Nonlinear1d(size=..., theta=...), or pass it here."
            )
        return check_rows(x, (1,)).squeeze(-1) - float(cast(float, self.theta if theta is None else theta))


class QuadraturePosterior(dist.TorchDistribution):
    """The posteriors of rows with one latent each, by quadrature; batch ``[N]``, event ``[1]``.

    Args:
        deviation: ``[N]`` the observations without theta.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.real, 1)

    def __init__(self, deviation: Tensor):
        self._observed = deviation
        reach, self._spacing = 12.0 + 0.5 * deviation.abs().max().item(), 0.01
        steps = math.ceil(reach / self._spacing)
        self._grid = self._spacing * torch.arange(-steps, steps + 1).to(deviation)
        super().__init__(deviation.shape, torch.Size((1,)), validate_args=False)

    def _by_chunk(self, of_chunk: Callable[[Tensor], Tensor]) -> Tensor:
        """Something of the log joints ``[n, G]`` on the grid, for some rows at a time."""
        chunks = self._observed.split(max(1, CHUNK // len(self._grid)))
        return torch.cat([of_chunk(_log_joint(self._grid, chunk.unsqueeze(-1))) for chunk in chunks], -1)

    @property
    def log_evidence(self) -> Tensor:
        """``[N]`` the logarithms of the integrals over the joint densities."""
        return self._by_chunk(lambda log_joint: log_joint.logsumexp(-1)) + math.log(self._spacing)

    def _moment(self, power: int) -> Tensor:
        return self._by_chunk(lambda log_joint: log_joint.softmax(-1) @ self._grid**power).unsqueeze(-1)

    @property
    def mean(self) -> Tensor:
        """``[N, 1]`` the posterior means."""
        return self._moment(1)

    @property
    def variance(self) -> Tensor:
        """``[N, 1]`` the posterior variances."""
        return self._moment(2) - self.mean.square()

    def log_prob(self, value: Tensor) -> Tensor:
        """The log densities of latents ``[..., N, 1]``."""
        return _log_joint(value.squeeze(-1).double(), self._observed) - self.log_evidence

    def sample(self, sample_shape=()) -> Tensor:
        """Draws, from a histogram with bins as wide as the grid's spacing."""
        count = torch.Size(sample_shape).numel()

        def draw(log_joint):
            return self._grid[torch.multinomial(log_joint.softmax(-1), count, replacement=True).T]

        draws = self._by_chunk(draw).reshape(self._extended_shape(torch.Size(sample_shape)))
        return draws + self._spacing * (torch.rand_like(draws) - 0.5)


def _curve(z: Tensor) -> Tensor:
    return z * z.sin() + z


def _location_and_scale(output: Tensor) -> dist.Normal:
    loc, log_scale = output.chunk(2, -1)
    return dist.Normal(loc, log_scale.exp())


def _log_joint(z: Tensor, deviation: Tensor) -> Tensor:
    """Log density of latents and of what the observations are without theta."""
    cos = z.cos()
    return -0.5 * z.square() - 0.5 * ((deviation - _curve(z)) * (-cos).exp()).square() - cos - LOG_TWO_PI


def _elbo(parameters: Tensor, deviation: Tensor, *, spacing: float = 0.1) -> Tensor:
    """ELBO of normals with parameters ``[..., 2]``, mean and log scale, at deviations ``[...]``."""
    # Expectations under a standard normal, by the trapezoidal rule.
    steps = math.ceil(9 / spacing)
    nodes = spacing * torch.arange(-steps, steps + 1).to(parameters)
    weights = spacing * (-0.5 * nodes.square() - 0.5 * LOG_TWO_PI).exp()
    loc, log_scale = parameters.unbind(-1)
    z = loc.unsqueeze(-1) + log_scale.exp().unsqueeze(-1) * nodes
    return _log_joint(z, deviation.unsqueeze(-1)) @ weights + log_scale + 0.5 * (1 + LOG_TWO_PI)


def _best_of_grid(deviation: Tensor) -> Tensor:
    """``[N, 2]`` the parameters of largest ELBO on a grid."""
    reach = math.ceil(6 + 0.5 * deviation.abs().max().item())
    loc = 0.02 * torch.arange(-50 * reach, 50 * reach + 1).to(deviation)
    grid = torch.cartesian_prod(loc, 0.1 * torch.arange(-50, 11).to(deviation))
    # The ELBO is quadratic in the deviation, so three points give it for every row. To choose a start few nodes will do.
    lower, middle, upper = (
        torch.cat(
            [_elbo(part, deviation.new_tensor(at).expand(len(part)), spacing=0.4) for part in grid.split(CHUNK // 50)]
        )
        for at in (-1.0, 0.0, 1.0)
    )
    coefficients = torch.stack([middle, 0.5 * (upper - lower), 0.5 * (lower + upper) - middle])
    powers = deviation.unsqueeze(-1) ** torch.arange(3).to(deviation)
    best = [(rows @ coefficients).argmax(-1) for rows in powers.split(max(1, CHUNK // len(grid)))]
    return grid[torch.cat(best)]


def _newton(parameters: Tensor, deviation: Tensor, steps: int = 8) -> Tensor:
    """Climb to the maximum near parameters ``[N, 2]``; a step that does not climb is not taken."""
    slopes, curvatures = vmap(grad(_elbo)), vmap(jacrev(grad(_elbo)))
    for _ in range(steps):
        step = torch.linalg.solve(curvatures(parameters, deviation), slopes(parameters, deviation))
        moved = parameters - step
        climbs = _elbo(moved, deviation) > _elbo(parameters, deviation)
        parameters = torch.where(climbs.unsqueeze(-1), moved, parameters)
    return parameters
