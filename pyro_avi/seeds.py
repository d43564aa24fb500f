"""Draws that leave the random state of the program as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from a seed, or on from the program's state (``None``), which is given back."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield
