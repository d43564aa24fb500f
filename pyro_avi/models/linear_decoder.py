"""What the models with a linear decoder and normal noise share: their closed forms."""

from abc import abstractmethod
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_avi.models.checks import check_rows
from pyro_avi.models.latent_decoder import LatentDecoder
from pyro_avi.models.normal_posterior import NormalPosterior

__all__ = ["LinearDecoder"]


class LinearDecoder(NormalPosterior, LatentDecoder):
    r"""Normal rows with a linear decoder, and everything there is to know about them.

    .. math:: z_n \sim N(0, I_K), \qquad x_n \sim N(W z_n + \mu, \Psi), \qquad \Psi \text{ diagonal}

    Rows are independent: ``log_evidence``, ``approximation_gap``, ``inference_gap`` and ``tail_index`` answer by row, ``[N]``.
    Answers are differentiable in the model's parameters where it has any.
    """

    @property
    @abstractmethod
    def loadings(self) -> Tensor:
        """``[D, K]``, the weights :math:`W`."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        r"""``[D]``, the offset :math:`\mu`."""

    def _decode(self) -> Callable[[Tensor], Tensor]:
        return lambda z: z @ self.loadings.T + self.mean

    def _exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loadings, mean and the noise's variances ``[D]``, in double precision."""
        mean = self.mean.double()
        return self.loadings.double(), mean, self.likelihood.scale.double().square().expand_as(mean)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loadings, mean, variance = self._exact()
        x = check_rows(x, mean.shape)
        scaled = loadings / variance.unsqueeze(-1)
        precision = torch.eye(loadings.shape[1]).to(loadings) + loadings.T @ scaled
        return torch.linalg.solve(precision, ((x - mean) @ scaled).T).T, precision

    # Every row is a block.
    def _rows(self, values: Tensor) -> Tensor:
        return values

    def _blocks(self, values: Tensor) -> Tensor:
        return values

    def log_evidence(self, x: Tensor) -> Tensor:
        r"""``[N]`` the exact :math:`\log p(x_n) = \log N(x_n; \mu, W W^\top + \Psi)`.

        Args:
            x: ``[N, D]``.
        """
        loadings, mean, variance = self._exact()
        return dist.LowRankMultivariateNormal(mean, loadings, variance).log_prob(check_rows(x, mean.shape))

    def best_constant(self, x: Tensor) -> dist.TorchDistribution:
        """The best factor that is the same for all rows: the mean of the posterior means, and the conditional variances.

        Args:
            x: ``[N, D]``.

        Returns:
            Independent normals with the rows as their batch, all of them equal.
        """
        return self.best_rank(x, 0)

    def best_rank(self, x: Tensor, rank: int) -> dist.TorchDistribution:
        """The best factors whose means are linear in ``rank`` features of a row, whatever the features.

        No encoder with ``rank`` units in its last layer and a linear head does better on these rows, and a linear encoder
        does as well. With 0 units it is the best constant factor, with K or more the best factor of every row.

        Args:
            x: ``[N, D]``.
            rank: the number of units of an encoder's last layer.

        Returns:
            Independent normals with the rows as their batch.

        Raises:
            ValueError: if ``rank`` is negative.
        """
        if rank < 0:
            raise ValueError(f"Expected a rank of at least 0, got {rank}.")
        means, precision = self._moments(x)
        root = torch.linalg.cholesky(precision)
        center = means.mean(0)
        left, values, right = torch.linalg.svd((means - center) @ root, full_matrices=False)
        kept = (left[:, :rank] * values[:rank]) @ right[:rank]
        loc = center + torch.linalg.solve_triangular(root, kept, upper=False, left=False)
        return self._normals(loc, precision.diagonal().rsqrt().expand_as(loc))

    def rank_gaps(self, x: Tensor) -> Tensor:
        r"""``[K + 1]`` the smallest amortization gap with k units in an encoder's last layer, k = 0 .. K, over all rows.

        .. math:: \frac12 \sum_{j > k} s_j^2, \qquad s_j \text{ the singular values of } (m_n - \bar m)^\top \Lambda^{1/2}

        The head is linear, its scale free; entry 0 is what the constant guide loses.

        Args:
            x: ``[N, D]``.
        """
        means, precision = self._moments(x)
        squares = torch.linalg.svdvals((means - means.mean(0)) @ torch.linalg.cholesky(precision)).square()
        # Fewer rows than latents have fewer directions.
        losses = torch.cat([squares, squares.new_zeros(1 + means.shape[1] - len(squares))])
        return 0.5 * losses.flip(0).cumsum(0).flip(0)
