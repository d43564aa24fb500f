"""The result of simulation-based calibration: ranks, a table, a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from pyro_avi.diagnostics.sbc_figure import plot_calibration
from pyro_avi.display.arviz_import import import_arviz
from pyro_avi.display.formatting import counted, with_error
from pyro_avi.display.text_table import check_format, text_table
from pyro_avi.estimators.ranks import UniformBand

__all__ = ["Calibration", "Coverage"]


# The same for all guides that are compared.
_uniform = lru_cache(maxsize=4)(UniformBand)


@dataclass(frozen=True)
class Coverage:
    """How often central intervals of the posteriors hold the latents that the model drew.

    Attributes:
        nominal: ``[J]`` how often they should. Between ``S`` draws there are ``S + 1`` ranks, so that an interval is a whole
            number of them; this is the probability of those.
        empirical: ``[J, Q]`` how often they do, for every quantity.
        se: ``[J, Q]`` its binomial standard error.
    """

    nominal: Tensor
    empirical: Tensor
    se: Tensor

    def __repr__(self) -> str:
        off = (self.empirical - self.nominal.unsqueeze(-1)).abs()
        level, quantity = divmod(int(off.argmax()), off.shape[-1])
        found, error = (values[level, quantity].item() for values in (self.empirical, self.se))
        far = f"{with_error(found, error)} in place of {self.nominal[level]:.3g} the furthest off"
        return f"Coverage({counted(off.shape[0], 'interval')} of {counted(off.shape[1], 'quantity')}, {far})"


@dataclass(frozen=True)
class Calibration:
    r"""Ranks of simulated latents among a guide's draws; made by :func:`~pyro_avi.sbc`.

    Attributes:
        ranks: ``[N, Q]`` how many of the ``S`` draws lie below the simulated value, by row and quantity.
        names: of the quantities: the coordinates of the latents by site, and ``"log likelihood"``.
        num_samples: ``S``.
        contraction: ``[Q - 1]`` of every coordinate, :math:`1 - E[\mathrm{Var}_q(z_n)] / \mathrm{Var}(z_n)`: 0 for posteriors
            as wide as the simulated latents vary over rows, near 1 for narrow ones.
    """

    ranks: Tensor
    names: tuple[str, ...]
    num_samples: int
    contraction: Tensor

    def __repr__(self) -> str:
        worst = int(self.p_values.argmin())
        least = f"p = {self.p_values[worst]:.2g} of {self.names[worst]} the least of {len(self.names):,}"
        return f"Calibration({counted(len(self.ranks), 'row')}, {counted(self.num_samples, 'draw')} each, {least})"

    @property
    def pit(self) -> Tensor:
        """``[N, Q]`` the ranks between 0 and 1, ``(rank + 1/2) / (S + 1)``: probability integral transforms."""
        return (self.ranks.double() + 0.5) / (self.num_samples + 1)

    @property
    def uniform(self) -> UniformBand:
        """The simultaneous band of the distribution function of uniform ranks."""
        return _uniform(len(self.ranks), self.num_samples)

    @cached_property
    def p_values(self) -> Tensor:
        """``[Q]`` the probability of ranks as far from uniform, if the guide were the posterior; rows independent.

        The test is that of the simultaneous band of the figure. Of many quantities, compare with the level divided by
        their number.
        """
        return self.uniform.p_values(self.ranks)

    def coverage(self, probs: Sequence[float]) -> Coverage:
        """How often central intervals hold the simulated value.

        Args:
            probs: the probabilities of the intervals, between 0 and 1.

        Raises:
            ValueError: if a probability is not between 0 and 1, or too small for an interval between the draws.
        """
        # Distances from the median: an interval of probability p holds the ranks with distances up to p.
        every = torch.arange(self.num_samples + 1, dtype=torch.double)
        every, found = (2 * (ranks + 0.5) / (self.num_samples + 1) - 1 for ranks in (every, self.ranks.double()))
        levels = torch.as_tensor(list(probs), dtype=torch.double)
        least = 2 / (self.num_samples + 1)
        if not len(levels) or not ((least <= levels) & (levels < 1)).all():
            raise ValueError(
                f"Expected probabilities below 1 and from {least:.3g}, that of the narrowest interval between "
                f"{self.num_samples} draws, got {levels.tolist()}."
            )
        inside = found.abs() <= levels.reshape(-1, 1, 1) + 1e-9
        count, rows = inside.double().sum(1), len(found)
        # Two successes and two failures more: of a share of 0 or 1 too something is left to doubt.
        share = (count + 2) / (rows + 4)
        nominal = (every.abs() <= levels.unsqueeze(-1) + 1e-9).double().mean(-1)
        return Coverage(nominal, count / rows, (share * (1 - share) / rows).sqrt())

    def table(self, format: str = "text", *, probs: Sequence[float] = (0.5, 0.9)):
        """By quantity the p-value of uniform ranks, the mean rank between 0 and 1, the coverage of central intervals.

        Args:
            format: ``"text"``, ``"markdown"``, or ``"frame"`` for a :class:`pandas.DataFrame`.
            probs: the probabilities of the intervals.

        Raises:
            ValueError: if the format is none of these, or :meth:`coverage` has no such intervals.
        """
        check_format(format)
        coverage = self.coverage(probs)
        columns = {"p": self.p_values, "mean rank": self.pit.mean(0)}
        for nominal, empirical in zip(coverage.nominal.tolist(), coverage.empirical, strict=True):
            columns[f"in {100 * nominal:.3g} %"] = empirical
        columns["contraction"] = torch.cat([self.contraction, self.contraction.new_tensor([torch.nan])])
        if format == "frame":
            import pandas

            return pandas.DataFrame({name: column.tolist() for name, column in columns.items()}, index=list(self.names))
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        cells = [("ranked", *columns)]
        for name, (p, mean, *shares, contraction) in zip(self.names, rows, strict=True):
            last = "" if contraction != contraction else f"{contraction:.2f}"
            cells.append((name, f"{p:.4f}", f"{mean:.3f}", *(f"{100 * share:.1f} %" for share in shares), last))
        return text_table(cells, self._notes(coverage), format=format)

    def _notes(self, coverage: Coverage) -> str:
        level = 0.05 / len(self.names)
        found = [name for name, p in zip(self.names, self.p_values.tolist(), strict=True) if p < level]
        named = ", ".join(found) if len(found) <= 5 else f"{len(found)} of {len(self.names)}"
        verdict = f"not uniform: {named}" if found else "no sign against uniform ranks"
        return (
            f"{len(self.ranks)} rows, {self.num_samples} draws each; coverage has a standard error of up to "
            f"{100 * coverage.se.max():.1f} %; at 5 % over all quantities {verdict}."
        )

    def plot(self, *, most: int = 4):
        """Draw histograms and distribution functions of ranks, and the coverage of central intervals.

        Histograms have an interval of 95 % for every bar; the differences of distribution functions one of 95 % for the
        whole line, the band that the p-values are by. Coverage is that of all quantities.

        Args:
            most: of how many quantities ranks are drawn: those with the smallest p-values.

        Returns:
            A :class:`matplotlib.figure.Figure`.
        """
        return plot_calibration(self, most=most)

    def to_arviz(self):
        """The ranks between 0 and 1 as ArviZ takes them.

        Returns:
            An ``arviz.InferenceData`` (ArviZ 0.x) or an ``xarray.DataTree`` (ArviZ 1.x) with the group ``prior_sbc``: a
            variable for each quantity, rows as draws of one chain. ``arviz.plot_ecdf_pit`` of ArviZ 1.x draws it as it is,
            ``arviz.plot_ecdf`` of 0.x a variable at a time.
        """
        arviz = import_arviz()
        values = {name: column.unsqueeze(0).numpy() for name, column in zip(self.names, self.pit.T, strict=True)}
        if int(arviz.__version__.partition(".")[0]) >= 1:
            return arviz.from_dict({"prior_sbc": values})
        dataset = arviz.dict_to_dataset(values)
        return arviz.InferenceData(prior_sbc=dataset, warn_on_custom_groups=False)
