"""A guide of a newcomer's: one factor for all rows, near its start."""

from torch import Tensor, nn

from pyro_avi.guide_bases.local_guide import LocalGuide

__all__ = ["BoxedGuide"]


class _Boxed(nn.Module):
    """A vector ``[P]`` no further than ``radius`` from where it starts, in any coordinate."""

    def __init__(self, start: Tensor, radius: float):
        super().__init__()
        self.register_buffer("start", start.clone())
        self.shift = nn.Parameter(start.new_zeros(start.shape))
        self.radius = radius

    def forward(self) -> Tensor:
        return self.start + self.radius * (self.shift / self.radius).tanh()


class BoxedGuide(LocalGuide):
    r"""A guide that gives every row the same factor, with parameters in a box.

    .. math:: f(n, x_n) = \lambda_0 + r \tanh(v / r)

    Args:
        model, plate, family, global_guide, init_loc_fn, init_scale, create_plates: as for every guide, see
            :class:`~pyro_avi.guide_bases.local_guide.LocalGuide`.
    """

    def _create_function(self, row_factor, initial, data, args, kwargs):
        return _Boxed(initial.flatten(0, -2)[0], radius=10.0)

    def _infer(self, row_factor, data, args, kwargs):
        return row_factor.function().expand(*(len(data.rows[name]) for name in row_factor.row_set.plates), -1)
