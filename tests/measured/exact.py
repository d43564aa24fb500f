"""Exact log evidences, by closed forms and by quadrature, in NumPy and SciPy alone."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats
from scipy.special import logsumexp
from torch import Tensor

__all__ = ["array", "integral", "integral_2d", "linear_normal", "log_bernoulli", "log_normal", "mixed"]


def array(values: Tensor) -> np.ndarray:
    """A tensor in double precision."""
    return values.detach().double().numpy()


def log_normal(x, loc, scale):
    """The log density of a normal."""
    return stats.norm.logpdf(x, loc, scale)


def log_bernoulli(x, logit):
    """The log probability of 0 or 1 at a logit."""
    return -np.logaddexp(0.0, np.where(x > 0, -logit, logit))


def linear_normal(x, design, scale: float, *, loc=0.0, prior_scale: float = 1.0) -> float:
    r"""The log density of :math:`x = \mathrm{loc} + A z + \epsilon`.

    Args:
        x: ``[D]``.
        design: ``[D, K]``, :math:`A`; the elements of :math:`z` are independent with mean 0.
        scale: the standard deviation of the noise.
        loc: the mean of ``x``.
        prior_scale: the standard deviation of the elements of :math:`z`, a number or ``[K]``.
    """
    x, design = np.atleast_1d(x), np.atleast_2d(design)
    if not x.size:
        return 0.0
    weighted = design * np.broadcast_to(prior_scale, design.shape[1:])
    covariance = weighted @ weighted.T + scale**2 * np.eye(len(x))
    return float(stats.multivariate_normal.logpdf(x, np.broadcast_to(loc, x.shape), covariance))


def _grid(low: float, high: float, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and log weights of the trapezoidal rule, which converges exponentially where the ends are negligible."""
    grid, weights = np.linspace(low, high, points), np.full(points, (high - low) / (points - 1))
    weights[[0, -1]] /= 2
    return grid, np.log(weights)


def integral(log_density: Callable, low: float = -12.0, high: float = 12.0, points: int = 1201) -> float:
    """The log of the integral of the exponential of a function of one variable, which takes arrays."""
    grid, weights = _grid(low, high, points)
    return float(logsumexp(log_density(grid) + weights))


def integral_2d(log_density: Callable, low: float = -10.0, high: float = 10.0, points: int = 301) -> float:
    """The same of a function of two variables."""
    grid, weights = _grid(low, high, points)
    return float(logsumexp(log_density(grid[:, None], grid) + weights[:, None] + weights))


def mixed(log_densities: Sequence, probabilities: Sequence[float]):
    """The log density of a mixture."""
    shape = (-1,) + (1,) * (np.asarray(log_densities[0]).ndim)
    return logsumexp(np.stack(log_densities) + np.log(np.reshape(probabilities, shape)), axis=0)
