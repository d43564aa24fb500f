"""The constant guide: one factor for all rows."""

from torch import nn

from pyro_avi.guides.guide import LocalGuide

__all__ = ["ConstantGuide"]


class ConstantGuide(LocalGuide):
    r"""A guide that gives every row the same factor, ``P`` parameters in all.

    .. math:: f(n, x_n) = \lambda

    The lower end of the comparison: it learns nothing about a single row.

    Args:
        model, plate, family, global_guide, init_loc_fn, init_scale, create_plates: as for every guide, see
            :class:`~pyro_avi.guides.guide.LocalGuide`.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.ConstantGuide(model).setup(x)
        >>> guide.variational_parameters(x[:3], torch.arange(3)).shape
        torch.Size([3, 4])
    """

    def _create_parameters(self, initial, found, args, kwargs):
        self.vector = nn.Parameter(initial[0].clone())

    def _infer(self, found, args, kwargs):
        return self.vector.expand(found.size if found.index is None else len(found.index), -1)
