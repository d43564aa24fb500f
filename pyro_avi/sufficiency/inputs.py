"""What an inference function has to read to answer for a row: its own data, some at constant distances, or all."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_avi.encoder_inputs.window import Window
from pyro_avi.sufficiency.data import Leaf

__all__ = ["Input", "describe_inputs", "window_over"]

# A window needs so many rows beyond its largest offset to be told from a pattern that only looks like one.
_MARGIN = 4
# Beyond half of the plate it is no window.
_LARGEST = 0.5


@dataclass(frozen=True)
class Input:
    """What is read of one tensor of data.

    Attributes:
        name: of the observed site, or of the argument.
        kind: ``"own row"``, ``"window"``, ``"selected"`` (elements that belong to one row each, but not by their position),
            ``"selector"`` (an argument that says which), ``"whole plate"`` or ``"irregular"``.
        before, after: of a window, how many rows before and after the own one.
    """

    name: str
    kind: str
    before: int = 0
    after: int = 0

    @property
    def is_own(self) -> bool:
        """Whether all that is read belongs to the row alone."""
        return self.kind in ("own row", "selected", "selector")

    def __str__(self) -> str:
        if self.kind == "own row":
            return self.name
        if self.kind == "window":
            return f"{self.name} in window({self.before}, {self.after})"
        return {
            "selected": f"the elements of {self.name} that belong to the row",
            "selector": f"which those are by {self.name}",
            "whole plate": f"{self.name} of the whole plate",
            "irregular": f"{self.name} of other rows",
        }[self.kind]


def window_over(inputs: Sequence[Input]) -> Window | None:
    """The smallest window that holds all of the inputs, ``None`` where a row's own data are all.

    Raises:
        ValueError: if no window holds them.
    """
    outside = [str(each) for each in inputs if each.kind not in ("own row", "window")]
    if outside:
        raise ValueError(f"Expected inputs in a window around their row, got {', '.join(outside)}.")
    before, after = (max((getattr(each, side) for each in inputs), default=0) for side in ("before", "after"))
    return Window(before, after) if before or after else None


def describe_inputs(
    leaves: Sequence[Leaf], data: Sequence[Tensor], plates: Sequence[str], count: int
) -> tuple[list[Input], int]:
    """The inputs of one set of rows, and the number of rows that would tell windows from chance.

    Args:
        leaves: the data of the call.
        data: by leaf the pairs ``[2, E]`` of rows and combinations of its rows.
        plates: of the rows.
        count: ``N``.
    """
    inputs: list[Input] = []
    needed = 0
    for leaf, pairs in zip(leaves, data, strict=True):
        if not pairs.shape[1]:
            continue
        own = leaf.rows_in(plates)
        positions = torch.arange(leaf.count) if own is None else own
        found = torch.stack([pairs[0], positions[pairs[1]]]).unique(dim=1)
        each = _classify(leaf, found, count, aligned=own is not None)
        if each.kind in ("window", "irregular", "whole plate") and own is not None:
            offsets = (found[1] - found[0]).unique()
            small = offsets[offsets.abs() < max(1, count // 2)]
            needed = max(needed, int(small.abs().max()) + _MARGIN if len(small) else 0)
        inputs.append(each)
    return inputs, needed


def _classify(leaf: Leaf, pairs: Tensor, count: int, *, aligned: bool) -> Input:
    rows, columns = pairs
    read = columns.unique()
    if aligned and bool((rows == columns).all()):
        return Input(leaf.name, "own row")
    if not aligned and not leaf.is_float and leaf.is_argument:
        return Input(leaf.name, "selector")
    if len(columns) == len(read):
        return Input(leaf.name, "selected")
    if len(rows.unique()) == count and len(columns) == count * len(read):
        return Input(leaf.name, "whole plate")
    offsets = (columns - rows).unique()
    before, after = max(0, -int(offsets.min())), max(0, int(offsets.max()))
    # At the edges rows may read less than inside.
    inside = (rows >= before) & (rows < count - after)
    expected = max(0, count - after - before) * len(offsets)
    if before + after < _LARGEST * count and int(inside.sum()) == expected > 0:
        return Input(leaf.name, "window", before, after)
    return Input(leaf.name, "irregular")
