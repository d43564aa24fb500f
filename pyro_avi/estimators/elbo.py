"""The evidence lower bound."""

from pyro_avi.estimators.estimate import Estimate, HasLogWeights, check_log_weights

__all__ = ["elbo"]


def elbo(weights: HasLogWeights) -> Estimate:
    r"""The ELBO as the mean of log weights.

    .. math:: \mathrm{ELBO} = \frac{1}{S} \sum_s \log w_s, \qquad
              \mathrm{ELBO}_n = \frac{1}{S} \sum_s \log \frac{p(x_n, z_n^{(s)} \mid \theta^{(s)})}{q(z_n^{(s)})}

    Args:
        weights: from :func:`~pyro_avi.log_weights`.

    Returns:
        The bound on the log evidence of the whole data set (rows of a minibatch stand for ``N / B`` each), and the
        local part of every row, in nats.

    Raises:
        ValueError: if there is no draw, a weight is ``nan`` or infinite, or no draw of a row has a weight above zero.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> weights = avi.LogWeights(local=torch.tensor([[1.0, 2.0], [3.0, 2.0]]), global_=torch.zeros(2), scale=1.0)
        >>> estimate = avi.elbo(weights)
        >>> estimate.value, round(estimate.se, 4), estimate.rows.tolist()
        (4.0, 1.0, [2.0, 2.0])
    """
    total, local = weights.total, check_log_weights(weights)
    several = len(total) > 1
    return Estimate(
        value=total.mean().item(),
        se=total.std().item() / len(total) ** 0.5 if several else float("nan"),
        rows=local.mean(0),
        scale=weights.scale,
        rows_se=local.std(0) / len(local) ** 0.5 if several else local.new_full(local.shape[1:], float("nan")),
    )
