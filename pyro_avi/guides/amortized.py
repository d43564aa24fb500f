"""The amortized guide: a network predicts each row's factor."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, cast

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_avi.calls.call_reader import CallData, CallReader
from pyro_avi.encoder_inputs.arguments import signature_text
from pyro_avi.encoder_inputs.covariate import Covariate
from pyro_avi.encoder_inputs.covariate_search import CovariateSearch
from pyro_avi.encoder_inputs.parts import Part, check_finite, join_parts, read_observed
from pyro_avi.encoders import MLP
from pyro_avi.encoders.network import Network
from pyro_avi.encoders.standardize import Standardize, transform_of
from pyro_avi.factors.row_factor import RowFactor
from pyro_avi.guide_bases.description import describe_option
from pyro_avi.guide_bases.local_guide import LocalGuide
from pyro_avi.sufficiency.amortizability import amortizability

__all__ = ["AmortizedGuide"]

Encoder = Sequence[int] | nn.Module
Inputs = Callable[..., Tensor]
Key = str | tuple[str, ...]


class AmortizedGuide(LocalGuide):
    r"""A guide that predicts every row's factor from the row itself, with the parameters of one network (A-VI).

    .. math:: f(n, x_n) = W h_\phi(x_n) + b

    with an encoder :math:`h_\phi` to ``H`` features and a linear head. Before training the head gives every row the same
    location and the scale ``init_scale``.

    Args:
        model: any Pyro callable.
        encoder: widths of a multilayer perceptron (:class:`~pyro_avi.encoders.MLP`), or any module from ``[B, *input]`` to
            features ``[B, H]``; for several row sets also a dictionary of such by the names of their plates.
        inputs: a function of the model's arguments that returns what the encoder reads, ``[B, ...]``: the rows of the
            call, or all ``N`` rows where the model draws its rows itself. By default the values observed in the plate and,
            for an encoder given by widths, the arguments that the model's rows depend on beyond them (covariates,
            exposures); several of them are flattened and joined. Masked values are read as zeros, and their mask beside
            them. Whole numbers that index or tell groups apart are not read. For several row sets a dictionary of such
            functions by the names of their plates, those left out by default. Together with ``create_plates`` the model's
            rows are not searched for: they are those of the plates given.
        standardize: whether what the encoder reads is standardized by the rows that the guide is set up with, counts by
            their logarithm first. By default where the encoder is given by widths and the guide finds its inputs: a module
            of your own reads values as the model observes them, and what ``inputs=`` returns is read as it is.
        plate, family, global_guide, init_loc_fn, init_scale, create_plates: as for every guide, see
            :class:`~pyro_avi.guide_bases.local_guide.LocalGuide`.

    Raises:
        ValueError: if a width is not positive, the encoder's features are not ``[B, H]``, nothing is known to read, or
            observed values that are not masked are nan or infinite.

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
        standardize: bool | None = None,
        **kwargs,
    ):
        super().__init__(model, **kwargs)
        for each in encoder.values() if isinstance(encoder, Mapping) else [encoder]:
            if not isinstance(each, nn.Module):
                MLP.check_widths(each)
        # Hidden from the module: the encoders that are trained belong to the inference functions.
        self._given_encoder = (_by_plates(encoder),)
        self._inputs = _by_plates(inputs)
        self._standardize = standardize
        self._masked: dict[str, bool] = {}
        self._covariates: dict[tuple[str, ...], list[Covariate]] = {}

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
        given = [self._option_for(self._inputs, rows.plates, "inputs", len(row_sets)) is not None for rows in row_sets]
        weighted = any(latent.is_weighted for latent in structure.global_latents + structure.local_latents)
        if row_sets and all(given) and self.create_plates is not None and not weighted:
            return None
        for rows in structure.row_sets:
            if self._option_for(self._inputs, rows.plates, "inputs", len(structure.row_sets)) is not None:
                continue
            if not rows.observations:
                raise ValueError(
                    f"Expected values observed in {rows} for the encoder to read, found none.\n"
                    "Try one of the following fixes:\n"
                    "- pass the observations to this call\n"
                    "- tell the guide what to read: inputs=lambda *args, **kwargs: ..."
                )
            for name, plates in rows.subsampled.items():
                if plates:
                    raise ValueError(
                        f"Expected all rows of plate {plates[0]!r} at observed site {name!r} for the encoder of {rows}, got a "
                        "part of them.\nTell the guide what to read: inputs=lambda *args, **kwargs: ..."
                    )
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
        encoder = describe_option(self._given_encoder[0])
        reads = [
            [covariate.describe() for covariate in self._covariates[row_factor.row_set.plates]]
            for row_factor in self.row_factors
        ]
        own = {"encoder": encoder, "inputs": describe_option(self._inputs), "standardize": self._standardize}
        found = {**super().describe(), **own, "covariates": reads}
        if args or kwargs:
            plates = tuple(self._structure.frames) or None
            found["amortizability"] = amortizability(self.model, *args, plate=plates, **kwargs).reason
        return found

    @staticmethod
    def _option_for(given: Any, plates: tuple[str, ...], option: str, count: int) -> Any:
        """The value of an option for one set of rows."""
        if isinstance(given, dict):
            return given.get(plates)
        if count > 1 and (isinstance(given, nn.Module) or callable(given)):
            raise ValueError(
                f"Expected {option}= for each of the {count} sets of rows, got one.\n"
                f"Pass a dictionary by the names of the plates: {option}={{{plates if len(plates) > 1 else plates[0]!r}: ...}}."
            )
        return given

    def _create_function(self, row_factor, initial, data, args, kwargs):
        plates, count = row_factor.row_set.plates, len(self._structure.row_sets)
        for name in row_factor.row_set.observations:
            self._masked[name] = name in data.masks
        self._check_finite(row_factor, data)
        encoder = self._option_for(self._given_encoder[0], plates, "encoder", count)
        if encoder is None:
            raise ValueError(
                f"Expected encoder= for {row_factor.row_set}, got those for {sorted(self._given_encoder[0])}."
            )
        by_widths, is_found = (
            not isinstance(encoder, nn.Module),
            self._option_for(self._inputs, plates, "inputs", count) is None,
        )
        self._covariates[plates] = self._find_covariates(row_factor, data, args, kwargs, by_widths) if is_found else []
        parts = [
            (value.to(initial.device), None if known is None else known.to(initial.device))
            for value, known in self._parts(row_factor, data, args, kwargs)
        ]
        depth, standardize = len(plates), nn.ModuleList()
        if by_widths and is_found if self._standardize is None else self._standardize:
            for (value, known), transform in zip(parts, self._transforms(row_factor, data, is_found), strict=True):
                known = None if known is None else known.flatten(0, depth - 1)
                standardize.append(Standardize(value.flatten(0, depth - 1), known, transform=transform))
        inputs = join_parts(parts, standardize, depth).flatten(0, depth - 1)
        if by_widths:
            encoder = MLP(prod(inputs.shape[1:]), encoder).to(initial)
        return Network(encoder, inputs, initial.flatten(0, -2), standardize)

    def _transforms(self, row_factor: RowFactor, data: CallData, is_found: bool) -> list[str]:
        """The transform of each part of the inputs before it is standardized."""
        if not is_found:
            return ["none"]
        observed = [
            transform_of(data.values[name], row_factor.row_set.supports[name])
            for name in row_factor.row_set.observations
        ]
        return observed + [covariate.transform for covariate in self._covariates[row_factor.row_set.plates]]

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
                    for row_factor in self.row_factors:
                        self._check_finite(row_factor, data)
            raise

    def _check_finite(self, row_factor: RowFactor, data: CallData) -> None:
        """Raise an error for observed values that would make every parameter nan."""
        if (
            self._option_for(self._inputs, row_factor.row_set.plates, "inputs", len(self._structure.row_sets))
            is not None
        ):
            return
        depth = len(row_factor.row_set.plates)
        for name in row_factor.row_set.observations:
            check_finite(name, self._observed(row_factor, name, data, self._like.dtype), depth)

    def _find_covariates(self, row_factor: RowFactor, data: CallData, args, kwargs, by_widths: bool) -> list[Covariate]:
        """The arguments other than observed values that the rows depend on and the encoder can read."""
        search = CovariateSearch(self.model, args, kwargs, row_factor.row_set)
        if self._expected is not None:
            at = [tuple(each["plates"]) for each in self._expected["row_sets"]].index(row_factor.row_set.plates)
            return [search.named(each) for each in self._expected["covariates"][at]]
        observed = {name: data.values[name] for name in row_factor.row_set.observations}
        covariates = search.find(data.rows, observed)
        names = {} if by_widths else {each.argument.name: "its encoder is a module of yours" for each in covariates}
        for name, reason in {**names, **search.undecided}.items():
            warnings.warn(
                f"The rows of {row_factor.row_set} may depend on argument {name} of the model, which the guide does not read "
                f"({reason}).\nSay what it reads, here as an example one number a row each: "
                f"inputs=lambda {signature_text(self.model)}: torch.stack([{', '.join([*observed, name])}], -1)",
                stacklevel=2,
            )
        return covariates if by_widths else []

    def _infer(self, row_factor, data, args, kwargs):
        depth = len(row_factor.row_set.plates)
        inputs = join_parts(self._parts(row_factor, data, args, kwargs), row_factor.function.standardize, depth)
        if depth == 1:
            return row_factor.function(inputs)
        return row_factor.function(inputs.flatten(0, depth - 1)).unflatten(0, inputs.shape[:depth])

    def _parts(self, row_factor: RowFactor, data: CallData, args: tuple, kwargs: Mapping[str, Any]) -> list[Part]:
        """The parts of the encoder's input, ``[*B, ...]`` each, with their masks."""
        plates = row_factor.row_set.plates
        dtype = row_factor.function.head.weight.dtype if row_factor.function else self._like.dtype
        given = self._option_for(self._inputs, plates, "inputs", len(self._structure.row_sets))
        if given is not None:
            inputs = given(*args, **kwargs)
            if not isinstance(inputs, Tensor):
                raise TypeError(f"Expected inputs= to return a tensor [B, ...], got a {type(inputs).__name__}.")
            inputs = self._read_given(inputs, plates, data, args, kwargs)
            return [(inputs.to(dtype) if self._standardize else inputs, None)]
        parts = [self._observed(row_factor, name, data, dtype) for name in row_factor.row_set.observations]
        rows = [data.rows[name] for name in plates]
        covariates = self._covariates[plates]
        return parts + [(covariate.read(args, kwargs, rows).to(dtype), None) for covariate in covariates]

    def _observed(self, row_factor: RowFactor, name: str, data: CallData, dtype: torch.dtype) -> Part:
        """The observed value of a site, and its mask where it has one."""
        return read_observed(name, data, row_factor.row_set, dtype, masked=self._masked[name])

    def _read_given(self, inputs: Tensor, plates: tuple[str, ...], data: CallData, args, kwargs) -> Tensor:
        drawn = {} if self._reader is None else self._reader.draws_rows(args, kwargs)
        for dim, name in enumerate(plates):
            # Where the model draws its rows, the caller cannot know them and gives all.
            if name in drawn:
                inputs = inputs.index_select(dim, cast(Tensor, data.rows[name].index))
            if inputs.dim() <= dim or inputs.shape[dim] != len(data.rows[name]):
                raise ValueError(
                    f"Expected inputs= to return the {len(data.rows[name])} rows of the call in dimension {dim}, got shape "
                    f"{tuple(inputs.shape)}."
                )
        return inputs


def _by_plates(given: Any) -> Any:
    """A dictionary by the names of plates with tuples as keys; anything else as it is."""
    if not isinstance(given, Mapping):
        return given
    return {(key,) if isinstance(key, str) else tuple(key): value for key, value in given.items()}
