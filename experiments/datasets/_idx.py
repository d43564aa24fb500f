"""The format of MNIST and its likes: gzip over a header of four big-endian numbers and one byte a pixel."""

import gzip
import struct
from pathlib import Path

import numpy as np

from ._images import DatasetError, Pixels
from ._published import PublishedFile

IMAGES = 0x00000803
"""The number that a file of grey 8-bit images begins with."""


def read(train: PublishedFile, test: PublishedFile, root: Path, *, download: bool) -> Pixels:
    """The images of two published IDX files in the data folder ``root``."""
    return Pixels(*(_images(file, file.read(root, download=download)) for file in (train, test)), maximum=255)


def _images(file: PublishedFile, content: bytes) -> np.ndarray:
    raw = gzip.decompress(content)
    magic, count, height, width = struct.unpack_from(">4I", raw)
    if magic != IMAGES:
        raise DatasetError(
            f"{file.path}: expected IDX images, which begin with 0x{IMAGES:08x}; got 0x{magic:08x}. "
            "List the file of images, not that of labels."
        )
    return np.frombuffer(raw, np.uint8, offset=16).reshape(count, 1, height, width)
