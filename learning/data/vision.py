"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 through torchvision: downloaded when asked to, else from a local root.

Images stay bytes ``[sample, channel, row, column]``; normalisation is per batch. torchvision reads (and, for CIFAR,
checks) the original files once; after that, every process maps the same cached arrays and need not import it.
"""

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
    """One data set: torchvision's class, the files that must be there, and its training images' mean and deviation."""

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
    """The set that ``config.name`` says. Raises ``ValueError`` naming ``data.root`` when its files are not there."""
    wanted, root = SETS[config.name], config.folder
    paths = [root / wanted.folder / name for name in wanted.files]
    if config.download and not all(path.is_file() for path in paths):
        _download(wanted, root, getattr(import_torchvision().datasets, wanted.factory))
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(
            f"data.root: {missing[0]} is missing for {config.name!r}; set data.download: true, or let data.root be "
            f"the folder that holds {wanted.folder}/"
        )
    digest = file_digest(paths, root=root)
    arrays = cached(root, f"{config.name}-{digest}", lambda: _read(wanted, root))
    groups = _writers(root, len(arrays["train_y"])) if _by_writer(config) else None
    return SamplePool(
        train=ArraySamples(arrays["train_x"], arrays["train_y"]),
        test=ArraySamples(arrays["test_x"], arrays["test_y"]),
        groups=groups,
        num_classes=wanted.num_classes,
        mean=wanted.mean,
        std=wanted.std,
        digest=digest,
    )


def to_arrays(images: Any, labels: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """torchvision's ``data`` and ``targets`` as bytes ``[sample, channel, row, column]`` and integer labels.

    ``data`` is ``[sample, row, column]`` (MNIST, a tensor) or ``[sample, row, column, channel]`` (CIFAR, an array).
    """
    pixels = np.asarray(images)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels, dtype=np.uint8), np.asarray(labels, dtype=np.int64)


def _read(wanted: VisionSet, root: Path) -> Arrays:
    """Training and test arrays from the original files."""
    factory = getattr(import_torchvision().datasets, wanted.factory)
    try:
        train, test = factory(str(root), train=True), factory(str(root), train=False)
    except Exception as error:  # each reader fails in its own way on damaged files: assertions, pickle and zip errors
        raise ValueError(
            f"data.root: the files in {root / wanted.folder} cannot be read or are not the official ones "
            f"({error}); delete that folder and set data.download: true"
        ) from error
    train_x, train_y = to_arrays(train.data, train.targets)
    test_x, test_y = to_arrays(test.data, test.targets)
    return {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y}


def _download(wanted: VisionSet, root: Path, factory: Callable[..., Any]) -> None:
    """Let torchvision fetch into a folder of its own, then move the result into place: several workers may do so at once."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-", ignore_cleanup_errors=True) as temporary:
            factory(temporary, download=True)
            target = root / wanted.folder
            for name in wanted.files:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                if not (target / name).exists():  # what the user has is never replaced
                    (Path(temporary) / wanted.folder / name).replace(target / name)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"data.download: {wanted.factory} could not be fetched into {root} ({error})") from error


def _by_writer(config: DataConfig) -> bool:
    """Whether writers are asked for: only MNIST's are known."""
    return config.name == "mnist" and isinstance(config.partition, Groups)


def _writers(root: Path, num_samples: int) -> torch.Tensor:
    """Writer of each MNIST training image, in MNIST's order, from ``mnist_writers.npz`` in the root or a folder in it.

    The numbers are those of QMNIST (Yadav, Bottou, NeurIPS 2019, arXiv 1905.10498); 539 people wrote the training set.
    """
    found = [path for path in (root / "mnist_writers.npz", *sorted(root.glob("*/mnist_writers.npz"))) if path.is_file()]
    if not found:
        raise ValueError(
            f"data.partition.name is 'groups', which for 'mnist' needs {root / 'mnist_writers.npz'} "
            "(array train_writer: the writer of each training image); put it there or use another partition"
        )
    with np.load(found[0]) as file:
        writers = np.asarray(file["train_writer"], dtype=np.int64)
    if writers.shape != (num_samples,):
        raise ValueError(f"data.root: train_writer in {found[0]} has {len(writers)} entries for {num_samples} images")
    return torch.from_numpy(writers)
