"""Normalizing flows: members that are not normal."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_avi.errors import check_count
from pyro_avi.families.family import Family, Setting, log_scales
from pyro_avi.families.transformed import (
    LazyComposedTransform,
    MaskedAutoregressiveTransform,
    MonotonicRQSTransform,
    Transformed,
)

__all__ = ["Flow"]


class Flow(Family):
    r"""Conditional normalizing flows: normals transformed by networks that all rows share.

    .. math:: z_n = m_n + s_n \odot T_\phi(\epsilon; c_n), \qquad \epsilon \sim N(0, I),
              \qquad \lambda_n = (m_n, \log s_n, c_n)

    so ``P = 2 K + C``. :math:`T_\phi` is a composition of autoregressive transforms, each an increasing rational-quadratic
    spline of every coordinate whose knots follow from the coordinates before it and from the row's context :math:`c_n`.
    The order is reversed from one transform to the next. The weights :math:`\phi` belong to all rows (for weights of each
    row's own: :class:`~pyro_avi.RowFlow`); they start with :math:`T_\phi` as the identity, so that the flow starts as a
    :class:`~pyro_avi.DiagonalNormal`.

    A draw and its density take one pass through the networks; the density of any other value takes ``K``.

    Args:
        transforms: the number of transforms; at least two let every latent depend on every other.
        hidden: the widths of each transform's network.
        context: ``C``, the number of parameters by which a row chooses its shape.
        bins: the number of pieces of each spline.

    Raises:
        TypeError, ValueError: if one of them is not a whole number of at least 1 (``bins``: 2); where a method needs the
            weights and :meth:`prepare` has not been called, or for another number of latents.
        TypeError: if ``hidden`` is no sequence.

    References:
        Kingma et al., "Improved variational inference with inverse autoregressive flow", 2016,
        https://arxiv.org/abs/1606.04934. Durkan et al., "Neural spline flows", 2019, https://arxiv.org/abs/1906.04032.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> family = avi.Flow(transforms=2, hidden=(16,), context=4)
        >>> family.prepare(3)
        >>> parameters = family.initial(torch.zeros(5, 3), scale=0.1)
        >>> parameters.shape
        torch.Size([5, 10])
        >>> q = family.distribution(parameters)
        >>> q.log_prob(q.rsample()).shape
        torch.Size([5])
    """

    cheap_density = False

    def __init__(self, *, transforms: int = 2, hidden: Sequence[int] = (64, 64), context: int = 8, bins: int = 8):
        super().__init__()
        self.transforms = check_count("transforms", transforms)
        if isinstance(hidden, str) or not isinstance(hidden, Sequence):
            raise TypeError(f"Expected hidden to be the widths of a network, e.g. (64, 64), got {hidden!r}.")
        # Without a hidden layer, a context of zero and weights of zero would hold each other there.
        if not hidden:
            raise ValueError("Expected at least one width in hidden, got none.")
        self.hidden = tuple(check_count("every width in hidden", width) for width in hidden)
        self.context = check_count("context", context)
        self.bins = check_count("bins", bins, least=2)
        self.num_latents: int | None = None
        self.flow: nn.Module | None = None

    def prepare(self, num_latents: int) -> None:
        """Create the weights for rows of ``K = num_latents`` latents, from torch's random state and in its default dtype.

        Args:
            num_latents: ``K``. A second call with the same number keeps the weights.

        Raises:
            TypeError, ValueError: if it is not a whole number of at least 1, or not that of the first call.
        """
        super().prepare(num_latents)
        if self.num_latents == num_latents:
            return
        if self.num_latents is not None:
            raise ValueError(
                f"Expected num_latents={self.num_latents}, for which the weights of this Flow were made, got "
                f"{num_latents}.\nMake another one: Flow(**flow.settings())."
            )
        order = torch.arange(num_latents)
        layers = [
            MaskedAutoregressiveTransform(
                num_latents,
                self.context,
                order=order.flip(0) if i % 2 else order,
                univariate=MonotonicRQSTransform,
                shapes=[(self.bins,), (self.bins,), (self.bins - 1,)],
                hidden_features=self.hidden,
                activation=nn.SiLU,
            )
            for i in range(self.transforms)
        ]
        for layer in layers:
            # Equal bins of slope one are the identity. The last layer learns from the first step on, what is before it
            # and the context from the second, the weights that read the context from the third: no saddle.
            nn.init.zeros_(layer.hyper[-1].weight)
            nn.init.zeros_(layer.hyper[-1].bias)
        self.flow, self.num_latents = LazyComposedTransform(*layers), num_latents

    def num_parameters(self, num_latents: int) -> int:
        """``2 K + C``: locations, log scales and the context."""
        return 2 * num_latents + self.context

    def num_shared(self, num_latents: int) -> int:
        """The weights and biases of every transform's network, from a row's coordinates and context to its knots."""
        # A single coordinate has none before it to read.
        read = self.context + (num_latents if num_latents > 1 else 0)
        sizes = (read, *self.hidden, num_latents * (3 * self.bins - 1))
        return self.transforms * sum((a + 1) * b for a, b in pairwise(sizes))

    def initial(self, loc: Tensor, scale: float | Tensor) -> Tensor:
        """Parameters ``[..., P]`` at ``loc [..., K]`` and ``scale``: independent normals, as long as the weights are new."""
        context = loc.new_zeros((*loc.shape[:-1], self.context))
        return torch.cat([loc, log_scales(loc, scale), context], -1)

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        """The member with ``parameters [..., P]``: batch shape ``[...]``, event shape ``[K]``."""
        if self.num_latents is None or self.flow is None:
            raise ValueError("Expected a Flow with weights, got none.\nCall flow.prepare(num_latents) first.")
        if parameters.shape[-1] != self.num_parameters(self.num_latents):
            raise ValueError(
                f"Expected 2 K + context = {self.num_parameters(self.num_latents)} parameters a row, got "
                f"{parameters.shape[-1]}."
            )
        loc, log_scale, context = parameters.split([self.num_latents, self.num_latents, self.context], -1)
        return Transformed(loc, log_scale, self.flow(context))

    def settings(self) -> Mapping[str, Setting]:
        """The sizes; the weights belong to the ``state_dict``."""
        return {
            "transforms": self.transforms,
            "hidden": list(self.hidden),
            "context": self.context,
            "bins": self.bins,
        }
