"""Draws that leave the random state of the program as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Stream", "seeded"]


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from a seed, or on from the program's state (``None``), which is given back."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


class Stream:
    """A random state of its own, which goes on where it was left: a context to draw from it.

    Args:
        seed: where it starts.
    """

    def __init__(self, seed: int):
        with seeded(seed):
            self._state = _get()

    def __enter__(self) -> "Stream":
        self._outer = _get()
        _set(self._state)
        return self

    def __exit__(self, *_) -> None:
        self._state = _get()
        _set(self._outer)


def _get() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(state[0])
    for device, of_device in enumerate(state[1]):
        torch.cuda.set_rng_state(of_device, device)
