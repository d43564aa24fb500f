"""The independent blocks of rows that the elements of a log joint belong to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_avi.densities.dependence import row_codes
from pyro_avi.densities.log_factors import LogFactor
from pyro_avi.densities.perturbation import PerturbedCall, Plates, row_frames, scale_of
from pyro_avi.inspection.isolated_run import isolated_run

__all__ = ["Attribution", "attribute", "check_attribution"]

# With up to 70 blocks this many evaluations find every element of a wrong block, with more nearly every one.
_MOST_CHECKS = 8


class Owners:
    """The blocks that the elements of one factor belong to.

    Args:
        blocks: the block of each element, with all dimensions of the plates; -1 for elements of no block.
        count: ``M``, the number of blocks.
    """

    def __init__(self, blocks: Tensor, count: int):
        self.blocks, self._count = blocks, count
        self.any, self._dim = bool((blocks >= 0).any()), None
        for dim in range(-blocks.dim(), 0):
            # The fast case, and nearly always the one at hand: the rows of one plate are the blocks, in order.
            along = torch.arange(count).view([count if d == dim else 1 for d in range(-blocks.dim(), 0)])
            if blocks.shape[dim] == count and torch.equal(blocks, along.expand(blocks.shape)):
                self._dim = dim
        # Elements of no block are added up at one more place, the last.
        self._places = torch.where(blocks < 0, count, blocks).flatten()

    @property
    def in_order(self) -> bool:
        """Whether the blocks are the positions along one plate, in order."""
        return self._dim is not None

    def sums(self, value: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The sums of the elements ``[..., *plates]`` of each block ``[..., M]``, and of those of no block; ``None`` for no
        elements.
        """
        depth = self.blocks.dim()
        value = value.reshape((1,) * (depth - value.dim()) + tuple(value.shape))
        lead = value.shape[: value.dim() - depth]
        if not self.any:
            return None, value.sum(tuple(range(-depth, 0))) if depth else value
        if self._dim is not None:
            return value.movedim(self._dim, len(lead)).reshape(*lead, self._count, -1).sum(-1), None
        sums = value.new_zeros(*lead, self._count + 1)
        sums = sums.index_add(-1, self._places.to(value.device), value.reshape(*lead, -1))
        return sums[..., : self._count], sums[..., self._count]


@dataclass(frozen=True)
class Attribution:
    r"""How a log joint splits into independent blocks of rows and the rest.

    .. math:: \log p(x, z, \theta) = \log p_0(\theta) + s \sum_m \log p_m(x, z_m \mid \theta)

    A block has every element that depends on its latents, in whatever plate. Rows that an element ties together are one
    block; usually each row is a block of its own.

    Attributes:
        blocks: the block ``[N]`` of every row of each row set, by the names of its plates; of several plates, flattened.
        num_blocks: ``M``.
        scale: ``s``, the number of blocks of the data that one block of the call stands for.
        has_globals: whether blocks share latents.
        is_estimate: whether a block's density is itself an estimate, because another plate subsamples its rows.
        owners: the block of each element, for every factor of the model and for every factor of the guide.
        sites: the names of the model's sites with elements that belong to blocks.
        ties: the names of the sites with elements that tie several rows.
    """

    blocks: dict[Plates, Tensor]
    num_blocks: int
    scale: float
    has_globals: bool
    is_estimate: bool
    owners: tuple[list[Owners], list[Owners]]
    sites: frozenset[str] = frozenset()
    ties: tuple[str, ...] = ()

    @property
    def by_row(self) -> bool:
        """Whether every row of one row set is a block of its own, in order."""
        rows = list(self.blocks.values())
        return len(rows) == 1 and torch.equal(rows[0], torch.arange(self.num_blocks))

    @property
    def in_order(self) -> bool:
        """Whether every element belongs to the row at its own position in the plate, or to no row."""
        return all(not each.any or each.in_order for part in self.owners for each in part)

    def split(
        self, factors: Sequence[LogFactor], *, is_guide: bool = False, only: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The log density of each block ``[..., M]``, unscaled, and the rest ``[...]``; dimensions left of the plates remain.

        Args:
            factors: all factors of another trace of the same call.
            is_guide: whether the trace is the guide's.
            only: the positions of the factors to add up; by default all.

        Raises:
            ValueError: if the factors have other shapes than those of the call that was analysed.
        """
        blocks, rest = [], []
        owners = self._owners(factors, is_guide)
        for i in range(len(factors)) if only is None else only:
            in_blocks, others = owners[i].sums(factors[i].value)
            blocks += [] if in_blocks is None else [in_blocks / self.scale]
            rest += [] if others is None else [others]
        zero = torch.zeros((), dtype=torch.double, device=factors[0].value.device)
        return sum(blocks, zero.expand(self.num_blocks)), sum(rest, zero)

    def _owners(self, factors: Sequence[LogFactor], is_guide: bool) -> list[Owners]:
        owners = self.owners[is_guide]
        if len(factors) != len(owners) or not all(map(_fits, factors, owners)):
            raise ValueError(
                f"Expected factors with elements of shapes {[tuple(each.blocks.shape) for each in owners]}, as at first, got "
                f"{[tuple(factor.value.shape) for factor in factors]}.\n"
                "The sites and plates of a model must not change from one draw to the next."
            )
        return owners


def _fits(factor: LogFactor, owners: Owners) -> bool:
    shape, depth = factor.value.shape, owners.blocks.dim()
    shape = shape[max(0, len(shape) - depth) :]
    return owners.blocks.shape == (1,) * (depth - len(shape)) + tuple(shape)


def attribute(
    model: Callable,
    guide: Callable | None,
    args: tuple,
    kwargs: Mapping[str, Any],
    plates: Plates,
    *,
    exclude: Sequence[str] = (),
) -> Attribution:
    """Find the independent blocks of rows of a call, and which elements of its log joint belong to them.

    The latents of some rows at a time are changed: the elements that then change depend on them. This needs no knowledge of
    how the model computes. The result is checked by another change (:func:`check_attribution`).

    Args:
        model, args, kwargs: a call of any Pyro callable.
        guide: any Pyro guide for it; ``None`` to analyse the model alone.
        plates: the names of the plates of the rows; none for a call that is one row.
        exclude: observed sites of the model to leave out.

    Raises:
        ValueError: if there are no sites in the plates, or the result does not hold.
    """
    with isolated_run(0):
        call = PerturbedCall(model, guide, args, kwargs, plates, exclude=exclude)
        result = _find(call)
        check_attribution(call, result)
    return result


def _find(call: PerturbedCall) -> Attribution:
    factors = (call.model_factors, call.guide_factors)
    rows, ties, tying = call.dependent_rows()
    homes = torch.cat([_home(call, factor) for part in factors for factor in part])
    row_of_element = torch.where((rows < 0).all(0), homes, rows.amax(0))
    numbers = _components(call.num_rows, rows, ties)
    num_blocks = int(numbers.max()) + 1
    owners = torch.where(row_of_element < 0, -1, numbers[row_of_element])
    split = iter(owners.split([factor.value.numel() for part in factors for factor in part]))
    of_model, of_guide = ([Owners(next(split).reshape(call.padded(x)), num_blocks) for x in part] for part in factors)
    by_factor = (of_model, of_guide)
    scale, is_estimate = _scales(call, by_factor)
    return Attribution(
        blocks=dict(zip(call.row_sets, numbers.split(list(call.sizes)), strict=True)),
        num_blocks=num_blocks,
        scale=scale,
        has_globals=call.has_globals,
        is_estimate=is_estimate,
        owners=by_factor,
        sites=frozenset(
            name
            for factor, each in zip(call.model_factors, by_factor[0], strict=True)
            if each.any
            for name in factor.sites
        ),
        ties=tuple(call.sites_of(tying)) if num_blocks < call.num_rows else (),
    )


def _home(call: PerturbedCall, factor: LogFactor) -> Tensor:
    """The row of each element by its position in the plates, for elements that depend on no latent; -1 outside of them."""
    if not call.row_sets or not call.plates:
        return torch.zeros(factor.value.numel(), dtype=torch.long)
    inside = {frame.name for frame in row_frames(factor.frames, call.plates)}
    sets = [(plates, frames) for plates, frames in call.row_sets.items() if set(plates) <= inside]
    if not sets:
        return torch.full((factor.value.numel(),), -1)
    plates, frames = max(sets, key=lambda each: len(each[0]))
    shape = call.padded(factor)
    if any(shape[frame.dim] != frame.size for frame in frames):
        return torch.full((factor.value.numel(),), -1)
    return (call.positions(plates) + call.offset(plates)).expand(shape).flatten()


def _components(count: int, rows: Tensor, ties: Sequence[Tensor]) -> Tensor:
    """``[R]`` the connected component of each row, where rows are connected that one element depends on."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = [torch.stack([one, two])[:, (one >= 0) & (two >= 0)] for one, two in zip(rows, rows[1:], strict=False)]
    # An element may depend on rows of the first and of the third set alone.
    pairs += [torch.stack([rows[0], each])[:, (rows[0] >= 0) & (each >= 0)] for each in rows[2:]]
    pairs += [torch.stack([tied[:1].expand(len(tied)), tied]) for tied in ties]
    one, two = torch.cat(pairs, 1).unique(dim=1).numpy() if pairs else torch.zeros(2, 0, dtype=torch.long).numpy()
    graph = coo_array((torch.ones(len(one)).numpy(), (one, two)), shape=(count, count))
    labels = torch.from_numpy(connected_components(graph, directed=False)[1]).long()
    # Numbered in the order of their first rows.
    first = torch.full((int(labels.max()) + 1,), count).scatter_reduce(0, labels, torch.arange(count), "amin")
    return first.argsort().argsort()[labels]


def _scales(call: PerturbedCall, owners: tuple[list[Owners], list[Owners]]) -> tuple[float, bool]:
    """The scale of a block, and whether other plates subsample their rows."""
    inside, all_plates = set(), set()
    for factors, parts in zip((call.model_factors, call.guide_factors), owners, strict=True):
        for factor, own in zip(factors, parts, strict=True):
            if own.any:
                all_plates.add(scale_of(factor.frames))
                inside.add(scale_of(row_frames(factor.frames, call.plates)))
    if len(inside) > 1:
        # The scale of factors that are in other plates only.
        inside.discard(1.0)
    scale = inside.pop() if len(inside) == 1 else 1.0
    return scale, any(abs(other - scale) > 1e-6 * scale for other in all_plates)


def check_attribution(call: PerturbedCall, found: Attribution) -> None:
    """Check that blocks and the rest add up to the log joint, and that blocks depend on no latents but their own.

    Args:
        call: the call that was analysed.
        found: how its log joint splits.

    Raises:
        ValueError: if that does not hold; the message names the sites.
    """
    wrong: list = []
    other = list(call.unaccounted())
    # In another order than in the search. For any two blocks there is an evaluation that changes one and not the other.
    codes = row_codes(found.num_blocks)[torch.randperm(found.num_blocks)]
    for chosen in codes.T[:_MOST_CHECKS]:
        again = call.with_changed({plates: chosen[blocks] for plates, blocks in found.blocks.items()})
        kept = torch.cat([~chosen, torch.tensor([True])]).to(call.device)
        for is_guide, factors in enumerate((call.model_factors, call.guide_factors)):
            for i, factor in enumerate(factors):
                one, two = (_parts(values, found, is_guide, i) for values in (factor.value, again[is_guide][i].value))
                if not torch.allclose(one.sum(), factor.value.sum(), rtol=1e-6, atol=1e-6, equal_nan=True):
                    other += factor.sites
                elif not bool(call.same(one, two)[kept].all()):
                    wrong += factor.sites
    if other:
        raise ValueError(
            f"Expected the parts of rows and globals to add up to the log joint, got another sum at sites {sorted(set(other))}."
            "\nThis is a fault of pyro_avi: please report the model."
        )
    if wrong:
        raise ValueError(
            f"Expected densities of rows that depend on no other rows' latents, got others at {sorted(set(wrong))}.\n"
            "Name all plates whose rows the sites tie, plate=(..., ...), or report the model: the rows were not told apart."
        )


def _parts(value: Tensor, found: Attribution, is_guide: int, position: int) -> Tensor:
    """``[M + 1]`` the parts of one factor, scaled: of each block, and the rest."""
    blocks, rest = found.owners[is_guide][position].sums(value)
    zero = value.new_zeros(())
    blocks = zero.expand(found.num_blocks) if blocks is None else blocks
    return torch.cat([blocks, (zero if rest is None else rest).reshape(1)])
