"""A window of neighbouring rows as an encoder's input."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_avi.errors import check_count

__all__ = ["Window", "function_of"]


class Window:
    r"""What an encoder reads of a row in a series: the row, so many before it, and so many after it.

    .. math:: f(x_{n-b}, \dots, x_n, \dots, x_{n+a})

    An encoder given by widths, and every module of your own, reads ``[B, before + 1 + after, F + 1]``: beside the ``F`` values
    of a neighbour 1, or beyond the ends of the series zeros and 0. Encoders that know gaps
    (:class:`~pyro_avi.encoders.Set`) read ``[B, before + 1 + after, F]`` with ``nan`` there.

    The neighbours are those in the last plate of the row set, in the order of its rows, and always of the whole series: also
    where a batch holds other rows. A call that gives some rows only has to say where the others are, by ``of=``.

    Args:
        before, after: how many rows; numbers that differ make the window one-sided.
        of: the values of all ``N`` rows, ``[N, ...]``: a function of the model's arguments. By default they are what the
            guide finds in a call, which has to be one of all rows, or one whose rows the model draws.

    Raises:
        ValueError: if a number is negative.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_avi as avi
        >>> def series(x):
        ...     before = torch.cat([torch.zeros(1), x[:-1]])
        ...     with pyro.plate("time", len(x)):
        ...         z = pyro.sample("z", dist.Normal(before, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.randn(20)
        >>> guide = avi.AmortizedGuide(series, (8,), inputs=avi.Window(1, 0)).setup(x)
        >>> guide.posterior(x).batch_shape
        torch.Size([20])
    """

    def __init__(self, before: int, after: int, *, of: Callable[..., Tensor] | None = None):
        self.before, self.after = check_count("before", before, least=0), check_count("after", after, least=0)
        if of is not None and not callable(of):
            raise TypeError(
                f"Expected of= to be a function of the model's arguments, got a {type(of).__name__}.\n"
                "Pass of=lambda *args, **kwargs: values"
            )
        self.of = of

    def read(self, values: Tensor, positions: Tensor | None, *, gaps: bool) -> Tensor:
        """The windows of some rows: ``[*O, B, before + 1 + after, F + 1]``, with ``gaps`` without the flag and with ``nan``.

        Args:
            values: ``[*O, N, F]`` of all rows of a series, in each row of other plates.
            positions: ``[B]`` of the rows asked for, ``None`` for all in order.
            gaps: whether rows beyond the ends are ``nan``.

        Raises:
            ValueError: if the window is longer than the series.
        """
        count = values.shape[-2]
        if max(self.before, self.after) >= count:
            raise ValueError(
                f"Expected a series of more than {max(self.before, self.after)} rows for {self}, got {count}.\n"
                "Try one of the following fixes:\n- take a window that is shorter than the series\n"
                "- pass the whole series, in the dimension of the last plate of the rows"
            )
        positions = torch.arange(count, device=values.device) if positions is None else positions
        at = positions.unsqueeze(-1) + torch.arange(-self.before, self.after + 1, device=values.device)
        there = ((at >= 0) & (at < count)).unsqueeze(-1)
        found = values.index_select(-2, at.clamp(0, count - 1).flatten()).unflatten(-2, at.shape)
        if gaps:
            return torch.where(there, found, torch.nan)
        flags = there.to(found.dtype).expand(*found.shape[:-1], 1)
        return torch.cat([torch.where(there, found, 0.0), flags], -1)

    def __repr__(self) -> str:
        return f"Window({self.before}, {self.after})"


def function_of(option: Any) -> Callable[..., Tensor] | None:
    """The function of the model's arguments that gives the values to read; ``None`` where they are found.

    Args:
        option: an ``inputs=`` of a guide.
    """
    option = option.of if isinstance(option, Window) else option
    return option if callable(option) else None
