"""The ELBO with discrete latents summed over, all of a row's together."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_avi.elbos.several_draws import PARTICLES, Draws, RowSums, SeveralDrawsELBO, sites_of
from pyro_avi.elbos.sites import innermost, is_drawn
from pyro_avi.errors import CallError

__all__ = ["EnumeratedELBO"]


class EnumeratedELBO(SeveralDrawsELBO):
    r"""The ELBO, exactly summed over the joint values of a row's discrete latents.

    .. math:: \mathrm{ELBO} = \sum_n \sum_{y} q(y) \left( \log p(x_n, y) - \log q(y) \right)

    Bernoullis, categoricals and one-hot vectors, several of them, and vectors of them, whose values ``TraceEnum_ELBO`` does
    not list. Latents with a path are drawn for each value. All values are evaluated at once: a vector of 8 bits takes 256
    times the memory of a draw.

    Args:
        max_values: the most joint values of a row.
        max_plate_nesting, and others: as for ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: if a latent has infinitely many values, there is no discrete one, or the joint values are too many.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = (torch.rand(20, 1, 8, 8) > 0.5).float()
        >>> model = avi.models.SigmoidBelief(avi.models.DenseDecoder(3, (16,), (1, 8, 8)), size=20)
        >>> avi.fit(model, avi.AmortizedGuide(model), x, num_steps=2, elbo=avi.EnumeratedELBO(), progress=False).steps
        2
    """

    # Found at the first call where it is not given.
    max_plate_nesting: Any

    def __init__(self, *, max_values: int = 4096, **kwargs):
        super().__init__(2, vectorize_particles=True, **kwargs)
        self._max_values = max_values
        self._values: dict[str, Tensor] | None = None

    def _get_traces(self, model, guide, args, kwargs):
        if self._values is None:
            self._values = self._list_values(model, guide, args, kwargs)
        count = len(next(iter(self._values.values())))
        plate = pyro.plate(PARTICLES, count, dim=-self.max_plate_nesting)
        yield self._get_trace(plate(model), _Values(self._values)(plate(guide)), args, kwargs)

    def _list_values(
        self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """The joint values of a row, by site ``[V, 1, ..., *batch, *event]``, one in the place of rows."""
        with poutine.block(), torch.no_grad():
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        rows = RowSums((model_trace, guide_trace))
        if self.max_plate_nesting == float("inf"):
            stacks = [site["cond_indep_stack"] for site in sites_of(model_trace, guide_trace)]
            # One more, for the values.
            self.max_plate_nesting = 1 + max((-f.dim for stack in stacks for f in stack if f.vectorized), default=0)
        discrete = [site for site in sites_of(guide_trace) if is_drawn(site) and not site["fn"].has_rsample]
        if not discrete:
            raise CallError("Expected discrete latents to sum over, got none.\nPass elbo=pyro.infer.Trace_ELBO().")
        supports = {site["name"]: _support(site) for site in discrete}
        shapes = {site["name"]: _shape_in_row(site, rows.dims) for site in discrete}
        events = {name: support.shape[1:] for name, support in supports.items()}
        counts = {name: prod(shape) // prod(events[name]) for name, shape in shapes.items()}
        total = prod(len(supports[name]) ** count for name, count in counts.items())
        if total > self._max_values:
            raise CallError(
                f"Expected at most max_values = {self._max_values:,} joint values of a row's discrete latents, got {total:,}.\n"
                "Try one of the following fixes:\n"
                "- draws in their place: elbo=avi.LeaveOneOutELBO(num_particles=...)\n"
                "- one site by the other, where they are independent: pyro.infer.TraceEnum_ELBO\n"
                "- a larger max_values="
            )
        every = [torch.arange(len(supports[name])) for name, count in counts.items() for _ in range(count)]
        at = torch.cartesian_prod(*every).reshape(total, -1)
        values, start = {}, 0
        for name, count in counts.items():
            chosen = supports[name][at[:, start : start + count].to(supports[name].device)]
            start += count
            batch = [1] * (self.max_plate_nesting - 1 - len(shapes[name]) + len(_event_of(discrete, name)))
            values[name] = chosen.reshape(total, *batch, *shapes[name])
        return values

    def bound(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """The ELBO of every row ``[*B]``, twice."""
        value = (draws.log_q.exp() * draws.log_weights).sum(0)
        return value, value


class _Values(Messenger):
    """Gives discrete latents their joint values in the place of draws."""

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self._values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._values and not msg["is_observed"]:
            fn = msg["fn"]
            msg["value"] = self._values[msg["name"]].expand(fn.batch_shape + fn.event_shape)


def _event_of(sites: list[Any], name: str) -> torch.Size:
    return next(site["fn"].event_shape for site in sites if site["name"] == name)


def _support(site: Any) -> Tensor:
    """``[V, *event]`` the values of an element of a discrete site."""
    inner = innermost(site["fn"])
    if not inner.has_enumerate_support:
        raise CallError(
            f"Expected latents with a finite list of values, got {type(inner).__name__} at site {site['name']!r}.\n"
            "Pass elbo=pyro.infer.Trace_ELBO() or avi.LeaveOneOutELBO(num_particles=...), which draw it."
        )
    support = inner.enumerate_support(expand=False)
    return support.reshape(len(support), *inner.event_shape).to(site["value"].dtype)


def _shape_in_row(site: Any, dims: list[int]) -> list[int]:
    """The shape of a site's value with one in the place of its rows."""
    batch = [1 if at - len(site["fn"].batch_shape) in dims else size for at, size in enumerate(site["fn"].batch_shape)]
    return [*batch, *site["fn"].event_shape]
