"""A guide whose discrete latents are summed over, so that their gradients have no noise."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyro_avi.guides import FactorizedGuide
from pyro_avi.inspection.isolated_run import isolated_run

__all__ = ["Enumerated", "enumerating_elbo"]


class Enumerated:
    """A factorized guide that enumerates its discrete latents in parallel, for ``TraceEnum_ELBO``; its tables are the guide's.

    Args:
        guide: with at least one discrete latent.
    """

    def __init__(self, guide: FactorizedGuide):
        self._guide, self._run = guide, config_enumerate(guide, "parallel")
        self.row_tables, self.check_rows, self.gather_rows = guide.row_tables, guide.check_rows, guide.gather_rows
        self.touched_rows, self.local_parameters = guide.touched_rows, guide.local_parameters
        self.row_moments = guide.row_moments

    @property
    def rows_on(self) -> str | None:
        """The device of the guide's tables, see :class:`~pyro_avi.optimization.step.HasRowTables`."""
        return self._guide.rows_on

    def __call__(self, *args, **kwargs):
        """Sample the latents."""
        return self._run(*args, **kwargs)


def enumerating_elbo(
    model: Callable, guide: FactorizedGuide, args: tuple, kwargs: Mapping[str, Any]
) -> TraceEnum_ELBO | None:
    """The ELBO of an :class:`Enumerated` guide, which also sums over latents that the model enumerates.

    ``None`` if neither has discrete latents, or if they cannot be enumerated in parallel.

    Args:
        model, guide, args, kwargs: a call of both.
    """
    with isolated_run(0), torch.enable_grad(), warnings.catch_warnings():
        sites = [site for site in poutine.trace(model).get_trace(*args, **kwargs).nodes.values() if "infer" in site]
        own = [latent.num_values for factor in guide.row_factors for latent in factor.row_set.latents]
        if all(number is None for number in own) and not any(site["infer"].get("enumerate") for site in sites):
            return None
        depth = max((-frame.dim for site in sites for frame in site["cond_indep_stack"]), default=0)
        elbo = TraceEnum_ELBO(max_plate_nesting=depth)
        # A vector-valued latent has no list of values. Where all latents are such, there is nothing to sum over.
        try:
            warnings.filterwarnings("error", "TraceEnum_ELBO found no sample sites")
            loss = elbo.differentiable_loss(model, Enumerated(guide), *args, **kwargs)
        except (UserWarning, RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
            return None
    return elbo if loss.isfinite() else None
