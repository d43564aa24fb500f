"""What a model of the zoo consists of, the training of four guides on it, and the table of what they reached."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from pyro.infer import ELBO, Trace_ELBO

import pyro_avi as avi
from gallery import Row, reach

__all__ = ["GUIDES", "Outcome", "Problem", "seeded", "solve", "table"]

GUIDES = {"constant": avi.ConstantGuide, "amortized": avi.AmortizedGuide, "factorized": avi.FactorizedGuide}


@dataclass(frozen=True)
class Problem:
    """A model, its data, the guide that comes with it, and how long all guides are trained.

    Attributes:
        origin: where the model comes from.
        rows: what the rows are, with their number.
        make_model: makes the model, with the same initial parameters each time.
        args: the arguments of model and guide.
        pyro_guide: what Pyro's own guide is: the name of a class of ``pyro.infer.autoguide``, or ``"by hand"``.
        make_pyro_guide: makes it, for a model.
        num_steps, lr: of all guides; the learning rate falls to zero along a cosine.
        encoder_lr: that of the amortized guide's encoder; by default ``lr``. A weight of a network moves the factors of all
            rows, and a rate that suits a table can be too large for it.
        make_elbo: makes the ELBO to train by and to measure with.
        options: arguments that the three guides are given, where a default does not suit the model.
        inputs: what the amortized guide reads, where its default asks for it.
    """

    origin: str
    rows: str
    make_model: Callable[[], Callable]
    args: tuple
    pyro_guide: str
    make_pyro_guide: Callable[[Callable], Callable]
    num_steps: int
    lr: float
    encoder_lr: float | None = None
    make_elbo: Callable[[], ELBO] = Trace_ELBO
    options: Mapping = field(default_factory=dict)
    inputs: Callable | None = None

    @property
    def given(self) -> str:
        """The arguments that are not left at their default, as text."""
        options = dict(self.options) | ({} if self.inputs is None else {"inputs": self.inputs})
        return ", ".join(f"`{name}={_written(value)}`" for name, value in options.items()) or "nothing"


@dataclass(frozen=True)
class Outcome:
    """What the guides of a problem reached.

    Attributes:
        problem: the problem.
        rows: by guide, ``"constant"``, ``"amortized"``, ``"factorized"`` and ``"pyro"``, what was reached, or the first line of
            the error that was raised instead.
        warnings: the first lines of what the guides warned of.
    """

    problem: Problem
    rows: Mapping[str, Row | str]
    warnings: tuple[str, ...]

    @property
    def best(self) -> Row:
        """The best of the three guides."""
        return max((self.rows[name] for name in GUIDES if isinstance(self.rows[name], Row)), key=lambda row: row.elbo)

    def __str__(self) -> str:
        return ", ".join(f"{name} {_bound(row)}" for name, row in self.rows.items())


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Draw from a seed and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def solve(problem: Problem, *, num_steps: int | None = None, num_samples: int = 100) -> Outcome:
    """Train the three guides and Pyro's own by the same steps, and estimate their bounds by the same estimator.

    A guide that refuses the model or diverges does not end it: its sentence is kept in the place of its bound.

    Args:
        problem: the problem.
        num_steps: in the place of the problem's own number.
        num_samples: the number of draws of each bound.
    """
    rows: dict[str, Row | str] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in (*GUIDES, "pyro"):
            try:
                with seeded():
                    model = problem.make_model()
                    rows[name] = reach(
                        name,
                        model,
                        _make_guide(problem, name, model),
                        *problem.args,
                        num_steps=num_steps or problem.num_steps,
                        num_samples=num_samples,
                        lr=_rates(problem, name),
                        elbo=problem.make_elbo(),
                        compile=False,
                    )
            except (ValueError, NotImplementedError, avi.DivergedError) as error:
                rows[name] = str(error).split("\n")[0]
    sentences = dict.fromkeys(str(warning.message).split("\n")[0] for warning in caught)
    return Outcome(problem, rows, tuple(sentences))


def table(outcomes: Mapping[str, Outcome]) -> str:
    """The outcomes by name as a table in Markdown, with the sentences of guides that have no number below."""
    lines = [
        "| model | constant | amortized | factorized | Pyro's guide | which | rows | steps | rate | given | from |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- | ---: | --- | --- | --- |",
    ]
    notes = []
    for name, outcome in outcomes.items():
        problem, rows = outcome.problem, outcome.rows
        bounds = [_bound(row) if isinstance(row, Row) else "none" for row in rows.values()]
        steps, rate = f"{problem.num_steps:,}", f"{problem.lr:g}"
        if problem.encoder_lr is not None:
            rate += f", encoder {problem.encoder_lr:g}"
        cells = [name, *bounds, problem.pyro_guide, problem.rows, steps, rate, problem.given, problem.origin]
        lines.append(f"| {' | '.join(cells)} |")
        notes += [f"- *{name}, {guide}*: {row}" for guide, row in rows.items() if not isinstance(row, Row)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _make_guide(problem: Problem, name: str, model: Callable) -> Callable:
    if name == "pyro":
        return problem.make_pyro_guide(model)
    options = dict(problem.options)
    if name == "amortized" and problem.inputs is not None:
        options["inputs"] = problem.inputs
    return GUIDES[name](model, **options)


def _rates(problem: Problem, name: str) -> float | dict[str, float]:
    if name != "amortized" or problem.encoder_lr is None:
        return problem.lr
    return {"local": problem.encoder_lr, "global": problem.lr}


def _written(value) -> str:
    function = getattr(value, "func", value)
    return getattr(function, "__name__", repr(value))


def _bound(row: Row | str) -> str:
    return f"{row.elbo:.1f} ± {row.se:.1f}" if isinstance(row, Row) else row
