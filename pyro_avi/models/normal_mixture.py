"""A mixture of normals whose labels are latents: evidence, posterior, and what a constant factor loses."""

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_avi.models.checks import check_positive, check_rows
from pyro_avi.models.latent_decoder import LatentDecoder
from pyro_avi.models.likelihoods import GaussianLikelihood

__all__ = ["NormalMixture"]


class NormalMixture(LatentDecoder):
    r"""A mixture of normals, the label of each row a latent.

    .. math:: z_n \sim \mathrm{OneHot}(\pi), \qquad x_n \sim N(\mu_{z_n}, \sigma^2 I_D)

    With one factor a row the family holds the posterior, so that there is no approximation gap, and the best factor that all
    rows share is known too.

    Args:
        means: ``[C, D]``.
        scale: :math:`\sigma`.
        weights: ``[C]`` the shares, by default equal ones.
        size: ``N``, the number of rows of the data set.

    Raises:
        ValueError: if shapes do not agree, or scale or weights are not positive.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> model = avi.models.NormalMixture(torch.tensor([[-2.0], [2.0]]), 1.0, size=3)
        >>> x = torch.tensor([[-2.0], [0.0], [1.0]])
        >>> model.posterior(x).probs[1]
        tensor([0.5000, 0.5000], dtype=torch.float64)
        >>> bool((model.inference_gap(x, model.posterior(x)).abs() < 1e-12).all())
        True
    """

    def __init__(self, means: Tensor, scale: float, *, weights: Tensor | None = None, size: int):
        if means.dim() != 2:
            raise ValueError(f"Expected means of shape [C, D], got {tuple(means.shape)}.")
        weights = torch.ones(len(means)).to(means) if weights is None else weights
        if weights.shape != means.shape[:1]:
            raise ValueError(
                f"Expected weights of shape [{len(means)}], one for each mean, got {tuple(weights.shape)}."
            )
        check_positive("scale", scale)
        check_positive("weights", weights)
        super().__init__(len(means), size=size, likelihood=GaussianLikelihood(scale))
        self.register_buffer("means", means)
        self.register_buffer("weights", weights / weights.sum())

    means: Tensor
    weights: Tensor

    def _decode(self) -> Callable[[Tensor], Tensor]:
        return lambda z: z.to(self.means) @ self.means

    def _prior(self, count: int) -> dist.TorchDistribution:
        return dist.OneHotCategorical(self.weights.expand(count, -1))

    def log_joint(self, x: Tensor) -> Tensor:
        r"""``[N, C]`` of :math:`\log p(x_n, z_n = c)`, in double precision.

        Args:
            x: ``[N, D]``.
        """
        x = check_rows(x, self.means.shape[1:])
        normal = dist.Normal(self.means.double(), self.likelihood.scale.double()).to_event(1)
        return self.weights.double().log() + normal.log_prob(x.unsqueeze(1))

    def log_evidence(self, x: Tensor) -> Tensor:
        r"""``[N]`` the exact :math:`\log p(x_n)`.

        Args:
            x: ``[N, D]``.
        """
        return self.log_joint(x).logsumexp(-1)

    def posterior(self, x: Tensor) -> dist.OneHotCategorical:
        """The exact posterior of every row's label, which is the best factor too.

        Args:
            x: ``[N, D]``.
        """
        return dist.OneHotCategorical(logits=self.log_joint(x))

    def best_constant(self, x: Tensor) -> dist.OneHotCategorical:
        r"""The best factor that is the same for all rows.

        .. math:: q(c) \propto \exp \Big( \frac 1N \sum_n \log p(x_n, c) \Big)

        Args:
            x: ``[N, D]``.
        """
        joint = self.log_joint(x)
        return dist.OneHotCategorical(logits=joint.mean(0).expand_as(joint))

    def inference_gap(self, x: Tensor, q: dist.OneHotCategorical) -> Tensor:
        r"""``[N]`` of :math:`\log p(x_n) - \mathrm{ELBO}_n(q)`, the divergence of a factor from the posterior.

        Args:
            x: ``[N, D]``.
            q: a factor of every row.
        """
        log_q = q.logits.double().log_softmax(-1)
        return (log_q.exp() * (log_q - self.log_joint(x))).sum(-1) + self.log_evidence(x)
