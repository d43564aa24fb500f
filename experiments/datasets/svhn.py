"""SVHN: 73,257 training and 26,032 test images of house numbers in photographs, 32x32, in colour.

References:
    Netzer, Wang, Coates, Bissacco, Wu, Ng 2011. Reading digits in natural images with unsupervised feature learning.
    http://ufldl.stanford.edu/housenumbers/
"""

import io
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from ._images import Pixels
from ._published import PublishedFile


def _file(name: str, size: int, md5: str) -> PublishedFile:
    return PublishedFile(name, size, md5, (f"http://ufldl.stanford.edu/housenumbers/{name}",))


TRAIN = _file("train_32x32.mat", 182_040_794, "e26dedcc434d2e4c54c9b2d4a06d8373")
TEST = _file("test_32x32.mat", 64_275_384, "eb5a983be6a315427106f1b164d9cef3")


def read(root: Path, *, download: bool) -> Pixels:
    """The images of the two published MATLAB files in ``root``."""
    return Pixels(*(_images(file.read(root, download=download)) for file in (TRAIN, TEST)), maximum=255)


def _images(content: bytes) -> np.ndarray:
    # Published as [H, W, C, N].
    return loadmat(io.BytesIO(content), variable_names=["X"])["X"].transpose(3, 2, 0, 1)
