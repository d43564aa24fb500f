"""The weight of the divergence from the prior in the loss of a training: warm-up and beta-VAE."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_avi.elbos.score_function import ScoreFunctionELBO
from pyro_avi.elbos.sites import is_latent
from pyro_avi.elbos.sticking_the_landing import StickingTheLandingELBO

__all__ = ["KLWeight"]

# Means over single draws, in which a weight of sites is one of terms. Bounds of several draws and sums over values take
# logarithms of sums, where it would be a power.
_WEIGHABLE = (Trace_ELBO, TraceMeanField_ELBO, StickingTheLandingELBO, ScoreFunctionELBO)


class KLWeight:
    r"""An ELBO whose divergence from the prior has a weight that may change from step to step.

    .. math:: E_q \left[ \log p(x \mid \theta, z) + \beta_t \log \frac{p(\theta, z)}{q(\theta, z)} \right]

    Args:
        elbo: whose bound it is, of one draw or the mean of several; it is left as it is.
        by_step: the :math:`\beta_t`, a number or a function of the step from 0.
        dtype, device: of the tensor with the weight, which a graph reads at every step.

    Attributes:
        elbo: the ELBO with the weight, of the same class.
        tensor: ``[1]`` the weight, where the ELBO reads it.

    Raises:
        TypeError: if the divergence is no term of the ELBO.

    Example::

        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro.infer import TraceMeanField_ELBO
        >>> from pyro_avi.optimization.kl_weight import KLWeight
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(2.0, 1.0))
        >>> weight = KLWeight(TraceMeanField_ELBO(), lambda step: step / 4)
        >>> weight.set(1)
        >>> weight.elbo.loss(model, guide)
        0.5
    """

    def __init__(
        self,
        elbo: ELBO,
        by_step: float | Callable[[int], float],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.check(elbo)
        self._by_step = by_step
        # Of one dimension: torch.compile takes a 0-dimensional double for a Python number.
        self.tensor = torch.ones(1, dtype=dtype, device=device)
        # Also for the step by which a graph is compared with the eager one.
        self.set(0)
        self.elbo, self._get_traces = copy.copy(elbo), elbo._get_traces
        # Of the same class, and with it what is known of that.
        self.elbo._get_traces = self._weighted_traces

    @staticmethod
    def check(elbo: Any) -> None:
        """Raise an error for an ELBO of which the divergence from the prior is no term."""
        if type(elbo) not in _WEIGHABLE:
            known = ", ".join(each.__name__ for each in _WEIGHABLE)
            raise TypeError(
                f"Expected one of {known} with kl_weight=, got {type(elbo).__name__}.\n"
                "Try one of the following fixes:\n- leave kl_weight= out\n"
                f"- one of those while the weight rises, and then avi.fit again with {type(elbo).__name__}"
            )

    def at(self, step: int) -> float:
        """The weight of a step, counted from 0."""
        return self._by_step(step) if callable(self._by_step) else self._by_step

    def set(self, step: int) -> None:
        """Write the weight of a step where the ELBO reads it."""
        self.tensor.fill_(self.at(step))

    def _weighted_traces(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        weighted = _Scale(self.tensor)(model), _Scale(self.tensor, all_sites=True)(guide)
        return self._get_traces(*weighted, args, kwargs)


class _Scale(Messenger):
    """Scales the log densities of latents.

    Args:
        weight: ``[1]``.
        all_sites: whether those of other sites as well: in a guide they are factors of its density.
    """

    def __init__(self, weight: Tensor, *, all_sites: bool = False):
        super().__init__()
        self._weight, self._all_sites = weight, all_sites

    def _pyro_sample(self, msg: Any) -> None:
        # The rows that a plate draws have no density.
        if is_latent(msg) or (self._all_sites and msg["is_observed"]):
            # Without a dimension, so that neither shapes nor dtypes change.
            msg["scale"] = msg["scale"] * self._weight.reshape(())
