"""Normalizing flows: members that are not normal."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_avi.families.family import Family, check_count


@contextmanager
def _same_validation() -> Iterator[None]:
    validated = Distribution._validate_args
    try:
        yield
    finally:
        Distribution.set_default_validate_args(validated)


# To import zuko switches off the validation of all distributions of the program.
with _same_validation():
    from zuko.flows import MaskedAutoregressiveTransform
    from zuko.lazy import LazyComposedTransform
    from zuko.transforms import MonotonicRQSTransform

__all__ = ["Flow"]


class Flow(Family):
    r"""Conditional normalizing flows: normals bent by networks that all rows share.

    .. math:: z_n = m_n + s_n \odot T_\phi(\epsilon; c_n), \qquad \epsilon \sim N(0, I),
              \qquad \lambda_n = (m_n, \log s_n, c_n)

    so ``P = 2 K + C``. :math:`T_\phi` is a composition of autoregressive transforms, each an increasing rational-quadratic
    spline of every coordinate whose knots follow from the coordinates before it and from the row's context :math:`c_n`.
    The order is reversed from one transform to the next. The weights :math:`\phi` belong to all rows; they start
    with :math:`T_\phi` as the identity, so that the flow starts as a :class:`~pyro_avi.DiagonalNormal`.

    A draw and its density take one pass through the networks; the density of any other value takes ``K``.

    Args:
        transforms: the number of transforms; at least two let every latent depend on every other.
        hidden: the widths of each transform's network.
        context: ``C``, the number of parameters by which a row chooses its shape.
        bins: the number of pieces of each spline.

    Raises:
        ValueError: if one of them is not a whole number of at least 1 (``bins``: 2); where a method needs the weights and
            :meth:`prepare` has not been called, or for another number of latents.
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
            ValueError: if it is not a whole number of at least 1, or not that of the first call.
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

    def initial(self, loc: Tensor, scale: float) -> Tensor:
        """Parameters ``[..., P]`` at ``loc [..., K]`` and ``scale``: independent normals, as long as the weights are new."""
        context = loc.new_zeros((*loc.shape[:-1], self.context))
        return torch.cat([loc, torch.full_like(loc, math.log(scale)), context], -1)

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        """The member with ``parameters [..., P]``: batch shape ``[...]``, event shape ``[K]``."""
        if self.num_latents is None:
            raise ValueError("Expected a Flow with weights, got none.\nCall flow.prepare(num_latents) first.")
        if parameters.shape[-1] != self.num_parameters(self.num_latents):
            raise ValueError(
                f"Expected 2 K + context = {self.num_parameters(self.num_latents)} parameters a row, got "
                f"{parameters.shape[-1]}."
            )
        loc, log_scale, context = parameters.split([self.num_latents, self.num_latents, self.context], -1)
        return _Transformed(loc, log_scale, self.flow(context))

    def settings(self) -> dict[str, int | float | str | list]:
        """The sizes; the weights are no setting but state."""
        return {
            "transforms": self.transforms,
            "hidden": list(self.hidden),
            "context": self.context,
            "bins": self.bins,
        }


class _Transformed(dist.TorchDistribution):
    """The distribution of ``loc + exp(log_scale) * transform(eps)`` for a standard normal ``eps``.

    It remembers its last draw with its density, which came with the draw, and inverts the transform for others only.
    """

    arg_constraints = {"loc": constraints.real_vector, "log_scale": constraints.real_vector}
    support = constraints.real_vector
    has_rsample = True
    _drawn: tuple[Tensor, Tensor, bool] | None = None

    def __init__(self, loc: Tensor, log_scale: Tensor, transform):
        self.loc, self.log_scale, self._transform = loc, log_scale, transform
        super().__init__(loc.shape[:-1], loc.shape[-1:])

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(_Transformed, _instance)
        new.loc, new.log_scale, new._transform = self.loc, self.log_scale, self._transform
        super(_Transformed, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape=()):
        eps = torch.randn(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        bent, log_slope = self._transform.call_and_ladj(eps)
        value = self.loc + self.log_scale.exp() * bent
        self._drawn = value, self._density(eps, log_slope), torch.is_grad_enabled()
        return value

    def log_prob(self, value):
        if self._drawn is not None and value is self._drawn[0]:
            _, density, with_gradient = self._drawn
            # Drawn without gradient, the value is a number like any other, whose density has a gradient all the same.
            if with_gradient or not torch.is_grad_enabled():
                return density
        if self._validate_args:
            self._validate_sample(value)
        eps, log_slope = self._transform.inv.call_and_ladj((value - self.loc) * (-self.log_scale).exp())
        return self._density(eps, -log_slope)

    def _density(self, eps, log_slope):
        base = -0.5 * (eps.square() + math.log(2 * math.pi)).sum(-1)
        return base - log_slope - self.log_scale.sum(-1)
