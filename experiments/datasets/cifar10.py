"""CIFAR10: 50,000 training and 10,000 test images of animals and vehicles, 32x32, in colour.

References:
    Krizhevsky 2009. Learning multiple layers of features from tiny images. Technical report, University of Toronto.
    https://www.cs.toronto.edu/~kriz/cifar.html
"""

import io
import pickle
from pathlib import Path

import numpy as np

from ._images import DatasetError, Pixels
from ._published import PublishedFile


def _file(name: str, size: int, md5: str) -> PublishedFile:
    return PublishedFile(
        f"cifar-10-batches-py/{name}",
        size,
        md5,
        ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
        archive_md5="c58f30108f718f92721af3b95e74349a",
    )


TRAIN = (
    _file("data_batch_1", 31_035_704, "c99cafc152244af753f735de768cd75f"),
    _file("data_batch_2", 31_035_320, "d4bba439e000b95fd0a9bffe97cbabec"),
    _file("data_batch_3", 31_035_999, "54ebc095f3ab1f0389bbae665268c751"),
    _file("data_batch_4", 31_035_696, "634d18415352ddfa80567beed471001a"),
    _file("data_batch_5", 31_035_623, "482c414d41f54cd18b22e5b47cb7c3cb"),
)
TEST = _file("test_batch", 31_035_526, "40351d587109b95175f43aff81a1287e")


def read(root: Path, *, download: bool) -> Pixels:
    """The images of the six published batches in ``root``."""
    train = np.concatenate([_images(file.read(root, download=download)) for file in TRAIN])
    return Pixels(train, _images(TEST.read(root, download=download)), maximum=255)


def _images(content: bytes) -> np.ndarray:
    # The batches were pickled by Python 2, whose strings are bytes.
    batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    return batch[b"data"].reshape(-1, 3, 32, 32)


# numpy moved this function between versions; every array names the one that rebuilds it.
_REBUILD = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _REBUILD,
    ("numpy._core.multiarray", "_reconstruct"): _REBUILD,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds numpy arrays and plain containers; whatever else a pickle asks to call is refused."""

    def find_class(self, module_name: str, global_name: str) -> object:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise DatasetError(
                f"CIFAR10: expected a pickle of numpy arrays alone, got one that asks for {module_name}.{global_name}. "
                "It was not loaded: it could run any code."
            ) from None
