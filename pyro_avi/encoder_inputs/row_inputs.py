"""What the encoder of one set of rows reads of a call."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyro_avi.calls.call_reader import CallData, CallReader
from pyro_avi.encoder_inputs.arguments import signature_text
from pyro_avi.encoder_inputs.covariate import Covariate
from pyro_avi.encoder_inputs.covariate_search import CovariateSearch
from pyro_avi.encoder_inputs.parts import Part, check_finite, join_parts, join_with_gaps, read_observed
from pyro_avi.encoder_inputs.standardize import Standardize, transform_of
from pyro_avi.encoder_inputs.window import Window
from pyro_avi.inspection.structure import RowSet

__all__ = ["RowInputs", "check_observed"]


@dataclass
class RowInputs:
    """The inputs of one set of rows.

    Attributes:
        rows: the set.
        given: the function of the model's arguments that gives the values, ``None`` for those that are found.
        window: of the neighbours that are read, ``None`` for none.
        is_series: whether the encoder reads all rows of the last plate together.
        gaps: whether it reads ``nan`` for what is not known.
        by_widths: whether it is given by widths: arguments are read beside the observed values, and all in its precision. A
            module may read what is no such number, as an embedding does.
        needed: the names of observed sites and arguments that have to be among what is found.
        masked: by observed site, whether it was masked in the first call.
        covariates: the arguments that are read beside the observed values.
    """

    rows: RowSet
    given: Callable[..., Tensor] | None = None
    window: Window | None = None
    is_series: bool = False
    gaps: bool = False
    by_widths: bool = False
    needed: tuple[str, ...] = ()
    masked: dict[str, bool] = field(default_factory=dict)
    covariates: list[Covariate] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """The number of plates of the rows."""
        return len(self.rows.plates)

    @property
    def reads_others(self) -> bool:
        """Whether a row's inputs are also those of other rows of the last plate."""
        return self.window is not None or self.is_series

    def find(
        self,
        model: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        data: CallData,
        *,
        expected: list[Mapping[str, Any]] | None,
    ) -> None:
        """Look at the first call: which values are masked, and which arguments rows depend on beyond what is observed.

        An encoder by widths reads these; of another one a warning names them.

        Args:
            model: any Pyro callable.
            args, kwargs: its arguments.
            data: of the call.
            expected: their descriptions, where they are known.
        """
        self.masked = {name: name in data.masks for name in self.rows.observations}
        if self.given is not None:
            return
        search = CovariateSearch(model, args, kwargs, self.rows)
        if expected is not None:
            self.covariates = [search.named(each) for each in expected]
            return
        observed = {name: data.values[name] for name in self.rows.observations}
        covariates = search.find(data.rows, observed)
        names = (
            {} if self.by_widths else {each.argument.name: "its encoder is a module of yours" for each in covariates}
        )
        for name, reason in {**names, **search.undecided}.items():
            warnings.warn(
                f"The rows of {self.rows} may depend on argument {name} of the model, which the guide does not read "
                f"({reason}).\nSay what it reads, here as an example one number a row each: "
                f"inputs=lambda {signature_text(model)}: torch.stack([{', '.join([*observed, name])}], -1)",
                stacklevel=2,
            )
        self.covariates = covariates if self.by_widths else []
        read = {*observed, *(each.argument.name for each in self.covariates)}
        if self.needed and (missing := [name for name in self.needed if name not in read]):
            self.covariates += [self._argument(search, name, data) for name in missing]

    def _argument(self, search: CovariateSearch, name: str, data: CallData) -> Covariate:
        """An argument that rows need beside their own row of it, which no exchange of single rows finds."""
        found = search.by_size(name, data.rows)
        if found is None:
            raise ValueError(
                f"Expected {name}, which {self.rows} need, with the rows of {self.rows} in a dimension of its own, or as an "
                "argument with as many, got neither.\nTell the guide what to read: inputs=avi.Window(..., of=...)"
            )
        return found

    def describe_reach(self) -> list[int] | str:
        """Which rows are read, as plain data: the window, ``"whole plate"`` or ``"own row"``."""
        if self.window is not None:
            return [self.window.before, self.window.after]
        return "whole plate" if self.is_series else "own row"

    @staticmethod
    def reach_from(description: list[int] | str) -> tuple[Window | None, bool]:
        """The window, and whether the whole plate is read, by what :meth:`describe_reach` said."""
        if isinstance(description, str):
            return None, description == "whole plate"
        before, after = description
        return Window(before, after), False

    def with_others(
        self,
        data: CallData,
        reader: CallReader | None,
        args: tuple,
        kwargs: Mapping[str, Any],
        counts: Mapping[str, int],
    ) -> CallData:
        """The data of a call with all rows of the last plate, where a row's inputs are also those of others.

        Args:
            data: of the rows of the call.
            reader: of the model; ``None`` where the caller gives rows and inputs.
            args, kwargs: of the call.
            counts: as for :meth:`~pyro_avi.calls.call_reader.CallReader.call`.

        Raises:
            ValueError: if some rows are given, and all are nowhere to be found.
        """
        plate = self.rows.plates[-1]
        subsample = data.rows[plate]
        call = None if reader is None else reader.call(args, kwargs, counts)
        if self.given is not None or not self.reads_others:
            return data
        assert call is not None
        if plate in call.drawn and plate not in call.ignored:
            device = None if subsample.index is None else subsample.index.device
            rows = {name: index for name in call.drawn if (index := data.rows[name].index) is not None}
            return call.read({**rows, plate: torch.arange(subsample.size, device=device)})
        if subsample.index is not None or plate in call.ignored:
            raise ValueError(
                f"Expected all {subsample.size} rows of plate {plate!r}, or a model that draws them, got a call of "
                f"{len(subsample)}: the encoder reads other rows beside each, which need not be in a batch.\n"
                "Try one of the following fixes:\n"
                "- say where all rows are: inputs=avi.Window(before, after, of=lambda *args, **kwargs: x_of_all_rows), for an "
                "encoder of the whole plate inputs=lambda *args, **kwargs: x_of_all_rows\n"
                f"- let the model draw its rows: pyro.plate({plate!r}, {subsample.size}, subsample_size=...)"
            )
        return data

    def check_finite(self, data: CallData, dtype: torch.dtype) -> None:
        """Raise an error for observed values that would make every parameter nan."""
        if self.given is None:
            for name in self.rows.observations:
                check_finite(name, self._observed(name, data, dtype), self.depth)

    def parts(
        self, data: CallData, args: tuple, kwargs: Mapping[str, Any], dtype: torch.dtype | None, drawn: Mapping
    ) -> list[Part]:
        """The parts of the input, ``[*B, ...]`` each, with their masks.

        Args:
            data: of the rows to read: those of the call, or all rows of the last plate where others are read too.
            args, kwargs: of the model.
            dtype: of the encoder; ``None`` to leave values of ``inputs=`` as they are.
            drawn: the plates whose rows the model draws.
        """
        if self.given is not None:
            inputs = self.given(*args, **kwargs)
            if not isinstance(inputs, Tensor):
                raise TypeError(f"Expected inputs= to return a tensor [B, ...], got a {type(inputs).__name__}.")
            inputs = self._rows_of(inputs, data, drawn)
            return [(inputs if dtype is None else inputs.to(dtype), None)]
        assert dtype is not None
        parts = [self._observed(name, data, dtype) for name in self.rows.observations]
        rows = [data.rows[name] for name in self.rows.plates]
        return parts + [(covariate.read(args, kwargs, rows).to(dtype), None) for covariate in self.covariates]

    def _observed(self, name: str, data: CallData, dtype: torch.dtype) -> Part:
        """The observed value of a site, and its mask where it has one."""
        return read_observed(name, data, self.rows, dtype, masked=self.masked[name])

    def _rows_of(self, inputs: Tensor, data: CallData, drawn: Mapping) -> Tensor:
        """What ``inputs=`` returned at the rows of a call."""
        plates = self.rows.plates
        for dim, name in enumerate(plates):
            subsample = data.rows[name]
            others = self.reads_others and dim == len(plates) - 1
            # Where the model draws its rows, the caller cannot know them and gives all.
            if name in drawn and not others and subsample.index is not None:
                inputs = inputs.index_select(dim, subsample.index)
            expected = subsample.size if others else len(subsample)
            if inputs.dim() <= dim or inputs.shape[dim] != expected:
                what = f"all {expected} rows of plate {name!r}" if others else f"the {expected} rows of the call"
                raise ValueError(
                    f"Expected inputs= to return {what} in dimension {dim}, got shape {tuple(inputs.shape)}."
                )
        return inputs

    def standardizers(self, parts: list[Part], data: CallData) -> nn.ModuleList:
        """What standardizes each part by these rows."""
        if self.given is not None:
            transforms = ["none"]
        else:
            transforms = [transform_of(data.values[name], self.rows.supports[name]) for name in self.rows.observations]
            transforms += [covariate.transform for covariate in self.covariates]
        found = nn.ModuleList()
        for (value, known), transform in zip(parts, transforms, strict=True):
            known = None if known is None else known.flatten(0, self.depth - 1)
            found.append(Standardize(value.flatten(0, self.depth - 1), known, transform=transform))
        return found

    def join(
        self, parts: list[Part], standardize: nn.ModuleList, positions: Tensor | None, globals_: Tensor | None
    ) -> Tensor:
        """What the encoder reads: ``[*B, ...]``, of a series all rows ``[*O, N, F]``.

        Args:
            parts: as :meth:`parts` gives them.
            standardize: what standardizes each of them; empty where nothing does.
            positions: of the rows of the call in the last plate, where others are read too; ``None`` for all in order.
            globals_: ``[G]`` the values of global latents, put behind those of every row.
        """
        if self.gaps:
            inputs = join_with_gaps(parts, standardize, self.depth, by_row=self.reads_others)
        else:
            inputs = join_parts(parts, standardize, self.depth)
            inputs = self._flat(inputs) if self.window is not None else inputs
        if self.window is not None:
            inputs = self.window.read(inputs, positions, gaps=self.gaps)
        if globals_ is None:
            return inputs
        inputs = inputs.unsqueeze(-1) if inputs.dim() == self.depth else inputs
        return torch.cat([inputs, globals_.to(inputs).expand(*inputs.shape[:-1], -1)], -1)

    def _flat(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(self.depth) if inputs.dim() > self.depth else inputs.unsqueeze(-1)


def check_observed(rows: RowSet) -> None:
    """Raise an error if a set of rows observes nothing that an encoder could read, or a part of it only.

    Args:
        rows: the set.
    """
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
