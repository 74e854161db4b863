"""Built-in image sets: MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 by torchvision, and the digits of scikit-learn.

Torchvision's sets are read from ``data.root``, and downloaded only if ``data.download`` is set. Images stay bytes
``[sample, channel, row, column]``; normalisation is per batch. torchvision reads (and, for CIFAR, checks) the original files
once; after that, every process maps the same cached arrays and does not import torchvision.

The digits are the default data, since they come with scikit-learn and need no network.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from ..compat import import_torchvision
from .cache import Arrays, ArraySamples, cached, file_digest
from .config import DataConfig, Groups
from .types import SamplePool

IDX = tuple(f"raw/{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))


class VisionSet(msgspec.Struct, frozen=True, kw_only=True):
    """One data set: torchvision's class, the required files, and mean and standard deviation of the training images."""

    title: str
    factory: str
    folder: str
    files: tuple[str, ...]
    num_classes: int = 10
    mean: tuple[float, ...]
    std: tuple[float, ...]


SETS = {
    "mnist": VisionSet(
        title="MNIST, 28 x 28 grey digits, 60,000 + 10,000",
        factory="MNIST",
        folder="MNIST",
        files=IDX,
        mean=(0.1307,),
        std=(0.3081,),
    ),
    "fashion_mnist": VisionSet(
        title="Fashion-MNIST, 28 x 28 grey clothes, 60,000 + 10,000",
        factory="FashionMNIST",
        folder="FashionMNIST",
        files=IDX,
        mean=(0.2860,),
        std=(0.3530,),
    ),
    "cifar10": VisionSet(
        title="CIFAR-10, 32 x 32 colour, 10 classes, 50,000 + 10,000",
        factory="CIFAR10",
        folder="cifar-10-batches-py",
        files=("batches.meta", *(f"data_batch_{n}" for n in range(1, 6)), "test_batch"),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": VisionSet(
        title="CIFAR-100, 32 x 32 colour, 100 classes, 50,000 + 10,000",
        factory="CIFAR100",
        folder="cifar-100-python",
        files=("meta", "train", "test"),
        num_classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
}


def load_vision(config: DataConfig) -> SamplePool:
    """Load the set that ``config.name`` names. Raises ``ValueError`` that names ``data.root`` if files are missing."""
    vision_set, root = SETS[config.name], config.folder
    paths = [root / vision_set.folder / name for name in vision_set.files]
    if config.download and not all(path.is_file() for path in paths):
        _download(vision_set, root, getattr(import_torchvision().datasets, vision_set.factory))
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(
            f"data.root: {missing[0]} is missing for {config.name!r}; set data.download: true, or let data.root be "
            f"the folder that holds {vision_set.folder}/"
        )
    digest = file_digest(paths, root=root)
    arrays = cached(root, f"{config.name}-{digest}", lambda: _read(vision_set, root))
    groups = _writers(root, len(arrays["train_y"])) if _by_writer(config) else None
    return SamplePool(
        train=ArraySamples(arrays["train_x"], arrays["train_y"]),
        test=ArraySamples(arrays["test_x"], arrays["test_y"]),
        groups=groups,
        num_classes=vision_set.num_classes,
        mean=vision_set.mean,
        std=vision_set.std,
        digest=digest,
    )


def to_arrays(images: Any, labels: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Convert torchvision's ``data`` and ``targets`` to bytes ``[sample, channel, row, column]`` and integer labels.

    ``data`` is ``[sample, row, column]`` (MNIST, a tensor) or ``[sample, row, column, channel]`` (CIFAR, an array).
    """
    pixels = np.asarray(images)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels, dtype=np.uint8), np.asarray(labels, dtype=np.int64)


def _read(vision_set: VisionSet, root: Path) -> Arrays:
    """Read training and test arrays from the original files."""
    factory = getattr(import_torchvision().datasets, vision_set.factory)
    try:
        train, test = factory(str(root), train=True), factory(str(root), train=False)
    except Exception as error:  # readers raise various exceptions on damaged files: assertions, pickle and zip errors
        raise ValueError(
            f"data.root: the files in {root / vision_set.folder} cannot be read or are not the official ones "
            f"({error}); delete that folder and set data.download: true"
        ) from error
    train_x, train_y = to_arrays(train.data, train.targets)
    test_x, test_y = to_arrays(test.data, test.targets)
    return {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y}


def _download(vision_set: VisionSet, root: Path, factory: Callable[..., Any]) -> None:
    """Download into a temporary folder, then move the files; several workers may do so at the same time."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-", ignore_cleanup_errors=True) as temporary:
            factory(temporary, download=True)
            target = root / vision_set.folder
            for name in vision_set.files:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                if not (target / name).exists():  # existing files are never replaced
                    (Path(temporary) / vision_set.folder / name).replace(target / name)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"data.download: {vision_set.factory} could not be downloaded into {root} ({error})"
        ) from error


def _by_writer(config: DataConfig) -> bool:
    """Whether the partition is by writer, which only MNIST supports."""
    return config.name == "mnist" and isinstance(config.partition, Groups)


def _writers(root: Path, num_samples: int) -> torch.Tensor:
    """Writer of each MNIST training image, in MNIST's order, from ``mnist_writers.npz`` in the root or a folder in it.

    The numbers are those of QMNIST (Yadav, Bottou, NeurIPS 2019, arXiv 1905.10498); 539 people wrote the training set.
    """
    files = [path for path in (root / "mnist_writers.npz", *sorted(root.glob("*/mnist_writers.npz"))) if path.is_file()]
    if not files:
        raise ValueError(
            f"data.partition.name is 'groups', which for 'mnist' needs {root / 'mnist_writers.npz'} "
            "(array train_writer: the writer of each training image); put it there or use another partition"
        )
    with np.load(files[0]) as file:
        writers = np.asarray(file["train_writer"], dtype=np.int64)
    if writers.shape != (num_samples,):
        raise ValueError(f"data.root: train_writer in {files[0]} has {len(writers)} entries for {num_samples} images")
    return torch.from_numpy(writers)


def load_digits() -> SamplePool:
    """Handwritten digits: 1,437 training and 360 test images ``[sample, 1, 8, 8]``, floats on the scale 0..1.

    In the order of labels every fifth image is a test image: the split is the same everywhere, and every class is in
    proportion. Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998; 1,797 images with 16
    grey levels.
    """
    table = np.loadtxt(_digits_file(), delimiter=",", dtype=np.float32)
    x, y = table[:, :-1].reshape(-1, 1, 8, 8) / 16, table[:, -1].astype(np.int64)
    test = np.zeros(len(y), dtype=bool)
    test[np.argsort(y, kind="stable")[::5]] = True
    return SamplePool(train=ArraySamples(x[~test], y[~test]), test=ArraySamples(x[test], y[test]), num_classes=10)


def _digits_file() -> Path:
    """The table in scikit-learn's package, found without importing it, which would take each worker a second."""
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None, "scikit-learn is a dependency"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
