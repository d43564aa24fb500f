"""FashionMNIST: 60,000 training and 10,000 test images of articles of clothing, 28x28, grey.

References:
    Xiao, Rasul, Vollgraf 2017. Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms.
    https://arxiv.org/abs/1708.07747
"""

from pathlib import Path

from . import _idx
from ._images import Pixels
from ._published import PublishedFile


def _file(name: str, size: int, md5: str) -> PublishedFile:
    source = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    return PublishedFile(f"FashionMNIST/raw/{name}", size, md5, (source + name,))


TRAIN = _file("train-images-idx3-ubyte.gz", 26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d")
TEST = _file("t10k-images-idx3-ubyte.gz", 4_422_102, "bef4ecab320f06d8554ea6380940ec79")


def read(root: Path, *, download: bool) -> Pixels:
    """The images of the published ``.gz`` files in ``root``."""
    return _idx.read(TRAIN, TEST, root, download=download)
