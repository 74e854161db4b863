import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from fedbonsai.learning.compat import import_torchvision
from fedbonsai.learning.data import vision
from fedbonsai.learning.data.config import DataConfig, Groups, Iid
from fedbonsai.learning.data.load import load
from fedbonsai.learning.data.types import Samples
from fedbonsai.learning.data.vision import load_digits

NUM_TRAIN, NUM_TEST = 12, 4


def write_idx(path: Path, array: np.ndarray) -> None:
    """One file in MNIST's own format: magic, sizes as big-endian integers, bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tiny MNIST and Fashion-MNIST: every pixel of image n is n, its label n % 10."""
    for name in ("MNIST", "FashionMNIST"):
        raw = tmp_path / name / "raw"
        raw.mkdir(parents=True)
        for part, count in (("train", NUM_TRAIN), ("t10k", NUM_TEST)):
            numbers = np.arange(count)
            write_idx(raw / f"{part}-images-idx3-ubyte", np.broadcast_to(numbers[:, None, None], (count, 28, 28)))
            write_idx(raw / f"{part}-labels-idx1-ubyte", numbers % 10)
    return tmp_path


def mnist(root: Path, **settings: object) -> DataConfig:
    return msgspec.convert({"name": "mnist", "root": str(root), **settings}, DataConfig)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_images_stay_bytes_with_their_labels(root: Path, name: str) -> None:
    data = load(mnist(root, name=name), num_devices=3, seed=0)
    assert [data.num_samples(d) for d in range(3)] == [4, 4, 4]
    for device in range(3):
        samples = data.train(device)
        assert (samples.x.shape, samples.x.dtype) == ((4, 1, 28, 28), torch.uint8)
        assert torch.equal(samples.x[:, 0, 27, 27] % 10, samples.y)
    server = data.server_test()
    assert server is not None
    assert server.y.tolist() == [0, 1, 2, 3]
    assert data.num_classes == 10


def test_normalisation_is_per_batch(root: Path) -> None:
    data = load(mnist(root), num_devices=1, seed=0)
    batch = data.train_transform(data.train(0).x, torch.Generator())
    assert batch.dtype == torch.float32
    assert torch.allclose(batch[3], torch.tensor((3 / 255 - 0.1307) / 0.3081))


def test_cached_and_uncached_are_the_same(root: Path) -> None:
    first = load(mnist(root), num_devices=2, seed=0)
    assert any((root / ".fedbonsai").iterdir())
    second = load(mnist(root), num_devices=2, seed=0)
    assert first.digest() == second.digest()
    assert all(torch.equal(first.train(d).x, second.train(d).x) for d in range(2))


def test_other_content_is_another_digest(root: Path) -> None:
    before = load(mnist(root), num_devices=2, seed=0).digest()
    write_idx(root / "MNIST" / "raw" / "train-labels-idx1-ubyte", np.zeros(NUM_TRAIN))
    data = load(mnist(root), num_devices=2, seed=0)
    assert data.train(0).y.tolist() == [0] * 6
    assert data.digest()["data"] != before["data"]
    assert data.digest()["split"] == before["split"]


def test_a_missing_root_says_which_file_and_what_to_do(tmp_path: Path) -> None:
    for name in vision.SETS:
        with pytest.raises(
            ValueError, match=rf"data\.root: {tmp_path / 'none'}.* is missing for '{name}'.*data\.download"
        ):
            load(mnist(tmp_path / "none", name=name), num_devices=2, seed=0)


def test_damaged_files_are_one_sentence(root: Path) -> None:
    (root / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
    with pytest.raises(ValueError, match=r"data\.root: the files in .*MNIST cannot be read"):
        load(mnist(root), num_devices=2, seed=0)


def test_files_that_are_not_the_official_cifar_are_refused(tmp_path: Path) -> None:
    for name in vision.SETS["cifar10"].files:
        path = tmp_path / "cifar-10-batches-py" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"cannot be read or are not the official ones"):
        load(mnist(tmp_path, name="cifar10"), num_devices=2, seed=0)


def test_cifars_layout_becomes_channels_first() -> None:
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    x, y = vision.to_arrays(images, [7, 1])
    assert (x.shape, x.dtype, y.tolist(), y.dtype) == ((2, 3, 4, 5), np.uint8, [7, 1], np.int64)
    assert x[1, 2, 3, 4] == images[1, 3, 4, 2]
    assert x.flags.c_contiguous


def test_what_the_table_says_is_what_torchvision_says() -> None:
    for wanted in vision.SETS.values():
        factory = getattr(import_torchvision().datasets, wanted.factory)
        if hasattr(factory, "base_folder"):
            listed = {name for name, _ in factory.train_list + factory.test_list} | {factory.meta["filename"]}
            assert (wanted.folder, set(wanted.files)) == (factory.base_folder, listed)
        else:
            listed = {f"raw/{name.removesuffix('.gz')}" for name, _ in factory.resources}
            assert (wanted.folder, set(wanted.files)) == (factory.__name__, listed)


def test_a_second_process_does_not_import_torchvision(root: Path) -> None:
    load(mnist(root), num_devices=2, seed=0)
    code = (
        "import sys; from fedbonsai.learning.data.load import load; from fedbonsai.learning.data.config import DataConfig;"
        f"print(load(DataConfig(name='mnist', root={str(root)!r}), num_devices=2, seed=0).num_samples(0));"
        "print('torchvision' in sys.modules, 'sklearn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["6", "False", "False"]


class Fetcher:
    """Replaces torchvision's class: writes the files that it is asked to download."""

    def __init__(self, root: str, *, download: bool) -> None:
        assert download
        for name in vision.IDX:
            path = Path(root) / "MNIST" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)


def test_a_download_is_moved_into_place(tmp_path: Path) -> None:
    for _ in range(2):  # the second one finds the files of the first
        vision._download(vision.SETS["mnist"], tmp_path / "new", Fetcher)
        assert {path.name for path in (tmp_path / "new").iterdir()} == {"MNIST"}
        assert all((tmp_path / "new" / "MNIST" / name).read_text() == name for name in vision.IDX)


def test_a_download_replaces_no_existing_file(tmp_path: Path) -> None:
    own = tmp_path / "MNIST" / vision.IDX[0]
    own.parent.mkdir(parents=True)
    own.write_text("the user's own")
    vision._download(vision.SETS["mnist"], tmp_path, Fetcher)
    found = [(tmp_path / "MNIST" / name).read_text() for name in vision.IDX]
    assert found == ["the user's own", *vision.IDX[1:]]


def test_a_failed_download_is_one_sentence(tmp_path: Path) -> None:
    def offline(root: str, *, download: bool) -> None:
        raise RuntimeError("Error downloading")

    with pytest.raises(ValueError, match=r"data\.download: MNIST could not be downloaded into .*Error downloading"):
        vision._download(vision.SETS["mnist"], tmp_path, offline)
    assert list(tmp_path.iterdir()) == []


WRITERS = np.array([5, 5, 5, 8, 8, 2, 2, 2, 2, 9, 9, 9], dtype=np.int16)


@pytest.mark.parametrize("place", [".", "labels"])
def test_writers_stay_together(root: Path, place: str) -> None:
    (root / place).mkdir(exist_ok=True)
    np.savez(root / place / "mnist_writers.npz", train_writer=WRITERS)
    data = load(mnist(root, partition={"name": "groups"}), num_devices=2, seed=0)
    writers = [{int(WRITERS[n]) for n in data.train(d).x[:, 0, 0, 0]} for d in range(2)]
    assert writers[0] | writers[1] == {2, 5, 8, 9}
    assert not writers[0] & writers[1]


def test_writers_that_are_missing_or_do_not_fit_are_refused(root: Path) -> None:
    config = mnist(root, partition=Groups())
    with pytest.raises(ValueError, match=r"needs .*mnist_writers\.npz"):
        load(config, num_devices=2, seed=0)
    np.savez(root / "mnist_writers.npz", train_writer=WRITERS[:5])
    with pytest.raises(ValueError, match=r"has 5 entries for 12 images"):
        load(config, num_devices=2, seed=0)
    assert load(mnist(root, partition=Iid()), num_devices=2, seed=0).num_samples(0) == 6


def test_only_mnist_has_writers(root: Path) -> None:
    with pytest.raises(ValueError, match=r"no natural groups"):
        load(mnist(root, name="fashion_mnist", partition=Groups()), num_devices=2, seed=0)


def everything() -> tuple[Samples, Samples]:
    pool = load_digits()
    assert pool.test is not None
    return pool.train.take(np.arange(len(pool.train))), pool.test.take(np.arange(len(pool.test)))


def test_shapes_and_scale() -> None:
    train, test = everything()
    assert (train.x.shape, test.x.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert (str(train.x.dtype), str(train.y.dtype)) == ("torch.float32", "torch.int64")
    assert (train.x.min().item(), train.x.max().item()) == (0.0, 1.0)


def test_every_class_is_in_the_test_set_in_proportion() -> None:
    train, test = everything()
    of_all = np.bincount(np.concatenate([train.y, test.y]))
    assert np.abs(np.bincount(test.y) - of_all / 5).max() <= 1


def test_it_is_what_scikit_learn_would_load() -> None:
    from sklearn.datasets import load_digits as reference

    train, test = everything()
    x, y = reference(return_X_y=True)

    def rows(pixels: np.ndarray, labels: np.ndarray) -> list[bytes]:
        return sorted(bytes([*row.astype(np.uint8), label]) for row, label in zip(pixels, labels, strict=True))

    ours = np.concatenate([train.x, test.x]).reshape(1797, 64) * 16
    assert rows(ours, np.concatenate([train.y, test.y]).astype(np.uint8)) == rows(x, y.astype(np.uint8))
