"""The base class of families."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, Union

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_avi.errors import check_count
from pyro_avi.seeds import seeded

__all__ = ["Family", "Setting", "drawn_quantile", "log_scales"]

# An argument that makes a family.
Setting: TypeAlias = Union[int, float, str, list, "Family"]

# Those that quantiles are taken of, and how many numbers of them are held at a time.
_DRAWS, _NUMBERS = 2000, 2**22


class Family(nn.Module, ABC):
    r"""A set of distributions over ``K`` unconstrained latents, indexed by ``P`` unconstrained parameters a row.

    .. math:: \{ q(z; \lambda) : \lambda \in \mathbb{R}^P \}, \qquad z \in \mathbb{R}^K

    A family knows nothing of rows and of inference functions: any of them may produce the parameters. It is a module, so
    that weights which all rows share, where a family has any, are trained, moved and kept with the guide. A guide copies
    the family it is given, once for each set of rows, and calls :meth:`prepare` on the copy before anything else.

    Subclasses are final and give :meth:`num_parameters`, :meth:`initial`, :meth:`distribution` and :meth:`settings`;
    :meth:`marginals` where coordinates are normal, or :meth:`quantile` where they have another formula. What else guides may
    rely on they say by attributes.

    Attributes:
        symmetric: whether every member is symmetric about its ``mean``, which its distribution then has. Draws are then
            paired with their mirror images where bounds are compared.
        independent: whether every member is a product of normals, given by :meth:`coordinates`, which guides then sample
            site by site.
        cheap_density: whether the density of any value takes about as long as that of an own draw; where a transform has to
            be inverted for it, it does not.
        sequential: whether the density of a member is a product over the latents in turn, each given those before it. Its
            distributions then have a method ``mask_elements(mask [..., K])`` that leaves factors out.
        conditional: whether a row has one member for each value of its discrete latents, see
            :class:`~pyro_avi.Conditional`.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> families = [avi.DiagonalNormal(), avi.MultivariateNormal(), avi.LowRankNormal(rank=2)]
        >>> [family.num_parameters(10) for family in families]
        [20, 65, 40]
    """

    symmetric: bool = False
    independent: bool = False
    cheap_density: bool = True
    sequential: bool = False
    conditional: bool = False

    def prepare(self, num_latents: int) -> None:
        """Make ready for rows of ``K = num_latents`` latents: create what all rows share, if there is anything.

        Args:
            num_latents: ``K``.

        Raises:
            TypeError, ValueError: if it is not a whole number of at least 1.
        """
        check_count("num_latents", num_latents)

    @abstractmethod
    def num_parameters(self, num_latents: int) -> int:
        """``P``, the number of parameters of one row with ``K = num_latents`` latents."""

    def num_shared(self, num_latents: int) -> int:
        """The number of weights that all rows share once the family is prepared for ``K = num_latents`` latents.

        Args:
            num_latents: ``K``.
        """
        return 0

    @abstractmethod
    def initial(self, loc: Tensor, scale: float | Tensor) -> Tensor:
        """Parameters ``[..., P]`` of the member centred at ``loc [..., K]`` with standard deviation ``scale``.

        Args:
            loc: ``[..., K]``.
            scale: of all latents, or ``[..., K]`` of each.
        """

    @abstractmethod
    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        """The member with ``parameters [..., P]``: batch shape ``[...]``, event shape ``[K]``, reparameterized."""

    def marginals(self, parameters: Tensor) -> dist.Normal | None:
        """The normal that each coordinate by itself follows: batch shape ``[..., K]``; ``None`` where it is none.

        Args:
            parameters: ``[..., P]``.
        """
        return None

    def fisher(self, parameters: Tensor) -> Tensor | None:
        r"""The diagonal of the Fisher information ``[..., P]``: twice the divergence that a small move of one parameter makes.

        .. math:: F_{pp} = E_q \left[ \left( \partial \log q(z; \lambda) / \partial \lambda_p \right)^2 \right]

        ``None`` where a family has no formula.

        Args:
            parameters: ``[..., P]``.
        """
        return None

    def quantile(self, parameters: Tensor, q: Tensor) -> Tensor:
        """The ``q``-quantiles of every coordinate by itself: ``q.shape + [..., K]``.

        Those of :meth:`marginals`; where there are none, those of 2,000 draws under a fixed seed.

        Args:
            parameters: ``[..., P]``.
            q: numbers between 0 and 1, of any shape.
        """
        normals = self.marginals(parameters)
        if normals is None:
            return drawn_quantile(self.distribution, parameters, q)
        score = torch.special.ndtri(q.to(normals.loc))
        return normals.loc + normals.scale * score.reshape(q.shape + (1,) * normals.loc.dim())

    def coordinates(self, parameters: Tensor) -> dist.Normal:
        """The ``K`` independent normals of an ``independent`` family: batch shape ``[..., K]``, no event.

        Args:
            parameters: ``[..., P]``.

        Raises:
            NotImplementedError: for a family that is not independent.
        """
        raise NotImplementedError(f"{self!r} is no family of independent normals.")

    @abstractmethod
    def settings(self) -> Mapping[str, Setting]:
        """The arguments that make the same family again: ``type(family)(**family.settings())``."""

    def describe(self) -> dict[str, Any]:
        """The settings as plain data with the name of the class, which includes its module if it is not of this package."""
        settings = self.settings().items()
        plain = {name: value.describe() if isinstance(value, Family) else value for name, value in settings}
        own = type(self).__module__.startswith("pyro_avi.families.")
        name = type(self).__name__ if own else f"{type(self).__module__}.{type(self).__qualname__}"
        return {"class": name, "settings": plain}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings().items())})"


def drawn_quantile(make: Callable[[Tensor], dist.TorchDistribution], parameters: Tensor, q: Tensor) -> Tensor:
    """The ``q``-quantiles ``q.shape + [..., K]`` of every coordinate of 2,000 draws under a fixed seed.

    Args:
        make: from parameters to a distribution with batch shape ``[...]`` and event shape ``[K]``.
        parameters: ``[..., P]``.
        q: numbers between 0 and 1, of any shape.
    """
    rows = parameters.reshape(-1, parameters.shape[-1])
    parts = []
    with seeded(0), torch.no_grad():
        # By pieces: the draws of all rows at once would need a thousand times the memory of the answer.
        for piece in rows.split(max(1, _NUMBERS // (_DRAWS * rows.shape[-1]))):
            draws = make(piece).sample((_DRAWS,))
            parts.append(draws.quantile(q.reshape(-1).to(draws), dim=0))
    result = torch.cat(parts, 1)
    return result.reshape(*q.shape, *parameters.shape[:-1], result.shape[-1])


def log_scales(loc: Tensor, scale: float | Tensor) -> Tensor:
    """The logarithms ``[..., K]`` of one scale for all of the latents of ``loc [..., K]``, or of one for each."""
    return scale.log().expand_as(loc) if isinstance(scale, Tensor) else torch.full_like(loc, math.log(scale))
