"""A call of a model for some of its rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_avi.closing.row_tables import table_like, write_tables
from pyro_avi.closing.weight_source import JointWeights, WeightSource, weight_source
from pyro_avi.densities.log_joint import LocalJoint
from pyro_avi.evidence.ais import isolated_sampling
from pyro_avi.evidence.hold_globals import hold_globals
from pyro_avi.guides import FactorizedGuide

__all__ = ["Call", "Calls", "Part", "part_of"]

# Points at which the log joints of two calls are compared.
_POINTS = 2
# In bytes, what draws that are evaluated at a time may take.
_MEMORY = 2**30

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
    if len(rows) == whole.joint.num_rows:
        return whole
    args, kwargs = _cut(whole, rows)
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


def _cut(whole: Part, rows: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments for some rows, positional ones and those by name."""

    def cut(value: Any) -> Any:
        has_rows = isinstance(value, Tensor) and value.dim() > 0 and len(value) == whole.joint.num_rows
        return value[rows.to(value.device)] if has_rows else value

    return tree_map(cut, whole.args), tree_map(cut, dict(whole.kwargs))


class Call(NamedTuple):
    """Some rows, or all, with a call of the model and tables of their own.

    ``rows`` are their positions in the whole, ``joint`` is their log joint, with globals held; ``None`` where it is not known.
    """

    guide: FactorizedGuide
    args: tuple
    kwargs: Mapping[str, Any]
    rows: Any
    part: Part | None


class Calls:
    """Calls of a model for some of its rows.

    Args:
        model, guide, args, kwargs: the call for all rows.
        seed: of the points at which calls are compared.

    Attributes:
        whole: the call for all rows.
        can_be_cut: whether the model has calls for some, as far as is known.
    """

    def __init__(self, model: Callable, guide: FactorizedGuide, args: tuple, kwargs: Mapping[str, Any], seed: int):
        self._model, self._seed = model, seed
        self.whole = Call(guide, args, kwargs, slice(None), None)
        latents = [latent for row_factor in guide.row_factors for latent in row_factor.row_set.latents]
        one_plate = len(guide.row_factors) == len(guide.row_plates) == 1
        self.can_be_cut = one_plate and all(x.num_values is None and not x.is_weighted for x in latents)
        # Whether a call for some of the rows has been compared with that for all.
        self._compared = False

    def weight_source(self, call: Call) -> WeightSource:
        """The source of the log weights of a call's factors."""
        if call.part is not None and not call.guide.global_latents:
            return JointWeights(call.part.joint, call.args, call.kwargs, max_memory=_MEMORY)
        return weight_source(self._model, call.guide, call.args, call.kwargs, max_memory=_MEMORY)

    def of(self, call: Call, rows: Tensor) -> Call:
        """The call for some rows of another, at positions in the whole, with a table of what the other has of them.

        It is the other one where the model has none. Of the first one this is tried, which takes as long as some steps; a
        model that has a call for some rows has one for fewer.
        """
        whole = self._part_of_all()
        if whole is None:
            self.can_be_cut = False
            return call
        part = self._compare(whole, rows) if not self._compared else None
        if part is whole:
            self.can_be_cut = len(rows) == whole.joint.num_rows
            return call
        self._compared = True
        guide = self.whole.guide
        args, kwargs = _cut(whole, rows) if part is None else (part.args, part.kwargs)
        guide = table_like(self._model, guide, args, kwargs, with_globals=bool(guide.global_latents))
        given = torch.zeros_like(_table(self.whole.guide))
        given[call.rows] = _table(call.guide)
        write_tables(guide, dict.fromkeys(guide.row_tables(), given[rows]))
        return Call(guide, args, kwargs, rows, part)

    def _compare(self, whole: Part, rows: Tensor) -> Part:
        """The call for some rows, or for all of them where the model has no call for a part."""
        guide = self.whole.guide
        with isolated_sampling(self._seed), torch.no_grad():
            posterior = cast(Any, guide.fixed_posterior(*self.whole.args, **self.whole.kwargs))
            points = posterior.rsample((_POINTS,))
            return part_of(self._held, whole, rows, points, plate=guide.row_plates[0])

    def _part_of_all(self) -> Part | None:
        """The whole call with its log joint, ``None`` where rows have none of their own."""
        guide, args, kwargs = self.whole.guide, self.whole.args, self.whole.kwargs
        if self.whole.part is None:
            try:
                self._held, _ = hold_globals(self._model, guide, "mean", args, kwargs, seed=self._seed)
                with isolated_sampling(self._seed):
                    joint = LocalJoint(self._held, args, kwargs, plate=guide.row_plates[0])
            except ValueError:
                return None
            rows = torch.arange(joint.num_rows, device=joint.initial.device)
            self.whole = self.whole._replace(part=Part(args, kwargs, joint, rows))
        return self.whole.part


def _table(guide: FactorizedGuide) -> Tensor:
    """``[N, P]`` the only one."""
    (table,) = guide.row_tables().values()
    return table.detach()
