"""The members of a conditional family in one row, by the values of its discrete latents."""

from collections.abc import Mapping, Sequence
from math import prod

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_avi.factors.discrete import DiscreteFactor
from pyro_avi.families import Family

__all__ = ["ConditionalMembers"]

_MOST_VALUES = 1000


class ConditionalMembers:
    """A table of members of a family, one for each value that the discrete latents of a row have together.

    Args:
        family: the family.
        discrete: the discrete latents, the first one slowest in the order of their values.

    Attributes:
        count: ``C``, the number of values.

    Raises:
        ValueError: if a discrete latent lies in a plate inside the row, or there are more than 1,000 values.
    """

    def __init__(self, family: Family, discrete: Sequence[DiscreteFactor]):
        self._family, self._discrete = family, discrete
        for factor in discrete:
            if not factor.is_event:
                raise ValueError(
                    f"Expected discrete latents without plates inside a row for {family!r}, got {factor.latent.name!r} "
                    f"with rows of shape {tuple(factor.row_shape)}.\n"
                    "Give that plate's rows factors of their own by plate=..., or use a family that is not conditional."
                )
        self.count = prod(factor.num_values**factor.num_elements for factor in discrete)
        if self.count > _MOST_VALUES:
            raise ValueError(
                f"Expected at most {_MOST_VALUES} values of a row's discrete latents for {family!r}, got {self.count} of "
                f"{[factor.latent.name for factor in discrete]} together.\nUse a family that is not conditional."
            )

    def at(self, table: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """The parameters ``[..., *plates, P]`` of the members at values of the discrete latents.

        Args:
            table: ``[*plates, C * P]``, with the dimensions of all plates.
            values: of the discrete sites, in any more dimensions on the left: those of particles or enumerated values.
        """
        position = torch.zeros((), dtype=torch.long, device=table.device)
        for factor in self._discrete:
            position = position * factor.num_values**factor.num_elements + factor.position(values[factor.latent.name])
        table = table.unflatten(-1, (self.count, -1))
        shape = torch.broadcast_shapes(position.shape, table.shape[:-2])
        index = position.expand(shape)[..., None, None].expand(*shape, 1, table.shape[-1])
        return table.expand(*shape, *table.shape[-2:]).gather(-2, index).squeeze(-2)

    def mixture(self, table: Tensor, of_discrete: Sequence[Tensor]) -> dist.MixtureSameFamily:
        """The distribution over all values of the discrete latents: batch shape ``[*B]``, event shape ``[K]``.

        Args:
            table: ``[*B, C * P]``.
            of_discrete: the parameters of the discrete latents.
        """
        members = self._family.distribution(table.unflatten(-1, (self.count, -1)))
        return dist.MixtureSameFamily(dist.Categorical(logits=self._logits(of_discrete)), members)

    def components(self, table: Tensor, of_discrete: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The parameters ``[C, *B, P]`` of all members, and the probabilities ``[C, *B]`` of their values.

        Args:
            table: ``[*B, C * P]``.
            of_discrete: the parameters of the discrete latents.
        """
        table = table.unflatten(-1, (self.count, -1))
        return table.movedim(-2, 0), self._logits(of_discrete).softmax(-1).movedim(-1, 0)

    def _logits(self, of_discrete: Sequence[Tensor]) -> Tensor:
        parts = zip(self._discrete, of_discrete, strict=True)
        return _joint_logits([each for factor, x in parts for each in factor.elements(x)])


def _joint_logits(elements: list[Tensor]) -> Tensor:
    """The logits ``[*B, C]`` of all combinations of values of independent elements, the first of them slowest."""
    result = elements[0].log_softmax(-1)
    for logits in elements[1:]:
        result = (result.unsqueeze(-1) + logits.log_softmax(-1).unsqueeze(-2)).flatten(-2)
    return result
