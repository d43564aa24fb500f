"""The log prior and the log likelihood of independent rows, from traces."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_avi.densities.attribution import Attribution, attribute
from pyro_avi.densities.log_factors import enumeration_depth, log_factors, trace_at
from pyro_avi.inspection.data_errors import explain_data_errors
from pyro_avi.inspection.sites import check_data, is_observation

__all__ = ["RowDensities", "TiedRowsError"]


class TiedRowsError(ValueError):
    """Rows share a factor, so that none has an evidence of its own."""


class RowDensities:
    r"""Splits the log joint of a model without global latents.

    .. math:: \log p(z_n), \qquad \log p(x_n \mid z_n)

    The factors of a row are those that depend on its latents, in whatever plate they are; enumerated latents are summed out.

    Args:
        model, args, kwargs: a call of any Pyro callable; a random subsample of rows is drawn once.
        plate: the name of the plate of the rows.

    Attributes:
        trace: of the call.
        rows: a trace with the sites of its subsamples alone.
        depth: the number of dimensions of its plates.
        scale: ``N / B``.
        is_estimate: whether the densities are estimates, because other plates subsample their rows.

    Raises:
        ValueError: if something ties rows.
    """

    def __init__(self, model: Callable, args: tuple, kwargs: Mapping[str, Any], *, plate: str):
        self._model, self._args, self._kwargs, self._plate = model, args, kwargs, plate
        with torch.no_grad(), explain_data_errors(args, kwargs):
            self.trace = poutine.trace(model).get_trace(*args, **kwargs)
            check_data(self.trace)
        self.rows = Trace()
        for name, site in self.trace.nodes.items():
            if site_is_subsample(site):
                self.rows.add_node(name, **site)
        frames = [frame for site in self.trace.nodes.values() for frame in site.get("cond_indep_stack", ())]
        self.depth = max(-frame.dim for frame in frames)
        self._enumerates = enumeration_depth(self.trace, ()) is not None
        self._joint = self._attribute(())
        self.scale, self.is_estimate = self._joint.scale, self._joint.is_estimate
        sites = self.trace.nodes.items()
        self._observed = [name for name, site in sites if site["type"] == "sample" and site["is_observed"]]
        # The prior has a sum over enumerated latents of its own, without the observations.
        self._prior = self._attribute(self._observed) if self._enumerates else None

    def _attribute(self, exclude: Sequence[str]) -> Attribution:
        model = poutine.replay(self._model, trace=self.rows)
        found = attribute(model, None, self._args, self._kwargs, (self._plate,), exclude=exclude)
        if not found.by_row:
            raise TiedRowsError(
                f"Expected rows of plate {self._plate!r} that are independent given the global latents, got rows that are tied "
                f"by {list(found.ties)}.\n"
                "Rows that share a factor have no evidence of their own: avi.log_weights, avi.elbo and avi.iwelbo take them "
                "together."
            )
        return found

    @property
    def sites(self) -> frozenset[str]:
        """The names of the sites whose elements belong to rows."""
        return self._joint.sites

    @property
    def observed(self) -> list[str]:
        """The names of the sites with observations of rows."""
        return [name for name in self._observed if name in self.sites and is_observation(self.trace.nodes[name])]

    def at(self, model: Callable, args: tuple, kwargs: Mapping[str, Any], given: Trace, *, outer: int = 0) -> Trace:
        """A trace at given latents.

        Args:
            model, args, kwargs: the call, or one of the same kind.
            given: the latents and rows.
            outer: the number of plates around the call.
        """
        return trace_at(model, args, kwargs, given, depth=self.depth + outer if self._enumerates else None)

    def split(self, trace: Trace) -> tuple[Tensor, Tensor]:
        """The log prior and the log likelihood of the rows, ``[..., B]`` each, without the plate's scale.

        Args:
            trace: from :meth:`at`.
        """
        factors = log_factors(trace)
        if self._prior is not None:
            prior, _ = self._prior.split(log_factors(trace, exclude=self._observed))
            joint, _ = self._joint.split(factors)
            return prior, joint - prior
        latent = [i for i, factor in enumerate(factors) if factor.is_latent]
        other = [i for i, factor in enumerate(factors) if not factor.is_latent]
        return self._joint.split(factors, only=latent)[0], self._joint.split(factors, only=other)[0]
