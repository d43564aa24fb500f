"""The way back from a table: an encoder fitted to the factors of its rows."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_avi.closing.row_tables import read_tables, table_like, write_tables
from pyro_avi.closing.weight_source import Draws, weight_source
from pyro_avi.display.formatting import counted, with_error
from pyro_avi.errors import check_count
from pyro_avi.estimators import Estimate
from pyro_avi.evidence.evidence import paired_mean
from pyro_avi.guides import AmortizedGuide, FactorizedGuide
from pyro_avi.lock import in_turn
from pyro_avi.seeds import as_seed, seeded
from pyro_avi.training.fit import LearningRate, fit

__all__ = ["Distillation", "distill"]


@dataclass(frozen=True)
class Distillation:
    """An encoder fitted to a table, and what it loses against it.

    Attributes:
        guide: the amortized guide.
        before: how much lower the bounds of its factors were than those of the table's before it was fitted to them, in nats;
            by row and in total. Where the table holds the best factors it is the amortization gap.
        after: the same for the guide as it is.
        losses: ``[num_steps]`` the divergences of the steps, in nats, for all rows.
    """

    guide: AmortizedGuide
    before: Estimate
    after: Estimate
    losses: Tensor

    def __repr__(self) -> str:
        after, before = (with_error(each.per_row.value, each.per_row.se) for each in (self.after, self.before))
        return (
            f"Distillation({after} nats a row below the table, {before} before, {counted(len(self.after.rows), 'row')})"
        )


@in_turn
def distill(
    guide: FactorizedGuide,
    encoder: Sequence[int] | nn.Module,
    *args,
    num_steps: int,
    batches: Iterable | None = None,
    lr: LearningRate = 1e-3,
    num_samples: int = 100,
    seed: int | None = 0,
    progress: bool = True,
    **kwargs,
) -> Distillation:
    r"""Fit an encoder to the factors of a table.

    .. math:: \min_\phi \sum_n \mathrm{KL} \left( q(z_n; \lambda_n) \,\|\, q(z_n; f_\phi(x_n)) \right)

    The model is evaluated only for the report: what the encoder learns are the table's rows, so that a step takes as long as
    the encoder. Divergences are exact where Pyro knows them, as of normals; elsewhere they are those of a draw from the
    table. What the encoder does not reach is closed for given rows by :func:`~pyro_avi.refine`.

    Args:
        guide: with a table for all rows of a data set. It is left as it is.
        encoder: as for :class:`~pyro_avi.AmortizedGuide`, or such a guide with the family of the table, which is copied and
            trained on from where it is.
        *args, **kwargs: the arguments of the guide's model, for the rows of the table.
        num_steps: the number of steps of Adam.
        batches: the arguments of each step with the positions of their rows, as for :func:`~pyro_avi.fit`, for example
            ``avi.minibatches(x, batch_size=100)``; by default every step takes all rows.
        lr: the learning rate, a number or a function of the step from 0.
        num_samples: the draws by which the bounds of the encoder and of the table are compared.
        seed: the seed of encoder and draws; ``None`` for one drawn from the random state of the program.
        progress: whether to show a progress bar, which appears after the first second.

    Returns:
        The amortized guide, with a copy of the table guide's factor of the global latents, and its gap to the table before
        and after.

    Raises:
        TypeError: if the guide has no table.
        ValueError: if it is for other rows, has another family than the guide given, or an argument is no positive count.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> table = avi.FactorizedGuide(model).setup(x)
        >>> distilled = avi.distill(table, (32,), x, num_steps=5)
        >>> distilled.guide.posterior(torch.rand(7, 1, 8, 8)).batch_shape, distilled.losses.shape
        (torch.Size([7]), torch.Size([5]))
    """
    if not isinstance(guide, FactorizedGuide):
        raise TypeError(
            f"Expected a FactorizedGuide, got {type(guide).__name__}.\n"
            "Give the rows factors of their own first: avi.refine(model, guide, x, num_steps=...)"
        )
    for name, count in (("num_steps", num_steps), ("num_samples", num_samples)):
        check_count(name, count)
    seed = as_seed(seed)
    guide.check_rows(*args, **kwargs)
    with seeded(seed):
        student = _student(guide, encoder).setup(*args, **kwargs)
    student.check_same_latents(guide)
    gap = _Gap(guide, args, kwargs, Draws(num_samples, seed + 1))
    before = gap.of(student)
    result = fit(
        guide,
        student,
        *(args if batches is None else ()),
        num_steps=num_steps,
        batches=batches,
        lr={"local": lr},
        elbo=_Divergence(),
        seed=seed,
        progress=progress,
        **kwargs,
    )
    return Distillation(student, before, gap.of(student), result.losses)


def _student(guide: FactorizedGuide, encoder: Sequence[int] | nn.Module) -> AmortizedGuide:
    """The guide to be fitted, for the same latents and with the same factor of the globals."""
    if isinstance(encoder, AmortizedGuide):
        if encoder.family.describe() != guide.family.describe():
            raise ValueError(
                f"Expected a guide with the family of the table, {guide.family!r}, got one with {encoder.family!r}."
            )
        return copy.deepcopy(encoder)
    return AmortizedGuide(
        guide.model,
        encoder,
        plate=guide.row_plates,
        family=guide.family,
        global_guide=copy.deepcopy(guide.global_guide),
        create_plates=guide.create_plates,
    )


class _Divergence:
    """The divergence of one guide from another as the loss of a training: the first is the model, the second the guide."""

    def differentiable_loss(self, model: FactorizedGuide, guide: AmortizedGuide, *args, **kwargs) -> Tensor:
        """The divergence of the rows of a call, exact where it is known, otherwise by one draw."""
        with torch.no_grad():
            given = poutine.trace(model).get_trace(*args, **kwargs)
        fitted = poutine.trace(poutine.replay(guide, trace=given)).get_trace(*args, **kwargs)
        total = torch.zeros(())
        for name, site in given.nodes.items():
            if site["type"] == "sample" and not site_is_subsample(site):
                total = total + _of_site(site, fitted.nodes[name]).to(total)
        return total


def _of_site(given: Mapping[str, Any], fitted: Mapping[str, Any]) -> Tensor:
    try:
        divergence = kl_divergence(given["fn"], fitted["fn"])
    except NotImplementedError:
        value = given["value"]
        divergence = given["fn"].log_prob(value) - fitted["fn"].log_prob(value)
    return scale_and_mask(divergence, fitted["scale"], fitted["mask"]).sum()


class _Gap:
    """How far the bounds of a guide's factors lie below those of a table's, by the same draws of both.

    Args:
        guide: with the table.
        args, kwargs: of the model.
        draws: the draws.
    """

    def __init__(self, guide: FactorizedGuide, args: tuple, kwargs: Mapping[str, Any], draws: Draws):
        self._table = table_like(guide.model, guide, args, kwargs, with_globals=bool(guide.global_latents))
        self._args, self._kwargs, self._draws = args, kwargs, draws
        self._source = weight_source(guide.model, self._table, args, kwargs)
        write_tables(self._table, read_tables(guide))
        self._of_table = self._source.weights(self._table, draws)

    def of(self, guide: AmortizedGuide) -> Estimate:
        """Those of an encoder's output, in nats."""
        with torch.no_grad():
            given = guide.variational_parameters(*self._args, **self._kwargs)
        tables = {}
        for (name, table), row_factor in zip(self._table.row_tables().items(), self._table.row_factors, strict=True):
            rows = given[row_factor.row_set.plates] if isinstance(given, dict) else given
            tables[name] = rows.reshape(table.shape)
        write_tables(self._table, tables)
        weights = self._source.weights(self._table, self._draws)
        return paired_mean(self._of_table.local - weights.local, weights.scale)
