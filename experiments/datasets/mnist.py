"""MNIST: 60,000 training and 10,000 test images of handwritten digits, 28x28, grey.

References:
    LeCun, Bottou, Bengio, Haffner 1998. Gradient-based learning applied to document recognition.
    Proceedings of the IEEE 86(11). https://doi.org/10.1109/5.726791
"""

from pathlib import Path

from . import _idx
from ._images import Pixels
from ._published import PublishedFile


def _file(name: str, size: int, md5: str) -> PublishedFile:
    # The authors' own page comes second: it often refuses downloads.
    sources = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
    return PublishedFile(f"MNIST/raw/{name}", size, md5, tuple(source + name for source in sources))


TRAIN = _file("train-images-idx3-ubyte.gz", 9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873")
TEST = _file("t10k-images-idx3-ubyte.gz", 1_648_877, "9fb629c4189551a2d022fa330f9573f3")


def read(root: Path, *, download: bool) -> Pixels:
    """The images of the published ``.gz`` files in ``root``."""
    return _idx.read(TRAIN, TEST, root, download=download)
