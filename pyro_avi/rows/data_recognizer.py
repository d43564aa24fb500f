"""A check that calls without row indices are about the rows that a table was fitted to."""

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["DataRecognizer"]


class DataRecognizer:
    """Recognizes the observed values of the first call without row indices.

    A loader that feeds ``pyro.plate("data", len(batch))`` gives every batch the same positions, and a table would train its
    first rows on all of them. The values are known by their sums, so that they need not be kept.

    Args:
        plates: the names of the plates, for the message.
    """

    def __init__(self, plates: str):
        self._plates = plates
        self._known: dict[str, Tensor] = {}
        self._last: list[tuple[weakref.ref, int]] = []

    def __getstate__(self):
        return {**self.__dict__, "_last": []}

    @property
    def has_seen_rows(self) -> bool:
        """Whether there was a call to compare with."""
        return bool(self._known)

    def check(self, values: Mapping[str, Tensor]) -> None:
        """Compare the observed values of a call with those of the first.

        Raises:
            ValueError: if they are others.
        """
        if self._are_last(values):
            return
        for name, value in values.items():
            sums = _sums(value)
            known = self._known.setdefault(name, sums)
            # Up to rounding: the order of a sum depends on the number of threads.
            if not ((known - sums).abs() <= 1e-9 * known[-1]).all():
                raise ValueError(
                    f"Expected the rows of {self._plates} that the table was set up with, got other values at site {name!r} "
                    "without the positions of their rows.\n"
                    "Try one of the following fixes:\n"
                    "- for minibatches of a loader, pass their positions: pyro.plate(name, size, subsample=index)\n"
                    "- for held-out rows: avi.refine(model, guide, x_new, num_steps=...)\n"
                    "- where rows stay and their values change (noise, dynamic binarization): same_rows=True"
                )
        self._last = [(weakref.ref(value), value._version) for value in values.values()]

    def _are_last(self, values: Mapping[str, Tensor]) -> bool:
        return len(self._last) == len(values) and all(
            known() is value and version == value._version
            for (known, version), value in zip(self._last, values.values(), strict=True)
        )


@torch.no_grad()
def _sums(value: Tensor) -> Tensor:
    flat = value.detach().reshape(-1).double().nan_to_num().cpu()
    return torch.stack([flat.sum(), flat @ torch.arange(len(flat), dtype=torch.double).cos(), flat.abs().sum()])
