"""The ELBO with the score function as its gradient, also where there is a path."""

from pyro.infer import Trace_ELBO

from pyro_avi.elbos.sites import WithoutPath

__all__ = ["ScoreFunctionELBO"]


class ScoreFunctionELBO(Trace_ELBO):
    r"""``Trace_ELBO`` with the score function ("policy gradient", REINFORCE) for every latent.

    .. math:: \nabla_\lambda \mathrm{ELBO} = E_q \left[
              \nabla_\lambda \log q_\lambda(z) \left( \log p(x, z) - \log q_\lambda(z) \right) \right]

    It needs no derivative of the model, and its noise grows with the number of latents. To compare with: latents that have
    a path are better given it, and those that have none get the score function from ``Trace_ELBO`` as well. As there, a
    row's score is multiplied by the terms of that row alone.

    Args:
        num_particles, vectorize_particles, and others: as for ``pyro.infer.Trace_ELBO``.

    References:
        Ranganath, Gerrish and Blei, "Black Box Variational Inference", 2014, https://arxiv.org/abs/1401.0118.
        Williams, "Simple Statistical Gradient-Following Algorithms", 1992, https://doi.org/10.1007/BF00992696.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> avi.fit(model, avi.AmortizedGuide(model), x, num_steps=2, elbo=avi.ScoreFunctionELBO(), progress=False).steps
        2
    """

    def _get_trace(self, model, guide, args, kwargs):
        return super()._get_trace(model, WithoutPath()(guide), args, kwargs)
