"""Statistics of numbers by row ``[S, R]`` of ``S`` seeds and ``R`` rows."""

from __future__ import annotations

import math

import numpy as np

from experiments.reporting.statistics import Mean


def mean_of_rows(rows: np.ndarray) -> Mean:
    """The mean, with its error as a statement about other rows and other seeds.

    With the mean a row over seeds :math:`m_n` and the mean a seed over rows :math:`m_s`::

        se = sqrt(var_n m_n / R + var_s m_s / S)

    The draws' error is part of both. With one seed the second term is unknown and left out.

    >>> mean_of_rows(np.array([[1.0, 3.0], [1.0, 3.0]]))
    Mean(value=2.0, se=1.0, seeds=2)
    """
    if rows.size == 0:
        return Mean()
    seeds, count = rows.shape
    variance = rows.mean(0).var(ddof=1) / count if count > 1 else math.nan
    if seeds > 1:
        variance += rows.mean(1).var(ddof=1) / seeds
    return Mean(float(rows.mean()), math.sqrt(variance), seeds)


def share(part_of: np.ndarray, whole: np.ndarray) -> Mean:
    """The ratio of two means, by the delta method; unknown where the whole is not told apart from 0.

    >>> share(np.array([[1.0, 2.0]]), np.array([[2.0, 4.0]]))
    Mean(value=0.5, se=0.0, seeds=1)
    """
    if part_of.size == 0 or mean_of_rows(whole).sign < 1:
        return Mean()
    ratio = part_of.mean() / whole.mean()
    error = mean_of_rows(part_of - ratio * whole)
    return Mean(float(ratio), error.se / float(whole.mean()), error.seeds)


def mean_between(test: np.ndarray, train: np.ndarray) -> Mean:
    """The mean of test rows minus that of training rows: other rows, the same seeds."""
    error = math.hypot(*(float(rows.mean(0).std(ddof=1)) / math.sqrt(rows.shape[1]) for rows in (test, train)))
    by_seed = test.mean(1) - train.mean(1)
    if len(by_seed) > 1:
        error = math.hypot(error, float(by_seed.std(ddof=1)) / math.sqrt(len(by_seed)))
    return Mean(float(by_seed.mean()), error, len(by_seed))
