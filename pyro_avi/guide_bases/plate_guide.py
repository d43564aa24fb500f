"""The plates of a guide's call, and the rows in them."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine

from pyro_avi.calls.call_reader import CallData, CallReader
from pyro_avi.guide_bases.base import BaseGuide
from pyro_avi.inspection.isolated_run import isolated_run
from pyro_avi.inspection.structure import Structure
from pyro_avi.rows.subsample import Subsample, check_positions
from pyro_avi.rows.uniform_subsample import UniformSubsample

__all__ = ["PlateGuide"]


class PlateGuide(BaseGuide):
    """A guide that finds the rows of a call and the plates of its latents.

    Args:
        model: any Pyro callable.
        create_plates: a function of the model's arguments that returns the plates to use.
    """

    def __init__(self, model: Callable, *, create_plates: Callable | None = None):
        super().__init__(model, create_plates=create_plates)
        # Set by setup(), which every other method calls first.
        self._structure: Structure = None  # type: ignore[assignment]
        self._reader: CallReader | None = None
        self._depth = 0

    @property
    @abstractmethod
    def _device(self) -> torch.device:
        """The device of the model."""

    def _require_setup(self):
        if self._structure is None:
            raise ValueError(
                f"Expected a {type(self).__name__} with parameters, got one that has never seen the model's arguments.\n"
                "Call guide.setup(*args) with the arguments of the model first."
            )

    @property
    def row_plates(self) -> tuple[str, ...]:
        """The names of the plates whose rows have factors of their own."""
        self._require_setup()
        return tuple(self._structure.frames)

    @property
    def global_latents(self) -> tuple[str, ...]:
        """The names of the latents outside these plates."""
        self._require_setup()
        return tuple(latent.name for latent in self._structure.global_latents)

    def row_plate(self) -> str:
        """The name of the plate of the rows; no property, since torch's tracing reads those of every module.

        Raises:
            ValueError: if there are several.
        """
        if len(self.row_plates) > 1:
            raise ValueError(f"Expected rows of one plate, got those of {self.row_plates}: rows that cross share data.")
        return self.row_plates[0]

    def _frames(self):
        structure = self._structure
        return [frame for latent in structure.global_latents + structure.local_latents for frame in latent.frames]

    def _find(
        self,
        args: tuple,
        kwargs: Mapping[str, Any],
        given: Mapping[str, pyro.plate],
        *,
        draw: bool = False,
        any_rows: bool = False,
    ) -> tuple[CallData, dict[str, pyro.plate]]:
        """The data of a call and the plates of its latents.

        Args:
            args, kwargs: of the call.
            given: plates that an enclosing guide or ``create_plates`` provides.
            draw: whether to draw rows where the model would draw them itself; otherwise all of them are taken.
            any_rows: whether a part of the rows is enough if not all can be read.
        """
        structure = self._structure
        if self._reader is None:
            self._require_plates(given)
            rows = {name: Subsample(given[name].size, given[name].indices) for name in structure.frames}
            for name, subsample in rows.items():
                check_positions(name, subsample.size, subsample.index)
            return CallData(rows, {}, {}, {}), {name: given[name] for name in structure.frames}
        call = self._reader.call(args, kwargs, self._counts(given))
        self._check_drawn([name for name in call.ignored if name not in given])
        indices, followed = {name: given[name].indices for name in call.drawn if name in given}, []
        for name, index in indices.items():
            check_positions(name, given[name].size, index)
        for name, (size, count) in call.drawn.items():
            if name not in given and draw:
                fn = self._drawn_rows(name, size, count)
                indices[name] = pyro.sample(name, fn, infer={"is_auxiliary": True})
            elif name not in given:
                # A batch without known positions is treated as a data set of its own.
                followed += [name] * (name in call.ignored)
                part = name in call.ignored or (any_rows and not call.traced)
                indices[name] = torch.arange(count if part else size, device=self._device)
        data = call.read(indices)
        data.rows.update((name, Subsample(len(indices[name]), None)) for name in followed)
        plates = {}
        for name, frame in structure.frames.items():
            if name in given:
                self._check_given(given[name], data, call.drawn)
                plates[name] = given[name]
                continue
            subsample = data.rows[name]
            plate_size = None if name in structure.without_size else subsample.size
            # The rows are known already; another site of the plate's name would be in the trace twice.
            with poutine.block(hide=[name]) if name in call.drawn else nullcontext():
                plates[name] = pyro.plate(name, plate_size, subsample=subsample.index, dim=frame.dim)
        return data, plates

    def rows_of(self, *args, **kwargs) -> dict[str, Subsample]:
        """The rows of a call, by plate of the latents.

        Args:
            *args, **kwargs: the arguments of the model.

        Returns:
            The number ``size`` of rows of the plate, and ``index [B]``, the positions of those of the call; ``None`` where
            it gives none, as they are all in order, or the model draws them.
        """
        self._require_setup()
        with isolated_run():
            given = self._given_plates(args, kwargs)
            data, _ = self._find(args, kwargs, given)
            drawn = {} if self._reader is None else self._reader.call(args, kwargs, self._counts(given)).drawn
        return {
            name: Subsample(drawn[name][0], None) if name in drawn and name not in given else subsample
            for name, subsample in data.rows.items()
        }

    @staticmethod
    def _counts(given: Mapping[str, pyro.plate]) -> dict[str, int]:
        """The numbers of rows of those plates given that are subsampled."""
        return {name: plate.subsample_size for name, plate in given.items() if plate.subsample_size < plate.size}

    def _check_drawn(self, ignored: Sequence[str]) -> None:
        """Raise an error if the model draws rows and does not use them; only guides with parameters by row do so."""

    def _drawn_rows(self, name: str, size: int, count: int) -> UniformSubsample:
        """The distribution of the rows of a plate that the model would otherwise draw itself."""
        return UniformSubsample(size, count, self._depth, self._device)

    def _require_plates(self, given: Mapping[str, pyro.plate]) -> None:
        for name in self._structure.frames:
            if name not in given:
                raise ValueError(
                    f"Expected create_plates() to return plate {name!r}, got {sorted(given)}.\n"
                    "With inputs= and create_plates= the guide knows the rows of a call from these alone."
                )

    def _check_given(self, plate: pyro.plate, data: CallData, drawn) -> None:
        rows = data.rows[plate.name]
        expected = torch.arange(rows.size) if rows.index is None else rows.index
        if plate.name not in drawn and not torch.equal(plate.indices.cpu(), expected.cpu()):
            raise ValueError(
                f"Expected plate {plate.name!r} to hold the {len(expected)} rows that the model works on, got "
                f"{len(plate.indices)} others.\nPass create_plates= a function that returns pyro.plate({plate.name!r}, "
                "size, subsample=...) with the rows of the call."
            )
