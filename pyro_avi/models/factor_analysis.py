"""Factor analysis with given parameters: a linear decoder whose every gap is known."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_avi.models.checks import as_scales
from pyro_avi.models.linear_decoder import LinearDecoder

__all__ = ["FactorAnalysis"]


class FactorAnalysis(LinearDecoder):
    r"""Factor analysis; with one noise scale for all dimensions, probabilistic principal component analysis.

    .. math:: z_n \sim N(0, I_K), \qquad x_n \sim N(W z_n + \mu, \mathrm{diag}(\sigma^2))

    The posterior of a row is normal with precision :math:`M = I + W^\top \mathrm{diag}(\sigma^{-2}) W`. Independent normals
    lose :math:`\frac12 (\sum_i \log M_{ii} - \log |M|)` a row, which is zero if and only if the columns of :math:`W` are
    orthogonal, weighted by the noise's precisions. The answers are those of
    :class:`~pyro_avi.models.linear_decoder.LinearDecoder`.

    Args:
        loadings: ``[D, K]``, any real matrix; the model has its precision and device.
        scale: the standard deviation of the noise, a number or ``[D]``.
        size: ``N``, the number of rows of the data set.
        mean: ``[D]``; by default 0.

    Raises:
        ValueError: if shapes do not fit, loadings are not finite, or a scale is not positive.

    References:
        Tipping and Bishop, "Probabilistic Principal Component Analysis", 1999, https://doi.org/10.1111/1467-9868.00196.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> model = avi.models.FactorAnalysis(torch.tensor([[1.0, 0.5], [0.0, 1.0], [1.0, 1.0]]), 0.5, size=4)
        >>> x = torch.zeros(4, 3)
        >>> model.log_evidence(x).shape, model.posterior(x).event_shape
        (torch.Size([4]), torch.Size([2]))
        >>> bool((model.approximation_gap(x) > 0).all())
        True
    """

    def __init__(self, loadings: Tensor, scale: float | Tensor, *, size: int, mean: Tensor | None = None):
        if loadings.dim() != 2 or not loadings.is_floating_point() or not loadings.isfinite().all():
            raise ValueError(
                f"Expected loadings [D, K] of finite real numbers, got shape {tuple(loadings.shape)} and type "
                f"{loadings.dtype}."
            )
        scale = as_scales("scale", scale, len(loadings), loadings)
        mean = loadings.new_zeros(len(loadings)) if mean is None else mean.to(loadings)
        if mean.shape != scale.shape:
            raise ValueError(f"Expected mean of shape {tuple(scale.shape)}, got {tuple(mean.shape)}.")
        super().__init__(loadings.shape[1], size=size, likelihood=_FixedNoise(scale))
        self.register_buffer("_loadings", loadings.detach().clone())
        self.register_buffer("_mean", mean.detach().clone())
        self.to(loadings)

    @classmethod
    def correlated(cls, correlation: float, *, size: int) -> "FactorAnalysis":
        r"""Two latents whose posterior has a given correlation in every row.

        .. math:: x_n \sim N(\sqrt c \, (z_{n1} \mp z_{n2}), 1), \qquad c = |\rho| / (1 - |\rho|)

        Only the difference (for a negative correlation the sum) is seen. Independent normals lose
        :math:`-\frac12 \log(1 - \rho^2)` a row, and their weights have tail index :math:`|\rho|`.

        Args:
            correlation: :math:`\rho`, between -1 and 1.
            size: ``N``, the number of rows of the data set.

        Raises:
            ValueError: if the correlation is not between -1 and 1.

        Example::

            >>> import torch
            >>> import pyro_avi as avi
            >>> model = avi.models.FactorAnalysis.correlated(0.8, size=1)
            >>> round(model.tail_index(torch.zeros(1, 1)).item(), 6)
            0.8
        """
        if not -1 < correlation < 1:
            raise ValueError(f"Expected a correlation between -1 and 1, got {correlation}.")
        root = math.sqrt(abs(correlation) / (1 - abs(correlation)))
        # Double precision, so that the correlation is the one that was asked for.
        loadings = torch.tensor([[root, -math.copysign(root, correlation)]], dtype=torch.double)
        return cls(loadings, 1.0, size=size)

    @property
    def loadings(self) -> Tensor:
        """``[D, K]``, the weights :math:`W`."""
        return self._loadings

    @property
    def mean(self) -> Tensor:
        r"""``[D]``, the offset :math:`\mu`."""
        return self._mean


class _FixedNoise(nn.Module):
    """Normal noise of given standard deviations."""

    def __init__(self, scale: Tensor):
        super().__init__()
        self.register_buffer("scale", scale.detach().clone())

    def forward(self, output: Tensor) -> dist.Normal:
        return dist.Normal(output, self.scale)
