"""Simulation-based calibration: a guide's posteriors against latents that the model drew."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_avi.closing.refine import refine
from pyro_avi.closing.row_tables import table_like
from pyro_avi.diagnostics.sbc_results import Calibration
from pyro_avi.diagnostics.simulated_data import Simulated, Simulator
from pyro_avi.display.progress_bar import progress_bar
from pyro_avi.errors import check_count
from pyro_avi.estimators.ranks import rank_among
from pyro_avi.evidence.hold_globals import Theta, hold_globals
from pyro_avi.guide_bases.local_guide import LocalGuide
from pyro_avi.guides import FactorizedGuide
from pyro_avi.inspection.isolated_run import isolated_run
from pyro_avi.lock import in_turn
from pyro_avi.seeds import as_seed

__all__ = ["sbc"]

# The numbers that are drawn at a time.
_NUMBERS = 2**24
_LIKELIHOOD = "log likelihood"


@in_turn
def sbc(
    model: Callable,
    guide: LocalGuide,
    *args,
    rebuild: Callable[[dict[str, Tensor]], tuple[tuple, Mapping[str, Any]]] | None = None,
    num_simulations: int,
    num_samples: int,
    num_steps: int = 0,
    lr: float = 0.2,
    theta: Theta = "mean",
    seed: int | None = 0,
    progress: bool = True,
    **kwargs,
) -> Calibration:
    r"""Simulation-based calibration (SBC) of a guide's local posteriors.

    .. math:: z_n \sim p(z_n \mid \theta), \quad x_n \sim p(x_n \mid z_n, \theta), \qquad
              z_n^{(1)}, \dots, z_n^{(S)} \sim q(z_n; f(n, x_n)), \qquad
              r_n = \#\{ s : z_n^{(s)} < z_n \}

    If :math:`q(z_n; f(n, x_n))` is the posterior :math:`p(z_n \mid x_n, \theta)`, the ranks :math:`r_n` are uniform on
    :math:`0, \dots, S`, for every coordinate of the latents. Too many at both ends: the posteriors are too narrow. Too many
    in the middle: too wide. A slope: they are off to one side. Ties are ranked at random.

    Ranks of latents cannot see everything: a guide that ignores the data and answers with the prior has uniform ranks too.
    So the log likelihood :math:`\log p(x_n \mid z_n, \theta)` is ranked as well, which sees it, and
    ``Calibration.contraction`` says how much narrower than the prior the posteriors are.

    The rows are those that the *model* draws. What is found holds for the data at hand as far as the model does: rows unlike
    any that it draws may be answered worse.

    Args:
        model: the model that the guide was made for.
        guide: any of the three guides. A factorized guide has an answer for its own rows only, so its ``num_steps`` must be
            positive.
        *args, **kwargs: the arguments of both. Observations in them are replaced by simulated ones; all else, such as
            positions and covariates, is kept.
        rebuild: how simulated values by site become arguments, ``(args, kwargs)``, for example
            ``lambda values: ((values["x"].exp(),), {})``. Needed where the model computes what it observes from its
            arguments, or other arguments are made from the data, such as features for the encoder.
        num_simulations: how often the rows of these arguments are simulated; all rows of all simulations are ranked.
        num_samples: ``S``, the draws of the guide for every row, at least 20; 99 make every percentage a whole number
            of ranks.
        num_steps: the steps of :func:`~pyro_avi.refine` by which the guide's answers for the simulated rows are improved,
            with :math:`\theta` held; 0: none.
        lr: its learning rate.
        theta: the values that the global latents are held at, as for :func:`~pyro_avi.measure_gaps`.
        seed: the seed of the draws; ``None`` for one drawn from the random state of the program.
        progress: whether to show a progress bar, which appears after the first second.

    Returns:
        The ranks with what they say.

    Raises:
        ValueError: if a factorized guide is not to be refined, the observations are not found in the arguments, draws of
            the model do not follow its density (``pyro.factor``, scaled sites, masked latents), the guide draws what is no
            number, or a count is too small.
        TypeError: if the guide is none of the three.

    References:
        Talts, Betancourt, Simpson, Vehtari and Gelman, "Validating Bayesian inference algorithms with simulation-based
        calibration", 2018, https://arxiv.org/abs/1804.06788. Modrák and others, "Simulation-based calibration checking for
        Bayesian computation: the choice of test quantities shapes sensitivity", 2023, https://arxiv.org/abs/2211.02383.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.AmortizedGuide(model).setup(x)
        >>> calibration = avi.sbc(model, guide, x, num_simulations=5, num_samples=99)
        >>> calibration.names, calibration.ranks.shape
        (('z[0]', 'z[1]', 'log likelihood'), torch.Size([100, 3]))
        >>> bool((calibration.p_values < 0.01).all())
        True
    """
    for name, number, least in (
        ("num_simulations", num_simulations, 1),
        ("num_samples", num_samples, 20),
        ("num_steps", num_steps, 0),
    ):
        check_count(name, number, least)
    seed = as_seed(seed)
    held, guide = hold_globals(model, guide, theta, args, kwargs, seed=seed)
    if isinstance(guide, FactorizedGuide) and not num_steps:
        raise ValueError(
            "Expected a guide that answers for simulated rows, got a FactorizedGuide, which has an answer for each row it was "
            "fitted to.\nPass num_steps=..., by which avi.refine fits factors to the simulated rows."
        )
    plate = guide.row_plate()
    latents = [latent.name for latent in guide.row_factors[0].row_set.latents]
    simulator = Simulator(held, plate, args, kwargs, latents, rebuild)
    seeds = torch.randint(2**31, (num_simulations, 3), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = []
    with progress_bar(num_simulations, unit="simulation", progress=progress) as bar:
        for of_data, of_steps, of_draws in seeds:
            with isolated_run(of_data):
                truth, simulated = simulator.draw()
            answers = guide
            if num_steps:
                answers = _refined(held, guide, simulated, num_steps=num_steps, lr=lr, seed=of_steps, progress=False)
            with isolated_run(of_draws):
                parts.append(_Ranked(answers, truth, simulated, num_samples))
            bar.update()
    values = torch.cat([part.values for part in parts])
    # One simulated row says nothing about how far they spread.
    spread = values.var(0) if len(values) > 1 else torch.full_like(values[0], torch.nan)
    contraction = 1 - torch.cat([part.variances for part in parts]).mean(0) / spread
    return Calibration(
        ranks=torch.cat([part.ranks for part in parts]),
        names=(*parts[0].names, _LIKELIHOOD),
        num_samples=num_samples,
        contraction=contraction,
    )


def _refined(held, guide: LocalGuide, simulated: Simulated, **options) -> FactorizedGuide:
    """A table for the simulated rows, refined from the guide's answers; from a table's mean, where it has none."""
    args, kwargs = simulated.args, simulated.kwargs
    table = table_like(held, guide, args, kwargs)
    with torch.no_grad():
        own = isinstance(guide, FactorizedGuide)
        start = guide.table.mean(0) if own else guide.variational_parameters(*args, **kwargs)
    return refine(held, table, *args, start=start, **options, **kwargs)


class _Ranked:
    """The rows of one simulation, ranked.

    Attributes:
        names: of the coordinates of the latents, ``K``.
        values: ``[B, K]`` the simulated latents.
        variances: ``[B, K]`` those of the guide's draws.
        ranks: ``[B, K + 1]``, the last one that of the log likelihood.
    """

    def __init__(self, guide: LocalGuide, truth: Mapping[str, Tensor], simulated: Simulated, num_samples: int):
        self._factor = guide.row_factors[0].factor
        self.names, self.values = self._names(truth), self._columns(truth).double().cpu()
        known = self._with_likelihood(truth, simulated)
        parameters = guide.variational_parameters(*simulated.args, **simulated.kwargs)
        below, ties = torch.zeros_like(known, dtype=torch.long), torch.zeros_like(known, dtype=torch.long)
        first, second = torch.zeros_like(self.values), torch.zeros_like(self.values)
        for draws in self._draws(parameters, num_samples, self.values.numel()):
            count = len(next(iter(draws.values())))
            each = [{name: value[i] for name, value in draws.items()} for i in range(count)]
            drawn = torch.stack([self._with_likelihood(one, simulated) for one in each])
            _check_numbers(drawn)
            for total, more in zip((below, ties), rank_among(known, drawn), strict=True):
                total += more
            # Around the truth, so that a far mean does not swallow the variance.
            apart = drawn[..., :-1] - self.values
            first, second = first + apart.sum(0), second + apart.square().sum(0)
        self.variances = (second - first.square() / num_samples) / (num_samples - 1)
        self.ranks = below + (torch.rand(known.shape, dtype=torch.double) * (ties + 1)).long()

    def _draws(self, parameters: Any, num_samples: int, numbers: int) -> Iterator[dict[str, Tensor]]:
        size = max(1, _NUMBERS // numbers)
        for start in range(0, num_samples, size):
            yield self._factor.draw(parameters, min(size, num_samples - start))

    def _with_likelihood(self, latents: Mapping[str, Tensor], simulated: Simulated) -> Tensor:
        """``[B, K + 1]``, in double precision."""
        likelihood = simulated.log_likelihood(latents).unsqueeze(-1)
        return torch.cat([self._columns(latents).double().cpu(), likelihood.cpu()], -1)

    def _columns(self, latents: Mapping[str, Tensor]) -> Tensor:
        """``[B, K]`` of values in the sites' shapes."""
        return torch.cat([self._by_row(latents, name).flatten(1) for name in latents], -1)

    def _by_row(self, latents: Mapping[str, Tensor], name: str) -> Tensor:
        return latents[name].movedim(self._factor.row_dims(name)[0], 0).unsqueeze(-1)

    def _names(self, latents: Mapping[str, Tensor]) -> tuple[str, ...]:
        names = []
        for latent in self._factor.latents:
            shape = self._by_row(latents, latent.name).shape[1:-1]
            split = len(shape) - latent.event_dim
            # Dimensions of plates to the left of the rows' that do not hold the latent are not coordinates.
            sizes = [size for size in shape[:split] if size > 1] + list(shape[split:])
            places = itertools.product(*map(range, sizes))
            names += [latent.name + (f"[{','.join(map(str, place))}]" if place else "") for place in places]
        return tuple(names)


def _check_numbers(drawn: Tensor) -> None:
    bad = drawn.isnan().any(-1).any(0)
    if bad.any():
        raise ValueError(
            f"Expected draws and likelihoods that are numbers, got nan in {int(bad.sum())} of {len(bad)} simulated rows, the "
            f"first is row {int(bad.nonzero()[0])}."
        )
