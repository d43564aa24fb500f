"""What models with a normal posterior share: every family's optimum follows from a mean and a precision."""

from abc import abstractmethod

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence

__all__ = ["NormalPosterior", "in_double"]


class NormalPosterior:
    r"""Closed forms of a model whose posterior is normal with a precision that does not depend on the data.

    .. math:: p(z \mid x) = N(m(x), \Lambda^{-1})

    Every answer is in nats and double precision. The rows may fall into blocks that are independent of each other, each with
    this posterior, or be one block.
    """

    @abstractmethod
    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Means ``[*blocks, M]`` and the precision :math:`\Lambda` ``[M, M]`` of a block, in double precision."""

    @abstractmethod
    def _rows(self, values: Tensor) -> Tensor:
        """Coordinates of the blocks ``[*blocks, M]`` as those of the rows ``[N, ...]``."""

    @abstractmethod
    def _blocks(self, values: Tensor) -> Tensor:
        """The inverse of ``_rows``."""

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        r"""The exact posterior :math:`N(m, \Lambda^{-1})`, of a block; also the optimum of its normals with full covariance.

        Args:
            x: the observations of all rows.
        """
        mean, precision = self._moments(x)
        # One factorization: with the precision and all means it would be one for each block.
        scale_tril = dist.MultivariateNormal(torch.zeros_like(precision[0]), precision_matrix=precision).scale_tril
        return dist.MultivariateNormal(mean, scale_tril=scale_tril)

    def best_diagonal(self, x: Tensor) -> dist.TorchDistribution:
        r"""The best independent normals: the posterior's means and *conditional* variances, :math:`N(m_i, 1 / \Lambda_{ii})`.

        Args:
            x: the observations of all rows.

        Returns:
            A distribution with the rows as its batch, as from ``guide.posterior(x)``.
        """
        mean, precision = self._moments(x)
        scale = precision.diagonal().rsqrt().expand_as(mean)
        return self._normals(self._rows(mean), self._rows(scale))

    def approximation_gap(self, x: Tensor) -> Tensor:
        r"""What the diagonal normals cannot express, :math:`\frac12 (\sum_i \log \Lambda_{ii} - \log |\Lambda|)`, by block.

        Args:
            x: the observations of all rows.
        """
        mean, precision = self._moments(x)
        gap = 0.5 * (precision.diagonal().log().sum() - torch.linalg.slogdet(precision).logabsdet)
        return gap.expand(mean.shape[:-1])

    def inference_gap(self, x: Tensor, q: dist.TorchDistribution) -> Tensor:
        r"""The evidence minus the ELBO of a normal factor, :math:`\mathrm{KL}(q \,\|\, p(z \mid x))`, by block.

        Args:
            x: the observations of all rows.
            q: independent normals with the rows as their batch, such as ``guide.posterior(x)`` of a
                :class:`~pyro_avi.DiagonalNormal`, or a multivariate normal of the shape of the posterior.

        Raises:
            ValueError: if ``q`` is no normal.
        """
        q = in_double(q)
        if not isinstance(q, dist.MultivariateNormal):
            q = dist.Normal(self._blocks(q.mean), self._blocks(q.stddev)).to_event(1)
        return kl_divergence(q, self.posterior(x))

    def tail_index(self, x: Tensor) -> Tensor:
        r"""What k-hat estimates at the best independent normals, by block: the Pareto tail index of their weights.

        .. math:: k = 1 - \lambda_{\min}(R), \qquad R_{ij} = \Lambda_{ij} / \sqrt{\Lambda_{ii} \Lambda_{jj}}

        Args:
            x: the observations of all rows.
        """
        mean, precision = self._moments(x)
        scale = precision.diagonal().rsqrt()
        smallest = torch.linalg.eigvalsh(scale.unsqueeze(-1) * precision * scale)[0]
        return (1.0 - smallest).expand(mean.shape[:-1])

    @staticmethod
    def _normals(loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        return dist.Normal(loc, scale).to_event(loc.dim() - 1)


def in_double(q: dist.TorchDistribution) -> dist.TorchDistribution:
    """A normal, independent or multivariate, in double precision."""
    if isinstance(q, torch.distributions.Independent) and isinstance(q.base_dist, torch.distributions.Normal):
        normal = dist.Normal(q.base_dist.loc.double(), q.base_dist.scale.double())
        return normal.to_event(q.reinterpreted_batch_ndims)
    if isinstance(q, torch.distributions.Normal):
        return dist.Normal(q.loc.double(), q.scale.double())
    if isinstance(q, torch.distributions.MultivariateNormal):
        return dist.MultivariateNormal(q.loc.double(), scale_tril=q.scale_tril.double())
    if isinstance(q, torch.distributions.LowRankMultivariateNormal):
        return dist.MultivariateNormal(q.loc.double(), q.covariance_matrix.double())
    raise ValueError(
        f"Expected a normal factor, independent or multivariate, got {type(q).__name__}.\n"
        "The closed form is that of a normal. For other families estimate the bound: avi.elbo(avi.log_weights(...))."
    )
