"""A call of a model for some of its rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_avi.densities.log_joint import LocalJoint

__all__ = ["Part", "part_of"]

# Both are evaluated at the same points, in the precision of the model.
_RELATIVE, _ABSOLUTE = 1e-4, 1e-4


@dataclass(frozen=True)
class Part:
    """A call of a model for some rows of a data set.

    Attributes:
        args, kwargs: of the model.
        joint: of these rows.
        rows: ``[B]`` their positions in the data set.
    """

    args: tuple
    kwargs: Mapping[str, Any]
    joint: LocalJoint
    rows: Tensor


def part_of(model: Callable, whole: Part, rows: Tensor, points: Tensor, *, plate: str) -> Part:
    """The call for some rows, or for all of them where the model has no call for a part.

    Tensors among the arguments whose first dimension has the size of the plate are cut to the rows. Whether that is a call
    for these rows is not read off the arguments but tried: their log joint must be the same in both calls.

    Args:
        model: without global latents.
        whole: the call for all rows.
        rows: ``[B]`` the positions of those asked for.
        points: ``[C, N, K]`` coordinates at which both are compared.
        plate: the name of the plate of the rows.
    """
    size = whole.joint.num_rows
    if len(rows) == size:
        return whole

    def cut(value: Any) -> Any:
        has_rows = isinstance(value, Tensor) and value.dim() > 0 and len(value) == size
        return value[rows.to(value.device)] if has_rows else value

    args, kwargs = tree_map(cut, whole.args), tree_map(cut, dict(whole.kwargs))
    try:
        joint = LocalJoint(model, args, kwargs, plate=plate)
        if joint.num_rows != len(rows) or joint.scale != whole.joint.scale:
            return whole
        with torch.no_grad():
            pairs = zip(joint(points[:, rows]), whole.joint(points), strict=True)
            same = all(
                torch.allclose(mine, all_rows[:, rows], rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True)
                for mine, all_rows in pairs
            )
    # What a model fails with that needs all of its rows.
    except (RuntimeError, ValueError, IndexError, TypeError):
        return whole
    return Part(args, kwargs, joint, rows) if same else whole
