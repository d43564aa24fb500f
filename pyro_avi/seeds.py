"""Random states: draws that leave that of the program as it was."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

__all__ = ["Stream", "as_seed", "draws_from", "random_state", "seed_of_rank", "seeded", "set_random_state"]


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """A context that draws from a seed, or on from the program's random state (``None``), which is restored afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def draws_from(seed: int | None) -> AbstractContextManager[None]:
    """A context that draws from a seed and restores the program's random state, or draws from that state (``None``)."""
    return nullcontext() if seed is None else seeded(seed)


def as_seed(seed: int | None) -> int:
    """The seed, or one drawn from the program's random state (``None``), for functions that derive several seeds from it."""
    return int(torch.randint(2**31, ())) if seed is None else seed


def seed_of_rank(seed: int, rank: int) -> int:
    """The seed of one of several processes that draw apart: of process 0 the seed itself, of others seeds drawn from it."""
    if rank == 0:
        return seed
    return int(torch.randint(2**62, (rank,), generator=torch.Generator().manual_seed(seed), device="cpu")[-1])


class Stream:
    """A random state apart from the program's. As a context it can be entered again and again, and draws on each time.

    Args:
        seed: the seed of the state.
    """

    def __init__(self, seed: int):
        with seeded(seed):
            self._state = random_state()

    def __enter__(self) -> "Stream":
        self._outer = random_state()
        set_random_state(self._state)
        return self

    def __exit__(self, *_) -> None:
        self._state = random_state()
        set_random_state(self._outer)


def random_state() -> list[torch.Tensor]:
    """torch's random states: that of the CPU, and of each CUDA device."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def set_random_state(states: list[torch.Tensor]) -> None:
    """Set torch's random states to those that :func:`random_state` returned, as far as the devices are there."""
    torch.set_rng_state(states[0])
    for device, state in enumerate(states[1 : 1 + torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
