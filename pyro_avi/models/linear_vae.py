"""The linear variational autoencoder: decoder weights are parameters, and the best of them are known."""

import math

import torch
from torch import Tensor, nn

from pyro_avi.models.checks import check_rows
from pyro_avi.models.factor_analysis import FactorAnalysis
from pyro_avi.models.likelihoods import GaussianLikelihood
from pyro_avi.models.linear_decoder import LinearDecoder

__all__ = ["LinearVAE"]


class LinearVAE(LinearDecoder):
    r"""A variational autoencoder with a linear decoder: probabilistic principal components, learned.

    .. math:: z_n \sim N(0, I_K), \qquad x_n \sim N(W z_n + \mu, \sigma^2 I_D)

    :math:`W`, :math:`\mu` and :math:`\sigma` are parameters. Their maximum likelihood is that of probabilistic principal
    component analysis, and the largest ELBO with independent normals equals it: of all rotations of the latents, which the
    likelihood cannot tell apart, the bound prefers the one without a gap. At the present parameters the answers are those of
    :class:`~pyro_avi.models.linear_decoder.LinearDecoder`.

    Args:
        latent_dim: ``K``.
        data_dim: ``D``, larger than ``K``.
        size: ``N``, the number of rows of the data set.
        scale: the initial :math:`\sigma`.

    Raises:
        ValueError: if ``K`` is not between 1 and ``D - 1``, or the scale is not positive.

    References:
        Tipping and Bishop, "Probabilistic Principal Component Analysis", 1999, https://doi.org/10.1111/1467-9868.00196.
        Lucas, Tucker, Grosse and Norouzi, "Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse", 2019,
        https://arxiv.org/abs/1911.02469.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.eye(4)[:, :3].repeat(2, 1)
        >>> model = avi.models.LinearVAE(1, 3, size=8)
        >>> best = model.best(x)
        >>> torch.allclose(best.log_evidence(x).sum(), model.maximum_elbo(x))
        True
    """

    def __init__(self, latent_dim: int, data_dim: int, *, size: int, scale: float = 1.0):
        if not 0 < latent_dim < data_dim:
            raise ValueError(
                f"Expected latent_dim between 1 and data_dim - 1 = {data_dim - 1}, got {latent_dim}.\n"
                "With as many latents as dimensions the noise's best scale is 0 and the likelihood has no maximum."
            )
        super().__init__(latent_dim, size=size, likelihood=GaussianLikelihood(scale, learned=True))
        self.decoder = nn.Linear(latent_dim, data_dim)

    @property
    def loadings(self) -> Tensor:
        """``[D, K]``, the weights :math:`W`."""
        return self.decoder.weight

    @property
    def mean(self) -> Tensor:
        r"""``[D]``, the offset :math:`\mu`."""
        return self.decoder.bias

    def best(self, x: Tensor) -> FactorAnalysis:
        r"""The model of largest likelihood, and of largest ELBO with independent normals: orthogonal columns, no gap.

        .. math:: W = U_K (\mathrm{diag}(\lambda_1, \dots, \lambda_K) - \sigma^2 I)^{1/2}, \qquad
                  \sigma^2 = \frac{1}{D - K} \sum_{j > K} \lambda_j

        with the eigenvalues :math:`\lambda_j`, in falling order, and eigenvectors of the rows' covariance.

        Args:
            x: ``[N, D]``.

        Raises:
            ValueError: if the rows span no more than K dimensions.
        """
        mean, values, vectors, variance = self._principal(x)
        loadings = vectors[:, : self.latent_dim] * (values[: self.latent_dim] - variance).clamp(min=0).sqrt()
        return FactorAnalysis(loadings, variance.sqrt(), size=self.size, mean=mean)

    def maximum_elbo(self, x: Tensor) -> Tensor:
        r"""``[]`` the largest ELBO over decoder and guide, over all rows: the largest log likelihood.

        .. math:: -\frac N 2 \left( D \log 2\pi + \sum_{j \le K} \log \lambda_j + (D - K) \log \sigma^2 + D \right)

        Args:
            x: ``[N, D]``.

        Raises:
            ValueError: if the rows span no more than K dimensions.
        """
        _, values, _, variance = self._principal(x)
        kept, rest = self.latent_dim, len(values) - self.latent_dim
        constant = len(values) * (1 + math.log(2 * math.pi))
        return -0.5 * len(x) * (constant + values[:kept].log().sum() + rest * variance.log())

    def _principal(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, eigenvalues in falling order and eigenvectors of the rows' covariance, and the variance that is left."""
        x = check_rows(x, self.mean.shape)
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        values, vectors = values.flip(0), vectors.flip(1)
        variance = values[self.latent_dim :].mean()
        if not variance > 1e-12 * values[0]:
            raise ValueError(
                f"Expected rows that vary in more than latent_dim = {self.latent_dim} dimensions, got {len(x)} rows whose "
                f"covariance leaves a variance of {variance.item():.3g}.\n"
                "The likelihood grows without bound as the noise's scale falls to 0: take fewer latents or more rows."
            )
        return mean, values, vectors, variance
