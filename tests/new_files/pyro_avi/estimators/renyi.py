"""An estimator of a newcomer's: the Renyi bound of order one half."""

import math

from torch import Tensor

from pyro_avi.estimators.estimate import HasLogWeights, check_log_weights

__all__ = ["renyi"]


def renyi(weights: HasLogWeights) -> Tensor:
    r"""The Renyi bound of order 1/2 on every row's log evidence, between its ELBO and the importance-weighted bound.

    .. math:: \hat{\mathcal{L}}_{1/2} = 2 \log \frac{1}{S} \sum_s w_s^{1/2}

    Args:
        weights: from :func:`~pyro_avi.log_weights`.

    Returns:
        ``[B]`` in nats.

    References:
        Li and Turner, "Renyi divergence variational inference", 2016, https://arxiv.org/abs/1602.02311.
    """
    local = check_log_weights(weights)
    return 2 * ((local / 2).logsumexp(0) - math.log(len(local)))
