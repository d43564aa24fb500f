"""A guide described by plain data, and compared with the description of the guide that was saved."""

from collections.abc import Callable, Mapping, Sequence
from math import inf
from types import FunctionType
from typing import Any

from pyro_avi.factors.layout import Layout
from pyro_avi.inspection.structure import Structure

__all__ = ["check_description", "check_kinds", "describe_latents", "describe_option", "qualified_name"]


def describe_latents(structure: Structure) -> dict[str, Any]:
    """The latents of a guide and their shapes.

    Args:
        structure: of the model.
    """
    return {
        "global_latents": {latent.name: list(latent.initial.shape) for latent in structure.global_latents},
        "row_sets": [
            {
                "plates": list(rows.plates),
                "latents": {latent.name: Layout(latent, rows.frames).row_shape for latent in rows.latents},
            }
            for rows in structure.row_sets
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


def check_kinds(header: Mapping[str, Any]) -> None:
    """Raise an error if a description from a file is not of the parts that a guide's has.

    Args:
        header: what stands in the file.

    Raises:
        ValueError: if a part is missing or of another kind; the message names it.
    """
    for part, is_right in {**_PARTS, **_MORE_PARTS.get(header["class"], {})}.items():
        if part not in header and part not in _SOME_PARTS:
            raise ValueError(f"Expected its description to have {part}, got none.")
        if part in header and not is_right(header[part]):
            raise ValueError(f"Expected its description to have a {part} of a guide, got {str(header[part])[:100]}.")
        if part in header and part in _BY_ROW_SET and len(header[part]) != len(header["row_sets"]):
            raise ValueError(
                f"Expected its description to have {part} for {len(header['row_sets'])} sets of rows, got those for "
                f"{len(header[part])}."
            )


def _is_one_of(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def _is_list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_right, value))


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_covariate(value: Any) -> bool:
    parts = {
        "argument": _is_text,
        "dims": _is_list_of(_is_one_of(int, type(None))),
        "by_position": _is_one_of(bool),
        "transform": _is_text,
    }
    return isinstance(value, dict) and value.keys() == parts.keys() and all(parts[name](value[name]) for name in parts)


def _are_shapes(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_list_of(_is_size), value.values()))


def _is_window(value: Any) -> bool:
    return _is_list_of(_is_size)(value) and len(value) == 2


def _is_reach(value: Any) -> bool:
    return _is_window(value) or value in ("own row", "whole plate")


def _is_row_set(value: Any) -> bool:
    return isinstance(value, dict) and _is_list_of(_is_text)(value.get("plates")) and _are_shapes(value.get("latents"))


def _is_family(value: Any) -> bool:
    return isinstance(value, dict) and _is_text(value.get("class")) and isinstance(value.get("settings"), dict)


_is_text = _is_one_of(str)
_is_text_or_none = _is_one_of(str, type(None))

# What every guide says of itself, what some do, and what not all files have.
_PARTS: Mapping[str, Callable[[Any], bool]] = {
    "plate": lambda value: value is None or (value != [] and _is_list_of(_is_text)(value)),
    "family": _is_family,
    "init_scale": lambda value: isinstance(value, float | int) and 0 < value < inf,
    "dtype": lambda value: value in ("float16", "bfloat16", "float32", "float64"),
    "global_guide": _is_text_or_none,
    "global_latents": _are_shapes,
    "row_sets": _is_list_of(_is_row_set),
}
# What a file may ask for at most in steps, and in points of each.
_MOST_STEPS = 10_000
_OF_ENCODER: Mapping[str, Callable[[Any], bool]] = {
    "encoder": lambda value: isinstance(value, str) or (value != [] and _is_list_of(_is_size)(value)),
    "inputs": lambda value: _is_text_or_none(value) or _is_window(value) or value == {"by": "verdict"},
    "standardize": _is_one_of(bool, type(None)),
    "covariates": _is_list_of(_is_list_of(_is_covariate)),
    "reads": _is_list_of(_is_reach),
    "reads_globals": lambda value: value in (None, "mean", "draw"),
}
_MORE_PARTS: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "AmortizedGuide": _OF_ENCODER,
    "SemiAmortizedGuide": {
        **_OF_ENCODER,
        "num_steps": lambda value: _is_size(value) and value <= _MOST_STEPS,
        "num_points": lambda value: _is_size(value) and value <= _MOST_STEPS and value % 2 == 0,
        "step_size": lambda value: isinstance(value, float | int) and 0 < value < inf,
        "learn_step_size": _is_one_of(bool),
    },
    "FactorizedGuide": {
        "same_rows": _is_one_of(bool),
        "rows_on": lambda value: value in (None, "cpu", "disk"),
        "rows_path": _is_text,
        "rows_version": _is_list_of(_is_size),
        "sizes": _is_list_of(_is_list_of(_is_size)),
    },
}
_BY_ROW_SET = frozenset({"covariates", "reads", "sizes", "rows_version"})
_SOME_PARTS = frozenset({"standardize", "covariates", "reads", "reads_globals", "rows_path", "rows_version"})


def qualified_name(value: Any) -> str:
    """The name of a function, or of the class of an object, with its module."""
    named = value if isinstance(value, FunctionType | type) else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def describe_option(given: Any) -> Any:
    """Plain data for an option: widths as a list, a module or function by its qualified name, a dictionary as one text."""
    if isinstance(given, dict):
        return ", ".join(f"{' x '.join(plates)}: {describe_option(each)}" for plates, each in given.items())
    return list(given) if isinstance(given, Sequence) else None if given is None else qualified_name(given)
