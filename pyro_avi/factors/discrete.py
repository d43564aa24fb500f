"""The factor of one discrete latent."""

from math import prod

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_avi.factors.layout import Layout
from pyro_avi.inspection.structure import Latent

__all__ = ["DiscreteFactor"]


class DiscreteFactor:
    r"""Independent categorical factors of the elements of a discrete latent, with one parameter for each value.

    .. math:: q(y) = \prod_e q(y_e), \qquad q(y_e = v) = \mathrm{softmax}(\lambda_e)_v

    A one-hot vector is one element; its values are the positions of the one.

    Args:
        latent: the latent.
        layout: how it lies in the rows.

    Attributes:
        num_values: the number of values of an element.
        num_elements: the number of elements in a row.
        num_parameters: the number of parameters of a row.
    """

    def __init__(self, latent: Latent, layout: Layout):
        self.latent, self._layout = latent, layout
        # The values of a one-hot vector are a dimension of its event already.
        self._extra = None if latent.is_one_hot else latent.num_values
        self.num_parameters = layout.size * (self._extra or 1)
        self.num_values = latent.num_values or 0
        self.num_elements = self.num_parameters // self.num_values
        self.row_shape = layout.row_shape
        # Whether all elements of a row are dimensions of its event, and none those of a plate inside the row.
        self.is_event = prod(layout.inner) == 1

    def logits(self, rows: Tensor) -> Tensor:
        """One logit for each value of each element, ``[..., V]`` behind the site's shape, of parameters ``[*B, P]``."""
        return self._layout.from_rows(rows, self._extra)

    def distribution(self, rows: Tensor) -> dist.TorchDistribution:
        """The site's distribution with parameters ``[*B, P]``."""
        logits, event_dim = self.logits(rows), self.latent.event_dim
        if self.latent.is_one_hot:
            return dist.OneHotCategorical(logits=logits).to_event(event_dim - 1)
        if self.latent.is_boolean:
            return dist.Bernoulli(logits=logits[..., 1] - logits[..., 0]).to_event(event_dim)
        return dist.Categorical(logits=logits).to_event(event_dim)

    def fisher(self, rows: Tensor) -> Tensor:
        """The diagonal ``[*B, P]`` of the Fisher information: ``q (1 - q)`` for a value of probability ``q``."""
        probs = rows.unflatten(-1, (-1, self.num_values)).softmax(-1)
        return (probs * (1 - probs)).flatten(-2)

    def certain_of(self, value: Tensor) -> Tensor:
        """The parameters ``[*B, P]`` of factors with all mass on a value in the site's shape."""
        rows = self._layout.to_rows(value)
        if not self.latent.is_one_hot:
            rows = torch.nn.functional.one_hot(rows.long(), self.num_values).flatten(-2)
        return rows.log()

    def mean(self, rows: Tensor) -> Tensor:
        """The mean in the site's shape: of a one-hot vector the probabilities of its positions."""
        probs = self.logits(rows).softmax(-1)
        return probs if self.latent.is_one_hot else probs @ torch.arange(probs.shape[-1]).to(probs)

    def quantile(self, rows: Tensor, q: Tensor) -> Tensor:
        """The ``q``-quantiles of every element, ``q.shape + shape of the site``: of a one-hot vector, of the position."""
        below = self.logits(rows).softmax(-1).cumsum(-1)
        # The smallest value that at least a share q lies at or below; rounding may leave the last sum below 1.
        reached = (below[..., :-1] < q.reshape(q.shape + (1,) * below.dim())).sum(-1)
        if self.latent.is_one_hot:
            reached = torch.nn.functional.one_hot(reached, below.shape[-1])
        return reached.to(self.latent.initial.dtype)

    def position(self, value: Tensor) -> Tensor:
        """The positions ``[..., *batch]`` of values ``[..., *batch, *event]`` among all of a row, the first element slowest."""
        if self.latent.is_one_hot:
            value, of_elements = value.argmax(-1), self.latent.event_dim - 1
        else:
            value, of_elements = value.long(), self.latent.event_dim
        value = value.flatten(-of_elements) if of_elements else value.unsqueeze(-1)
        count = value.shape[-1]
        weight = self.num_values ** torch.arange(count - 1, -1, -1, device=value.device)
        return (value * weight).sum(-1)

    def elements(self, rows: Tensor) -> list[Tensor]:
        """The logits ``[*B, V]`` of each element."""
        return list(rows.unflatten(-1, (-1, self.num_values)).unbind(-2))
