"""A guide described by plain data, and compared with the description of the guide that was saved."""

from collections.abc import Iterable, Mapping, Sequence
from types import FunctionType
from typing import Any

from pyro_avi.factors.row_factor import RowFactor
from pyro_avi.inspection.structure import Structure

__all__ = ["check_description", "describe_latents", "describe_option", "qualified_name"]


def describe_latents(structure: Structure, row_factors: Iterable[RowFactor]) -> dict[str, Any]:
    """The latents of a guide and their shapes.

    Args:
        structure: of the model.
        row_factors: the factors of its sets of rows.
    """
    return {
        "global_latents": {latent.name: list(latent.initial.shape) for latent in structure.global_latents},
        "row_sets": [
            {
                "plates": list(row_factor.row_set.plates),
                "latents": {
                    latent.name: row_factor.factor.row_shape(latent.name) for latent in row_factor.row_set.latents
                },
            }
            for row_factor in row_factors
        ],
    }


def check_description(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise an error if a guide differs from the description of the one that was saved.

    Args:
        found: the description of the guide.
        expected: that of the other one.

    Raises:
        ValueError: if a part differs; the message names it.
    """
    for part in found:
        if found[part] != expected[part]:
            raise ValueError(
                f"Expected a model for which the guide has {part} = {expected[part]}, got {found[part]}.\n"
                "Pass the model, and arguments of the kind, that the guide was made with; for other rows of a "
                "FactorizedGuide load it with its own and use avi.refine(model, guide, x_new, num_steps=...)."
            )


def qualified_name(value: Any) -> str:
    """The name of a function, or of the class of an object, with its module."""
    named = value if isinstance(value, FunctionType | type) else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def describe_option(given: Any) -> Any:
    """Plain data for an option: widths as a list, a module or function by its qualified name, a dictionary as one text."""
    if isinstance(given, dict):
        return ", ".join(f"{' x '.join(plates)}: {describe_option(each)}" for plates, each in given.items())
    return list(given) if isinstance(given, Sequence) else None if given is None else qualified_name(given)
