"""The simplest model with a global and a local latent: both exact posterior and best factors are known."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_avi.models.checks import check_positive, check_rows
from pyro_avi.models.flat import Flat
from pyro_avi.models.latent_decoder import LatentDecoder
from pyro_avi.models.normal_posterior import in_double

__all__ = ["NormalNormal"]


class NormalNormal(LatentDecoder):
    r"""Normal rows around a common location, each moved by a latent of its own.

    .. math:: \theta \sim N(0, s^2) \text{ or flat}, \qquad z_n \sim N(0, 1), \qquad x_n \sim N(\theta + \tau z_n, \sigma^2)

    Under the flat prior independent normals for :math:`\theta, z_1, \dots, z_N` lose
    :math:`\frac12 \log(1 + \tau^2 / \sigma^2)` in total, for every N. A factor that is linear in :math:`x_n` attains them;
    a constant one does not. Answers are in nats and double precision.

    Args:
        tau: the standard deviation that the latents give to a row.
        sigma: the standard deviation of the noise.
        size: ``N``, the number of rows of the data set.
        prior_scale: ``s``; infinite, the default, is the flat prior of density 1. It has no draws: called without ``x``, the
            model then simulates at :math:`\theta = 0`.

    Raises:
        ValueError: if a scale is not positive.

    References:
        Margossian and Blei, "Amortized Variational Inference: When and Why?", 2024, https://arxiv.org/abs/2307.11018.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> model = avi.models.NormalNormal(1.155, 2.43, size=50)
        >>> x = model()
        >>> round(model.approximation_gap(x).item(), 6)
        0.101845
        >>> guide = avi.AmortizedGuide(model, torch.nn.Identity()).setup(x)
    """

    def __init__(self, tau: float, sigma: float, *, size: int, prior_scale: float = math.inf):
        for name, scale in {"tau": tau, "sigma": sigma}.items():
            check_positive(name, scale)
        if not prior_scale > 0:
            raise ValueError(f"Expected prior_scale to be positive, or infinite for a flat prior, got {prior_scale}.")
        super().__init__(1, size=size, likelihood=partial(dist.Normal, scale=sigma))
        self.tau, self.sigma, self.prior_scale = tau, sigma, prior_scale
        # Of a row given theta, and the prior's precision.
        self._variance, self._precision = tau**2 + sigma**2, prior_scale**-2

    def _decode(self) -> Callable[[Tensor], Tensor]:
        flat = math.isinf(self.prior_scale)
        theta = pyro.sample("theta", Flat(self.zero) if flat else dist.Normal(self.zero, self.prior_scale))
        return lambda z: theta.unsqueeze(-1) + self.tau * z

    def log_evidence(self, x: Tensor, theta: float | Tensor | None = None) -> Tensor:
        r"""The exact log evidence: ``[]`` of all rows together, which :math:`\theta` ties; given it, ``[N]`` by row.

        Under the flat prior it is the logarithm of :math:`\int p(x_{1:N} \mid \theta) \, d\theta`.

        Args:
            x: ``[N, 1]``.
            theta: the location to condition on; by default it is integrated out.
        """
        x = check_rows(x, (1,)).squeeze(-1)
        v, precision = self._variance, self._precision
        if theta is not None:
            return dist.Normal(torch.as_tensor(theta, dtype=x.dtype, device=x.device), math.sqrt(v)).log_prob(x)
        # log p(x) = log p(x | theta) + log p(theta) - log p(theta | x), at the posterior's mean.
        posterior = self.posterior(x.unsqueeze(-1))["theta"]
        result = self.log_evidence(x.unsqueeze(-1), posterior.mean).sum() - posterior.log_prob(posterior.mean)
        if precision:
            result = result + dist.Normal(torch.zeros_like(result), self.prior_scale).log_prob(posterior.mean)
        return result

    def posterior(
        self, x: Tensor, theta: float | Tensor | None = None
    ) -> dist.TorchDistribution | dict[str, dist.TorchDistribution]:
        r"""The exact posterior.

        Args:
            x: ``[N, 1]``.
            theta: the location to condition on.

        Returns:
            Given :math:`\theta`, that of the latents: batch ``[N]``, event ``[1]``. Otherwise the marginals by site:
            ``"theta"``, a normal, and ``"z"``, a multivariate normal over the rows, event ``[N]``: a diagonal plus rank 1.
        """
        x = check_rows(x, (1,)).squeeze(-1)
        v = self._variance
        slope, scale = self.tau / v, self.sigma / math.sqrt(v)
        if theta is not None:
            loc = (slope * (x - torch.as_tensor(theta, dtype=x.dtype, device=x.device))).unsqueeze(-1)
            return dist.Normal(loc, scale).to_event(1)
        precision = len(x) / v + self._precision
        of_theta = dist.Normal(x.sum() / v / precision, x.new_tensor(precision**-0.5))
        factor = torch.full_like(x, slope * precision**-0.5).unsqueeze(-1)
        of_z = dist.LowRankMultivariateNormal(slope * (x - of_theta.mean), factor, torch.full_like(x, scale**2))
        return {"theta": of_theta, "z": of_z}

    def best_diagonal(self, x: Tensor) -> dict[str, dist.TorchDistribution]:
        r"""The best independent normals by site, ``"theta"`` and ``"z"`` with batch ``[N]`` and event ``[1]``.

        .. math:: q(\theta) = N\left( \hat\theta, \left( \frac N{\sigma^2} + \frac1{s^2} \right)^{-1} \right), \qquad
                  q(z_n) = N\left( \frac{\tau (x_n - \hat\theta)}{\sigma^2 + \tau^2}, \frac{\sigma^2}{\sigma^2 + \tau^2} \right)

        with the posterior's mean :math:`\hat\theta`, under the flat prior :math:`\bar x`.

        Args:
            x: ``[N, 1]``.
        """
        theta = self.posterior(x)["theta"].mean
        scale = theta.new_tensor(len(x) / self.sigma**2 + self._precision).rsqrt()
        return {"theta": dist.Normal(theta, scale), "z": self.posterior(x, theta)}

    def best_constant(self, x: Tensor) -> dict[str, dist.TorchDistribution]:
        r"""The best independent normals of which all rows have the same.

        .. math:: q(z_n) = N\left( \bar m, \frac{\sigma^2}{\sigma^2 + \tau^2} \right)

        with the average :math:`\bar m` of the rows' best means, 0 under the flat prior; :math:`q(\theta)` is as before.

        Args:
            x: ``[N, 1]``.
        """
        best = self.best_diagonal(x)
        normal = best["z"].base_dist
        return {**best, "z": dist.Normal(normal.loc.mean(0).expand_as(normal.loc), normal.scale).to_event(1)}

    def approximation_gap(self, x: Tensor) -> Tensor:
        r"""``[]`` what the independent normals lose, over all rows: the price of cutting :math:`\theta` and z apart.

        .. math:: \frac12 \log \frac{N / \sigma^2 + 1 / s^2}{N / (\sigma^2 + \tau^2) + 1 / s^2}, \qquad
                  \text{under the flat prior } \frac12 \log \left( 1 + \frac{\tau^2}{\sigma^2} \right)

        Args:
            x: ``[N, 1]``.
        """
        size = len(check_rows(x, (1,)))
        ratio = (size / self.sigma**2 + self._precision) / (size / self._variance + self._precision)
        return torch.tensor(0.5 * math.log(ratio), dtype=torch.double)

    def inference_gap(self, x: Tensor, q: Mapping[str, dist.TorchDistribution]) -> Tensor:
        r"""``[]`` the evidence minus the ELBO of independent normals, over all rows: their divergence from the posterior.

        Args:
            x: ``[N, 1]``.
            q: ``"theta"``, a normal, and ``"z"``, independent normals with batch ``[N]`` and event ``[1]``.

        Raises:
            ValueError: if a factor is no normal.
        """
        theta, z = in_double(q["theta"]), in_double(q["z"])
        x = check_rows(x, (1,))
        best = self.best_diagonal(x)
        # The posterior's precision has a star's shape: theta is tied to every z, and no z to another.
        of_theta, of_z = best["theta"].variance.reciprocal(), self._variance / self.sigma**2
        d_theta, d_z = theta.mean - best["theta"].mean, z.mean - best["z"].mean
        distance = of_theta * d_theta**2 + (of_z * d_z**2 + 2 * self.tau / self.sigma**2 * d_theta * d_z).sum()
        ratios = torch.cat([(of_theta * theta.variance).reshape(1), (of_z * z.variance).reshape(-1)])
        return self.approximation_gap(x) + 0.5 * (distance + (ratios - 1 - ratios.log()).sum())

    def tail_index(self, x: Tensor) -> Tensor:
        r"""``[]`` what k-hat estimates at the best independent normals: the Pareto tail index of their joint weights.

        .. math:: \frac{\tau}{\sqrt{\sigma^2 + \tau^2}} \left( 1 + \frac{\sigma^2}{N s^2} \right)^{-1/2}

        Args:
            x: ``[N, 1]``.
        """
        size = len(check_rows(x, (1,)))
        index = self.tau / math.sqrt(self._variance * (1 + self.sigma**2 * self._precision / size))
        return torch.tensor(index, dtype=torch.double)
