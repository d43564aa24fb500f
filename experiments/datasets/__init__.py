"""Image data sets, one module each; the name of the module is the name of the data set.

A module here whose name does not start with an underscore is a data set. It has one function,
``read(root, *, download) -> Pixels``; nothing is registered anywhere else.
"""

from __future__ import annotations

import os
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ._images import DatasetError, ImageData, draw_rows
from ._once import read_once

if TYPE_CHECKING:
    import torch

__all__ = ["DatasetError", "ImageData", "load", "names"]


def names() -> tuple[str, ...]:
    """The data sets that :func:`load` knows, in alphabetical order.

    >>> {"digits", "mnist"} <= set(names())
    True
    """
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    num_train: int | None = None,
    seed: int = 0,
    download: bool = False,
) -> ImageData:
    """The images of the data set ``name``, as pixels in [0, 1]; labels are not read.

    The processes of a sweep read a data set once on each machine.

    Args:
        name: one of :func:`names`, in upper or lower case.
        data_dir: the folder of the data, laid out as torchvision lays it out; by default the folder that the
            environment variable ``PYRO_AVI_DATA`` names, else ``./data``. Only ``download`` writes to it.
        num_train: take this many of the training images, drawn without replacement and kept in their published
            order; by default all. The test images are always all.
        seed: decides, with ``name`` and ``num_train``, which training images are drawn. The global random state is
            neither read nor changed.
        download: get files that are missing, with torchvision, into ``data_dir``. No file there is replaced.

    Raises:
        DatasetError: if the name is unknown, if a file is missing, truncated or not the published one, if a download
            fails, or if there are fewer than ``num_train`` training images.

    >>> images = load("digits", num_train=1000)
    >>> tuple(images.train.shape), tuple(images.test.shape)
    ((1000, 1, 8, 8), (360, 1, 8, 8))
    """
    module = str(name).lower()
    if module not in names():
        raise DatasetError(f"Expected the name of a data set, one of {', '.join(names())}; got {name!r}.")
    root = Path(data_dir if data_dir is not None else os.environ.get("PYRO_AVI_DATA") or "data").expanduser().absolute()
    read = import_module(f"{__name__}.{module}").read
    pixels = read_once(lambda: read(root, download=download), module, str(root))
    size = len(pixels.train)
    if num_train is None:
        train = pixels.train
    elif 1 <= num_train <= size:
        train = pixels.train[draw_rows(size, num_train, seed)]
    else:
        raise DatasetError(
            f"Data set {module!r}: expected num_train from 1 to {size:,}, the number of its training images; "
            f"got {num_train:,}. Leave num_train out to take all of them."
        )
    return ImageData(module, _scaled(train, pixels.maximum), _scaled(pixels.test, pixels.maximum))


def _scaled(rows: np.ndarray, maximum: int) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.divide(rows, maximum, dtype=np.float32, order="C"))
