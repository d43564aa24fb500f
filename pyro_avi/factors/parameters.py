"""The parameters of a factor: how they are divided among a family and discrete latents, and where these lie in rows."""

from collections.abc import Iterator, Mapping, Sequence

import pyro.distributions as dist
import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor, nn

from pyro_avi.errors import check_held
from pyro_avi.factors.conditional_members import ConditionalMembers
from pyro_avi.factors.discrete import DiscreteFactor
from pyro_avi.factors.layout import Layout
from pyro_avi.families import DiagonalNormal, Family
from pyro_avi.inspection.structure import Latent

__all__ = ["ParameterizedFactor"]


class ParameterizedFactor(nn.Module):
    """A set of latents with one vector of variational parameters for each row.

    Args:
        name: of the auxiliary site that a joint family is sampled at.
        latents: the latents of the factor.
        frames: the plates of the rows, the one with the leftmost dimension first; none for a factor without rows.
        family: the set that a row's factor is taken from, not yet prepared.
        most: of a family whose settings are a file's, the numbers that the file holds for these rows.

    Raises:
        ValueError: if the family asks for more numbers than that, or a conditional family cannot be, as in
            :class:`~pyro_avi.factors.conditional_members.ConditionalMembers`.
    """

    def __init__(
        self,
        name: str,
        latents: Sequence[Latent],
        frames: Sequence[CondIndepStackFrame],
        family: Family | None = None,
        *,
        most: int | None = None,
    ):
        super().__init__()
        self.name, self.latents, self.frames = name, tuple(latents), tuple(frames)
        self._layouts = {latent.name: Layout(latent, self.frames) for latent in self.latents}
        self._continuous = [latent for latent in self.latents if latent.num_values is None]
        self._discrete = [
            DiscreteFactor(latent, self._layouts[latent.name])
            for latent in self.latents
            if latent.num_values is not None
        ]
        self._sizes = [self._layouts[latent.name].size for latent in self._continuous]
        self.family = family or DiagonalNormal()
        self.num_latents = sum(self._sizes)
        # Where a row has several members of the family, by the values of its discrete latents.
        conditional = self.family.conditional and self._continuous and self._discrete
        self._members = ConditionalMembers(self.family, self._discrete) if conditional else None
        of_family = 0
        if self._continuous:
            if most is not None:
                asked = self.family.num_parameters(self.num_latents) + self.family.num_shared(self.num_latents)
                check_held(f"{self.family!r} for {self.num_latents} latents", asked, most)
            self.family.prepare(self.num_latents)
            of_family = self.family.num_parameters(self.num_latents) * self._num_members
        self._split = [of_family, *(factor.num_parameters for factor in self._discrete)]
        self.num_parameters = sum(self._split)

    @property
    def _num_members(self) -> int:
        return 1 if self._members is None else self._members.count

    @property
    def plates(self) -> tuple[str, ...]:
        """The names of the plates of the rows."""
        return tuple(frame.name for frame in self.frames)

    def initial(self, scale: float) -> Tensor:
        """Parameters ``[*B, P]`` at the latents' initial values with standard deviation ``scale``."""
        parts = []
        if self._continuous:
            locs = [self._layouts[latent.name].to_rows(latent.initial) for latent in self._continuous]
            member = self.family.initial(torch.cat(locs, -1), scale)
            parts.append(member.repeat(*(1,) * (member.dim() - 1), self._num_members))
        for factor in self._discrete:
            # All values equally likely: the value of one draw is not informative.
            rows = self._layouts[factor.latent.name].to_rows(factor.latent.initial)
            # Values may be whole numbers.
            parts.append(rows.new_zeros(*rows.shape[:-1], factor.num_parameters, dtype=factor.latent.dtype))
        return torch.cat([part.to(parts[0]) for part in parts], -1)

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        """The distribution of the continuous latents' coordinates: batch shape ``[*B]``, event shape ``[K]``.

        With a conditional family it is the mixture over the values of the discrete latents.
        """
        if not self._continuous:
            raise ValueError(
                f"Expected a continuous latent in plate {' x '.join(self.plates)}, found discrete ones only.\n"
                "Draw from the guide itself, or ask it for its median."
            )
        of_family, *of_discrete = parameters.split(self._split, -1)
        if self._members is None:
            return self.family.distribution(of_family)
        return self._members.mixture(of_family, of_discrete)

    def condition(self, parameters: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """The parameters ``[*B, P]`` with all mass of discrete factors on the values that a call observes.

        Args:
            parameters: ``[*B, P]``, one row for each row of the plates.
            given: the values of latents that the call observes, by site.
        """
        if not any(factor.latent.name in given for factor in self._discrete):
            return parameters
        of_family, *of_discrete = parameters.split(self._split, -1)
        parts = [
            factor.certain_of(given[factor.latent.name]).to(x) if factor.latent.name in given else x
            for factor, x in zip(self._discrete, of_discrete, strict=True)
        ]
        return torch.cat([of_family, *parts], -1)

    def fisher(self, parameters: Tensor) -> Tensor | None:
        """The diagonal ``[*B, P]`` of the Fisher information; of a conditional family that of each member by itself.

        ``None`` where the family has no formula.

        Args:
            parameters: ``[*B, P]``, one row for each row of the plates.
        """
        of_family, *of_discrete = parameters.split(self._split, -1)
        parts = [factor.fisher(x) for factor, x in zip(self._discrete, of_discrete, strict=True)]
        if self._continuous:
            members = of_family.unflatten(-1, (self._num_members, -1))
            continuous = self.family.fisher(members)
            if continuous is None:
                return None
            parts.insert(0, continuous.flatten(-2))
        return torch.cat(parts, -1)

    def row_shape(self, name: str) -> list[int]:
        """The shape of a latent's unconstrained coordinates in one row: other plates, then event dimensions."""
        return self._layouts[name].row_shape

    def row_dims(self, name: str) -> tuple[int, ...]:
        """The dimensions of a site's value that hold the rows, one a plate, from the right."""
        latent = next(latent for latent in self.latents if latent.name == name)
        return tuple(frame.dim - latent.event_dim for frame in self.frames)

    def _on_sites(self, coordinates: Tensor) -> dict[str, Tensor]:
        """The continuous sites' values of coordinates ``[..., *B, K]``."""
        return {
            latent.name: latent.to_support(self._layouts[latent.name].from_rows(rows))
            for latent, rows in zip(self._continuous, coordinates.split(self._sizes, -1), strict=True)
        }

    def _normals_by_site(self, normals: dist.Normal, *, is_spread: bool) -> Iterator[tuple[Latent, dist.Normal]]:
        """The normals ``[..., *B, K]`` of all coordinates, by latent and in the shape of its site."""
        alone = len(self._sizes) == 1
        locs, scales = ([x] if alone else x.split(self._sizes, -1) for x in (normals.loc, normals.scale))
        for latent, loc, scale in zip(self._continuous, locs, scales, strict=True):
            layout = self._layouts[latent.name]
            place = layout.from_spread if is_spread else layout.from_rows
            yield latent, dist.Normal(place(loc), place(scale))
