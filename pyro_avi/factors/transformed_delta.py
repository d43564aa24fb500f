"""Sites whose value comes from a joint draw at another site."""

import pyro.distributions as dist
import torch
from pyro.distributions.distribution import Distribution as PyroDistribution
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.distributions import Distribution, register_kl

__all__ = ["TransformedDelta"]


class TransformedDelta(dist.Delta):
    r"""The part of a joint draw that lies at one site of the model.

    A joint family draws all latents of a row as one unconstrained vector :math:`u` at an auxiliary site. A site of
    the model holds what its transform makes of its share, :math:`z = t(u)`, and by the change of variables the density
    that the auxiliary site does not know of:

    .. math:: \log q(z) = \log q(u) + \mathrm{log\_density},
              \qquad \mathrm{log\_density} = -\log \lvert \det \partial t / \partial u \rvert

    so that the log probabilities of the two sites add up to that of the latent. It differs from Pyro's ``Delta`` in the
    Kullback-Leibler divergence, where ``Delta`` forgets its density, and keeps its class when masked.

    Args:
        v: the value ``z``, ``batch_shape + event_shape``.
        log_density: ``batch_shape``, or one number.
        event_dim: the number of event dimensions of the value.

    Example::

        >>> import pyro.distributions as dist, torch
        >>> from torch.distributions import kl_divergence
        >>> from pyro_avi.factors.transformed_delta import TransformedDelta
        >>> u = torch.tensor([0.0, 1.0])
        >>> site = TransformedDelta(u.exp(), log_density=-u)
        >>> site.log_prob(u.exp())
        tensor([ 0., -1.])
        >>> kl_divergence(site, dist.LogNormal(0.0, 1.0))
        tensor([0.9189, 1.4189])
    """

    _mask: Tensor | None = None

    def expand(self, batch_shape, _instance=None) -> "TransformedDelta":
        """The same with the batch dimensions expanded to ``batch_shape``."""
        new = super().expand(batch_shape, _instance)
        if self._mask is not None:
            new._mask = self._mask.expand(new.batch_shape)
        return new

    def mask(self, mask: Tensor | bool) -> "TransformedDelta":
        """The same where ``mask`` is true; elsewhere its log probability, and its part of a divergence, is 0."""
        mask = torch.as_tensor(mask, device=self.v.device).bool()
        new = self.expand(broadcast_shape(mask.shape, self.batch_shape))
        new.log_density = torch.where(mask, new.log_density, 0.0)
        new._mask = (mask if self._mask is None else mask & self._mask).expand(new.batch_shape)
        return new

    def log_prob(self, x: Tensor) -> Tensor:
        """``log_density`` at the value, minus infinity elsewhere; 0 where masked."""
        log_prob = super().log_prob(x)
        return log_prob if self._mask is None else torch.where(self._mask, log_prob, 0.0)


# Twice: Pyro's distributions inherit from its own base as well, for which Pyro has a rule of Delta's, and of two rules
# that fit equally well torch takes one with a warning.
@register_kl(TransformedDelta, Distribution)
@register_kl(TransformedDelta, PyroDistribution)
def _kl_transformed_delta(p: TransformedDelta, q: Distribution) -> Tensor:
    return p.log_density - q.log_prob(p.v)
