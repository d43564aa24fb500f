"""A call whose latents are all global, as one row of a plate around it."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_avi.guide_bases.local_guide import LocalGuide
from pyro_avi.guide_bases.mean_field import MeanFieldNormal
from pyro_avi.guides import FactorizedGuide
from pyro_avi.inspection.isolated_run import isolated_run

__all__ = ["OneRow", "as_one_row", "write_back"]

_PLATE = "call"


class _Unseen(Messenger):
    """Removes the dimension of the plate around a model from the values that its sites return."""

    def __init__(self, depth: int):
        super().__init__()
        self._depth = depth
        self._shapes: dict[str, torch.Size] = {}

    def _pyro_sample(self, msg):
        if not site_is_subsample(msg):
            self._shapes[msg["name"]] = msg["fn"].batch_shape

    def _pyro_post_sample(self, msg):
        shape = self._shapes.pop(msg["name"], None)
        if shape is None or msg["is_observed"]:
            return
        # Under plates further out, as the one of several points, values keep the dimension; so do the values of an enumerated
        # latent.
        fn, value = msg["fn"], msg["value"]
        if len(fn.batch_shape) == self._depth + 1 and value.shape == fn.batch_shape + fn.event_shape:
            msg["value"] = value.reshape(shape + fn.event_shape)


class OneRow:
    """A model in a plate of one row, so that methods for rows apply to the whole call.

    Args:
        model: any Pyro callable.
        depth: the number of dimensions of its plates.
    """

    def __init__(self, model: Callable, depth: int):
        self.model, self._depth = model, depth

    def __call__(self, *args, **kwargs):
        """Run the model."""
        with pyro.plate(_PLATE, 1, dim=-self._depth - 1), _Unseen(self._depth):
            return self.model(*args, **kwargs)


def as_one_row(
    model: Callable, guide: LocalGuide, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[OneRow, FactorizedGuide]:
    """The call as one row, and a guide with the parameters of the given one.

    Args:
        model: any Pyro callable.
        guide: a guide for it whose latents are all global, with the default factor of these.
        args, kwargs: the arguments of both.

    Raises:
        ValueError: if the globals have a factor of another kind.
    """
    mean_field = guide.global_guide
    if not isinstance(mean_field, MeanFieldNormal):
        raise ValueError(
            f"Expected the default factor of global latents, got {type(mean_field).__name__}.\n"
            "Without latents in a plate the factor of the globals is what is measured: of a MeanFieldNormal alone it is known "
            "how to refine it. avi.log_weights takes any guide."
        )
    with isolated_run(0):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    frames = [frame for site in trace.nodes.values() for frame in site.get("cond_indep_stack", ()) if frame.vectorized]
    one_row = OneRow(model, max((-frame.dim for frame in frames), default=0))
    table = FactorizedGuide(one_row, plate=_PLATE, same_rows=True).setup(*args, **kwargs)
    with torch.no_grad():
        table.table.copy_(mean_field.vector)
    return one_row, table


def write_back(model: Callable, table: FactorizedGuide, args: tuple, kwargs: Mapping[str, Any]) -> FactorizedGuide:
    """A guide for the model itself with the parameters of the one row.

    Args:
        model, args, kwargs: the call.
        table: the guide for it as one row.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The model has no plate")
        result = FactorizedGuide(model, same_rows=True).setup(*args, **kwargs)
    with torch.no_grad():
        result.global_guide.vector.copy_(table.row_factors[0].function.table[0])
    return result
