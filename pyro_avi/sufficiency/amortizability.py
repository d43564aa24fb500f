"""Whether amortization can reach what factors of every row's own reach: a verdict before any training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine

from pyro_avi.inspection.data_errors import explain_data_errors
from pyro_avi.inspection.isolated_run import isolated_run
from pyro_avi.inspection.sites import is_latent
from pyro_avi.inspection.structure import RowSet
from pyro_avi.lock import in_turn
from pyro_avi.sufficiency.components import Reach, reach_of
from pyro_avi.sufficiency.couplings import find_couplings
from pyro_avi.sufficiency.doubts import find_doubts
from pyro_avi.sufficiency.inputs import Input, describe_inputs
from pyro_avi.sufficiency.joint import Joint, Point, no_rows
from pyro_avi.sufficiency.patterns import TooIrregularError
from pyro_avi.sufficiency.symmetry import are_alike, are_exchangeable
from pyro_avi.sufficiency.verdict import Amortizability, LatentVerdict

__all__ = ["amortizability"]

_POINTS, _RUNS = 6, 8


@in_turn
def amortizability(
    model: Callable,
    *args: Any,
    plate: str | Sequence[str] | None = None,
    structure: Sequence[str] = (),
    **kwargs: Any,
) -> Amortizability:
    r"""Say whether an encoder of a row's own data can close the amortization gap of a model, and what it would have to read.

    The best factor of a row, the global latents' given, solves

    .. math:: \nu_n^* = \arg\max_\nu \, \mathbb E_{q(\theta) \, q(z_n; \nu) \prod_{m \ne n} q(z_m; \nu_m^*)}
              [\log p(\theta, z, x)] + \mathbb H[q(z_n; \nu)]

    and so depends on the data that enter terms with :math:`z_n`, and on the factors of all rows whose latents such terms tie
    to it. With the second derivatives :math:`\partial^2 \ell / \partial z_n \partial z_m` and
    :math:`\partial^2 \ell / \partial z_n \partial x_i` of the log joint, which rows are tied and which data enter is seen
    without knowing how the model computes. A derivative other than zero is a proof. One that is zero at each of six random
    points only suggests independence; the log joint's differences are looked at besides.

    Global latents are refitted to every data set and no obstacle, and so are the latents of a crossed plate. See
    :doc:`amortizability`.

    Args:
        model: any Pyro callable with latents in a plate.
        *args, **kwargs: its arguments: a few dozen rows say as much as all of them.
        plate: the name of the plate of the rows, or several; by default those that hold a latent and an observation, or else
            a latent.
        structure: the names of arguments that are no data and stay as they are, besides square matrices over the rows and
            one-hot matrices.

    Raises:
        ValueError: if the model has no latents in a plate, or ``structure`` names no argument.

    References:
        Margossian and Blei, "Amortized Variational Inference: When and Why?", UAI 2024, https://arxiv.org/abs/2307.11018.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_avi as avi
        >>> def series(x):
        ...     before = torch.cat([torch.zeros(1), x[:-1]])
        ...     with pyro.plate("time", len(x)):
        ...         z = pyro.sample("z", dist.Normal(before, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> verdict = avi.amortizability(series, torch.randn(20))
        >>> verdict.possible, verdict.inputs_needed
        (False, 'x in window(1, 0)')
    """
    plates = None if plate is None else (plate,) if isinstance(plate, str) else tuple(plate)
    with isolated_run(0), _without_threads():
        with explain_data_errors(args, kwargs):
            doubt = _changes(model, args, kwargs)
        if doubt is not None:
            return _undecided(model, args, kwargs, plates, doubt)
        joint = Joint(model, args, kwargs, plates=plates, fixed=tuple(structure))
        try:
            points = [joint.point(seed) for seed in range(_POINTS)]
            couplings = find_couplings(joint, points)
            found = [_verdict(joint, points, reach_of(joint, couplings, at), at) for at in range(len(joint.row_sets))]
        except (TooIrregularError, FloatingPointError) as error:
            found = [_open(f"Undecided: {error}.") for _ in joint.row_sets]
    verdicts: dict[str, LatentVerdict] = {}
    for rows, each in zip(joint.row_sets, found, strict=True):
        verdicts |= {latent.name: LatentVerdict(latent.name, rows.plates, **each) for latent in rows.latents}
    return Amortizability(tuple(verdicts[latent.name] for latent in joint.latents))


@contextmanager
def _without_threads() -> Iterator[None]:
    # Sums of one thread are the same every time, and so small operations are faster.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _changes(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> str | None:
    """Whether the sites of a model differ from one run to the next."""
    first = None
    for seed in range(_RUNS):
        torch.default_generator.manual_seed(seed)
        trace = poutine.trace(model).get_trace(*args, **kwargs)
        names = {(name, site["type"]) for name, site in trace.nodes.items()}
        first = names if first is None else first
        if names != first:
            return "its sites change from run to run"
    return None


def _undecided(model, args, kwargs, plates, doubt: str) -> Amortizability:
    trace = poutine.trace(model).get_trace(*args, **kwargs)
    verdicts = [
        LatentVerdict(name, tuple(f.name for f in site["cond_indep_stack"]), **_open(f"Undecided: {doubt}."))
        for name, site in trace.nodes.items()
        if is_latent(site)
        and site["cond_indep_stack"]
        and (plates is None or {f.name for f in site["cond_indep_stack"]} & set(plates))
    ]
    if not verdicts:
        raise no_rows()
    return Amortizability(tuple(verdicts))


def _open(reason: str) -> dict[str, Any]:
    return {
        "possible": None,
        "interpolates": None,
        "inputs": (),
        "reads_index": False,
        "coupled": False,
        "reason": reason,
    }


def _verdict(joint: Joint, points: Sequence[Point], reach: Reach, at: int) -> dict[str, Any]:
    rows = joint.row_sets[at]
    count = len(reach.components)
    for doubt in find_doubts(joint, points, reach, at):
        return _open(f"Undecided: {doubt}.")
    if reach.data is None:
        inputs, needed = [Input(leaf.name, "whole plate") for leaf in joint.leaves], 0
    else:
        inputs, needed = describe_inputs(joint.leaves, reach.data, rows.plates, count)
    if count < max(needed, 3):
        few = "one row does" if count == 1 else f"{count} rows do"
        return _open(f"Undecided: {few} not tell a pattern from chance; call with at least {max(needed, 3)}.")
    own = all(each.is_own for each in inputs) and not reach.coupled
    window = max((each.before for each in inputs), default=0), max((each.after for each in inputs), default=0)
    regular = all(each.kind in ("own row", "window", "whole plate") for each in inputs) and not reach.coupled
    alike = not regular or are_alike(joint, points[0], rows, before=window[0], after=window[1])
    exchangeable = own and alike or are_exchangeable(joint, points[0], rows)
    return {
        "possible": own and alike,
        "interpolates": exchangeable,
        "inputs": tuple(inputs),
        # Of a whole plate one has to know which of its rows is asked for.
        "reads_index": not alike or reach.data is None and not exchangeable,
        "coupled": reach.coupled,
        "reason": _reason(joint, rows, reach, inputs, own, alike),
    }


def _reason(joint: Joint, rows: RowSet, reach: Reach, inputs: Sequence[Input], own: bool, alike: bool) -> str:
    names = ", ".join(latent.name for latent in rows.latents)
    if reach.coupled:
        sizes = reach.components.unique(return_counts=True)[1]
        whole = "all rows are" if len(sizes) == 1 else f"up to {int(sizes.max())} rows at a time are"
        return f"The latents {names} of different rows are coupled ({whole}): each row's factor depends on their data."
    if not own:
        shared = ", ".join(str(each) for each in inputs if not each.is_own)
        return f"Given the global latents, the factor of {names} depends on data of other rows: {shared}."
    if not alike:
        return (
            f"Rows with equal data have different factors of {names}: something besides the arguments tells rows apart."
        )
    crossed = [latent.name for other in reach.crossed for latent in joint.row_sets[other].latents]
    given = "the global latents" + (f" and {', '.join(crossed)}, which are refitted" if crossed else "")
    return f"Given {given}, the factor of {names} depends on the row's own data alone."
