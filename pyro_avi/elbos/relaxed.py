"""The ELBO with discrete latents relaxed to continuous ones, so that it can be differentiated through them."""

from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_avi.elbos.sites import is_drawn, with_innermost
from pyro_avi.errors import CallError

__all__ = ["RelaxedELBO"]


class RelaxedELBO(Trace_ELBO):
    r"""``Trace_ELBO`` with Gumbel-softmax draws in the place of Bernoulli and one-hot latents.

    .. math:: z = \mathrm{softmax}\left( (\lambda + G) / \tau \right), \qquad G_v \sim \mathrm{Gumbel}(0, 1)

    for logits :math:`\lambda`; for bits the sigmoid of logit and logistic noise. The densities of model and guide at these
    values are the discrete ones, continued linearly in :math:`z`. Value and gradient are **biased**: less for a small
    temperature, at which the noise grows. Straight through, the value is that of the discrete draw and the gradient that of
    the relaxed one.

    Args:
        temperature: :math:`\tau`.
        straight_through: whether values are discrete.
        num_particles, vectorize_particles, and others: as for ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: if the temperature is not positive, or a discrete latent is of another kind: the model must be able to use
            a value between its values, as of a one-hot vector, and not as a position, as of a ``Categorical``.

    References:
        Jang, Gu and Poole, "Categorical Reparameterization with Gumbel-Softmax", 2017, https://arxiv.org/abs/1611.01144.
        Maddison, Mnih and Teh, "The Concrete Distribution", 2017, https://arxiv.org/abs/1611.00712.
        Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013,
        https://arxiv.org/abs/1308.3432.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = (torch.rand(20, 1, 8, 8) > 0.5).float()
        >>> model = avi.models.SigmoidBelief(avi.models.DenseDecoder(3, (16,), (1, 8, 8)), size=20)
        >>> elbo = avi.RelaxedELBO(temperature=0.5)
        >>> avi.fit(model, avi.AmortizedGuide(model), x, num_steps=2, elbo=elbo, progress=False).steps
        2
    """

    #: The distributions that it can relax.
    kinds = (dist.Bernoulli, dist.OneHotCategorical)

    def __init__(self, temperature: float = 0.5, *, straight_through: bool = False, **kwargs):
        if not temperature > 0:
            raise ValueError(f"Expected a positive temperature, got {temperature}.")
        super().__init__(**kwargs)
        self.temperature, self.straight_through = temperature, straight_through

    def _get_trace(self, model, guide, args, kwargs):
        relax = _Relax(self.temperature, self.straight_through)
        # Values between those of the support are no mistake here.
        with pyro.validation_enabled(False):
            return super()._get_trace(relax(model), relax(guide), args, kwargs)


class _Relax(Messenger):
    """Relaxes the discrete latents of a guide, and the densities of the model at the same sites."""

    def __init__(self, temperature: float, straight_through: bool):
        super().__init__()
        self._temperature, self._straight_through = temperature, straight_through

    def _pyro_sample(self, msg: Any) -> None:
        if is_drawn(msg) and not msg["fn"].has_rsample:
            msg["fn"] = with_innermost(msg["fn"], lambda inner: self._relaxed(inner, msg["name"]))

    def _relaxed(self, inner: Any, name: str) -> "_Relaxed":
        if not isinstance(inner, RelaxedELBO.kinds):
            raise CallError(
                f"Expected discrete latents to be Bernoulli or OneHotCategorical, got {type(inner).__name__} at site "
                f"{name!r}.\n"
                "Write the site as a one-hot vector, or pass elbo=avi.LeaveOneOutELBO(num_particles=...)."
            )
        return _Relaxed(inner, self._temperature, self._straight_through)


class _Relaxed(TorchDistribution):
    """A discrete distribution with relaxed draws, and its log density continued linearly to values between its own.

    Args:
        discrete: a Bernoulli or a one-hot categorical.
        temperature, straight_through: as for :class:`RelaxedELBO`.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, discrete: Any, temperature: float, straight_through: bool):
        self._discrete, self._temperature, self._straight_through = discrete, temperature, straight_through
        super().__init__(discrete.batch_shape, discrete.event_shape, validate_args=False)

    def expand(self, batch_shape, _instance=None) -> "_Relaxed":
        """The same with a larger batch shape."""
        return _Relaxed(self._discrete.expand(batch_shape), self._temperature, self._straight_through)

    def rsample(self, sample_shape=()) -> Tensor:
        """Relaxed draws."""
        logits = self._discrete.logits
        shape = torch.Size(sample_shape) + logits.shape
        if self.event_shape:
            gumbel = -torch.empty(shape, dtype=logits.dtype, device=logits.device).exponential_().log()
            soft = ((logits + gumbel) / self._temperature).softmax(-1)
            hard = torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft)
        else:
            uniform = torch.rand(shape, dtype=logits.dtype, device=logits.device)
            tiny = torch.finfo(logits.dtype).tiny
            logistic = uniform.clamp(min=tiny).log() - (-uniform).log1p()
            soft = ((logits + logistic) / self._temperature).sigmoid()
            hard = (soft > 0.5).to(soft)
        return soft + (hard - soft).detach() if self._straight_through else soft

    def log_prob(self, value: Tensor) -> Tensor:
        """Of values of the support their log probability; linear between them."""
        logits = self._discrete.logits
        if self.event_shape:
            return (value * logits.log_softmax(-1)).sum(-1)
        return value * logits - torch.nn.functional.softplus(logits)
