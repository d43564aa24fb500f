"""The structure of a model: local and global latents, the plates of its rows, and its observations."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_avi.inspection.supports import is_like, transform_of, unwrapped

__all__ = ["Latent", "RowSet", "Structure"]


@dataclass(frozen=True)
class Latent:
    """A latent site of a model.

    Attributes:
        name: the site's name.
        frames: the plates that hold it, innermost last.
        support: its constraint.
        event_dim: the number of its event dimensions.
        initial: its initial value in unconstrained coordinates, ``batch_shape + unconstrained event shape``; for a discrete
            latent its initial value, ``batch_shape``.
        unconstrained_event_dim: the number of event dimensions of ``initial``.
        num_values: the number of values of a discrete latent, ``None`` for a continuous one.
        is_weighted: whether it is masked, or scaled beyond its plates.
        dtype: of its density.
    """

    name: str
    frames: tuple[CondIndepStackFrame, ...]
    support: constraints.Constraint
    event_dim: int
    initial: Tensor
    unconstrained_event_dim: int
    num_values: int | None = None
    is_weighted: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def is_real(self) -> bool:
        """Whether the support is the whole real space, so that no transform is needed."""
        return is_like(self.support, constraints.real)

    @property
    def is_boolean(self) -> bool:
        """Whether the values are 0 and 1, as those of a Bernoulli."""
        return is_like(self.support, constraints.boolean)

    @property
    def is_one_hot(self) -> bool:
        """Whether the values are vectors with a single one, as those of a one-hot Categorical."""
        return is_like(self.support, constraints.one_hot)

    @property
    def transform(self) -> Transform:
        """The map from unconstrained coordinates to the support, elementwise where the support is."""
        return transform_of(self.support)

    @property
    def independent_dim(self) -> int:
        """The number of event dimensions over which the support is elementwise."""
        return unwrapped(self.support)[1]

    def to_support(self, value: Tensor) -> Tensor:
        """Map unconstrained coordinates to the support."""
        return value if self.is_real else self.transform(value)


@dataclass(frozen=True)
class RowSet:
    """The latents inside one combination of the chosen plates, whose rows get one factor each.

    Attributes:
        frames: these plates, the one with the leftmost dimension first.
        latents: the latents, in the order of the model.
        observations: the observed sites whose plates include these; for each the dimensions of its value that hold the
            rows, one a plate, from the right.
        subsampled: by observed site, its other plates that take a part of their rows only.
        supports: by observed site, its support.
    """

    frames: tuple[CondIndepStackFrame, ...]
    latents: tuple[Latent, ...]
    observations: Mapping[str, tuple[int, ...]]
    subsampled: Mapping[str, tuple[str, ...]]
    supports: Mapping[str, constraints.Constraint]

    @property
    def plates(self) -> tuple[str, ...]:
        """The names of the plates."""
        return tuple(frame.name for frame in self.frames)

    def __str__(self) -> str:
        names = [f'"{name}"' for name in self.plates]
        return f"plate {names[0]}" if len(names) == 1 else f"plates {' x '.join(names)}"


@dataclass(frozen=True)
class Structure:
    """The parts of a model for one choice of the plates whose rows get local factors.

    Attributes:
        row_sets: the latents inside these plates, by the plates that they lie in.
        global_latents: the latents outside them.
        observations: all observed sites, in the chosen plates or not.
        order: the names of all latents as the model states them.
        without_size: the names of the plates that the model gives no size.
    """

    row_sets: tuple[RowSet, ...]
    global_latents: tuple[Latent, ...]
    observations: tuple[str, ...]
    order: tuple[str, ...]
    without_size: frozenset[str] = frozenset()

    @property
    def local_latents(self) -> tuple[Latent, ...]:
        """The latents of all row sets."""
        return tuple(latent for rows in self.row_sets for latent in rows.latents)

    @property
    def frames(self) -> dict[str, CondIndepStackFrame]:
        """The chosen plates that hold latents, by name."""
        return {frame.name: frame for rows in self.row_sets for frame in rows.frames}
