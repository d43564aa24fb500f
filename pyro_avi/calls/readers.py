"""Readers of the data of calls of one signature, by a replay of recorded operations or by another run of the model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_avi.calls.model_run import CallData, DataQuery, Run, run_once
from pyro_avi.calls.replay import Replay
from pyro_avi.rows.subsample import Subsample

__all__ = ["ReplayReader", "RerunReader", "targets"]


class ReplayReader:
    """Replays the operations that lead from the arguments to what the model works on.

    Args:
        run: the recorded run.
        data: what it worked on.
        ignored: as :attr:`~pyro_avi.calls.call_reader.Call.ignored`.
        replay: from the arguments and the rows drawn to :func:`targets`.
        keep: objects whose identity is part of the signature.
    """

    def __init__(self, run: Run, data: CallData, ignored: tuple[str, ...], replay: Replay, keep):
        self.drawn, self.ignored, self._data, self._plain = run.drawn, ignored, data, run.plain_scales
        self._replay, self._keep = replay, keep

    def read(self, args, kwargs, rows: Mapping[str, Tensor], leaves) -> CallData:
        """The data of a call, as :meth:`~pyro_avi.calls.call_reader.CallReader.read` gives them."""
        given, data = iter(self._replay([*leaves, *(rows.get(name) for name in self.drawn)])), self._data
        return CallData(
            {name: Subsample(subsample.size, next(given)) for name, subsample in data.rows.items()},
            {name: next(given) for name in data.values},
            {name: replace(mask, values=next(given)) for name, mask in data.masks.items()},
            {name: next(given) / self._plain[name] for name in data.scales},
            {name: next(given) for name in data.given},
        )


class RerunReader:
    """Runs the model again at every call: slow, and always right.

    Args:
        model, query, counts: as for :func:`~pyro_avi.calls.model_run.run_once`.
        run, ignored, keep: as for :class:`ReplayReader`.
    """

    def __init__(self, model, query: DataQuery, counts: Mapping[str, int], run: Run, ignored: tuple[str, ...], keep):
        self._run = lambda args, kwargs, rows: run_once(model, query, args, kwargs, rows=rows, counts=counts, seed=0)
        self._query, self.drawn, self.ignored, self._keep = query, run.drawn, ignored, keep

    def read(self, args, kwargs, rows: Mapping[str, Tensor], leaves) -> CallData:
        """The data of a call, as :meth:`~pyro_avi.calls.call_reader.CallReader.read` gives them."""
        if torch.jit.is_tracing():
            raise ValueError(
                f"Expected the rows and observed values of {self._query} to be traced to the arguments of the model for a "
                "Jit ELBO, which would otherwise keep those of its first call.\n"
                "Pass the data as tensor arguments, tell the guide what to read (inputs=lambda *args, **kwargs: ...), or use "
                "the ELBO without Jit."
            )
        others = {}
        for name, (size, count) in self.drawn.items():
            if name in rows and len(rows[name]) != count:
                others[name] = Subsample(size, rows[name])
                if not self._query.sites:
                    rows = {**rows, name: torch.arange(count, device=rows[name].device)}
                    continue
                raise ValueError(
                    f"Expected a call for {count} of the {size} rows of plate {name!r}, as many as the model draws, got one "
                    f"for {len(rows[name])}: what it observes in them could not be traced to its arguments, and it runs for "
                    "that many only.\nPass the data as tensor arguments, and the positions of the rows: "
                    f"pyro.plate({name!r}, {size}, subsample=index)."
                )
        run = self._run(args, kwargs, rows)
        if run.drawn != self.drawn:
            raise ValueError(
                f"Expected {self._query} to draw its rows as in the first call, (N, B) = {self.drawn}, got {run.drawn}.\n"
                "Pass the data as arguments of the model, so that a call with other data is seen as one."
            )
        if others:
            # Masks and scales of other rows would be needed for draws, which are for as many as the model draws.
            return CallData({**run.data.rows, **others}, {}, {}, {})
        plain = run.plain_scales
        scales = {name: scale / plain[name] for name, scale in run.data.scales.items()}
        return replace(run.data, scales=scales)


def targets(data: CallData) -> list[Any]:
    """All tensors and numbers of a call's data, in the order that readers give them."""
    masks = (mask.values for mask in data.masks.values())
    rows = (rows.index for rows in data.rows.values())
    return [*rows, *data.values.values(), *masks, *data.scales.values(), *data.given.values()]
