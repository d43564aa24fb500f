"""A uniform subsample of the rows of a plate, drawn by a guide where the model would draw it."""

import torch
from pyro.distributions.distribution import Distribution
from torch import Tensor

__all__ = ["UniformSubsample", "draw_rows", "first_swaps"]


def draw_rows(size: int, count: int, device: torch.device | None = None) -> Tensor:
    """``count`` different rows of ``size`` in random order, every order of every subset as likely as any other.

    Time and memory grow with ``B`` and not with ``N``, and no shape or branch depends on what is drawn, so that a compiled
    step draws as an eager one.

    Args:
        size: ``N``.
        count: ``B``, at most ``N``.
        device: of the rows.

    Returns:
        ``[B]``.

    Example::

        >>> import torch
        >>> from pyro_avi.rows.uniform_subsample import draw_rows
        >>> draw_rows(10_000_000, 256).unique().shape
        torch.Size([256])
    """
    # Some thirty small operations take as long as a permutation of so many rows.
    if size <= 10_000 + 10 * count:
        return torch.randperm(size, device=device)[:count].clone()
    return first_swaps(size, count, device)


def first_swaps(size: int, count: int, device: torch.device | None = None) -> Tensor:
    """As :func:`draw_rows`, by the first ``count`` swaps of a Fisher-Yates shuffle that stores only the positions they touch.

    The chance of a row is ``1 / N`` up to a relative ``N / 2^62``.

    Args:
        size, count, device: as for :func:`draw_rows`.

    References:
        Knuth, "The Art of Computer Programming", volume 2, section 3.4.2, algorithm P.
    """
    step = torch.arange(count, device=device)
    # Step i swaps position i with target[i], one of i .. N - 1, and its row is what it finds there.
    target = step + torch.randint(2**62, (count,), device=device) % (size - step)
    # Of a position that no earlier step swapped that is its own number, otherwise what the last such step m moved there:
    # what then stood at position m.
    ordered, steps = target.sort(stable=True)
    again = torch.where(ordered[1:] == ordered[:-1], steps[:-1], -1)
    before = torch.full_like(step, -1).index_copy(0, steps[1:], again)
    # Whose number stands at position i when its step comes: follow the moves back, twice as far each time.
    into = torch.where((target < count) & (target > step), target, count)
    last = torch.full((count + 1,), -1, device=device).scatter_reduce(0, into, step, "amax")[:count]
    origin = torch.where(last < 0, step, last)
    for _ in range((count - 1).bit_length()):
        origin = origin[origin]
    return torch.where(before < 0, target, origin[before])


class UniformSubsample(Distribution):
    """``count`` of ``size`` rows, without replacement; its log probability is 0, as that of a plate's own draw.

    A class of its own rather than the plate's: ``pyro.infer.Predictive`` forgets the plates' draws of a guide and would
    pair the latents of some rows with the data of others.

    Args:
        size: ``N``.
        count: ``B``.
        depth: the number of dimensions of the model's plates; ``Predictive`` would give dimensions to a sample with fewer.
        device: of the rows.
        rows: ``[count]`` drawn already, which every sample gives.
    """

    has_rsample = True
    event_shape = torch.Size()

    def __init__(self, size: int, count: int, depth: int, device: torch.device, rows: Tensor | None = None):
        self.size, self.count, self.device, self.rows = size, count, device, rows
        self.batch_shape = torch.Size([1] * (depth - 1) + [count])

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Draw the rows ``[count]``."""
        return draw_rows(self.size, self.count, self.device) if self.rows is None else self.rows

    def log_prob(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Zero: the plate's scale accounts for the rows left out."""
        return torch.zeros((), device=self.device)
