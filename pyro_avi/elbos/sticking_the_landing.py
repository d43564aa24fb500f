"""The ELBO with the path derivative as its gradient, without the score."""

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_avi.elbos.sites import is_latent, score_of

__all__ = ["StickingTheLandingELBO"]


class StickingTheLandingELBO(Trace_ELBO):
    r"""``Trace_ELBO`` with a gradient whose variance vanishes where the guide is the posterior.

    .. math:: \nabla_\lambda \mathrm{ELBO} = E_\epsilon \left[
              \nabla_z \left( \log p(x, z) - \log q_\lambda(z) \right) \nabla_\lambda z_\lambda(\epsilon) \right]

    The gradient of a single draw has a second term, the score :math:`\nabla_\lambda \log q_\lambda(z)` at a fixed
    :math:`z`. Its mean is zero; without it the gradient is zero in every draw once :math:`q` is exact. Far from there the
    variance may be larger, much larger for a normal that is too narrow. The value is that of ``Trace_ELBO``.

    It takes a second evaluation of the density of every latent, which for a :class:`~pyro_avi.Flow` means an inverse.
    Latents that are not reparameterized are treated as ``Trace_ELBO`` does.

    Args:
        weight: ``[1]`` the share of the score that is left out, 1 by default. The tensor may be changed between steps.
        num_particles, vectorize_particles, and others: as for ``pyro.infer.Trace_ELBO``.

    References:
        Roeder, Wu and Duvenaud, "Sticking the landing: simple, lower-variance gradient estimators for variational
        inference", 2017, https://arxiv.org/abs/1703.09194.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.AmortizedGuide(model)
        >>> avi.fit(model, guide, x, num_steps=2, elbo=avi.StickingTheLandingELBO(), progress=False).steps
        2
    """

    def __init__(self, *args, weight: Tensor | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = torch.ones(1) if weight is None else weight

    def _differentiable_loss_particle(self, model_trace, guide_trace):
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        for site in guide_trace.nodes.values():
            if is_latent(site):
                score = score_of(site)
                if score is not None:
                    surrogate = surrogate - (self.weight.to(score) * score).sum()
        return loss, surrogate
