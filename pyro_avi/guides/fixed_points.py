"""The bound of all rows of a call at a few fixed points of their factors, as a function of the variational parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_avi.calls.call_reader import CallData
from pyro_avi.densities.log_factors import enumeration_depth, log_factors, trace_at
from pyro_avi.evaluation_mode import evaluation_mode
from pyro_avi.factors.row_factor import RowFactor
from pyro_avi.inspection.sites import is_latent

__all__ = ["FixedPoints", "at_noise", "balanced_signs"]


def balanced_signs(count: int, num_latents: int) -> Tensor:
    """``[count, K]`` points of -1 and 1, each with its mirror image: columns of a Hadamard matrix and their negatives.

    From ``count = 2 K'`` points on, ``K'`` the next power of two, their moments up to the third are those of independent
    standard normals, so that the mean of a polynomial of third degree is exact. With fewer points latents whose numbers
    differ by a multiple of ``count / 2`` have the same signs.

    Args:
        count: even.
        num_latents: ``K``.
    """
    half = [[1.0 - 2.0 * ((i & k).bit_count() % 2) for k in range(num_latents)] for i in range(count // 2)]
    return torch.tensor([[sign * x for x in row] for row in half for sign in (1.0, -1.0)])


def at_noise(normal: dist.TorchDistribution, noise: Tensor) -> Tensor:
    """The value ``[*B, K]`` of a normal's draw by standard normal noise ``[K]``, the same for all rows."""
    factor = getattr(normal, "scale_tril", None)
    return normal.mean + (normal.stddev * noise if factor is None else factor @ noise)


@dataclass(frozen=True)
class FixedPoints:
    """The mean bound of a call over fixed points, the same for all rows and calls.

    The model runs hidden from the program's handlers, with its modules in evaluation mode, and its parameters have their
    gradients.

    Attributes:
        model, args, kwargs: the call.
        row_factors: of all sets of rows.
        order: the names of the latents, in the order of the model.
        plates: of the latents, by name.
        data: of the call.
        known: the values of the global latents, by site.
        depth: the number of dimensions of the model's plates where it enumerates latents, ``None`` where it does not.
    """

    model: Callable
    args: tuple
    kwargs: Mapping[str, Any]
    row_factors: Sequence[RowFactor]
    order: Sequence[str]
    plates: Mapping[str, pyro.plate]
    data: CallData
    known: Mapping[str, Tensor]
    depth: int | None = None

    def bound(self, parameters: Sequence[Tensor], noise: Sequence[Tensor]) -> Tensor:
        """The bound ``[]``.

        Args:
            parameters: ``[*B, P]`` of each set of rows.
            noise: ``[C, K]`` of each set of rows, in whose place the points stand in a factor.
        """
        with poutine.block(), evaluation_mode():
            return torch.stack([self._at(parameters, point) for point in zip(*noise, strict=True)]).mean()

    def enumeration_depth(self, parameters: Sequence[Tensor], noise: Sequence[Tensor]) -> int | None:
        """What :attr:`depth` is to be."""
        with poutine.block(), evaluation_mode():
            trace = self._run_model(self._run_guide(parameters, [each[0] for each in noise]))
        return enumeration_depth(trace, self.order)

    def _at(self, parameters: Sequence[Tensor], noise: Sequence[Tensor]) -> Tensor:
        of_guide = self._run_guide(parameters, noise)
        entropy = -of_guide.log_prob_sum()
        of_model = self._run_model(of_guide)
        if self.depth is not None:
            return entropy + torch.stack([factor.value.sum() for factor in log_factors(of_model)]).sum()
        return entropy + of_model.log_prob_sum()

    def _run_guide(self, parameters: Sequence[Tensor], noise: Sequence[Tensor]) -> Trace:
        given, samplers = Trace(), {}
        for row_factor, x, point in zip(self.row_factors, parameters, noise, strict=True):
            factor = row_factor.factor
            _add(given, factor.at(at_noise(factor.distribution(x), point)))
        with poutine.trace() as traced, poutine.replay(trace=given):
            for row_factor, x in zip(self.row_factors, parameters, strict=True):
                data = self.data
                samplers.update(row_factor.factor.samplers(x, self.plates, data.masks, data.scales, data.given))
            for name in self.order:
                if name in samplers:
                    samplers[name]()
        return traced.trace

    def _run_model(self, of_guide: Trace) -> Trace:
        given = of_guide.copy()
        _add(given, self.known)
        _add(given, {name: rows.index for name, rows in self.data.rows.items() if rows.index is not None})
        trace = trace_at(self.model, self.args, self.kwargs, given, depth=self.depth)
        unknown = [name for name, site in trace.nodes.items() if is_latent(site) and name not in given]
        if unknown:
            raise ValueError(
                f"Expected a call that observes its data, got one in which the model draws {unknown}: the bound of a row, "
                "along which its factor is improved, is that of what is observed.\nPass the data, or take an AmortizedGuide."
            )
        return trace


def _add(trace: Trace, values: Mapping[str, Any]) -> None:
    """Give a trace values to be replayed."""
    for name, value in values.items():
        trace.add_node(name, type="sample", is_observed=False, value=value, infer={})
