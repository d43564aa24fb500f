"""Standardized inputs of an encoder: location and scale of what a guide was set up with."""

import torch
from torch import Tensor, nn
from torch.distributions import constraints

__all__ = ["Standardize", "transform_of"]

_COUNTS = (type(constraints.nonnegative_integer), constraints.multinomial)
_POSITIVE = (type(constraints.positive), type(constraints.nonnegative))
_BOUNDED = (
    *(
        type(each)
        for each in (constraints.boolean, constraints.unit_interval, constraints.simplex, constraints.one_hot)
    ),
    constraints.interval,
    constraints.half_open_interval,
    constraints.integer_interval,
)

# How many times its least value the largest of an argument is at least for its logarithm to be read.
_WIDE = 10.0


def _inside(support: constraints.Constraint | None) -> constraints.Constraint | None:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def transform_of(values: Tensor, support: constraints.Constraint | None = None) -> str:
    """What is done to values before they are standardized, by their support, or where there is none by what they are.

    - ``"log1p"``: whole numbers without an upper bound (counts).
    - ``"log"``: positive numbers; of an argument only such as span more than a factor of ten (exposures).
    - ``"shared"``: nothing, and all features are measured in one unit: bounded and whole numbers.
    - ``"none"``: nothing.

    Args:
        values: those that a guide is set up with.
        support: of the site that they are observed at, ``None`` for an argument.
    """
    inside = _inside(support)
    whole = not values.is_floating_point()
    if isinstance(inside, _COUNTS):
        return "log1p"
    if isinstance(inside, _BOUNDED):
        return "shared"
    if whole:
        is_count = values.dtype not in (torch.bool, torch.uint8) and bool((values >= 0).all())
        return "log1p" if is_count else "shared"
    if isinstance(inside, _POSITIVE) and not isinstance(inside.lower_bound, Tensor) and inside.lower_bound == 0:
        return "log"
    is_wide = (
        support is None and values.numel() and bool((values > 0).all()) and bool(values.max() > _WIDE * values.min())
    )
    return "log" if is_wide else "none"


class Standardize(nn.Module):
    r"""Takes off the location and divides by the scale that the first rows had.

    .. math:: x_{nd} \mapsto (t(x_{nd}) - m_d) / s_d

    with a transform :math:`t` that is a logarithm for counts and other positive numbers, see :func:`transform_of`.

    Locations and scales are buffers: they are kept with the module and never follow later rows. Elements that are not known
    have no part in them and become 0, the location.

    - Features of one dimension that may differ in unit have a location and a scale each: mean and standard deviation.
    - Features in one unit (counts, bounded and whole numbers) have a location each and one scale, the root of their mean
      variance: a species that was counted once in a thousand rows is not blown up.
    - Rows of several dimensions, such as images, have one location and one scale.
    - A feature that does not vary has the scale of those that do; where none does, as in a single row, the root mean square
      of all values; where they are all 0, the scale 1.

    Args:
        values: the first rows, ``[N, ...]``.
        known: true where a value counts, in a shape that broadcasts against them; by default everywhere.
        transform: one of those of :func:`transform_of`.
    """

    def __init__(self, values: Tensor, known: Tensor | None = None, *, transform: str):
        super().__init__()
        self.transform = transform
        values = self._transformed(values)
        known = values.isfinite() if known is None else known & values.isfinite()
        dims = tuple(range(values.dim())) if values.dim() > 2 else (0,)
        location, variance = _moments(values, known, dims)
        varies = variance.sqrt() > 64 * torch.finfo(values.dtype).eps * location.abs()
        of_varying = torch.where(varies, variance, 0.0).sum() / varies.sum().clamp(min=1)
        of_all = torch.where(known, values, 0.0).square().sum() / known.sum().clamp(min=1)
        # Without a look at the content, so that it can be set up by shapes alone.
        common = torch.where(of_varying > 0, of_varying, torch.where(of_all > 0, of_all, 1.0)).sqrt()
        scale = (
            common.expand_as(variance)
            if transform in ("log1p", "shared")
            else torch.where(varies, variance.sqrt(), common)
        )
        self.register_buffer("location", location.clone())
        self.register_buffer("scale", scale.clone())

    location: Tensor
    scale: Tensor

    def _transformed(self, values: Tensor) -> Tensor:
        if self.transform == "log1p":
            return values.clamp(min=0).log1p()
        if self.transform == "log":
            return values.clamp(min=torch.finfo(values.dtype).tiny).log()
        return values

    def forward(self, values: Tensor, known: Tensor | None = None) -> Tensor:
        """Standardized rows; zeros where values are not known.

        Args:
            values: ``[B, ...]``.
            known: as for the first rows.

        Raises:
            ValueError: if the rows have other features than the first ones.
        """
        depth = self.location.dim()
        # Another number of features fails by itself, but for a single one.
        if depth and not torch.jit.is_tracing() and values.shape[-depth:] != self.location.shape:
            raise ValueError(
                f"Expected rows with features of shape {tuple(self.location.shape)}, as the guide was set up with, got values "
                f"of shape {tuple(values.shape)} for its encoder."
            )
        values = (self._transformed(values) - self.location) / self.scale
        return values if known is None else torch.where(known, values, 0.0)


def _moments(values: Tensor, known: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and variance over some dimensions of the elements that are known; those of all where none is."""
    values, count = torch.where(known, values, 0.0), known.sum(dims)
    mean = values.sum(dims) / count.clamp(min=1)
    mean = torch.where(count > 0, mean, values.sum() / count.sum().clamp(min=1))
    variance = torch.where(known, values - mean, 0.0).square().sum(dims) / count.clamp(min=1)
    return mean, variance
