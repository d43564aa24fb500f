"""The factor of a set of latents: where variational parameters become sampled sites."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import prod

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor, nn

from pyro_avi.families import DiagonalNormal, Family, Flow, RowFlow
from pyro_avi.guides.placed import Placed
from pyro_avi.masks import Mask
from pyro_avi.structure import Latent

__all__ = ["Factor"]


class Factor(nn.Module):
    """Samples latents, site by site and inside their plates, from variational parameters.

    The continuous latents of one row are one vector of ``K`` unconstrained coordinates, in the order of the model's sites,
    with a distribution of the family. A discrete latent has a categorical factor of its own, and one parameter for each of
    its values. Plates of a latent other than the rows' are event dimensions of that row.

    Args:
        name: of the auxiliary site that a joint family is sampled at.
        latents: the latents of the factor.
        frames: the plates of the rows, the one with the leftmost dimension first; none for a factor without rows.
        family: the set that a row's factor is taken from, not yet prepared.
    """

    def __init__(
        self, name: str, latents: Sequence[Latent], frames: Sequence[CondIndepStackFrame], family: Family | None = None
    ):
        super().__init__()
        self.name, self.latents, self.frames = name, tuple(latents), tuple(frames)
        self._layouts = {latent.name: _Layout(latent, self.frames) for latent in self.latents}
        self._continuous = [latent for latent in self.latents if latent.num_values is None]
        self._discrete = [latent for latent in self.latents if latent.num_values is not None]
        self._sizes = [self._layouts[latent.name].size for latent in self._continuous]
        self._categories = [self._layouts[latent.name].size * latent.num_values for latent in self._discrete]
        self.family = family or DiagonalNormal()
        self.num_latents = sum(self._sizes)
        of_family = 0
        if self._continuous:
            self.family.prepare(self.num_latents)
            of_family = self.family.num_parameters(self.num_latents)
        self._split = [of_family, *self._categories]
        self.num_parameters = sum(self._split)

    @property
    def plates(self) -> tuple[str, ...]:
        """The names of the plates of the rows."""
        return tuple(frame.name for frame in self.frames)

    def initial(self, scale: float) -> Tensor:
        """Parameters ``[*B, P]`` at the latents' initial values with standard deviation ``scale``."""
        parts = []
        if self._continuous:
            locs = [self._layouts[latent.name].to_rows(latent.initial) for latent in self._continuous]
            parts.append(self.family.initial(torch.cat(locs, -1), scale))
        for latent, width in zip(self._discrete, self._categories, strict=True):
            # Every value alike: what one draw was is no information.
            parts.append(torch.zeros(*self._layouts[latent.name].to_rows(latent.initial).shape[:-1], width))
        return torch.cat([part.to(parts[0]) for part in parts], -1)

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        """The distribution of the continuous latents' coordinates: batch shape ``[*B]``, event shape ``[K]``."""
        if not self._continuous:
            raise ValueError(
                f"Expected a continuous latent in plate {' x '.join(self.plates)}, found discrete ones only.\n"
                "Draw from the guide itself, or ask it for its median."
            )
        return self.family.distribution(parameters[..., : self._split[0]])

    def statements(
        self,
        parameters: Tensor,
        plates: Mapping[str, pyro.plate],
        masks: Mapping[str, Mask],
        scales: Mapping[str, Tensor | float],
    ) -> dict[str, Callable[[], Tensor]]:
        """The sample statements by site, to be run in the order of the model; a joint family is sampled at once.

        Args:
            parameters: ``[*B, P]``, one row for each row of the plates.
            plates: the plates of the sites, by name.
            masks: what masks the model's sites, by site; those of single elements of an event leave out the same
                coordinates here.
            scales: the factor by which the model's sites count beyond their plates, by site.
        """

        def sample(latent: Latent, fn: dist.TorchDistribution) -> Tensor:
            mask = masks.get(latent.name)
            if mask is not None and mask.event_dim:
                mask, fn = None, mask.inside(fn)
            with ExitStack() as stack:
                for frame in latent.frames:
                    stack.enter_context(plates[frame.name])
                _enter(stack, mask, scales.get(latent.name))
                return pyro.sample(latent.name, fn)

        parts = parameters.split(self._split, -1) if self._discrete else [parameters]
        sites = [(latent, self._categorical(latent, x)) for latent, x in zip(self._discrete, parts[1:], strict=True)]
        if isinstance(self.family, DiagonalNormal):
            sites += [(latent, _on_support(latent, normal)) for latent, normal in self._normals(parts[0])]
        elif self._continuous:
            joint = self._sample_joint(parts[0], plates, masks, scales).split(self._sizes, -1)
            sites += [(latent, self._placed(latent, x)) for latent, x in zip(self._continuous, joint, strict=True)]
        return {latent.name: partial(sample, latent, fn) for latent, fn in sites}

    def _sample_joint(self, parameters, plates, masks, scales) -> Tensor:
        """One draw of all continuous latents of every row, at an auxiliary site."""
        depth = max(-frame.dim for frame in self.frames)
        fn = self.family.distribution(_spread(parameters, self.frames, depth))
        with ExitStack() as stack:
            for frame in self.frames:
                stack.enter_context(plates[frame.name])
            _enter(stack, self._of_rows(masks, "mask"), self._of_rows(scales, "scale"))
            return pyro.sample(self.name, fn, infer={"is_auxiliary": True})

    def _of_rows(self, given: Mapping[str, Mask | Tensor | float], what: str):
        """What masks or scales whole rows, the same for all of their latents."""
        found = [given.get(latent.name) for latent in self._continuous]
        values = [x.values if isinstance(x, Mask) else x for x in found]
        whole = not any(isinstance(x, Mask) and x.event_dim for x in found)
        whole &= all(x is values[0] or (not isinstance(x, Tensor) and x == values[0]) for x in values)
        if whole and isinstance(values[0], Tensor):
            rows = {-frame.dim for frame in self.frames}
            whole = all(size == 1 or values[0].dim() - i in rows for i, size in enumerate(values[0].shape))
        if not whole:
            names = [latent.name for latent in self._continuous]
            raise ValueError(
                f"Expected one {what} for whole rows with the joint family {type(self.family).__name__}, got a {what} on "
                f"{[name for name in names if name in given]} of the latents {names}, or on a part of their elements.\n"
                "A joint factor cannot leave out a part of a row. Use family=DiagonalNormal(), or one poutine."
                f"{what} around all latents of the rows."
            )
        return found[0]

    def _placed(self, latent: Latent, rows: Tensor) -> Placed:
        """A latent's site, computed from a joint draw of unconstrained coordinates."""
        layout = self._layouts[latent.name]
        coordinates = layout.from_spread(rows)
        value = latent.to_support(coordinates)
        if latent.is_real:
            log_density = torch.zeros((), dtype=value.dtype, device=value.device)
        else:
            log_density = -latent.transform.log_abs_det_jacobian(coordinates, value)
            log_density = (
                log_density.sum(tuple(range(-latent.independent_dim, 0))) if latent.independent_dim else log_density
            )
        return Placed(
            value, log_density.expand(value.shape[: value.dim() - latent.event_dim]), event_dim=latent.event_dim
        )

    def draw(self, parameters: Tensor, count: int) -> dict[str, Tensor]:
        """Independent draws of every site, ``count`` leftmost: ``(count,) + shape of the site``; no sample statements.

        Args:
            parameters: ``[*B, P]``, one row for each row of the plates.
            count: the number of draws.
        """
        result = {}
        parts = parameters.split(self._split, -1)
        if self._continuous:
            coordinates = self.family.distribution(parts[0]).sample((count,))
            for latent, rows in zip(self._continuous, coordinates.split(self._sizes, -1), strict=True):
                result[latent.name] = latent.to_support(self._layouts[latent.name].from_rows(rows))
        for latent, logits in zip(self._discrete, parts[1:], strict=True):
            result[latent.name] = self._categorical(latent, logits).sample((count,))
        return {latent.name: result[latent.name] for latent in self.latents}

    def mean(self, parameters: Tensor) -> dict[str, Tensor]:
        """The mean of every site: its median where that is the same, else the average of 1,000 draws under a fixed seed.

        Args:
            parameters: ``[*B, P]``, one row for each row of the plates.
        """
        result = self.quantile(parameters, parameters.new_tensor(0.5)) if self._is_normal else {}
        drawn = [latent.name for latent in self.latents if not (self._is_normal and latent.is_real)]
        if drawn:
            devices = [parameters.device] if parameters.is_cuda else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(0)
                draws = self.draw(parameters, 1000)
            result.update((name, draws[name].to(parameters.dtype).mean(0)) for name in drawn)
        return {latent.name: result[latent.name] for latent in self.latents}

    @property
    def _is_normal(self) -> bool:
        return not isinstance(self.family, (Flow, RowFlow))

    def row_shape(self, name: str) -> list[int]:
        """The shape of a latent's unconstrained coordinates in one row: other plates, then event dimensions."""
        return self._layouts[name].row_shape

    def row_dim(self, name: str) -> int:
        """The dimension of a site's value that holds the rows of the one plate, from the right."""
        latent = next(latent for latent in self.latents if latent.name == name)
        return self.frames[0].dim - latent.event_dim

    def quantile(self, parameters: Tensor, q: Tensor) -> dict[str, Tensor]:
        """The ``q``-quantiles of every coordinate, mapped to the supports: ``q.shape + shape of the site``."""
        result = {}
        parts = parameters.split(self._split, -1)
        if self._continuous:
            coordinates = self.family.quantile(parts[0], q)
            for latent, rows in zip(self._continuous, coordinates.split(self._sizes, -1), strict=True):
                result[latent.name] = latent.to_support(self._layouts[latent.name].from_rows(rows))
        for latent, logits in zip(self._discrete, parts[1:], strict=True):
            below = self._layouts[latent.name].from_rows(logits, latent.num_values).softmax(-1).cumsum(-1)
            # The smallest value that at least a share q lies at or below; rounding may leave the last sum below 1.
            reached = (below[..., :-1] < q.reshape(q.shape + (1,) * below.dim())).sum(-1)
            result[latent.name] = reached.to(latent.initial.dtype)
        return {latent.name: result[latent.name] for latent in self.latents}

    def _normals(self, parameters: Tensor):
        if not self._continuous:
            return
        normal = self.family.coordinates(parameters)
        alone = len(self._sizes) == 1
        locs, scales = ([x] if alone else x.split(self._sizes, -1) for x in (normal.loc, normal.scale))
        for latent, loc, scale in zip(self._continuous, locs, scales, strict=True):
            layout = self._layouts[latent.name]
            yield latent, dist.Normal(layout.from_rows(loc), layout.from_rows(scale))

    def _categorical(self, latent: Latent, logits: Tensor) -> dist.TorchDistribution:
        logits = self._layouts[latent.name].from_rows(logits, latent.num_values)
        boolean = latent.is_boolean
        fn = dist.Bernoulli(logits=logits[..., 1] - logits[..., 0]) if boolean else dist.Categorical(logits=logits)
        return fn.to_event(latent.event_dim)


def _on_support(latent: Latent, normal: dist.Normal) -> dist.TorchDistribution:
    """A latent's site, sampled from normals of its unconstrained coordinates."""
    # A real site is sampled from its normals themselves, and an elementwise support is transformed by elements, so that
    # closed-form divergences apply.
    if latent.is_real:
        return normal.to_event(latent.unconstrained_event_dim)
    inner = latent.unconstrained_event_dim - latent.independent_dim
    return dist.TransformedDistribution(normal.to_event(inner), [latent.transform]).to_event(latent.independent_dim)


def _enter(stack: ExitStack, mask: Mask | None, scale: Tensor | float | None) -> None:
    if mask is not None:
        stack.enter_context(poutine.mask(mask=mask.values))
    if scale is not None:
        stack.enter_context(poutine.scale(scale=scale))


def _spread(rows: Tensor, frames: Sequence[CondIndepStackFrame], depth: int, lead: int = 0) -> Tensor:
    """Rows ``[..., *B, K]`` with ``depth`` dimensions for plates, each where its plate says, behind ``lead`` others."""
    sizes = dict(zip((-frame.dim for frame in frames), rows.shape[lead:], strict=False))
    return rows.reshape(*rows.shape[:lead], *(sizes.get(depth - i, 1) for i in range(depth)), rows.shape[-1])


class _Layout:
    """How a latent's tensor, batch and event dimensions, lies in the rows ``[*B, K]``."""

    def __init__(self, latent: Latent, frames: Sequence[CondIndepStackFrame]):
        shape = latent.initial.shape
        split = latent.initial.dim() - latent.unconstrained_event_dim
        batch, self._event = shape[:split], tuple(shape[split:])
        self._frames = tuple(frames)
        self._rows = {-frame.dim for frame in frames}
        self._depth = len(batch)
        # The plates that are no rows: their sizes where they stand, 1 elsewhere.
        self._inner = tuple(1 if len(batch) - i in self._rows else size for i, size in enumerate(batch))
        self.size = prod(self._inner) * prod(self._event)
        self.row_shape = [*self._inner, *self._event]
        # A vector in one plate needs no reshaping, in the most frequent case and the one with the least to do.
        self._is_rows = self._depth == len(self._frames) == len(self._event) == 1

    def to_rows(self, value: Tensor) -> Tensor:
        """``[*B, K]`` of a tensor in the site's shape."""
        positions = [self._depth + frame.dim for frame in self._frames]
        value = value.movedim(positions, list(range(len(positions))))
        return value.reshape((*value.shape[: len(positions)], -1))

    def from_rows(self, rows: Tensor, extra: int | None = None) -> Tensor:
        """The site's shape of ``[..., *B, K]``, or of ``[..., *B, K * extra]`` with ``extra`` elements in each."""
        if self._is_rows and extra is None:
            return rows
        lead = rows.dim() - 1 - len(self._frames)
        return self.from_spread(_spread(rows, self._frames, self._depth, lead), extra)

    def from_spread(self, rows: Tensor, extra: int | None = None) -> Tensor:
        """The site's shape of rows whose plates' dimensions stand where the plates say, behind any others."""
        event = self._event if extra is None else (*self._event, extra)
        batch = rows.shape[:-1]
        batch = (1,) * (self._depth - len(batch)) + tuple(batch)
        lead, batch = batch[: len(batch) - self._depth], batch[len(batch) - self._depth :]
        if prod(self._inner) == 1:
            return rows.reshape((*lead, *batch, *event))
        rows = rows.reshape((*lead, *batch, *self._inner, *event))
        # In each dimension either the rows or the other plate has size 1.
        pairs = [len(lead) + x for i in range(self._depth) for x in (i, self._depth + i)]
        tail = range(len(lead) + 2 * self._depth, rows.dim())
        merged = [a * b for a, b in zip(batch, self._inner, strict=True)]
        return rows.permute(*range(len(lead)), *pairs, *tail).reshape((*lead, *merged, *event))
