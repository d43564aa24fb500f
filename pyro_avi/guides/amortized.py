"""The amortized guide: a network predicts each row's factor."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_avi.calls.call_reader import CallData, CallReader
from pyro_avi.encoder_inputs.row_inputs import RowInputs, check_observed
from pyro_avi.encoder_inputs.window import Window, function_of
from pyro_avi.encoders import MLP
from pyro_avi.encoders.gaps import ReadsGaps
from pyro_avi.encoders.network import Network
from pyro_avi.encoders.recurrent import Recurrent
from pyro_avi.encoders.sequence import SequenceEncoder
from pyro_avi.guide_bases.by_plates import by_plates, option_for
from pyro_avi.guide_bases.description import describe_option
from pyro_avi.guide_bases.global_values import global_values, initial_globals
from pyro_avi.guide_bases.local_guide import LocalGuide
from pyro_avi.inspection.structure import RowSet
from pyro_avi.sufficiency.amortizability import amortizability

__all__ = ["AmortizedGuide"]

Encoder = Sequence[int] | nn.Module
Inputs = Callable[..., Tensor] | Window | str
Key = str | tuple[str, ...]

_NEEDED = "needed"


class AmortizedGuide(LocalGuide):
    r"""A guide that predicts every row's factor from the row itself, with the parameters of one network (A-VI).

    .. math:: f(n, x_n) = W h_\phi(x_n) + b

    with an encoder :math:`h_\phi` to ``H`` features and a linear head. Before training the head gives every row the same
    location and the scale ``init_scale``. An encoder may read more than the row: its neighbours (:class:`~pyro_avi.Window`),
    the whole plate (:class:`~pyro_avi.encoders.Recurrent`, :class:`~pyro_avi.encoders.Attention`), the global latents.

    Args:
        model: any Pyro callable.
        encoder: widths of a multilayer perceptron (:class:`~pyro_avi.encoders.MLP`), or any module from ``[B, *input]`` to
            features ``[B, H]``; for several row sets also a dictionary of such by the names of their plates. One that reads
            the whole plate is given all its rows, and so a call that holds some of them is refused unless the model draws
            them or ``inputs=`` gives all.
        inputs: a function of the model's arguments that returns what the encoder reads, ``[B, ...]``: the rows of the
            call, or all ``N`` rows where the model draws its rows itself, or where the encoder reads the whole plate. By
            default the values observed in the plate and, for an encoder given by widths, the arguments that the model's rows
            depend on beyond them (covariates, exposures); several of them are flattened and joined. Masked values are read as
            zeros, and their mask beside them; encoders of sets and series read ``nan``. Whole numbers that index or tell
            groups apart are not read. A :class:`~pyro_avi.Window` for the values of neighbours too. ``"needed"`` for what
            :func:`~pyro_avi.amortizability` asks for: the row, a window, or the whole plate, for which an encoder given by
            widths is a :class:`~pyro_avi.encoders.Recurrent`. For several row sets a dictionary of such by the names of
            their plates, those left out by default. A function together with ``create_plates`` leaves the model's rows
            unsearched: they are those of the plates given.
        reads_globals: ``"mean"`` or ``"draw"`` for the global latents as further input, put behind the values of each row:
            their medians, which are the means in unconstrained coordinates, or their values in the same draw of the guide,
            so that :math:`q(z_n \mid \theta)` follows :math:`\theta`. Where no draw is made, as by :meth:`posterior`, the
            medians stand for them.
        standardize: whether what the encoder reads is standardized by the rows that the guide is set up with, counts by
            their logarithm first. By default where the encoder is given by widths and the guide finds its inputs: a module
            of your own reads values as the model observes them, and what ``inputs=`` returns is read as it is.
        plate, family, global_guide, init_loc_fn, init_scale, create_plates: as for every guide, see
            :class:`~pyro_avi.guide_bases.local_guide.LocalGuide`.

    Raises:
        ValueError: if a width is not positive, the encoder's features are not ``[B, H]``, nothing is known to read,
            observed values that are not masked are nan or infinite, a window is longer than the series, or rows are given
            whose neighbours are not.

    References:
        Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, https://arxiv.org/abs/1312.6114.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.AmortizedGuide(model, encoder=(32,)).setup(x)
        >>> guide.posterior(torch.rand(7, 1, 8, 8)).batch_shape
        torch.Size([7])
    """

    def __init__(
        self,
        model: Callable,
        encoder: Encoder | Mapping[Key, Encoder] = (64, 64),
        *,
        inputs: Inputs | Mapping[Key, Inputs] | None = None,
        reads_globals: str | None = None,
        standardize: bool | None = None,
        **kwargs,
    ):
        super().__init__(model, **kwargs)
        for each in encoder.values() if isinstance(encoder, Mapping) else [encoder]:
            if not isinstance(each, nn.Module):
                MLP.check_widths(each)
        for option in inputs.values() if isinstance(inputs, Mapping) else [inputs]:
            if not (option is None or option == _NEEDED or isinstance(option, Window) or callable(option)):
                what = f"a function of the model's arguments, an avi.Window or {_NEEDED!r}"
                raise TypeError(f"Expected inputs= to be {what}, got {option!r}.")
        if reads_globals not in (None, "mean", "draw"):
            raise ValueError(f"Expected reads_globals to be None, 'mean' or 'draw', got {reads_globals!r}.")
        # Hidden from the module: the encoders that are trained belong to the inference functions.
        self._given_encoder = (by_plates(encoder),)
        self._inputs = by_plates(inputs)
        self._reads_globals = reads_globals
        self._standardize = standardize
        self._reading: dict[tuple[str, ...], RowInputs] = {}

    @property
    def encoder(self) -> nn.Module | dict[tuple[str, ...], nn.Module]:
        """The encoder, ``[B, *input]`` to ``[B, H]``; by plates where there are several row sets."""
        return self._by_row_set(lambda row_factor: row_factor.function.encoder)

    @property
    def head(self) -> nn.Linear | dict[tuple[str, ...], nn.Linear]:
        """The linear head, ``[B, H]`` to ``[B, P]``; by plates where there are several row sets."""
        return self._by_row_set(lambda row_factor: row_factor.function.head)

    def _create_reader(self, structure):
        sites: dict[str, None] = {}
        row_sets = structure.row_sets
        given = [function_of(self._inputs_for(rows, len(row_sets))) is not None for rows in row_sets]
        weighted = any(latent.is_weighted for latent in structure.global_latents + structure.local_latents)
        if row_sets and all(given) and self.create_plates is not None and not weighted:
            return None
        for rows, is_given in zip(row_sets, given, strict=True):
            if is_given:
                continue
            check_observed(rows)
            sites.update(dict.fromkeys(rows.observations))
        latents = [latent.name for latent in structure.global_latents + structure.local_latents]
        unobserved = not structure.observations
        return CallReader(
            self.model, tuple(structure.frames), tuple(sites), latents, unobserved=unobserved, inputs=True
        )

    def _all_rows(self):
        # The rows are what it reads.
        return None

    def describe(self, *args, **kwargs):
        """The kind of this guide as plain data, with modules and functions by their names.

        Args:
            *args, **kwargs: the arguments of the model, to say also whether a row's own data suffice for its best factor
                (``"amortizability"``, see :func:`~pyro_avi.amortizability`).
        """
        readings = [self._reading[row_factor.row_set.plates] for row_factor in self.row_factors]
        own = {
            "encoder": describe_option(self._given_encoder[0]),
            "inputs": _describe_inputs(self._inputs),
            "reads": [each.describe_reach() for each in readings],
            "reads_globals": self._reads_globals,
            "standardize": self._standardize,
            "covariates": [[covariate.describe() for covariate in each.covariates] for each in readings],
        }
        found = {**super().describe(), **own}
        if args or kwargs:
            plates = tuple(self._structure.frames) or None
            found["amortizability"] = amortizability(self.model, *args, plate=plates, **kwargs).reason
        return found

    def _inputs_for(self, rows: RowSet, count: int) -> Inputs | None:
        return option_for(self._inputs, rows.plates, "inputs", count)

    def _create_function(self, row_factor, initial, data, args, kwargs):
        rows, count = row_factor.row_set, len(self._structure.row_sets)
        encoder = option_for(self._given_encoder[0], rows.plates, "encoder", count)
        if encoder is None:
            raise ValueError(f"Expected encoder= for {rows}, got those for {sorted(self._given_encoder[0])}.")
        expected = self._expected_of(rows)
        if self._expected and expected and isinstance(expected["reads"], list):
            # The encoder has a weight at least for each row of its window.
            self._expected.check_size(rows.plates, sum(expected["reads"]))
        reading = self._reading[rows.plates] = self._create_reading(rows, encoder, args, kwargs, expected)
        covariates = None if expected is None else expected["covariates"]
        reading.find(self.model, args, kwargs, data, expected=covariates)
        reading.check_finite(data, initial.dtype)
        whole = self._with_others(reading, data, args, kwargs)
        parts = [
            (value.to(initial.device), None if known is None else known.to(initial.device))
            for value, known in self._parts(reading, whole, initial.dtype, args, kwargs)
        ]
        is_found = reading.given is None
        standardize = nn.ModuleList()
        if reading.by_widths and is_found if self._standardize is None else self._standardize:
            standardize = reading.standardizers(parts, whole)
        # The global latents have no factor yet.
        of_globals = None if self._reads_globals is None else initial_globals(self._structure)
        inputs = reading.join(parts, standardize, self._index(reading, data), of_globals)
        inputs = inputs if reading.is_series else inputs.flatten(0, reading.depth - 1)
        if reading.by_widths:
            sizes = (inputs.shape[-1] if reading.is_series else prod(inputs.shape[1:]), *encoder)
            if self._expected is not None:
                # A recurrent layer has more than one that is not, and the head reads its last units at least.
                least = sum((a + 1) * b for a, b in pairwise((*sizes, row_factor.factor.num_parameters)))
                self._expected.check_size(rows.plates, least)
            encoder = (Recurrent if reading.is_series else MLP)(sizes[0], encoder).to(initial)
        return Network(encoder, inputs, initial.flatten(0, -2), standardize)

    def _create_reading(self, rows: RowSet, encoder: Encoder, args, kwargs, expected) -> RowInputs:
        """What the encoder of a set of rows is to read."""
        option = self._inputs_for(rows, len(self._structure.row_sets))
        window, is_series = option if isinstance(option, Window) else None, isinstance(encoder, SequenceEncoder)
        needed: tuple[str, ...] = ()
        if option == _NEEDED and expected is not None:
            window, needed_series = RowInputs.reach_from(expected["reads"])
        elif option == _NEEDED:
            plates = tuple(self._structure.frames)
            verdict = amortizability(self.model, *args, plate=plates, **kwargs).by_latent[rows.latents[0].name]
            window, needed_series = verdict.window(), verdict.reads_whole_plate
            needed = tuple(each.name for each in verdict.inputs)
        else:
            needed_series = is_series
        if needed_series and not is_series and isinstance(encoder, nn.Module):
            raise ValueError(
                f"Expected an encoder that reads all rows of {rows}, which the verdict asks for, got a "
                f"{type(encoder).__name__}.\nPass encoder= by its widths, or avi.encoders.Recurrent or Attention."
            )
        is_series = is_series or needed_series
        gaps = is_series or isinstance(encoder, ReadsGaps)
        by_widths = not isinstance(encoder, nn.Module)
        return RowInputs(rows, function_of(option), window, is_series, gaps=gaps, by_widths=by_widths, needed=needed)

    def _expected_of(self, rows: RowSet) -> dict[str, Any] | None:
        """What the file that the guide is loaded from says of the inputs of a set of rows."""
        if self._expected is None:
            return None
        at = [tuple(each["plates"]) for each in self._expected.description["row_sets"]].index(rows.plates)
        return {name: self._expected.description[name][at] for name in ("covariates", "reads")}

    def forward(self, *args, **kwargs) -> dict[str, Tensor]:
        """Sample every latent of the model; return the values by site.

        Raises:
            ValueError: if observed values that are not masked are nan or infinite, where validation is on.
        """
        try:
            return super().forward(*args, **kwargs)
        except ValueError:
            # Looked for after the fact, so that it takes no time at other steps.
            if self._structure is not None and not torch.jit.is_tracing():
                with poutine.block():
                    data, _ = self._find(args, kwargs, self._given_plates(args, kwargs))
                    for reading in self._reading.values():
                        reading.check_finite(data, self._like.dtype)
            raise

    @property
    def _draws_globals_first(self) -> bool:
        return self._reads_globals == "draw"

    def _infer(self, row_factor, data, args, kwargs):
        reading, network = self._reading[row_factor.row_set.plates], row_factor.function
        whole = self._with_others(reading, data, args, kwargs)
        parts = self._parts(reading, whole, network.head.weight.dtype, args, kwargs)
        index, of_globals = self._index(reading, data), None
        if self._reads_globals is not None:
            of_globals = global_values(self._structure, self.global_guide, data, args, kwargs)
        inputs = reading.join(parts, network.standardize, index, of_globals)
        if reading.is_series:
            parameters = network(inputs)
            return parameters if index is None else parameters.index_select(-2, index)
        if reading.depth == 1:
            return network(inputs)
        return network(inputs.flatten(0, reading.depth - 1)).unflatten(0, inputs.shape[: reading.depth])

    @staticmethod
    def _index(reading: RowInputs, data: CallData) -> Tensor | None:
        """The positions of the rows of a call among all that are read; ``None`` where they are the same."""
        return data.rows[reading.rows.plates[-1]].index if reading.reads_others else None

    def _with_others(self, reading: RowInputs, data: CallData, args, kwargs) -> CallData:
        if not reading.reads_others:
            return data
        return reading.with_others(data, self._reader, args, kwargs, self._counts(self._given_plates(args, kwargs)))

    def _parts(self, reading: RowInputs, data: CallData, dtype: torch.dtype, args, kwargs) -> list:
        if reading.given is None:
            return reading.parts(data, args, kwargs, dtype, {})
        drawn = {} if self._reader is None else self._reader.draws_rows(args, kwargs)
        return reading.parts(data, args, kwargs, dtype if self._standardize or reading.by_widths else None, drawn)


def _describe_inputs(option: Any) -> Any:
    """Plain data for ``inputs=``, with which a guide can be made where it is no text."""
    if isinstance(option, Window) and option.of is None:
        return [option.before, option.after]
    if option == _NEEDED:
        return {"by": "verdict"}
    return describe_option(option.of if isinstance(option, Window) else option)
