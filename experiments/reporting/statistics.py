"""Statistics over seeds: means, paired differences, times to a level that some seeds never reach; and how they are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

#: A difference counts as seen when it exceeds this many of its standard errors.
SEEN = 2.0


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its standard error, or one number of one run with its Monte Carlo error; nan where unknown.

    >>> print(Mean(241.3456, 0.1234, 3), Mean(0.04321, math.nan, 1), Mean(5120.4, 33.3, 3), Mean(), sep="; ")
    241.35 ± 0.12; 0.0432; 5,120 ± 33; -
    """

    value: float = math.nan
    se: float = math.nan
    seeds: int = 0

    @property
    def known(self) -> bool:
        return math.isfinite(self.value)

    @property
    def sign(self) -> int:
        """-1 or 1 where the value differs from 0 by more than `SEEN` standard errors, else 0.

        >>> Mean(3.0, 1.0, 4).sign, Mean(-3.0, 2.0, 4).sign, Mean(3.0, math.nan, 1).sign
        (1, 0, 0)
        """
        return int(np.sign(self.value)) if abs(self.value) > SEEN * self.se else 0

    def __str__(self) -> str:
        # An error below rounding of the value, as of numbers that agree over seeds, is no error to print.
        if not self.known or not math.isfinite(self.se) or self.se <= 1e-9 * abs(self.value):
            return significant(self.value)
        # Two significant digits of the error, two decimals at most while they show it.
        first = -math.floor(math.log10(self.se))
        places = max(min(first + 1, max(first, 2)), 0)
        return f"{self.value:,.{places}f} ± {self.se:,.{places}f}"


def mean_over_seeds(values: Iterable[Mean]) -> Mean:
    """The mean over the seeds whose values are finite, and its standard error.

    With S seeds, values v_s of standard deviation sd and Monte Carlo errors m_s::

        se = sqrt(max(sd^2, mean_s m_s^2) / S)

    sd already contains the Monte Carlo error, whose draws differ between seeds, so the two are not added; the maximum
    keeps a chance agreement of few seeds from passing for precision. Of one seed `se` is the Monte Carlo error alone, or
    nan if that is zero.

    >>> mean_over_seeds([Mean(1.0, 0.1), Mean(3.0, 0.1)])
    Mean(value=2.0, se=1.0, seeds=2)
    """
    finite = [each for each in values if each.known]
    if not finite:
        return Mean()
    numbers, errors = ([getattr(each, name) for each in finite] for name in ("value", "se"))
    monte_carlo = float(np.mean(np.square(errors)))
    if len(finite) == 1:
        return Mean(numbers[0], math.sqrt(monte_carlo) or math.nan, 1)
    se = math.sqrt(max(float(np.var(numbers, ddof=1)), monte_carlo) / len(finite))
    return Mean(float(np.mean(numbers)), se, len(finite))


def paired_difference(minuend: Mapping[int, Mean], subtrahend: Mapping[int, Mean]) -> Mean:
    """The mean of minuend - subtrahend over the seeds that both have, each seed's difference taken first.

    >>> paired_difference({1: Mean(5.0, 0.0), 2: Mean(8.0, 0.0)}, {1: Mean(4.0, 0.0), 2: Mean(5.0, 0.0), 3: Mean()})
    Mean(value=2.0, se=1.0, seeds=2)
    """
    pairs = [(minuend[seed], subtrahend[seed]) for seed in sorted(minuend.keys() & subtrahend.keys())]
    return mean_over_seeds(Mean(one.value - other.value, math.hypot(one.se, other.se)) for one, other in pairs)


@dataclass(frozen=True)
class Duration:
    """Steps or seconds to an event, or how long it was waited for in vain where `censored`: then a lower bound.

    >>> print(Duration(20), Duration(1234.5, censored=True))
    20 > 1,234
    """

    value: float
    censored: bool = False

    def __str__(self) -> str:
        return ("> " if self.censored else "") + significant(self.value)


def median_duration(durations: Iterable[Duration]) -> Duration | None:
    """The median over seeds, each that never got there counted as later than seen; None of none.

    >>> print(median_duration([Duration(10), Duration(90, True), Duration(20)]))
    20
    >>> print(median_duration([Duration(10), Duration(90, True), Duration(90, True)]))
    > 90
    """
    durations = list(durations)
    if not durations:
        return None
    median = float(np.median([math.inf if each.censored else each.value for each in durations]))
    if math.isfinite(median):
        return Duration(median)
    return Duration(float(np.median([each.value for each in durations])), censored=True)


def ratio_text(numerator: Duration | None, denominator: Duration | None) -> str:
    """The ratio of two medians, as a bound where one is a bound; "unknown" where neither was reached.

    >>> ratio_text(Duration(300), Duration(100)), ratio_text(Duration(300, True), Duration(100))
    ('3.0', '> 3.0')
    """
    both = [numerator, denominator]
    if None in both or denominator.value == 0 or all(each.censored for each in both):
        return "unknown"
    ratio = numerator.value / denominator.value
    return f"{'> ' * numerator.censored}{'< ' * denominator.censored}{ratio:.{1 + (ratio < 1)}f}"


def significant(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits and no exponent; "-" where it is not finite.

    >>> significant(0.012345), significant(1234.5), significant(2.5), significant(0.0), significant(math.nan)
    ('0.0123', '1,234', '2.5', '0', '-')
    """
    if not math.isfinite(value):
        return "-"
    places = max(digits - 1 - math.floor(math.log10(abs(value) or 1.0)), 0)
    # Without the sign of a zero.
    text = f"{value + 0.0:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
