"""The noise of gradient estimators, with its errors and costs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pyro_avi.display.formatting import counted, with_error
from pyro_avi.display.text_table import text_table

__all__ = ["EstimatorNoise", "GradientVariance", "GroupNoise"]


@dataclass(frozen=True)
class GroupNoise:
    """The noise of one estimator in a group of parameters.

    Attributes:
        variance: the sum of the variances of all elements of the gradient, that of one evaluation.
        se: its standard error.
        snr: the signal-to-noise ratio, the length of the mean (without what noise adds to it) over the root of the variance.
        bias: the distance of the mean from that of the reference: of the unbiased estimators of the same bound that were
            measured before, the one with the least variance. ``nan`` where there is none.
        bias_noise: the distance that noise alone leads to expect.
    """

    variance: float
    se: float
    snr: float
    bias: float = math.nan
    bias_noise: float = math.nan


@dataclass(frozen=True, repr=False)
class EstimatorNoise:
    """What was measured of one estimator.

    Attributes:
        name: of the estimator.
        bound: what it estimates the gradient of, ``"ELBO"`` or ``"importance-weighted"``.
        is_biased: whether its mean is another one.
        mean: the mean of the gradient of the bound by parameter, shaped as the parameter.
        variance: that of each element, by parameter.
        groups: by group of parameters.
        rows: by site of the guide ``[*B]`` the variance of the gradient in the parameters of a row's factor.
        seconds: of an evaluation, the median; on a CPU those of the processor.
        evaluations: of the likelihood of every row in an evaluation.
    """

    name: str
    bound: str
    is_biased: bool
    mean: Mapping[str, Tensor]
    variance: Mapping[str, Tensor]
    groups: Mapping[str, GroupNoise]
    rows: Mapping[str, Tensor]
    seconds: float
    evaluations: float

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {with_error(group.variance, group.se)}" for name, group in self.groups.items())
        return f"EstimatorNoise({self.name}, variance {parts}, {self.evaluations:.3g} evaluations)"


@dataclass(frozen=True, repr=False)
class GradientVariance:
    """The noise of several estimators on one model and guide.

    Attributes:
        estimators: what was measured, by name.
        num_samples: the number of evaluations of each.
        left_out: by name the reason why an estimator cannot be used on the pair.
    """

    estimators: Mapping[str, EstimatorNoise]
    num_samples: int
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> EstimatorNoise:
        """What was measured of an estimator.

        Args:
            name: of the estimator.
        """
        return self.estimators[name]

    def __repr__(self) -> str:
        return (
            f"GradientVariance({counted(len(self.estimators), 'estimator')}, {counted(self.num_samples, 'draw')} each)"
        )

    def table(self, *, format: str = "text") -> str:
        """A line for each estimator and group of parameters.

        Variance times cost compares estimators at an equal budget: averaging n evaluations divides the variance by n and
        multiplies the cost by it.

        Args:
            format: ``"text"`` or ``"markdown"``.

        Raises:
            ValueError: if it is neither.
        """
        if format not in ("text", "markdown"):
            raise ValueError(f'Expected format to be "text" or "markdown", got {format!r}.')
        cells = [["estimator", "bound", "group", "variance", "signal / noise", "bias", "evaluations", "ms",
                  "variance x evaluations", "variance x ms"]]  # fmt: skip
        for each in self.estimators.values():
            for name, group in each.groups.items():
                bias = "-" if math.isnan(group.bias) else with_error(group.bias, group.bias_noise)
                costs = [f"{group.variance * cost:.3g}" for cost in (each.evaluations, 1e3 * each.seconds)]
                cells.append([each.name, each.bound, name, with_error(group.variance, group.se), f"{group.snr:.3g}", bias,
                              f"{each.evaluations:.3g}", f"{1e3 * each.seconds:.3g}", *costs])  # fmt: skip
        notes = f"{counted(self.num_samples, 'draw')} each; bias beside the distance that noise alone leads to expect."
        return text_table(cells, notes, format=format)
