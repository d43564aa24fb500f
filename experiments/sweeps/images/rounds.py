"""Training in rounds, each as long as all before it, until a round gains little."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["SHARE", "Rounds", "convergence", "has_fallen"]

#: The share of all that a training gains below which its last half is to gain, to have converged.
SHARE = 0.01

# The first round of the most steps, as a power of one half.
_HALVINGS = 4
# The share of a round in which the rates rise, and the points of a curve in each.
_RISING, _PARTS = 0.05, 5
# The share of what was gained that no round may lose.
_LOST = 0.1


@dataclass(frozen=True)
class Rounds:
    """Rounds of training. In each the learning rates rise to their largest values and fall to zero by half a cosine.

    A bound at a large rate says how noisy the steps are and not how far they have come, and one at a small rate hardly
    moves, far from the best or not. So two bounds are compared at the ends of rounds, where the rates have fallen: when
    as many steps as all before them have gained little, more of them would, too.

    Args:
        ends: the steps after which a round ends, increasing.

    Example:
        >>> rounds = Rounds.doubling(8000)
        >>> rounds.ends
        (500, 1000, 2000, 4000, 8000)
        >>> [round(rounds.share_of_rate(step), 2) for step in (0, 250, 499, 500, 750)]
        [0.04, 0.5, 0.0, 0.04, 0.5]
    """

    ends: tuple[int, ...]

    @classmethod
    def doubling(cls, most: int) -> "Rounds":
        """Rounds that double the steps taken so far, up to ``most``."""
        return cls(tuple(sorted({math.ceil(most / 2**power) for power in range(_HALVINGS + 1)})))

    def share_of_rate(self, step: int) -> float:
        """The learning rate of a step, from 0, as a share of the largest one."""
        place = min(bisect_right(self.ends, step), len(self.ends) - 1)
        began = self.ends[place - 1] if place else 0
        length = self.ends[place] - began
        # At the full rate at once, trainings were seen to diverge at the first steps of a round.
        rising = min(1.0, (step - began + 1) / max(1.0, _RISING * length))
        return rising * 0.5 * (1 + math.cos(math.pi * (step - began) / length))

    def points(self) -> set[int]:
        """Steps to look at: ever later ones at first, then some in each round, its end among them."""
        began, points = 0, {math.ceil(self.ends[0] / 4**power) for power in range(1, 4)}
        for end in self.ends:
            points |= {began + math.ceil((end - began) * part / _PARTS) for part in range(1, _PARTS + 1)}
            began = end
        return points


def convergence(curve: Mapping[str, Sequence[Any]], share: float, before: float | None = 0.0) -> dict[str, Any]:
    """Whether the last half of the steps has moved the bound by less than a share of what all of them have gained.

    Args:
        curve: ``step``, ``seconds`` and ``elbo`` (nats a row, ``None`` where it is not finite) by point.
        share: below which a training has converged.
        before: what the training that this one goes on from had gained.

    Returns:
        ``steps`` and ``rise``, what was done and what it gained; ``late_gain`` and ``late_seconds``, what the last half
        of the steps gained and cost; ``share``, and ``converged``, which is false where a bound is not known.
    """
    steps = curve["step"][-1]
    half = max(place for place, step in enumerate(curve["step"]) if step <= steps / 2)
    start, middle, end = (curve["elbo"][place] for place in (0, half, -1))
    known = None not in (start, middle, end, before)
    rise = before + end - start if known else None
    return {
        "steps": steps,
        "rise": rise,
        "late_gain": end - middle if known else None,
        "late_seconds": curve["seconds"][-1] - curve["seconds"][half],
        "share": share,
        "converged": known and abs(end - middle) < share * rise,
    }


def has_fallen(found: Mapping[str, Any]) -> bool:
    """Whether the last half of the steps has lost a good part of what those before had gained, or all of them have lost.

    The rates are too large then.

    Args:
        found: by :func:`convergence`.

    Example:
        >>> has_fallen({"rise": 70.0, "late_gain": -30.0}), has_fallen({"rise": 99.0, "late_gain": -1.0})
        (True, False)
    """
    if found["rise"] is None:
        return False
    return found["rise"] < 0 or found["late_gain"] < -_LOST * (found["rise"] - found["late_gain"])
