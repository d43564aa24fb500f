"""Normals in which every latent depends on a few before it."""

import math
from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import pad

from pyro_avi.errors import check_count
from pyro_avi.families.family import Family, Setting, log_scales

__all__ = ["AutoregressiveNormal", "MarkovNormal"]


class MarkovNormal(Family):
    r"""Normal autoregressive processes: every latent depends on the ``order`` latents before it.

    .. math:: q(z_n) = \prod_{k=1}^{K} q(z_{nk} \mid z_{n,k-1}, \dots, z_{n,k-b}), \qquad z_{nk} = m_{nk} + s_{nk} v_{nk},
              \qquad v_{nk} = \sum_{j=1}^{\min(b, k-1)} a_{nkj} \, v_{n,k-j} + \epsilon_{nk},
              \qquad \lambda_n = (m_n, \log s_n, a_n)

    with :math:`\epsilon \sim N(0, I)`, so the Cholesky factor of the precision is a band, and
    ``P = 2 K + b K - b (b + 1) / 2`` grows with ``K`` and not with its square. It is the family for rows that are series: the
    latents are in the order of the model's sites, and those of one site in the order of its plates and events. States of
    ``D`` dimensions that depend on the state before them, :math:`q(z_t \mid z_{t-1})`, are members with ``order=2 * D - 1``.
    With ``order=K - 1`` it is the set of all normals, as :class:`~pyro_avi.MultivariateNormal`, with all
    :math:`a = 0` that of :class:`~pyro_avi.DiagonalNormal`.

    Rows may end early: where a mask leaves latents out, so are their factors :math:`q(z_{nk} \mid \dots)`, and the rest is the
    density of the others.

    A draw takes about :math:`\log_2 (K / b)` operations one after the other, and its density one.

    Args:
        order: ``b``, the number of latents before it that each depends on.

    Raises:
        TypeError, ValueError: if ``order`` is not a whole number of at least 1; in :meth:`distribution`, if the number of
            parameters is that of no ``K``.

    References:
        Rue and Held, "Gaussian Markov Random Fields", 2005, section 2.4. Archer, Park, Buesing, Cunningham and Paninski,
        "Black box variational inference for state space models", 2015, https://arxiv.org/abs/1511.07367.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> family = avi.MarkovNormal(order=1)
        >>> parameters = family.initial(torch.zeros(5, 10), scale=0.1)
        >>> parameters.shape
        torch.Size([5, 29])
        >>> q = family.distribution(parameters)
        >>> q.log_prob(q.rsample()).shape
        torch.Size([5])
    """

    symmetric = True
    sequential = True

    def __init__(self, order: int):
        super().__init__()
        self.order = check_count("order", order)

    def num_parameters(self, num_latents: int) -> int:
        """``2 K + sum_k min(order, k - 1)``: locations, log scales and coefficients."""
        order = min(self.order, max(num_latents - 1, 0))
        return num_latents * (2 + order) - order * (order + 1) // 2

    def initial(self, loc: Tensor, scale: float | Tensor) -> Tensor:
        """Parameters ``[..., P]`` of independent normals at ``loc [..., K]`` with standard deviation ``scale``."""
        count = loc.shape[-1]
        coefficients = loc.new_zeros((*loc.shape[:-1], self.num_parameters(count) - 2 * count))
        return torch.cat([loc, log_scales(loc, scale), coefficients], -1)

    def distribution(self, parameters: Tensor) -> "AutoregressiveNormal":
        """The normal with ``parameters [..., P]``: batch shape ``[...]``, event shape ``[K]``."""
        count = self._num_latents(int(parameters.shape[-1]))
        order = min(self.order, count - 1)
        loc, log_scale, given = parameters.split([count, count, parameters.shape[-1] - 2 * count], -1)
        # A latent with fewer than `order` before it has a coefficient for each of these.
        row, column = torch.tril_indices(count, order, -1, device=parameters.device)
        coefficients = parameters.new_zeros((*parameters.shape[:-1], count * order))
        coefficients = coefficients.index_copy(-1, row * order + column, given).unflatten(-1, (count, order))
        return AutoregressiveNormal(loc, log_scale.exp(), coefficients)

    def _num_latents(self, num_parameters: int) -> int:
        """``K``."""
        count = (num_parameters + self.order * (self.order + 1) // 2) // (2 + self.order)
        if count < self.order:
            count = (math.isqrt(8 * num_parameters + 9) - 3) // 2
        if count < 1 or self.num_parameters(count) != num_parameters:
            raise ValueError(
                f"Expected the number of parameters of rows of K latents, 2 K + order K - order (order + 1) / 2 with order="
                f"{self.order} for K > order, got {num_parameters}."
            )
        return count

    def marginals(self, parameters: Tensor) -> dist.Normal:
        """The normal of each coordinate by itself: batch shape ``[..., K]``."""
        normal = self.distribution(parameters)
        return dist.Normal(normal.loc, normal.stddev)

    def settings(self) -> Mapping[str, Setting]:
        """The order."""
        return {"order": self.order}


class AutoregressiveNormal(dist.TorchDistribution):
    r"""The distribution of a normal autoregressive process.

    .. math:: z_k = m_k + s_k v_k, \qquad v_k = \sum_{j=1}^{b} a_{kj} v_{k-j} + \epsilon_k

    Args:
        loc: :math:`m`, ``[..., K]``.
        scale: :math:`s`, ``[..., K]``.
        coefficients: :math:`a`, ``[..., K, b]``; those of values before the first are not read.
        elements: which factors count, broadcasting against ``[..., K]``; by default all.
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "coefficients": constraints.independent(constraints.real, 2),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, loc: Tensor, scale: Tensor, coefficients: Tensor, elements: Tensor | None = None, *, validate_args=None
    ):
        self.loc, self.scale, self.coefficients, self._elements = loc, scale, coefficients, elements
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        """The same distribution with a larger batch shape."""
        new = self._get_checked_instance(AutoregressiveNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc, new.scale = (x.expand(batch_shape + self.event_shape) for x in (self.loc, self.scale))
        # Not expanded: what draws need of them is computed once.
        new.coefficients, new._elements = self.coefficients, self._elements
        super(AutoregressiveNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def mask_elements(self, mask: Tensor) -> "AutoregressiveNormal":
        """The same with the density of those latents alone where ``mask [..., K]`` is true, each given all before it."""
        return AutoregressiveNormal(
            self.loc, self.scale, self.coefficients, mask, validate_args=self.__dict__.get("_validate_args")
        )

    @property
    def mean(self) -> Tensor:
        """``[..., K]``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """``[..., K]``, each latent's own."""
        step, solved = self._blocks()
        noise = solved @ solved.mT
        for lag, power in _powers(step):
            before = power[..., lag:, :, :] @ noise[..., :-lag, :, :] @ power[..., lag:, :, :].mT
            noise = noise + _behind(before, lag)
        of_blocks = noise.diagonal(dim1=-2, dim2=-1).flatten(-2)[..., : self.event_shape[0]]
        return (of_blocks * self.scale.square()).expand(self._extended_shape())

    def rsample(self, sample_shape=()) -> Tensor:
        """Draws, differentiable in all parameters."""
        shape = self._extended_shape(sample_shape)
        eps = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        if self.coefficients.shape[-1] == 0:
            return self.loc + self.scale * eps
        step, solved = self._blocks()
        size = step.shape[-1]
        state = pad(eps, (0, -shape[-1] % size)).unflatten(-1, (-1, size, 1))
        state = _product(solved, state)
        for lag, power in _powers(step):
            state = state + _behind(_product(power[..., lag:, :, :], state[..., :-lag, :, :]), lag)
        return self.loc + self.scale * state.flatten(-3)[..., : shape[-1]]

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density ``[...]`` of values ``[..., K]``."""
        if self._validate_args:
            self._validate_sample(value)
        v = (value - self.loc) / self.scale
        eps, count = v, v.shape[-1]
        for j in range(self.coefficients.shape[-1]):
            eps = eps - self.coefficients[..., j] * pad(v, (j + 1, 0))[..., :count]
        terms = -0.5 * (eps.square() + math.log(2 * math.pi)) - self.scale.log()
        return (terms if self._elements is None else torch.where(self._elements, terms, 0.0)).sum(-1)

    def _blocks(self) -> tuple[Tensor, Tensor]:
        """The process in blocks of ``b``: the matrix ``[..., T, b, b]`` from a block to the next, and that of its noise."""
        count, order = self.coefficients.shape[-2:]
        size = max(order, 1)
        # Row r of a block reads the b values before it, of which b - r lie in the block before.
        rows = pad(self.coefficients.flip(-1), (0, size + 1 + size - order, 0, -count % size))
        rows = rows.unflatten(-2, (-1, size)).flatten(-2)[..., : 2 * size * size].unflatten(-1, (size, 2 * size))
        before, within = rows.split(size, -1)
        identity = torch.eye(size, dtype=rows.dtype, device=rows.device)
        if size == 1:
            return before, identity.expand_as(within)
        solved = torch.linalg.solve_triangular(
            identity - within, identity.expand_as(within), upper=False, unitriangular=True
        )
        return solved @ before, solved


def _powers(step: Tensor):
    """Steps over 1, 2, 4, ... blocks: a sum over all blocks before is a few sums over twice as many each."""
    lag, count = 1, step.shape[-3]
    while lag < count:
        yield lag, step
        if 2 * lag < count:
            # Steps into the first blocks from before them lead nowhere.
            step = _behind(_product(step[..., lag:, :, :], step[..., :-lag, :, :]), lag)
        lag *= 2


def _product(one: Tensor, two: Tensor) -> Tensor:
    """The product of matrices; of 1 by 1 matrices without the overhead of one."""
    return one * two if one.shape[-1] == two.shape[-1] == 1 else one @ two


def _behind(blocks: Tensor, lag: int) -> Tensor:
    """Blocks ``[..., T - lag, b, m]`` after ``lag`` blocks of zeros."""
    return pad(blocks, (0, 0, 0, 0, lag, 0))
