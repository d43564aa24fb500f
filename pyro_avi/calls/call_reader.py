"""Where a model's rows and observed values come from: recorded once, sliced, replayed at every later call.

Looking for the model's data among its arguments by identity fails as soon as the model writes ``x.float()``, ``x / 255``
or ``x[index]``. So the first call of a signature runs the model once under a recorder of tensor operations, walks back
from the rows and observed values to the arguments, and keeps those operations alone: nothing for ``obs=x``, one division
for ``obs=x / 255``. The likelihood is never run again.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_avi.calls.analysis import analyse_call
from pyro_avi.calls.model_run import CallData, DataQuery
from pyro_avi.calls.readers import ReplayReader, RerunReader
from pyro_avi.calls.signature import describe_leaf, flatten
from pyro_avi.inspection.isolated_run import untraced
from pyro_avi.rows.subsample import check_positions

__all__ = ["CallData", "CallReader"]


class CallReader:
    """Reads the rows of plates, observed values, masks and scales of any call of a model.

    Python numbers that the model takes from elsewhere than its arguments count as fixed.

    Args:
        model: any Pyro callable.
        plates: the names of the plates.
        sites: the observed sites to read.
        latents: the latent sites whose masks and scales are to be known, and whether the call observes them.
        optional: whether the observed sites are only to recognize a call by: they are left out where it lacks them, hides
            where they come from, or draws its rows.
        unobserved: whether calls that observe something in the plates of the latents are refused.
        inputs: whether the guide can be told what to read, for the advice.
    """

    # More signatures usually come from a Python number that changes every step.
    max_signatures = 64

    def __init__(
        self,
        model: Callable,
        plates: Sequence[str],
        sites: Sequence[str] = (),
        latents: Sequence[str] = (),
        *,
        optional: bool = False,
        unobserved: bool = False,
        inputs: bool = False,
    ):
        self._model = model
        self._query = DataQuery(tuple(plates), tuple(sites), tuple(latents), optional, unobserved, inputs)
        self._readers: dict[tuple, ReplayReader | RerunReader] = {}
        self._warned: set[str] = set()

    def __getstate__(self):
        # A replay knows its tensors by identity, which a copy has not.
        return {**self.__dict__, "_readers": {}}

    def draws_rows(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """``(N, B)`` of each plate of which the model draws ``B`` of ``N`` rows itself (``subsample_size=``)."""
        return self.call(args, kwargs).drawn

    def read(self, args: tuple, kwargs: Mapping[str, Any], rows: Mapping[str, Tensor] | None = None) -> CallData:
        """The data of a call with these arguments.

        Args:
            args, kwargs: the arguments of the model.
            rows: by plate the rows ``[B]`` drawn by the guide, for plates that the model subsamples itself.

        Raises:
            ValueError: if the model gives other rows or values when it is run again, or lacks an observation.
        """
        return self.call(args, kwargs).read(rows or {})

    def call(self, args: tuple, kwargs: Mapping[str, Any], counts: Mapping[str, int] | None = None) -> "Call":
        """One call of the model, whose rows can be looked at before it is read.

        Args:
            args, kwargs: the arguments of the model.
            counts: by plate the number of rows ``B`` that a plate given to the guide takes, where the model would take all.
        """
        leaves, structure = flatten(args, kwargs)
        signature = (structure, *map(describe_leaf, leaves))
        if counts:
            signature = (*signature, *counts.items())
        with untraced() if torch.jit.is_tracing() else nullcontext():
            data_reader = self._reader_of(signature, args, kwargs, counts or {})
        return Call(data_reader, args, kwargs, leaves)

    def _reader_of(self, signature, args, kwargs, counts):
        """The reader for calls of a signature, which is all about the arguments except the content of tensors."""
        if signature not in self._readers:
            if len(self._readers) == self.max_signatures:
                self._warn_once(
                    f"The model was called with more than {self.max_signatures} kinds of arguments, and each is analysed "
                    "anew. Pass a number that changes from step to step as a 0-dimensional tensor."
                )
                self._readers.clear()
            self._readers[signature] = analyse_call(self._model, self._query, args, kwargs, counts, self._warn_once)
        return self._readers[signature]

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


@dataclass(frozen=True)
class Call:
    """A call of the model with its arguments."""

    _data_reader: "ReplayReader | RerunReader"
    _args: tuple
    _kwargs: Mapping[str, Any]
    _leaves: Sequence[Any]

    @property
    def drawn(self) -> dict[str, tuple[int, int]]:
        """As :meth:`CallReader.draws_rows`."""
        return self._data_reader.drawn

    @property
    def ignored(self) -> tuple[str, ...]:
        """The plates whose rows the model draws and does not use, though it observes something there."""
        return self._data_reader.ignored

    @property
    def traced(self) -> bool:
        """Whether any number of rows can be read, and not just as many as the model draws."""
        return isinstance(self._data_reader, ReplayReader)

    def read(self, rows: Mapping[str, Tensor]) -> CallData:
        """As :meth:`CallReader.read`."""
        data = self._data_reader.read(self._args, self._kwargs, rows, self._leaves)
        for name, subsample in data.rows.items():
            if subsample.index is not None and name not in self._data_reader.drawn:
                check_positions(name, subsample.size, subsample.index)
        return data
