"""What an escalation answers for every row, and what it says of the answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_avi.display.formatting import counted
from pyro_avi.display.text_table import check_format, text_table

__all__ = ["LEVELS", "Escalation", "LevelCost"]

LEVELS = ("amortized", "weighted", "refined", "richer", "NUTS")


class LevelCost(NamedTuple):
    """What a level has cost: how many rows it was tried for, and the seconds that they took together."""

    rows: int
    seconds: float


@dataclass(frozen=True)
class Escalation:
    """Draws from the posterior of every row, each row by the first method that was good enough for it.

    Attributes:
        draws: by site ``[S, *site]``, in the model's coordinates.
        weights: ``[S, N]`` the weight of each draw of each row; those of a row sum to 1. Draws that are good enough as they
            are all have the same, draws that were not weighed have none.
        levels: of every row the method of its draws: ``"amortized"``, draws from the guide as they are; ``"weighted"``, the
            same by their importance weights; ``"refined"`` and ``"richer"``, draws from a factor of the row's own, of the
            guide's family and of the richer one, as they are or by their weights; ``"NUTS"``, draws of Markov chains.
        met: ``[N]`` whether the tolerance is met, by weights that are to be trusted or chains that have mixed. The answer of
            any other row is the one with most effective draws, and not to be relied on.
        gap: ``[N]`` how far the answer's distribution is estimated to be from the posterior, as a divergence in nats: of
            draws as they are ``log p(x_n) - ELBO_n``, of weighted ones what the bound of these lacks of the evidence.
            Of chains none is known: ``nan``.
        evidence, evidence_se: ``[N]`` the importance-weighted bound on the log evidence of every row in nats, by the last
            factor that the row was given and the draws of it that were weighed, and its standard error.
        khat: ``[N]`` Pareto tail indices of the weights of the draws that were weighed; ``nan`` for chains.
        ess: ``[N]`` effective sample sizes: of the weights, or of the worst coordinate of the chains.
        r_hat: ``[N]`` split R-hat of the worst coordinate of the chains; ``nan`` elsewhere.
        seconds: ``[N]`` the share of every row in the time that all its levels took, by the evaluations of its log joint.
        cost: by level for how many rows it was tried, and what that took; the weights of the guide's draws among the first.
        tolerance: what was asked for, in nats.
        row_axes: by site the axis of the rows in its draws.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> model = avi.models.FactorAnalysis(torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 0.5]), size=20)
        >>> x = model()
        >>> guide = avi.AmortizedGuide(model, torch.nn.Identity()).setup(x)
        >>> answer = avi.escalate(model, guide, x, num_steps=30, num_samples=200)
        >>> answer.mean()["z"].shape, answer.by_row().columns.tolist()[:3]
        (torch.Size([20, 1]), ['level', 'met', 'gap'])
    """

    draws: Mapping[str, Tensor]
    weights: Tensor
    levels: tuple[str, ...]
    met: Tensor
    gap: Tensor
    evidence: Tensor
    evidence_se: Tensor
    khat: Tensor
    ess: Tensor
    r_hat: Tensor
    seconds: Tensor
    cost: Mapping[str, LevelCost]
    tolerance: float
    row_axes: Mapping[str, int]

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.levels.count(level):,} {level}" for level in LEVELS if level in self.levels)
        met = f"{int(self.met.sum()):,} within {self.tolerance:g} nats"
        return f"Escalation({counts} of {counted(len(self.levels), 'row')}, {met}, {self._seconds():.3g} s)"

    def mean(self) -> dict[str, Tensor]:
        """The posterior mean of every site, in the site's shape."""
        result = {}
        for name, draws in self.draws.items():
            axis = self.row_axes[name]
            shape = [1] * draws.dim()
            shape[0], shape[axis] = self.weights.shape
            result[name] = (self.weights.reshape(shape) * draws).sum(0).to(draws)
        return result

    def by_row(self):
        """What every row got, how reliable it is and what it cost.

        Returns:
            A :class:`pandas.DataFrame` with a line for each row: ``level``, ``met``, ``gap``, ``evidence``, ``evidence_se``,
            ``khat``, ``ess``, ``r_hat`` and ``seconds``, as above.
        """
        import pandas

        names = ("met", "gap", "evidence", "evidence_se", "khat", "ess", "r_hat", "seconds")
        columns: dict[str, Any] = {name: getattr(self, name).cpu().numpy() for name in names}
        return pandas.DataFrame({"level": list(self.levels), **columns})

    def table(self, format: str = "text"):
        """By level for how many rows it was tried and whose draws are its, and the worst of their diagnoses.

        Args:
            format: ``"text"``, ``"markdown"``, or ``"frame"`` for a :class:`pandas.DataFrame`.

        Raises:
            ValueError: if it is none of these.
        """
        check_format(format)
        entries = {level: self._entry(level) for level in LEVELS if level in self.cost}
        if format == "frame":
            import pandas

            return pandas.DataFrame.from_dict(entries, orient="index")
        cells = [("level", "tried", "rows", "met", "mean gap", "k-hat", "least ESS", "seconds")]
        for level, (tried, rows, met, gap, worst, least, seconds) in (
            (level, tuple(entry.values())) for level, entry in entries.items()
        ):
            numbers = (f"{gap:.4f}", f"{worst:.2f}", f"{least:,.0f}", f"{seconds:.2f}")
            cells.append((level, f"{tried:,}", f"{rows:,}", f"{met:,}", *numbers))
        notes = (
            f"{int(self.met.sum()):,} of {counted(len(self.levels), 'row')} within {self.tolerance:g} nats, "
            f"{self._seconds():.2f} s."
        )
        return text_table(cells, notes, format=format)

    def _entry(self, level: str) -> dict[str, float]:
        own = torch.tensor([each == level for each in self.levels], device=self.gap.device)
        known = own & ~self.gap.isnan()

        def reduced(values: Tensor, reduce: Callable[[Tensor], Tensor], where: Tensor) -> float:
            return reduce(values[where]).item() if where.any() else float("nan")

        return {
            "tried": self.cost[level].rows,
            "rows": int(own.sum()),
            "met": int((own & self.met).sum()),
            "mean gap": reduced(self.gap, torch.mean, known),
            "largest k-hat": reduced(self.khat, torch.max, known),
            "least ESS": reduced(self.ess, torch.min, own),
            "seconds": self.cost[level].seconds,
        }

    def _seconds(self) -> float:
        return sum(each.seconds for each in self.cost.values())
