"""NUTS on the log joint of one row, started from its factor."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

from pyro_avi.densities.log_joint import LocalJoint

__all__ = ["Chains", "nuts_draws", "row_potential"]

# The steps of warm-up for each latent from which on a full matrix of masses is adapted.
_DRAWS_EACH = 30


class Chains(NamedTuple):
    """Draws from the posterior of a row, and how well the chains have mixed.

    Attributes:
        u: ``[S, K]`` coordinates.
        r_hat: the largest split R-hat of a coordinate: of chains that agree it is 1.
        ess: the smallest effective sample size of a coordinate.
    """

    u: Tensor
    r_hat: float
    ess: float


def nuts_draws(
    joint: LocalJoint, row: int, points: Tensor, *, num_samples: int, num_warmup: int, num_chains: int
) -> Chains:
    r"""Chains of the No-U-Turn sampler for one row, each started from a draw from its factor.

    They move in double precision, in coordinates in which the factor is a standard normal, :math:`u = m + L \epsilon` with its
    mean and the Cholesky factor of its covariance: the factor gives the masses that warm-up starts from. It adapts a full
    matrix of masses where it has draws enough for one, otherwise the diagonal.

    Args:
        joint: of a call with the row.
        row: its position there.
        points: ``[S, B, K]`` draws from the factors of the rows of that call. Where others are in it, they stay where they are.
        num_samples: ``S``, of all chains together.
        num_warmup: the steps of each chain before its draws, in which step size and masses are adapted.
        num_chains: the number of chains, one after the other.

    References:
        Hoffman and Gelman, "The No-U-Turn Sampler", 2014, https://jmlr.org/papers/v15/hoffman14a.html.
    """
    own = points[:, row].double()
    mean, scale = own.mean(0), _cholesky(own)

    potential = row_potential(joint, row, points[:1], mean, scale)
    each = -(-num_samples // num_chains)
    draws = []
    for chain in range(num_chains):
        start = torch.linalg.solve_triangular(scale, (own[chain] - mean).unsqueeze(-1), upper=False).squeeze(-1)
        sampler = MCMC(
            NUTS(potential_fn=potential, full_mass=_DRAWS_EACH * len(mean) <= num_warmup),
            num_samples=each,
            warmup_steps=num_warmup,
            initial_params={"e": start},
            disable_progbar=True,
        )
        sampler.run()
        draws.append(mean + sampler.get_samples()["e"].detach() @ scale.T)
    u = torch.stack(draws)
    return Chains(
        # In turns of the chains, so that all have as many of the draws that are kept.
        u.transpose(0, 1).flatten(0, 1)[:num_samples].to(points),
        split_gelman_rubin(u).max().item(),
        effective_sample_size(u).clamp(max=u.shape[0] * u.shape[1]).min().item(),
    )


def row_potential(
    joint: LocalJoint, row: int, others: Tensor, mean: Tensor, scale: Tensor
) -> Callable[[dict[str, Tensor]], Tensor]:
    """The negative log joint of a row at ``u = mean + scale @ e``.

    Args:
        joint: of a call with the row.
        row: its position there.
        others: ``[1, B, K]`` where the other rows are.
        mean, scale: ``[K]``, ``[K, K]``.
    """

    def potential(values: dict[str, Tensor]) -> Tensor:
        u = others.clone()
        u[0, row] = (mean + scale @ values["e"]).to(u)
        prior, likelihood = joint(u)
        return -(prior + likelihood)[0, row]

    return potential


def _cholesky(draws: Tensor) -> Tensor:
    """``[K, K]`` the Cholesky factor of the covariance of draws ``[S, K]``, shrunk to its diagonal where they are few."""
    count, size = draws.shape
    covariance = torch.cov(draws.T).reshape(size, size)
    diagonal = covariance.diagonal().clamp(min=1e-12).diag()
    return torch.linalg.cholesky((count * covariance + size * diagonal) / (count + size))
