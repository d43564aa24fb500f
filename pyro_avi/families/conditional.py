"""A member for each value of a row's discrete latents."""

from collections.abc import Mapping

import pyro.distributions as dist
from torch import Tensor

from pyro_avi.families.family import Family, Setting

__all__ = ["Conditional"]


class Conditional(Family):
    r"""Factors of continuous latents that depend on the discrete latents of their row.

    .. math:: q(y_n, z_n) = q(y_n) \, q(z_n; \lambda_{n y_n}), \qquad
              \lambda_n = (\lambda_{n1}, \dots, \lambda_{nC}, \text{logits of } y_n)

    with a member of ``family`` for each of the ``C`` values that the discrete latents of a row have together, so a row has
    ``C`` times as many parameters, and those of the discrete latents. What it says of ``z`` alone is a mixture. Without
    discrete latents in the row it is ``family`` itself.

    A call that observes a discrete latent takes the member of its value. Not so a label under ``obs_mask=``: in a row that
    has one, the draw of the missing one is of no account, and all members learn the same.

    The methods are about one member; the table of them is the guides'. Every one of Pyro's ELBOs applies that takes
    discrete latents; in an expectation over ``y`` rather than a draw of it, with ``TraceEnum_ELBO`` and
    :func:`pyro.infer.config_enumerate` around the guide.

    Args:
        family: the family of the members.

    Raises:
        TypeError: if it is no family.

    References:
        Kingma, Rezende, Mohamed and Welling, "Semi-supervised learning with deep generative models", 2014,
        https://arxiv.org/abs/1406.5298, whose guide is of this form.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> import pyro_avi as avi
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         y = pyro.sample("y", dist.Categorical(torch.ones(3)))
        ...         z = pyro.sample("z", dist.Normal(3.0 * y, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = avi.FactorizedGuide(model, family=avi.Conditional(avi.DiagonalNormal()))
        >>> guide.setup(torch.randn(20)).table.shape
        torch.Size([20, 9])
    """

    conditional = True

    def __init__(self, family: Family):
        super().__init__()
        if not isinstance(family, Family):
            raise TypeError(f"Expected the family of the members, such as DiagonalNormal(), got {family!r}.")
        self.family = family
        # A mixture of symmetric members is not symmetric itself.
        self.independent, self.symmetric = family.independent, family.symmetric
        self.cheap_density, self.sequential = family.cheap_density, family.sequential

    def prepare(self, num_latents: int) -> None:
        """Make ready for rows of ``K = num_latents`` latents."""
        self.family.prepare(num_latents)

    def num_parameters(self, num_latents: int) -> int:
        """``P``, the number of parameters of one member."""
        return self.family.num_parameters(num_latents)

    def num_shared(self, num_latents: int) -> int:
        """The weights that all rows share, those of the family of the members."""
        return self.family.num_shared(num_latents)

    def initial(self, loc: Tensor, scale: float | Tensor) -> Tensor:
        """Parameters ``[..., P]`` of the member at ``loc [..., K]`` with standard deviation ``scale``."""
        return self.family.initial(loc, scale)

    def coordinates(self, parameters: Tensor) -> dist.Normal:
        """The ``K`` independent normals of a member, if those are independent."""
        return self.family.coordinates(parameters)

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        """The member with ``parameters [..., P]``: batch shape ``[...]``, event shape ``[K]``."""
        return self.family.distribution(parameters)

    def marginals(self, parameters: Tensor) -> dist.Normal | None:
        """The normal of each coordinate of a member, where it is one."""
        return self.family.marginals(parameters)

    def fisher(self, parameters: Tensor) -> Tensor | None:
        """The diagonal of the Fisher information of a member."""
        return self.family.fisher(parameters)

    def quantile(self, parameters: Tensor, q: Tensor) -> Tensor:
        """The ``q``-quantiles of every coordinate of a member."""
        return self.family.quantile(parameters, q)

    def settings(self) -> Mapping[str, Setting]:
        """The family of the members."""
        return {"family": self.family}
