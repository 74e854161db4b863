"""Handwritten digits, 8 x 8 pixels: the default data, for it comes with scikit-learn and needs no network.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998; 1,797 images, 16 grey levels.
"""

import importlib.util
from pathlib import Path

import numpy as np

from .cache import ArraySamples
from .types import SamplePool


def load_digits() -> SamplePool:
    """1,437 training and 360 test images ``[sample, 1, 8, 8]``, floats on the scale 0..1.

    Sorted by label, every fifth one is a test image: the same split everywhere, with every class in proportion.
    """
    table = np.loadtxt(_file(), delimiter=",", dtype=np.float32)
    x, y = table[:, :-1].reshape(-1, 1, 8, 8) / 16, table[:, -1].astype(np.int64)
    test = np.zeros(len(y), dtype=bool)
    test[np.argsort(y, kind="stable")[::5]] = True
    return SamplePool(train=ArraySamples(x[~test], y[~test]), test=ArraySamples(x[test], y[test]), num_classes=10)


def _file() -> Path:
    """The table in scikit-learn's package. Read without importing it: that would cost each worker a second, for one file."""
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None, "scikit-learn is a dependency"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
