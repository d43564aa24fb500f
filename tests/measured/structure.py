"""What the contract of measurements knows of a structure: a model, data, and the exact log evidence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

__all__ = [
    "DISCRETE",
    "GUIDES",
    "MEASUREMENTS",
    "SEVERAL_PLATES",
    "STRUCTURES",
    "TIED",
    "Measured",
    "add",
    "add_made",
]

GUIDES = ("ConstantGuide", "AmortizedGuide", "FactorizedGuide")
MEASUREMENTS = ("log_weights", "ais", "measure_gaps", "refine", "sbc", "posterior_predictive", "to_arviz")


def _by_row(pattern: str) -> dict[str, str]:
    return dict.fromkeys(("ais", "sbc"), pattern)


# Rows that have no evidence of their own, or coordinates that a chain cannot move along.
TIED = _by_row("(?s)independent given the global latents.*tied by.*avi.log_weights")
SEVERAL_PLATES = _by_row("(?s)Expected rows of one plate, got those of")
DISCRETE = {"ais": "(?s)Expected continuous latents, got the discrete latent.*Sum it out"}


@dataclass(frozen=True)
class Measured:
    """A model with what measurements have to say of it.

    Attributes:
        name: what is special about it, in words.
        make: makes the model.
        args: of a call of the model.
        evidence: ``[M]`` the exact log evidence in nats of each independent block of rows, in the order of their first rows,
            given ``theta``; for parts of a data set unscaled.
        blocks: the block of every row; ``None`` where every row is one.
        theta: values of the global latents.
        total: the log evidence of all data, the global latents integrated out; by default the sum of ``evidence``.
        scale: ``N / B``.
        options: arguments of all guides.
        amortized: arguments of the amortized guide alone.
        init_scale: the standard deviation, in unconstrained coordinates, of the factors that draws come from.
        refused: what is refused, as a pattern of its message by what it is: ``"setup"``, a measurement, or one of a guide as
            ``"FactorizedGuide setup"``.
        applies: the measurements that there is something to say of.
        warning: a pattern of what the guide warns of.
        is_conjugate: whether the posterior of every row is in the mean-field family.
        rebuild: for `sbc`, where simulated values are no arguments.
        nesting: the number of plate dimensions.
        brute_force: how the evidence is checked: ``"mode"`` from the mode of the joint density, ``"wide"`` where there may
            be several, ``None`` where the density of the call is that of a part of a data set.
        restated: a model of the same density that Pyro can sum over its discrete latents, for this check.
        num_samples: draws that give the evidence a standard error of about .05.
    """

    name: str
    make: Callable[[], Callable]
    args: tuple
    evidence: np.ndarray
    blocks: Sequence[int] | None = None
    theta: Mapping[str, Tensor] = field(default_factory=dict)
    total: float | None = None
    scale: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    amortized: Mapping[str, Any] = field(default_factory=dict)
    init_scale: float = 1.0
    refused: Mapping[str, str] = field(default_factory=dict)
    applies: Sequence[str] = MEASUREMENTS
    warning: str | None = None
    is_conjugate: bool = False
    rebuild: Callable | None = None
    nesting: int = 1
    brute_force: str | None = "mode"
    restated: Callable | None = None
    num_samples: int = 400

    def refusal(self, kind: str, measurement: str) -> str | None:
        """The pattern of the message by which a measurement of a guide is refused, if it is."""
        for key in ("setup", f"{kind} setup", measurement, f"{kind} {measurement}"):
            if key in self.refused:
                return self.refused[key]
        return None


STRUCTURES: dict[str, Measured] = {}


def add(name: str, model: Callable, args: tuple, evidence, **more) -> None:
    """Enter a structure; ``model`` is a function that is one for all tests."""
    add_made(name, lambda: model, args, evidence, **more)


def add_made(name: str, make: Callable[[], Callable], args: tuple, evidence, **more) -> None:
    """Enter a structure whose model has a state of its own, and is made for every test."""
    if name in STRUCTURES:
        raise ValueError(f"Expected structures of different names, got {name!r} twice.")
    evidence = np.atleast_1d(np.asarray(evidence, dtype=float))
    STRUCTURES[name] = Measured(name, make, args, evidence, **more)
