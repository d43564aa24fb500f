"""The gaps of a guide as numbers, a table and a figure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_avi.diagnostics.gap_figure import plot_gaps
from pyro_avi.display.formatting import counted, with_error
from pyro_avi.display.text_table import check_format, text_table
from pyro_avi.estimators import Estimate, TailIndex
from pyro_avi.estimators.estimate import MeanOfRows

__all__ = ["Gaps"]


@dataclass(frozen=True)
class Gaps:
    r"""The gaps of a guide, for every row and in total, in nats; made by :func:`~pyro_avi.measure_gaps`.

    .. math:: \text{inference} = \text{approximation} + \text{amortization}

    Where the evidence is not exact, ``evidence`` is a lower bound. Then the inference and the approximation gap are
    **intervals**, from ``value`` to ``value + slack.value``, and so are their rows; the amortization gap needs no evidence.

    Attributes:
        inference: :math:`\log p(x_n) - \mathrm{ELBO}_n(q)`.
        approximation: :math:`\log p(x_n) - \mathrm{ELBO}_n(q^*_n)`. Its error covers what, by the gradient of the bound,
            :math:`q^*_n` lacks of the best.
        amortization: :math:`\mathrm{ELBO}_n(q^*_n) - \mathrm{ELBO}_n(q)`. Zero where refinement gains nothing beyond doubt;
            measured by other draws than those that chose, and not cut off at zero, which would bias the sum.
        richer: what the richer family gains, :math:`\mathrm{ELBO}_n(q^{**}_n) - \mathrm{ELBO}_n(q^*_n)`, a part of the
            approximation gap; ``None`` where no family was given.
        elbo: :math:`\mathrm{ELBO}_n(q)`.
        evidence: :math:`\log p(x_n)`, or a bound on it from below.
        slack: how far the evidence may lie above ``evidence``: 0 where it is exact; by a reverse run from exact latents,
            a bound in expectation; else an estimate, the bias to first order, and infinite for unreliable rows. Its
            ``value`` is that of the other rows.
        exact: whether the evidence is exact.
        converged: ``[N]`` whether a row's :math:`q^*_n`, and its best factor of the richer family, had stopped to improve,
            and little is left to gain by their gradient. What refinement gains of others is a lower bound.
        unreliable: ``[N]`` whether a row's evidence hangs on too few of its weights (k-hat above its threshold).
        khat: tail indices and effective sample sizes of the guide's own weights.
    """

    inference: Estimate
    approximation: Estimate
    amortization: Estimate
    richer: Estimate | None
    elbo: Estimate
    evidence: Estimate
    slack: Estimate
    exact: bool
    converged: Tensor
    unreliable: Tensor
    khat: TailIndex

    @property
    def scale(self) -> float:
        """``N / B``, by which rows count in the totals."""
        return self.elbo.scale

    def __repr__(self) -> str:
        parts, slack = [], self.slack.per_row.value
        for name in ("amortization", "approximation", "inference"):
            gap: MeanOfRows = getattr(self, name).per_row
            # Both ends of an interval, if they differ in the digits that are shown.
            ends = [gap.value, gap.value if name == "amortization" else gap.value + slack]
            least, most = (with_error(end, gap.se) for end in ends)
            parts.append(f"{name} {least}" + ("" if least == most else f" up to {most.partition(' ±')[0]}"))
        return f"Gaps({', '.join(parts)} nats a row, {counted(len(self.elbo.rows), 'row')})"

    def generalization(self, held_out: "Gaps") -> Estimate:
        """The generalization gap: the mean amortization gap of held-out rows minus that of these rows, in nats a row.

        Args:
            held_out: the gaps of the same guide on held-out rows.

        Returns:
            The difference with its standard error over rows, of the rows that might have been held out as well as of the
            draws. ``rows`` are the held-out rows' gaps minus the mean of these.
        """
        here, there = self.amortization.rows, held_out.amortization.rows
        error = (here.var() / len(here) + there.var() / len(there)).sqrt()
        rows = there - here.mean()
        # Its value is a mean over rows already.
        return Estimate(rows.mean().item(), error.item(), rows, held_out.amortization.rows_se, scale=1 / rows.numel())

    def table(self, format: str = "text"):
        """The gaps and what they are made of, in nats a row.

        Args:
            format: ``"text"``, ``"markdown"``, or ``"frame"`` for a :class:`pandas.DataFrame`.

        Raises:
            ValueError: if it is none of these.
        """
        check_format(format)
        entries = self._entries()
        if format == "frame":
            import pandas

            return pandas.DataFrame.from_dict(
                {name.strip(): numbers for name, numbers in entries.items()},
                orient="index",
                columns=["value", "se", "to"],
            )
        cells = [("nats a row", "value", "se", *([] if self.exact else ["up to"]))]
        for name, (value, error, to) in entries.items():
            last = [] if self.exact else ["" if to == value else f"{to:.3f}"]
            cells.append((name, f"{value:.3f}", f"{error:.3f}", *last))
        return text_table(cells, self._notes(), format=format)

    def by_row(self):
        """The gaps of every row in nats, and how reliable they are.

        Returns:
            A :class:`pandas.DataFrame` with a line for each row: ``evidence``, ``elbo`` and the gaps, each with the
            standard error of its draws (``..._se``); ``slack``, how far evidence, inference and approximation gap may lie
            above; ``ess``, ``khat`` and ``khat_se`` of the guide's own weights, and ``draws``, how many these were;
            ``converged`` and ``unreliable``, as above.
        """
        import pandas

        estimates = {"evidence": self.evidence, "elbo": self.elbo, "inference": self.inference}
        estimates.update(approximation=self.approximation, amortization=self.amortization)
        if self.richer is not None:
            estimates["richer"] = self.richer
        columns: dict[str, Any] = {}
        for name, estimate in estimates.items():
            columns[name] = estimate.rows
            columns[f"{name}_se"] = estimate.rows_se
        columns.update(slack=self.slack.rows, ess=self.khat.ess, khat=self.khat.rows, khat_se=self.khat.rows_se)
        columns.update(draws=torch.full_like(self.converged, self.khat.num_samples, dtype=torch.long))
        columns.update(converged=self.converged, unreliable=self.unreliable)
        return pandas.DataFrame({name: column.detach().cpu().numpy() for name, column in columns.items()})

    def plot(
        self,
        others: Mapping[str, "Gaps"] | None = None,
        *,
        name: str = "guide",
        images: Tensor | None = None,
        worst: int = 10,
    ):
        """Draw the gaps: bars with two standard errors, their distribution over rows, the rows that lose most.

        Args:
            others: gaps of other guides for the same rows, by name.
            name: of this guide.
            images: ``[N, height, width]``, drawn beside the rows that lose most.
            worst: how many of these.

        Returns:
            A :class:`matplotlib.figure.Figure`.
        """
        return plot_gaps({name: self, **(others or {})}, images=images, worst=worst)

    def _entries(self) -> dict[str, tuple[float, float, float]]:
        """By name the mean of the rows, its standard error, and the upper end of the interval."""

        def entry(estimate: Estimate, slack: float = 0.0) -> tuple[float, float, float]:
            mean = estimate.per_row
            return mean.value, mean.se, mean.value + slack

        slack = self.slack.per_row.value
        entries = {
            "log evidence" if self.exact else "log evidence (bound)": entry(self.evidence, slack),
            "ELBO": entry(self.elbo),
            "inference gap": entry(self.inference, slack),
            "  approximation gap": entry(self.approximation, slack),
        }
        if self.richer is not None:
            entries["    closed by the richer family"] = entry(self.richer)
        return {**entries, "  amortization gap": entry(self.amortization)}

    def _notes(self) -> str:
        rows, late = len(self.elbo.rows), int((~self.converged).sum())
        notes = [f"{rows} rows", f"{late} of them not converged" if late else "all converged"]
        if not self.exact:
            doubtful = int(self.unreliable.sum())
            without = "" if self.slack.rows.isfinite().all() else " and no end known"
            notes.append(f"evidence of {doubtful} unreliable{without}" if doubtful else "evidence reliable")
        heavy, draws = int(self.khat.unreliable.sum()), self.khat.ess
        share = float("nan") if draws is None else (draws / self.khat.num_samples).median().item()
        notes.append(f"k-hat of the guide above {self.khat.threshold:.2f} in {heavy}, median ESS {share:.0%}")
        return ", ".join(notes) + "."

    def lost_most(self, count: int) -> Tensor:
        """The positions of the ``count`` rows with the largest inference gaps, the largest first."""
        return torch.topk(self.inference.rows, min(count, len(self.inference.rows))).indices
