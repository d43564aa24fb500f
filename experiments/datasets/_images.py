"""What a data set is: its pixels as read, and its images as the experiments use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    # Imported where it is used: naming a data set, planning and reporting need none of its seconds.
    import torch


class DatasetError(ValueError):
    """A data set that is unknown, missing, damaged, or not what the experiments can use."""


class Pixels(NamedTuple):
    """What a data set's module reads: arrays ``[N, C, H, W]`` of whole numbers from 0 to ``maximum``."""

    train: np.ndarray
    test: np.ndarray
    maximum: int


# Without eq=False, comparing two of them would ask for the truth value of a tensor.
@dataclass(frozen=True, eq=False)
class ImageData:
    """Training and test images of one data set.

    Args:
        name: what reports call the data set.
        train: ``[N, C, H, W]``, float32, pixels in [0, 1].
        test: ``[M, C, H, W]``, the same.

    Raises:
        DatasetError: if an array is empty, has another shape or type, or holds a pixel that is not a number in [0, 1].

    >>> import torch
    >>> ImageData("dots", train=torch.rand(6, 1, 2, 2), test=torch.rand(3, 1, 2, 2)).train.shape
    torch.Size([6, 1, 2, 2])
    """

    name: str
    train: torch.Tensor
    test: torch.Tensor

    def __post_init__(self) -> None:
        _check(f"Data set {self.name!r}, train", self.train)
        _check(f"Data set {self.name!r}, test", self.test)
        if self.train.shape[1:] != self.test.shape[1:]:
            raise DatasetError(
                f"Data set {self.name!r}: expected train and test images of one shape [C, H, W], "
                f"got {list(self.train.shape[1:])} and {list(self.test.shape[1:])}."
            )


def _check(where: str, images: torch.Tensor) -> None:
    import torch

    if not isinstance(images, torch.Tensor):
        raise DatasetError(f"{where}: expected a torch.Tensor, got {type(images).__name__}. Use torch.as_tensor.")
    if images.dtype != torch.float32:
        raise DatasetError(
            f"{where}: expected dtype torch.float32, got {images.dtype}. For 8-bit pixels: images.float() / 255."
        )
    if images.dim() != 4 or images.numel() == 0:
        raise DatasetError(
            f"{where}: expected images [N, C, H, W] with no dimension empty, got shape {list(images.shape)}. "
            "Grey images have one channel: images.unsqueeze(1)."
        )
    # Written so that nan, for which every comparison is false, counts as bad.
    good = ((images >= 0) & (images <= 1)).flatten(1).all(1)
    if not good.all():
        row = int(good.logical_not().nonzero()[0, 0])
        raise DatasetError(
            f"{where}: expected finite pixels in [0, 1], got {int(good.logical_not().sum()):,} of {len(images):,} "
            f"images with others; the first is row {row}, whose pixels go from {images[row].min():g} to "
            f"{images[row].max():g}. Divide by the largest possible value, and leave out or repair nan and inf."
        )


def draw_rows(size: int, count: int, seed: int) -> np.ndarray:
    """The positions of ``count`` of ``size`` rows, drawn without replacement by ``seed`` alone, ascending."""
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    return np.sort(torch.randperm(size, generator=generator, device="cpu")[:count].numpy())
