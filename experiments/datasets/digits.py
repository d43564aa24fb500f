"""Digits: 1,797 handwritten digits of 8x8 grey pixels from 0 to 16, bundled with scikit-learn.

They come without a published split: a fixed fifth of the rows is held out.

References:
    Alpaydin, Kaynak 1998. Optical Recognition of Handwritten Digits. UCI Machine Learning Repository.
    https://doi.org/10.24432/C50P49
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from ._images import Pixels, draw_rows

NUM_TRAIN = 1437
SPLIT_SEED = 0


def read(root: Path, *, download: bool) -> Pixels:
    """1,437 training and 360 test images; nothing is read from ``root``, and nothing needs a download."""
    images = load_digits().images[:, np.newaxis]
    is_train = np.zeros(len(images), dtype=bool)
    is_train[draw_rows(len(images), NUM_TRAIN, SPLIT_SEED)] = True
    return Pixels(images[is_train], images[~is_train], maximum=16)
