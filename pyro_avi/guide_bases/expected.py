"""What a guide in a file says of itself, against the numbers that the file holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_avi.errors import check_held
from pyro_avi.guide_bases.description import check_description, describe_latents
from pyro_avi.inspection.structure import Structure

__all__ = ["Expected"]


@dataclass
class Expected:
    """The guide that a file describes, for the one that is to take its parameters.

    Attributes:
        description: what the guide's ``describe()`` said.
        held: the numbers that the file holds for each set of rows.
        family_is_given: whether the family is the caller's rather than made by the description.
    """

    description: dict[str, Any]
    held: list[int]
    family_is_given: bool

    @classmethod
    def of(cls, description: Mapping[str, Any], state: Mapping[str, Tensor], *, family_is_given: bool) -> "Expected":
        """By the ``state_dict`` of the guide.

        Args:
            description: of the guide.
            state: its ``state_dict``.
            family_is_given: as for the class.
        """
        parts = [f"row_factors.{at}." for at in range(len(description["row_sets"]))]
        held = [sum(x.numel() for name, x in state.items() if name.startswith(part)) for part in parts]
        return cls(dict(description), held, family_is_given)

    def most_of_families(self, structure: Structure) -> list[int | None]:
        """The most numbers that the family of each set of rows may have; ``None`` where the caller gave it.

        Raises:
            ValueError: if the model has other latents.
        """
        check_description(describe_latents(structure), self.description)
        return [None if self.family_is_given else held for held in self.held]

    def check_size(self, plates: tuple[str, ...], size: int) -> None:
        """Raise an error for an inference function with more numbers than the file holds for it.

        Args:
            plates: of its set of rows.
            size: how many numbers it has at least.

        Raises:
            ValueError: if the file holds fewer.
        """
        at = [rows["plates"] for rows in self.description["row_sets"]].index(list(plates))
        check_held(f"the factors of plate {' x '.join(plates)}", size, self.held[at])
