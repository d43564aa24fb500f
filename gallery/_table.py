"""Train guides, each with the model it was made for, and say in one table what they reached."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

import pyro_avi as avi

__all__ = ["Row", "Table", "compare", "correlation", "reach"]

Column = Callable[[AutoGuide, tuple, int], float]


@dataclass(frozen=True)
class Row:
    """What one guide reached.

    Attributes:
        guide: its name.
        parameters: the number of its parameters, those of the model left out.
        elbo, se: the ELBO on all rows after training, in nats, and its standard error over the draws.
        before: the ELBO before training.
        seconds: of training.
        columns: what else was asked for.
    """

    guide: str
    parameters: int
    elbo: float
    se: float
    before: float
    seconds: float
    columns: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """The guides' rows in the order of the guides; ``str`` of it is what a person reads."""

    rows: tuple[Row, ...]

    def __getitem__(self, guide: str) -> Row:
        return next(row for row in self.rows if row.guide == guide)

    def __str__(self) -> str:
        extra = list(self.rows[0].columns)
        lines = [["guide", "parameters", "ELBO (nats)", "seconds", *extra]]
        for row in self.rows:
            bound = f"{row.elbo:.1f} ± {row.se:.1f}"
            columns = [f"{row.columns[name]:.{3 if abs(row.columns[name]) < 10 else 1}f}" for name in extra]
            lines.append([row.guide, f"{row.parameters}", bound, f"{row.seconds:.0f}", *columns])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
        )


def compare(
    guides: Mapping[str, AutoGuide],
    *args,
    num_steps: int,
    num_samples: int,
    lr: float,
    encoder_lr: float | None = None,
    batch_size: int | None = None,
    elbo: ELBO | None = None,
    columns: Mapping[str, Column] | None = None,
) -> Table:
    """Train each guide with ``guide.model`` by the same steps and estimate what it reached.

    Args:
        guides: by name; each with a model of its own where the model has parameters.
        *args: the arguments of model and guide, with all rows.
        num_steps: the number of steps.
        num_samples: the number of draws of the final estimates.
        lr: the learning rate of the first step; it falls to zero along a cosine.
        encoder_lr: the same for the encoders of amortized guides; by default ``lr``. A weight of a network moves the factors
            of all rows, and a rate that suits a table is too large for it.
        batch_size: of minibatches ``(*args[index], index)``; by default every step takes all rows.
        elbo: one of Pyro's ELBOs, to train by and to measure with; by default ``Trace_ELBO()``.
        columns: more columns: functions of a guide, ``args`` and ``num_samples``, called after training.
    """
    options = {"num_steps": num_steps, "num_samples": num_samples, "batch_size": batch_size, "elbo": elbo}
    rows = []
    for name, guide in guides.items():
        amortized = encoder_lr is not None and isinstance(guide, avi.AmortizedGuide)
        rates = {"local": encoder_lr, "global": lr} if amortized else lr
        rows.append(reach(name, guide.model, guide, *args, lr=rates, columns=columns, **options))
    return Table(tuple(rows))


def reach(
    name: str,
    model: Callable,
    guide: Callable,
    *args,
    num_steps: int,
    num_samples: int,
    lr: float | Mapping[str, float],
    batch_size: int | None = None,
    elbo: ELBO | None = None,
    columns: Mapping[str, Column] | None = None,
    compile: str | bool = "auto",
) -> Row:
    """Train one model and guide and estimate what they reached; the arguments are those of :func:`compare`.

    ``guide`` is any guide of Pyro's; ``lr``, which may hold a rate for each part, and ``compile`` are those of
    :func:`pyro_avi.fit`.
    """
    elbo, columns = elbo or Trace_ELBO(), columns or {}
    batches = None if batch_size is None else avi.minibatches(*args, batch_size=batch_size)
    # Pyro's store knows parameters by name, and two models or guides have the same names.
    with pyro.get_param_store().scope():
        before, _ = _bound(elbo, model, guide, args, min(num_samples, 10))
        fit = avi.fit(
            model,
            guide,
            *(args if batches is None else ()),
            batches=batches,
            num_steps=num_steps,
            lr=_falling(lr, num_steps),
            elbo=elbo,
            compile=compile,
            progress=False,
        )
        value, se = _bound(elbo, model, guide, args, num_samples)
        with _evaluation():
            found = {key: column(guide, args, num_samples) for key, column in columns.items()}
            parameters = _count_parameters(guide, args)
    return Row(name, parameters, value, se, before, fit.seconds, found)


def correlation(site: str, truth: Tensor) -> Column:
    """A column: how the posterior means of a site's elements correlate with the values that made the data.

    Args:
        site: a latent or ``pyro.deterministic`` site of the model.
        truth: its value when the data were made.
    """

    def column(guide: AutoGuide, args: tuple, num_samples: int) -> float:
        mean = sum(_draw(guide, args, site) for _ in range(num_samples)) / num_samples
        return torch.corrcoef(torch.stack([mean.flatten(), truth.flatten()]))[0, 1].item()

    return column


def _falling(rates, num_steps: int):
    if isinstance(rates, dict):
        return {part: _falling(rate, num_steps) for part, rate in rates.items()}
    return lambda step: rates * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _draw(guide: AutoGuide, args: tuple, site: str) -> Tensor:
    # Not by Predictive, which gives the global latents dimensions that models such as `x @ slopes` do not expect.
    latents = poutine.trace(guide).get_trace(*args)
    return poutine.trace(poutine.replay(guide.model, trace=latents)).get_trace(*args).nodes[site]["value"]


@contextmanager
def _evaluation() -> Iterator[None]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        yield


def _bound(elbo: ELBO, model: Callable, guide: Callable, args: tuple, num_samples: int) -> tuple[float, float]:
    with _evaluation():
        draws = -torch.tensor([elbo.loss(model, guide, *args) for _ in range(num_samples)], dtype=torch.double)
    return draws.mean().item(), draws.std().item() / num_samples**0.5


def _count_parameters(guide: Callable, args: tuple) -> int:
    trace = poutine.trace(guide, param_only=True).get_trace(*args)
    return sum(site["value"].numel() for site in trace.nodes.values() if site["type"] == "param")
