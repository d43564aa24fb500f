"""The importance-weighted bound and the effective sample size."""

import math

import torch
from torch import Tensor

from pyro_avi.estimators.estimate import Estimate, HasLogWeights, check_log_weights

__all__ = ["ess", "iwelbo", "log_mean_exp"]

# The number of random splits of the draws in halves that the bias is averaged over.
_SPLITS = 8


def iwelbo(weights: HasLogWeights) -> Estimate:
    r"""The importance-weighted bound of all ``S`` draws.

    .. math:: \mathcal{L}_S = E \log \frac{1}{S} \sum_{s=1}^{S} w_s \;\le\; \log p(x)

    It rises from the ELBO (``S = 1``) to the log evidence. Without global latents rows are independent, so that every row
    has a bound of its own and the total is their sum. **With global latents** a draw of :math:`\theta` has one draw of
    every :math:`z_n`, and the total is the bound of the joint weights of the whole data set: valid, and for many rows loose.
    The bounds of the rows do not add up to it: each is a bound on the log of the row's evidence averaged over
    :math:`\theta`, :math:`\log E_{q_0(\theta)} p(x_n \mid \theta)`. Bounds on :math:`\log p(x_n \mid \theta)` at a fixed
    :math:`\theta` are given by :func:`~pyro_avi.measure_gaps` and :func:`~pyro_avi.ais`.

    The bias :math:`E \mathcal{L}_S - \log p(x)` is about :math:`- \mathrm{Var}(w) / (2 S E[w]^2)`. As it halves when the
    number of draws doubles, it is estimated by the bound of ``K = S / 2`` draws minus that of ``2 K``, averaged over random
    halves of the draws. The estimate is never positive; where a few draws have nearly all the weight, it is too close to
    zero: see :func:`~pyro_avi.khat`.

    Args:
        weights: from :func:`~pyro_avi.log_weights`.

    Returns:
        The bound on the log evidence of the data set, and of every row ``[B]``, in nats; standard errors by the delta method.
        ``value - bias`` is corrected to first order, and no longer a bound.

    Raises:
        ValueError: if a weight is ``nan`` or infinite, or if the weights are those of a minibatch and there are global
            latents: the exponential of an estimate of the sum over the data is biased upwards.

    References:
        Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", 2016, https://arxiv.org/abs/1509.00519.
        Nowozin, "Debiasing evidence approximations", 2018, https://openreview.net/forum?id=HyZoi-WRb.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> local = torch.tensor([[1.0, 2.0], [3.0, 2.0]]).log()
        >>> weights = avi.LogWeights(local, torch.zeros(2), scale=1.0, has_globals=False)
        >>> estimate = avi.iwelbo(weights)
        >>> [round(x, 4) for x in estimate.rows.exp().tolist()], round(estimate.value, 4)
        ([2.0, 2.0], 1.3863)
    """
    local = check_log_weights(weights)
    if weights.is_estimate:
        raise ValueError(
            "Expected weights of rows with all of their observations, got those of a part that stands for the whole.\n"
            "The log of an estimated density is biased, and its mean no bound: pass all rows of the other plates."
        )
    influence, bias = _influence(local), _bias(local)
    rows, rows_se = log_mean_exp(local), _standard_error(influence)
    if not weights.has_globals:
        return Estimate(
            value=weights.global_.mean().item() + weights.scale * rows.sum().item(),
            se=weights.scale * _standard_error(influence.sum(1)).item(),
            bias=weights.scale * bias.sum().item(),
            rows=rows,
            rows_se=rows_se,
            rows_bias=bias,
            scale=weights.scale,
        )
    if weights.scale != 1.0:
        raise ValueError(
            f"Expected the weights of all rows, got those of a minibatch in which a row counts {weights.scale:g} times.\n"
            "With global latents the bound of a part of the rows is none of the whole: pass all rows to avi.log_weights."
        )
    total = weights.total.unsqueeze(1)
    return Estimate(
        value=log_mean_exp(total).item(),
        se=_standard_error(_influence(total)).item(),
        bias=_bias(total).item(),
        rows=rows,
        rows_se=rows_se,
        rows_bias=bias,
    )


def ess(weights: HasLogWeights) -> Tensor:
    r"""Kish's effective sample size of every row's weights.

    .. math:: \mathrm{ESS}_n = \frac{(\sum_s w_{sn})^2}{\sum_s w_{sn}^2}, \qquad 1 \le \mathrm{ESS}_n \le S

    It is large also where the guide has missed a part of the posterior altogether.

    Args:
        weights: from :func:`~pyro_avi.log_weights`.

    Returns:
        ``[B]`` in draws.

    Raises:
        ValueError: if a weight is ``nan`` or infinite.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> local = torch.tensor([[0.0, 0.0], [0.0, -100.0]])
        >>> avi.ess(avi.LogWeights(local, torch.zeros(2), scale=1.0)).tolist()
        [2.0, 1.0]
    """
    return 1 / check_log_weights(weights).softmax(0).square().sum(0)


def log_mean_exp(values: Tensor) -> Tensor:
    """``[B]`` the log of the mean exponential of ``values [S, B]``."""
    return values.logsumexp(0) - math.log(len(values))


def _influence(values: Tensor) -> Tensor:
    """``[S, B]`` the influence of each draw on the log of the mean weight, to first order."""
    return len(values) * values.softmax(0) - 1


def _standard_error(influence: Tensor) -> Tensor:
    if len(influence) == 1:
        return influence.new_full(influence.shape[1:], float("nan"))
    return influence.std(0) / len(influence) ** 0.5


def _bias(values: Tensor) -> Tensor:
    """``[B]`` the bound of half of the draws minus that of all."""
    half = len(values) // 2
    if half == 0:
        return values.new_full(values.shape[1:], float("nan"))
    generator = torch.Generator().manual_seed(0)
    differences = []
    for _ in range(_SPLITS):
        order = torch.randperm(len(values), generator=generator).to(values.device)[: 2 * half]
        one, two = log_mean_exp(values[order[:half]]), log_mean_exp(values[order[half:]])
        differences.append((one + two) / 2 - (torch.logaddexp(one, two) - math.log(2)))
    return torch.stack(differences).mean(0)
