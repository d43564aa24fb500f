"""The factorized guide: a factor for each row, with parameters of its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from pyro_avi.guides.guide import LocalGuide

__all__ = ["FactorizedGuide"]


class FactorizedGuide(LocalGuide):
    r"""A guide that gives every row a factor with parameters of its own, ``N * P`` in all (F-VI).

    .. math:: f(n, x_n) = \lambda_n

    The upper end of the comparison: no inference function does better, given the family. It answers for the rows it was
    fitted to; for others, see :func:`~pyro_avi.refine`.

    Args:
        model, plate, family, global_guide, init_loc_fn, init_scale, create_plates: as for every guide, see
            :class:`~pyro_avi.guides.guide.LocalGuide`.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.FactorizedGuide(model).setup(x)
        >>> guide.table.shape
        torch.Size([20, 4])
    """

    _touched: list | None = None

    def _create_parameters(self, initial, found, args, kwargs):
        # A first call with a minibatch knows the initial values of its own rows only; the others take them in turn.
        repeats = -(-found.size // len(initial))
        self.table = nn.Parameter(initial.repeat(repeats, 1)[: found.size].clone())

    def _infer(self, found, args, kwargs):
        self._check_rows(found)
        if self._touched is None:
            return self._gather(found.index)
        for _, index, rows in self._touched:
            if index is found.index or (index is not None and found.index is not None and index.equal(found.index)):
                return rows
        rows = self._gather(found.index).detach().requires_grad_()
        self._touched.append(("table", found.index, rows))
        return rows

    def _gather(self, index: Tensor | None) -> Tensor:
        return self.table if index is None else self.table[index]

    def _check_rows(self, found):
        if found.size != len(self.table):
            raise ValueError(
                f'Expected all {len(self.table)} rows of plate "{self._structure.plate.name}", got {found.size}.\n'
                "A FactorizedGuide has one row of parameters for each row it was fitted to.\n"
                "Try one of the following fixes:\n"
                "- for a minibatch, pass the positions of its rows, or let the model subsample its plate\n"
                "- for held-out rows: avi.refine(model, guide, x_new, num_steps=...)"
            )

    def row_tables(self) -> Mapping[str, nn.Parameter]:
        """The parameters with one row for each row of the plate, by name; what a row-wise optimizer updates."""
        return {"table": self.table}

    @contextmanager
    def touched_rows(self) -> Iterator[list[tuple[str, Tensor | None, Tensor]]]:
        """A context that gives a list, filled by every call with ``("table", index, rows)``.

        ``rows [B, P]`` is a leaf of the graph that stands for the rows ``index`` of the table, ``None`` for all in order.
        """
        self._touched = []
        try:
            yield self._touched
        finally:
            self._touched = None
