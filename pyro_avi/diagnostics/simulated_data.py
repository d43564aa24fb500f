"""Data sets simulated from a model, which replace the data of a call."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_avi.densities.row_densities import RowDensities
from pyro_avi.inspection.isolated_run import isolated_run
from pyro_avi.inspection.masks import site_mask
from pyro_avi.inspection.sites import equal, is_scaled

__all__ = ["Simulator"]

_Call = tuple[tuple, Mapping[str, Any]]


class Simulator:
    """Draws latents and observations of the rows of a call from the model, and puts the observations into its arguments.

    An argument is replaced where it is the observed value itself, in any shape. What else the model is given stays: the
    positions of rows, covariates, masks.

    Args:
        model: any Pyro callable without global latents.
        plate: the name of the plate of the rows.
        args, kwargs: its arguments.
        latents: the names of the latents of the rows.
        rebuild: from simulated values by site to the arguments, a tuple of the positional and a dictionary of the others.

    Raises:
        ValueError: if nothing is observed in the plate, what the model observes is no argument, or its draws do not follow
            its density.
    """

    def __init__(
        self,
        model: Callable,
        plate: str,
        args: tuple,
        kwargs: Mapping[str, Any],
        latents: Sequence[str],
        rebuild: Callable[[dict[str, Tensor]], _Call] | None = None,
    ):
        self._model, self._plate, self._latents = model, plate, tuple(latents)
        self._args, self._kwargs, self._rebuild = args, kwargs, rebuild
        with isolated_run(0):
            self._densities = RowDensities(model, args, kwargs, plate=plate)
        nodes = self._densities.trace.nodes
        observed = {name: nodes[name] for name in self._densities.observed}
        if not observed:
            raise ValueError(f"Expected an observation in plate {plate!r} in this call, got none: pass the data.")
        _check_draws({name: nodes[name] for name in self._densities.sites}, observed, self._latents)
        self._observed = tuple(observed)
        self._leaves, self._structure = tree_flatten((args, dict(kwargs)))
        self._places = {} if rebuild else {name: self._find(name, site["value"]) for name, site in observed.items()}

    def _find(self, name: str, value: Tensor) -> list[int]:
        """The positions of an observed value among the leaves of the arguments."""
        places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor) and _same(leaf, value)]
        if len(places) > 1 and (value == value.flatten()[0]).all():
            # Zeros in the place of data look like any other zeros.
            places = [i for i in places if self._leaves[i].data_ptr() == value.data_ptr()]
        if not places:
            raise ValueError(
                f"Expected the values observed at site {name!r} to be an argument of the model, found none that is.\n"
                "Try one of the following fixes:\n"
                "- pass all rows of a data set, or rows with their positions, instead of letting the model draw them\n"
                "- say how simulated values become arguments: rebuild=lambda values: ((values[...], ...), {})"
            )
        return places

    def draw(self) -> tuple[dict[str, Tensor], "Simulated"]:
        """Latents by site in the site's shape, and the call with the observations that they came with.

        Raises:
            ValueError: if the model does not observe the simulated values when it is given them.
        """

        def unobserved(*args, **kwargs):
            with poutine.uncondition(), poutine.block(hide_fn=self._stays):
                return self._model(*args, **kwargs)

        nodes = poutine.trace(unobserved).get_trace(*self._args, **self._kwargs).nodes
        latents = {name: nodes[name]["value"] for name in self._latents}
        values = {name: nodes[name]["value"] for name in self._observed}
        args, kwargs = self._rebuild(values) if self._rebuild else self._put(values)
        simulated = Simulated(self._model, self._densities, args, kwargs)
        trace = simulated.trace(latents)
        for name, value in values.items():
            site = trace.nodes.get(name)
            if site is None or not site["is_observed"] or not _close(site["value"], value):
                raise ValueError(
                    f"Expected the model to observe the simulated values at site {name!r} when it is given them, got "
                    "others.\nSay how simulated values become arguments: rebuild=lambda values: ((values[...], ...), {}). "
                    "Rows have to be given: a model that draws its rows gives others every time."
                )
        return latents, simulated

    def _stays(self, msg) -> bool:
        return msg["type"] == "sample" and msg["is_observed"] and msg["name"] not in self._observed

    def _put(self, values: Mapping[str, Tensor]) -> _Call:
        leaves = list(self._leaves)
        for name, places in self._places.items():
            for place in places:
                leaves[place] = values[name].reshape(leaves[place].shape).to(leaves[place].dtype)
        return tree_unflatten(leaves, self._structure)


class Simulated:
    """A call of the model with simulated observations.

    Attributes:
        args, kwargs: the arguments.
    """

    def __init__(self, model: Callable, densities: RowDensities, args: tuple, kwargs: Mapping[str, Any]):
        self.args, self.kwargs = tuple(args), dict(kwargs)
        self._model, self._densities = model, densities

    def trace(self, latents: Mapping[str, Tensor]) -> Trace:
        """A trace of the model at given latents.

        Args:
            latents: by site.
        """
        given = Trace()
        for name, value in latents.items():
            given.add_node(name, type="sample", is_observed=False, value=value, infer={})
        return self._densities.at(self._model, self.args, self.kwargs, given)

    def log_likelihood(self, latents: Mapping[str, Tensor]) -> Tensor:
        """``[B]`` the log density of the rows' observations at given latents.

        Args:
            latents: by site.
        """
        return self._densities.split(self.trace(latents))[1]


def _same(leaf: Tensor, value: Tensor) -> bool:
    # A draw of whole numbers has the type of its distribution's parameters.
    return leaf.numel() == value.numel() and equal(leaf.detach().reshape(value.shape).to(value), value)


def _close(found: Tensor, value: Tensor) -> bool:
    # There and back through the caller's transform, values are rounded.
    return found.numel() == value.numel() and torch.allclose(
        found.reshape(value.shape).to(value), value, rtol=1e-4, atol=1e-4, equal_nan=True
    )


def _check_draws(in_plate: Mapping[str, Mapping], observed: Mapping[str, Mapping], latents: Sequence[str]) -> None:
    """Raise an error for factors, scales and masks, which draws from the model do not follow."""
    for name, site in in_plate.items():
        if site["is_observed"] and isinstance(site["fn"], dist.Unit):
            what = "a pyro.factor"
        elif (name in observed or name in latents) and is_scaled(site):
            what = "a scale"
        elif name in latents and site_mask(site) is not None:
            what = "a mask"
        else:
            continue
        raise ValueError(
            f"Expected a model whose draws follow its density, got {what} at site {name!r}.\n"
            "Draws do not know of it, so that rows drawn from the model say nothing about its posterior."
        )
