"""The log joint of every row as a function of its latents, for many points at once."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide.initialization import init_to_feasible
from torch import Tensor

from pyro_avi.compilation.compiled_function import compile_function
from pyro_avi.compilation.cost import count_flops, saves_time
from pyro_avi.densities.log_weights import LogWeights
from pyro_avi.densities.row_densities import RowDensities
from pyro_avi.inspection.inspect_model import inspect_model
from pyro_avi.inspection.structure import Latent
from pyro_avi.seeds import seeded

__all__ = ["LocalJoint"]

# Seconds that it takes to compile the log joint, and that handlers take of a call; roughly those of one core.
_COST_OF_COMPILING, _HANDLERS = 10.0, 2e-3
# What a model that cannot run in one more plate fails with.
_SHAPE_ERRORS = (RuntimeError, ValueError, IndexError, TypeError)
# Bytes of the points that a CPU evaluates at a time. More would not fit its cache: a point of a VAE took three times as long.
_CACHE = 2**26


class LocalJoint:
    r"""The log prior and the log likelihood of every row in unconstrained coordinates of its latents.

    .. math:: \log p(z_n) + \log \left| \frac{\partial z_n}{\partial u_n} \right|, \qquad \log p(x_n \mid z_n),
              \qquad z_n = t(u_n)

    Points are evaluated together in one more plate around the model, or one after another where the model does not run in it
    or gives other numbers. The factors of a row are those that depend on its latents, as for log weights.

    Args:
        model: any Pyro callable without global latents, whose local latents are continuous.
        args, kwargs: its arguments; a random subsample of rows is drawn once.
        plate: the name of the plate of the rows.

    Raises:
        ValueError: if the model has other latents, or masked or scaled ones, or something ties its rows.
    """

    def __init__(self, model: Callable, args: tuple, kwargs: Mapping[str, Any], *, plate: str):
        self._model, self._args, self._kwargs, self._plate = model, args, kwargs, plate
        structure = inspect_model(model, args, kwargs, plates=(plate,), init_loc_fn=init_to_feasible)
        _check(structure, plate)
        self._latents = structure.local_latents
        self._densities = RowDensities(model, args, kwargs, plate=plate)
        self._rows, self._depth = self._densities.rows, self._densities.depth
        self._frame = structure.frames[plate]
        self._shapes = {latent.name: tuple(latent.initial.shape) for latent in self._latents}
        initial = [self._to_rows(latent, latent.initial.unsqueeze(0)) for latent in self._latents]
        self._sizes = [part.shape[-1] for part in initial]
        self.num_rows, self.num_latents = self._frame.size, sum(self._sizes)
        self.scale, self.is_estimate = self._densities.scale, self._densities.is_estimate
        self.initial = torch.cat(initial, -1)
        self.at_once = self._runs_at_once()
        # Compiled, by the number of points; None where that is not possible.
        self._graphs: dict[int, Callable | None] = {}
        self._flops: int | None = None  # of one point, once counted

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The log prior and the log likelihood ``[C, B]``, in double precision.

        Args:
            u: ``[C, B, K]``, the coordinates of the latents in the order of the model.
        """
        if self.at_once:
            return self._evaluate(u)
        both = [self._evaluate(point.unsqueeze(0), alone=True) for point in u]
        return torch.cat([prior for prior, _ in both]), torch.cat([likelihood for _, likelihood in both])

    def prior_draws(self, count: int) -> Tensor:
        """``[C, B, K]`` coordinates of draws from the prior, ``C = count``."""
        if not self.at_once:
            return torch.cat([self._prior_draws(1, alone=True) for _ in range(count)])
        return self._prior_draws(count)

    def coordinates(self, values: Mapping[str, Tensor], count: int) -> Tensor:
        """``[C, B, K]`` coordinates of given values, ``C = count``.

        Args:
            values: by site, in the site's shape, with or without ``count`` values leftmost.

        Raises:
            ValueError: if a latent has no value, or one of another shape.
        """
        names = [latent.name for latent in self._latents]
        if set(values) != set(names):
            raise ValueError(f"Expected values of the latents {names}, got {sorted(values)}.")
        parts = []
        for latent in self._latents:
            value = torch.as_tensor(values[latent.name]).to(latent.initial)
            shape = tuple(latent.to_support(latent.initial).shape)
            if value.shape not in (shape, (count, *shape)):
                raise ValueError(
                    f"Expected values of latent {latent.name!r} of shape {shape} or {(count, *shape)}, got "
                    f"{tuple(value.shape)}."
                )
            value = value.expand(count, *shape)
            parts.append(self._to_rows(latent, value if latent.is_real else latent.transform.inv(value)))
        return torch.cat(parts, -1)

    def values(self, u: Tensor) -> dict[str, Tensor]:
        """The latents at given coordinates, by site ``[C, *site]``: the way back from :meth:`coordinates`.

        Args:
            u: ``[C, B, K]``.
        """
        result = {}
        for latent, rows in zip(self._latents, u.split(self._sizes, -1), strict=True):
            value = latent.to_support(self._from_rows(latent, rows))
            result[latent.name] = value.reshape(len(u), *latent.to_support(latent.initial).shape)
        return result

    def row_axes(self) -> dict[str, int]:
        """By site the axis of the rows in :meth:`values`."""
        return {latent.name: 1 + self._batch_dim(latent) + self._frame.dim for latent in self._latents}

    def memory(self) -> int:
        """About how many bytes the graph of the gradient at one more point takes."""
        counts = []
        for count in (1, 2):
            kept: dict[int, int] = {}

            def keep(tensor, kept=kept):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                point = self.initial.expand(count, -1, -1).clone().requires_grad_()
                # The graph is kept until all is counted: freed memory would be reused, and several tensors counted as one.
                graph = self(point)
            counts.append(sum(kept.values()))
            del graph
        return max(counts[1] - counts[0], 16 * self.initial.numel() * self.initial.element_size())

    def chunks(self, count: int, max_memory: int) -> list[int]:
        """The sizes of the chunks in which ``count`` points are evaluated within ``max_memory`` bytes; at least one point each.

        On a CPU a chunk also fits the cache.
        """
        max_memory = min(max_memory, _CACHE) if self.initial.device.type == "cpu" else max_memory
        # Twice: gradients are computed while their graph is in memory.
        size = max(1, int(max_memory // (2 * self.memory()))) if self.at_once else 1
        return [size] * (count // size) + ([count % size] if count % size else [])

    @torch.no_grad()
    def log_weights(
        self, posterior: TorchDistribution, *, symmetric: bool, num_samples: int, max_memory: int
    ) -> LogWeights:
        """The log weights ``[S, B]`` of draws from a factor of the rows, of a symmetric one each with its mirror image.

        The effect of a shift of the factor on a log weight is mostly an odd function around the mean, and cancels in such a
        pair.

        Args:
            posterior: batch shape ``[B]``, event shape ``[K]``. From the same random state, two posteriors of one family
                have the same draws up to location and scale.
            symmetric: whether it is symmetric about its mean; otherwise all draws are independent, not in pairs.
            num_samples: ``S``, rounded up to an even number.
            max_memory: in bytes, what the draws that are evaluated at a time may take.
        """
        local = []
        sizes = self.chunks((num_samples + 1) // 2, max_memory)
        self._prepare(sizes[0], 2 * len(sizes))
        for count in sizes:
            u = posterior.rsample((count,))
            pair = [self._log_weight(posterior, u)]
            u = 2 * posterior.mean - u if symmetric else posterior.rsample((count,))
            pair.append(self._log_weight(posterior, u))
            local.append(torch.stack(pair, 1).flatten(0, 1))
        return self.weigh(torch.cat(local))

    @torch.no_grad()
    def log_prob(self, u: Tensor, *, max_memory: int) -> Tensor:
        """The log joint ``[C, B]`` of the rows, in double precision and without a gradient.

        Args:
            u: ``[C, B, K]`` coordinates.
            max_memory: in bytes, what the points that are evaluated at a time may take.
        """
        sizes = self.chunks(len(u), max_memory)
        self._prepare(sizes[0], len(sizes))
        return torch.cat([self._total(points) for points in u.split(sizes)])

    def weigh(self, local: Tensor) -> LogWeights:
        """Log weights ``[S, B]`` of the rows, as they count in the data."""
        zeros = local.new_zeros(len(local))
        return LogWeights(local, zeros, self.scale, has_globals=False, is_estimate=self.is_estimate)

    def _prepare(self, count: int, calls: int) -> None:
        """Compile the log joint at so many points, if that saves time over so many calls."""
        if not self.at_once or count in self._graphs:
            return
        if self._flops is None:
            self._flops = count_flops(self._evaluate, self.initial)
        if saves_time(count * self._flops, calls=calls, overhead=_HANDLERS, cost=_COST_OF_COMPILING):
            self._graphs[count] = compile_function(self._evaluate, *self._trial_points(count))

    def _trial_points(self, count: int) -> tuple[Tensor, Tensor]:
        """Two sets of ``count`` points near the initial one, the same in every call."""
        with seeded(0):
            noise = torch.randn(2, count, *self.initial.shape[1:]).to(self.initial)
        return self.initial + 0.1 * noise[0], self.initial + 0.1 * noise[1]

    def _total(self, u: Tensor) -> Tensor:
        graph = self._graphs.get(len(u))
        prior, likelihood = self(u) if graph is None else graph(u)
        return prior + likelihood

    def _log_weight(self, posterior: TorchDistribution, u: Tensor) -> Tensor:
        return self._total(u) - posterior.log_prob(u).double()

    def _runs_at_once(self) -> bool:
        with torch.no_grad():
            u = self._trial_points(2)[0]
            apart = [torch.cat(x) for x in zip(*(self._evaluate(point[None], alone=True) for point in u), strict=True)]
            try:
                together = self._evaluate(u)
            except _SHAPE_ERRORS:
                return False
        return all(
            torch.allclose(one, two, rtol=1e-4, atol=1e-4, equal_nan=True)
            for one, two in zip(together, apart, strict=True)
        )

    def _evaluate(self, u: Tensor, *, alone: bool = False) -> tuple[Tensor, Tensor]:
        count = len(u)
        given = self._rows.copy()
        log_det = u.new_zeros((), dtype=torch.double)
        for latent, rows in zip(self._latents, u.split(self._sizes, -1), strict=True):
            point = self._from_rows(latent, rows)
            value = latent.to_support(point)
            if not latent.is_real:
                ladj = latent.transform.log_abs_det_jacobian(point, value).double()
                log_det = log_det + ladj.movedim(1 + self._depth + self._frame.dim, 1).reshape(
                    count, self.num_rows, -1
                ).sum(-1)
            if alone:
                value = value.reshape(value.shape[1 + self._depth - self._batch_dim(latent) :])
            given.add_node(latent.name, type="sample", is_observed=False, value=value, infer={})
        with nullcontext() if alone else self._outer(count):
            trace = self._densities.at(self._model, self._args, self._kwargs, given, outer=1)
        prior, likelihood = self._densities.split(trace)
        shape = (count, self.num_rows)
        return (log_det + prior).expand(shape), likelihood.expand(shape)

    def _prior_draws(self, count: int, *, alone: bool = False) -> Tensor:
        given = self._rows
        with torch.no_grad(), nullcontext() if alone else self._outer(count):
            trace = poutine.trace(poutine.replay(self._model, trace=given)).get_trace(*self._args, **self._kwargs)
        values = {}
        for latent in self._latents:
            value = trace.nodes[latent.name]["value"]
            values[latent.name] = value.reshape(count, *latent.to_support(latent.initial).shape)
        return self.coordinates(values, count)

    def _outer(self, count: int) -> pyro.plate:
        return pyro.plate("_points", count, dim=-self._depth - 1)

    @staticmethod
    def _batch_dim(latent: Latent) -> int:
        return latent.initial.dim() - latent.unconstrained_event_dim

    def _to_rows(self, latent: Latent, value: Tensor) -> Tensor:
        """Unconstrained values ``[C, *site]`` as rows ``[C, B, k]``."""
        value = value.movedim(self._frame.dim - latent.unconstrained_event_dim, 1)
        return value.reshape(*value.shape[:2], -1)

    def _from_rows(self, latent: Latent, rows: Tensor) -> Tensor:
        """Rows ``[C, B, k]`` as unconstrained values ``[C, 1, ..., *site]``, with ones for plates that the site is not in."""
        shape, dim = self._shapes[latent.name], self._frame.dim - latent.unconstrained_event_dim
        others = list(shape)
        del others[dim]
        value = rows.reshape(len(rows), shape[dim], *others).movedim(1, dim)
        return value.reshape(len(rows), *(1,) * (self._depth - self._batch_dim(latent)), *shape)


def _check(structure, plate: str) -> None:
    if structure.global_latents or [rows.plates for rows in structure.row_sets] != [(plate,)]:
        outside = [latent.name for latent in structure.global_latents]
        raise ValueError(f"Expected local latents in plate {plate!r} and no others, got {outside} besides.")
    for latent in structure.local_latents:
        if latent.num_values is not None:
            raise ValueError(
                f"Expected continuous latents, got the discrete latent {latent.name!r}.\nSum it out in the model."
            )
        if latent.is_weighted:
            raise ValueError(
                f"Expected latents with a density, got latent {latent.name!r} under a mask or a scale: its prior does not "
                "integrate to 1, and there is no evidence."
            )
