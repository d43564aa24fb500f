"""Normalizing flows whose networks are every row's own."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_avi.errors import check_count
from pyro_avi.families.family import Family, Setting, log_scales
from pyro_avi.families.transformed import (
    AutoregressiveTransform,
    ComposedTransform,
    DependentTransform,
    MonotonicRQSTransform,
    Transformed,
)

__all__ = ["RowFlow"]

# Of the weights of a network: steps that suit locations and log scales are too large for it.
_UNIT = 0.2


class RowFlow(Family):
    r"""Normals transformed by networks that belong to one row each.

    .. math:: z_n = m_n + s_n \odot T(\epsilon; w_n), \qquad \epsilon \sim N(0, I),
              \qquad \lambda_n = (m_n, \log s_n, w_n)

    The transform :math:`T` is that of :class:`~pyro_avi.Flow`, increasing rational-quadratic splines of every coordinate
    whose knots follow from the coordinates before it, the order reversed from one transform to the next, but by a small
    network with one hidden layer whose weights are the row's own: a member for every row, without anything that ties rows
    together. It is the family to measure gaps by, as ``richer=`` of :func:`~pyro_avi.measure_gaps`. With ``T`` transforms of
    ``H`` units and ``b`` bins

    .. math:: P = 2 K + T \left( K (3 b - 1) + \sum_{h=1}^{H} (r_h + 1 + (K - r_h) (3 b - 1)) \right),
              \qquad 1 \le r_h \le K - 1

    with :math:`r_h` the number of coordinates that a unit reads (one latent has no network, and :math:`P = 2 + T (3 b - 1)`):
    thousands for tens of latents, which is much for a table and more than an encoder should have to predict.

    A draw and its density take one pass through the networks; the density of any other value takes ``K``.

    Args:
        transforms: the number of transforms; at least two let every latent depend on every other.
        hidden: ``H``, the width of each network.
        bins: the number of pieces of each spline.

    Raises:
        TypeError, ValueError: if one of them is not a whole number of at least 1 (``bins``: 2); in :meth:`distribution`, where
            :meth:`prepare` has not been called, or for another number of parameters.

    References:
        Cremer, Li and Duvenaud, "Inference suboptimality in variational autoencoders", 2018,
        https://arxiv.org/abs/1801.03558, whose best factors are flows with weights of each row's own. Durkan et al.,
        "Neural spline flows", 2019, https://arxiv.org/abs/1906.04032.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> family = avi.RowFlow(transforms=2, hidden=4, bins=4)
        >>> family.prepare(3)
        >>> parameters = family.initial(torch.zeros(5, 3), scale=0.1)
        >>> parameters.shape
        torch.Size([5, 224])
        >>> q = family.distribution(parameters)
        >>> q.log_prob(q.rsample()).shape
        torch.Size([5])
    """

    cheap_density = False

    def __init__(self, *, transforms: int = 2, hidden: int = 8, bins: int = 8):
        super().__init__()
        self.transforms = check_count("transforms", transforms)
        self.hidden = check_count("hidden", hidden)
        self.bins = check_count("bins", bins, least=2)
        self.num_latents: int | None = None

    def prepare(self, num_latents: int) -> None:
        """Record which coordinates each unit reads and which knots it writes, for rows of ``K = num_latents`` latents.

        Args:
            num_latents: ``K``.

        Raises:
            TypeError, ValueError: if it is not a whole number of at least 1.
        """
        super().prepare(num_latents)
        self.num_latents = num_latents
        reads = torch.tensor(self._reads(num_latents), dtype=torch.long)
        order = torch.arange(num_latents)
        # A unit reads the first coordinates and has weights for the knots of those behind them.
        read = order.unsqueeze(-1) < reads
        written = (reads.unsqueeze(-1) <= order).repeat_interleave(3 * self.bins - 1, -1)
        for name, mask in (("_read", read), ("_written", written)):
            self.register_buffer(name, mask.flatten().nonzero().squeeze(-1), persistent=False)

    def _reads(self, num_latents: int) -> list[int]:
        """How many coordinates each unit reads: from 1 to ``K - 1``, all about equally often."""
        return [1 + unit * (num_latents - 1) // self.hidden for unit in range(self.hidden)] if num_latents > 1 else []

    def num_parameters(self, num_latents: int) -> int:
        """``P``: locations, log scales and the weights of every transform's network."""
        return 2 * num_latents + self.transforms * sum(self._sizes(num_latents))

    def _sizes(self, num_latents: int) -> list[int]:
        """The numbers of weights and biases of the two layers."""
        knots = 3 * self.bins - 1
        if num_latents == 1:
            return [0, 0, 0, knots]
        # The sum of `_reads`, of any number of units at once.
        others, units = num_latents - 1, self.hidden
        read = units + ((others - 1) * (units - 1) + math.gcd(others, units) - 1) // 2
        return [read, units, (num_latents * units - read) * knots, num_latents * knots]

    def initial(self, loc: Tensor, scale: float | Tensor) -> Tensor:
        """Parameters ``[..., P]`` of independent normals at ``loc [..., K]`` with standard deviation ``scale``."""
        count = loc.shape[-1]
        first, bias, *second = self._sizes(count)
        # Equal bins of slope one are the identity, whatever the units say: the second layer starts at zero and learns from
        # the first step on. Sines of whole numbers do not repeat; no random numbers, so that a setup can be repeated.
        units = torch.arange(1, first + bias + 1, dtype=loc.dtype, device=loc.device).sin() / (_UNIT * count**0.5)
        weights = torch.cat([units, units.new_zeros(sum(second))]).repeat(self.transforms)
        return torch.cat([loc, log_scales(loc, scale), weights.expand(*loc.shape[:-1], len(weights))], -1)

    def distribution(self, parameters: Tensor) -> Transformed:
        """The member with ``parameters [..., P]``: batch shape ``[...]``, event shape ``[K]``."""
        count = self.num_latents
        if count is None:
            raise ValueError("Expected a RowFlow that knows K, got none.\nCall flow.prepare(num_latents) first.")
        # Under torch.jit.trace the elements of a shape are tensors.
        if int(parameters.shape[-1]) != self.num_parameters(count):
            raise ValueError(
                f"Expected {self.num_parameters(count)} parameters a row for K = {count} latents, got "
                f"{parameters.shape[-1]}."
            )
        loc, log_scale, *weights = parameters.split([count, count, *(self._sizes(count) * self.transforms)], -1)
        layers = [self._transform(count, weights[4 * i : 4 * i + 4], flip=bool(i % 2)) for i in range(self.transforms)]
        return Transformed(loc, log_scale, ComposedTransform(*layers))

    _read: Tensor
    _written: Tensor

    def _transform(self, count: int, weights: list[Tensor], *, flip: bool) -> AutoregressiveTransform:
        """One transform of a row by its network, of the coordinates in turn or from the last to the first."""
        knots = 3 * self.bins - 1
        one, bias, two, outputs = (_UNIT * part for part in weights)
        units = bias.shape[-1]
        one = _spread(one, self._read, count * units).unflatten(-1, (count, units))
        two = _spread(two, self._written, units * count * knots).unflatten(-1, (units, count * knots))

        def splines(eps: Tensor) -> DependentTransform:
            # einsum: matmul would copy the weights of a row for every draw.
            hidden = (torch.einsum("...k,...kh->...h", eps.flip(-1) if flip else eps, one) + bias).tanh()
            values = (torch.einsum("...h,...ho->...o", hidden, two) + outputs).unflatten(-1, (count, knots))
            values = values.flip(-2) if flip else values
            return DependentTransform(
                MonotonicRQSTransform(*values.split([self.bins, self.bins, self.bins - 1], -1)), 1
            )

        return AutoregressiveTransform(splines, passes=count)

    def settings(self) -> Mapping[str, Setting]:
        """The sizes."""
        return {"transforms": self.transforms, "hidden": self.hidden, "bins": self.bins}


def _spread(values: Tensor, index: Tensor, count: int) -> Tensor:
    """``[..., count]`` with the values at the positions ``index`` and zero elsewhere."""
    return values.new_zeros(*values.shape[:-1], count).index_copy(-1, index, values)
