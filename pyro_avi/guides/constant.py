"""The constant guide: one factor for all rows."""

from torch import Tensor, nn

from pyro_avi.guide_bases.local_guide import LocalGuide

__all__ = ["ConstantGuide"]


class _Constant(nn.Module):
    """One vector ``[P]`` of parameters for every row."""

    def __init__(self, initial: Tensor):
        super().__init__()
        self.vector = nn.Parameter(initial.clone())


class ConstantGuide(LocalGuide):
    r"""A guide that gives every row the same factor, ``P`` parameters in all.

    .. math:: f(n, x_n) = \lambda

    The lower end of the comparison: it learns nothing about a single row.

    Args:
        model, plate, family, global_guide, init_loc_fn, init_scale, create_plates: as for every guide, see
            :class:`~pyro_avi.guide_bases.local_guide.LocalGuide`.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.ConstantGuide(model).setup(x)
        >>> guide.variational_parameters(x[:3], torch.arange(3)).shape
        torch.Size([3, 4])
    """

    def _create_function(self, row_factor, initial, data, args, kwargs):
        return _Constant(initial.flatten(0, -2)[0])

    def _infer(self, row_factor, data, args, kwargs):
        return row_factor.function.vector.expand(*(len(data.rows[name]) for name in row_factor.row_set.plates), -1)

    @property
    def vector(self) -> nn.Parameter | dict[tuple[str, ...], nn.Parameter]:
        """``[P]`` the parameters of all rows; by plates where there are several row sets."""
        return self._by_row_set(lambda row_factor: row_factor.function.vector)
