"""Numbers as text, with their errors."""

import math

__all__ = ["counted", "with_error"]

# Larger numbers, and smaller errors, are written with an exponent.
_LARGEST, _SMALLEST = 1e12, 1e-6


def with_error(value: float, error: float) -> str:
    """A number rounded to two digits of its standard error, and that error.

    A number without a known error, or without an error (0), has six digits.

    Args:
        value: the number.
        error: its standard error, ``nan`` where it is not known.

    Example::

        >>> from pyro_avi.display.formatting import with_error
        >>> with_error(-80.8412, 0.0312), with_error(-1234567.8, 1234.0), with_error(3.25, 0.0)
        ('-80.841 ± 0.031', '-1,234,600 ± 1,200', '3.25 ± 0')
    """
    if not (math.isfinite(value) and math.isfinite(error)) or error == 0:
        return f"{_plain(value)} ± {_plain(error)}"
    # Decimals, from the rounded error: rounding 9.96 to 10 adds a digit in front of the point.
    digits = 1 - math.floor(math.log10(float(f"{error:.1e}")))
    if error < _SMALLEST or max(abs(value), error) >= _LARGEST:
        scale = max(abs(value), error)
        return f"{value:.{max(1, math.floor(math.log10(scale)) + digits)}e} ± {error:.1e}"
    return " ± ".join(f"{round(number, digits) + 0.0:,.{max(digits, 0)}f}" for number in (value, error))


def _plain(number: float) -> str:
    """Six digits."""
    if math.isfinite(number) and 1e6 <= abs(number) < _LARGEST:
        return f"{number:,.0f}"
    return f"{number:.6g}"


def counted(number: int, noun: str) -> str:
    """A number of things, with their plural.

    Example::

        >>> from pyro_avi.display.formatting import counted
        >>> counted(1, "row"), counted(1000000, "row")
        ('1 row', '1,000,000 rows')
        >>> counted(2, "quantity")
        '2 quantities'
    """
    several = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else several}"
