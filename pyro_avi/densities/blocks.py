"""How the elements of a log joint are added up to its independent blocks of rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_avi.densities.log_factors import LogFactor
from pyro_avi.densities.perturbation import Plates

__all__ = ["Attribution", "Owners"]


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

    @property
    def num_bytes(self) -> int:
        """The memory that it takes."""
        tensors = [*self.blocks.values(), *(each.blocks for part in self.owners for each in part)]
        # Of each element the block, and the place where it is added up.
        return sum(2 * tensor.numel() * tensor.element_size() for tensor in tensors)

    def copy(self) -> "Attribution":
        """The same, with blocks of its own: users get them with their log weights."""
        return replace(self, blocks={plates: blocks.clone() for plates, blocks in self.blocks.items()})

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
