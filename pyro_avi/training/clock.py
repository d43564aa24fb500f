"""The time that steps take, without waiting for a CUDA device after each of them."""

import time
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["Clock"]


class Clock:
    """Adds up the seconds between starts and stops.

    Those of a CUDA device are measured by events in its stream, so that the program goes on while the device works.

    Args:
        device: where the steps are computed.
        laps: of the steps taken before, from which it goes on.
    """

    # Intervals whose events are kept before they are read.
    _most = 1000

    def __init__(self, device: torch.device, laps: Sequence[tuple[int, float]] = ((0, 0.0),)):
        self._device, self._seconds = device, laps[-1][1]
        self._began: Any = None
        # Pairs of a start and a stop; between them, from :meth:`lap`, numbers of steps taken until then.
        self._spans: list[tuple[Any, Any] | int] = []
        self._laps = list(laps)

    def start(self) -> None:
        """Begin an interval."""
        self._began = self._now()

    def stop(self) -> None:
        """End the interval."""
        self._spans.append((self._began, self._now()))
        self._began = None
        if len(self._spans) == self._most:
            self.read()

    def lap(self, steps: int) -> None:
        """Record how many steps have been taken by now."""
        runs = self._began is not None
        if runs:
            self.stop()
        self._spans.append(steps)
        if runs:
            self.start()

    @property
    def laps(self) -> list[tuple[int, float]]:
        """Numbers of steps and the seconds until then; reading them waits for the device."""
        self.read()
        return self._laps

    def laps_until(self, steps: int) -> list[tuple[int, float]]:
        """All laps, the last one of the steps taken by now."""
        laps, seconds = list(self.laps), self.read()
        return laps if laps[-1][0] == steps else [*laps, (steps, seconds)]

    def read(self) -> float:
        """The seconds of all intervals; it waits until the device has come to the last stop."""
        for span in self._spans:
            if isinstance(span, int):
                self._laps.append((span, self._seconds))
                continue
            began, ended = span
            if isinstance(ended, torch.cuda.Event):
                ended.synchronize()
                self._seconds += began.elapsed_time(ended) / 1000
            else:
                self._seconds += ended - began
        self._spans.clear()
        return self._seconds

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
