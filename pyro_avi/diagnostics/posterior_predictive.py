"""Draws of what a model observes, from its posterior predictive given a guide."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_avi.densities.log_factors import enumeration_depth, sample_enumerated
from pyro_avi.display.progress_bar import progress_bar
from pyro_avi.errors import check_count
from pyro_avi.inspection.isolated_run import isolated_run
from pyro_avi.inspection.sites import is_observation
from pyro_avi.lock import in_turn
from pyro_avi.seeds import as_seed

__all__ = ["Predictor", "posterior_predictive"]

# Errors of a model or guide that cannot run in an additional plate.
_SHAPE_ERRORS = (RuntimeError, ValueError, IndexError, KeyError, TypeError)
# Bytes of the values that are drawn at a time.
_AT_A_TIME = 2**26


@in_turn
def posterior_predictive(
    model: Callable,
    guide: Callable,
    *args,
    num_samples: int,
    seed: int | None = 0,
    progress: bool = True,
    **kwargs,
) -> dict[str, Tensor]:
    r"""Draw new observations from the posterior predictive of a model and a guide.

    .. math:: \theta, z_{1:N} \sim q, \qquad \tilde x_n \sim p(\tilde x_n \mid z_n, \theta)

    The guide answers for the call as it is given; then its latents stand and all observations are drawn anew, those that
    depend on one another in the order of the model. What the model reads from its arguments stays: sizes, positions of rows,
    covariates, masks. Elements that a mask leaves out are drawn like any others. Enumerated latents of the model are drawn
    from their posterior given the guide's draw. Modules are called in evaluation mode.

    Args:
        model: any Pyro callable.
        guide: any Pyro guide.
        *args, **kwargs: the arguments of both.
        num_samples: ``S``, the number of draws. They are made together where model and guide run in a plate around them and
            give the same densities there, otherwise one after the other.
        seed: the seed of the draws; ``None`` for one drawn from the random state of the program.
        progress: whether to show a progress bar, which appears after the first second.

    Returns:
        By site ``[S, *shape of the site]``: of every site that the model observes, and every other one that the guide does not
        sample, as an observation that is left out of the call. A site with ``obs_mask=`` is ``name_observed``.

    Raises:
        ValueError: if there is no such site, an observation cannot be drawn, there are no draws, or the model draws other
            rows every time.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.AmortizedGuide(model).setup(x)
        >>> draws = avi.posterior_predictive(model, guide, x, num_samples=10)
        >>> draws["x"].shape
        torch.Size([10, 20, 1, 8, 8])
    """
    check_count("num_samples", num_samples)
    predictor = Predictor(model, guide, args, kwargs)
    if not predictor.sites:
        raise ValueError(
            "Expected a model with observations to draw, got one without.\n"
            "Write them as pyro.sample(name, fn, obs=x): a pyro.factor has no distribution to draw from."
        )
    draws: dict[str, Tensor] = {}
    seed = as_seed(seed)
    with isolated_run(seed), progress_bar(num_samples, unit="draw", progress=progress) as bar:
        done = 0
        for count in predictor.chunks(num_samples):
            for name, values in predictor.draw(count).items():
                if name not in draws:
                    draws[name] = values.new_empty(num_samples, *values.shape[1:])
                draws[name][done : done + count] = values
            done += count
            bar.update(count)
    return draws


class Predictor:
    """Draws the observations of one call of a model, given latents of a guide.

    Args:
        model, guide, args, kwargs: as in :func:`posterior_predictive`.

    Attributes:
        sites: the names of the sites that are drawn.
    """

    def __init__(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]):
        self._model, self._guide, self._args, self._kwargs = model, guide, args, kwargs
        with isolated_run(0):
            self._of_guide = self._trace(guide)
            of_model = self._trace(poutine.replay(model, trace=self._of_guide))
            self._enumeration = enumeration_depth(of_model, self._of_guide.nodes)
            self.sites = tuple(name for name, site in of_model.nodes.items() if self._is_predicted(name, site))
            self._rows = _rows(of_model)
            self._of_model = self._unobserved(self._latents(self._of_guide))
            self._check_events(of_model)
            frames = _frames(self._of_guide) + _frames(of_model)
            self._depth = max((-frame.dim for frame in frames if frame.vectorized), default=0)
            # Three runs: rows that are drawn again are seldom the same.
            for _ in range(2):
                self._check_rows(self._trace(poutine.replay(model, trace=self._trace(guide))))

    def at(self, latents: Trace) -> dict[str, Tensor]:
        """One draw of every site, given a trace with the latents of model and guide.

        Args:
            latents: of which only the sites of latents are read.
        """
        nodes = self._unobserved(latents).nodes
        return {name: nodes[name]["value"] for name in self.sites}

    def draw(self, count: int) -> dict[str, Tensor]:
        """``[count, *shape]`` of every site, together where that gives the same.

        Args:
            count: 1 where draws are not made together.
        """
        if not self.at_once:
            of_guide = self._trace(self._guide)
            values = self.at(self._latents(of_guide))
            return {name: value.unsqueeze(0) for name, value in values.items()}
        _, of_model = self._together(count)
        return {name: self._split(of_model, name, count, self._of_model) for name in self.sites}

    def chunks(self, num_samples: int) -> list[int]:
        """The numbers of draws that are made at a time.

        Args:
            num_samples: the number of all.
        """
        if not self.at_once:
            return [1] * num_samples
        values = [site["value"] for site in self._of_model.nodes.values() if isinstance(site.get("value"), Tensor)]
        size = max(1, _AT_A_TIME // max(1, sum(value.numel() * value.element_size() for value in values)))
        return [size] * (num_samples // size) + ([num_samples % size] if num_samples % size else [])

    def _trace(self, program: Callable) -> Trace:
        return poutine.trace(program).get_trace(*self._args, **self._kwargs)

    def _is_predicted(self, name: str, site: Mapping[str, Any]) -> bool:
        if site["type"] != "sample" or site_is_subsample(site):
            return False
        if site["is_observed"]:
            return is_observation(site)
        return name not in self._of_guide.nodes and not site["infer"].get("enumerate")

    def _latents(self, of_guide: Trace) -> Trace:
        """The latents of a draw, with draws from the posterior of those that the model enumerates."""
        if self._enumeration is None:
            return of_guide
        trace = sample_enumerated(self._model, self._args, self._kwargs, of_guide, depth=self._enumeration)
        self._check_rows(trace)
        return trace

    def _unobserved(self, latents: Trace) -> Trace:
        """A trace of the model with given latents, in which nothing is observed that can be drawn."""
        given = Trace()
        for name, site in latents.nodes.items():
            if site["type"] == "sample" and not site["is_observed"]:
                given.add_node(name, **site)

        def stays(msg) -> bool:
            return msg["type"] == "sample" and msg["is_observed"] and msg["name"] not in self.sites

        def unobserved(*args, **kwargs):
            with poutine.uncondition(), poutine.block(hide_fn=stays):
                return self._model(*args, **kwargs)

        try:
            trace = self._trace(poutine.replay(unobserved, trace=given))
        except (NotImplementedError, AssertionError) as error:
            # Pyro's hidden Markov models assert that they were given a duration.
            raise _cannot_be_drawn(
                f"one of {list(self.sites)} whose sample() fails with a {type(error).__name__}"
            ) from error
        self._check_rows(trace)
        return trace

    def _check_events(self, observed: Trace) -> None:
        for name in self.sites:
            # A series without a given duration would be drawn with another one than the data have.
            shapes = [tuple(_event(trace.nodes[name])) for trace in (observed, self._of_model)]
            if shapes[0] != shapes[1]:
                raise _cannot_be_drawn(f"site {name!r} with draws of shape {shapes[1]} where the data have {shapes[0]}")

    def _check_rows(self, trace: Trace) -> None:
        rows = _rows(trace)
        if rows.keys() != self._rows.keys() or not all(torch.equal(rows[name], self._rows[name]) for name in rows):
            raise ValueError("Expected the same rows in every draw, got a model that draws its rows: pass them.")

    def _together(self, count: int) -> tuple[Trace, Trace]:
        """Traces of guide and model with ``count`` draws in a plate around them."""
        with pyro.plate("_draws", count, dim=-self._depth - 1):
            of_guide = self._trace(self._guide)
            return of_guide, self._unobserved(of_guide)

    @staticmethod
    def _split(trace: Trace, name: str, count: int, alone: Trace) -> Tensor:
        """``[count, *shape]`` the values of a site, of the shape that it has in one draw."""
        return trace.nodes[name]["value"].reshape(count, *alone.nodes[name]["value"].shape)

    @cached_property
    def at_once(self) -> bool:
        """Whether draws can be made together: two in a plate have the densities that each has alone."""
        if self._enumeration is not None:
            return False
        try:
            with isolated_run(0):
                together = self._together(2)
                return all(self._is_as_alone(together, position) for position in range(2))
        except _SHAPE_ERRORS:
            return False

    def _is_as_alone(self, together: tuple[Trace, Trace], position: int) -> bool:
        of_guide, of_model = (
            _at(trace, position, alone) for trace, alone in zip(together, (self._of_guide, self._of_model), strict=True)
        )
        runs = self._trace(poutine.replay(self._guide, trace=of_guide)), self._unobserved(of_model)
        return all(_same_densities(trace, position, run) for trace, run in zip(together, runs, strict=True))


def _cannot_be_drawn(found: str) -> ValueError:
    return ValueError(
        f"Expected observations that can be drawn like the data, got {found}.\n"
        "Give the distribution a sample() of that shape, as duration= does of Pyro's hidden Markov models, or leave the draws "
        "out: avi.to_arviz(..., posterior_predictive=False)."
    )


def _event(site: Mapping[str, Any]) -> torch.Size:
    """The shape of a row's value."""
    return site["value"].shape[site["value"].dim() - site["fn"].event_dim :]


def _drawn(trace: Trace) -> dict[str, Mapping[str, Any]]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }


def _rows(trace: Trace) -> dict[str, Tensor]:
    return {name: site["value"] for name, site in trace.nodes.items() if site_is_subsample(site)}


def _frames(trace: Trace) -> list:
    return [frame for site in trace.nodes.values() for frame in site.get("cond_indep_stack", ())]


def _at(trace: Trace, position: int, alone: Trace) -> Trace:
    """One of two draws that were made together, with the shapes of one made alone."""
    one = Trace()
    for name, site in _drawn(alone).items():
        value = trace.nodes[name]["value"].reshape(2, *site["value"].shape)[position]
        one.add_node(name, **{**site, "value": value})
    return one


def _same_densities(together: Trace, position: int, alone: Trace) -> bool:
    for name, site in _drawn(alone).items():
        one = site["fn"].log_prob(site["value"])
        both = together.nodes[name]["fn"].log_prob(together.nodes[name]["value"])
        if not torch.allclose(both.reshape(2, *one.shape)[position], one, rtol=1e-4, atol=1e-4, equal_nan=True):
            return False
    return True
