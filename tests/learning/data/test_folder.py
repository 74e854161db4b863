from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.data.load import load
from PIL import Image

CLASSES = ["ant", "bee", "cat"]


def picture(path: Path, grey: int, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (grey, grey, grey)).save(path)


def config(folder: Path, /, **settings: object) -> DataConfig:
    base = {"name": "folder", "root": str(folder), "classes": CLASSES, "kwargs": {"image_size": 4}}
    return msgspec.convert({**base, **settings}, DataConfig)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three devices with unequal classes; device 10 lacks the first class. The grey value tells the class."""
    for device, classes in (("0", ["ant", "bee", "cat"]), ("2", ["ant", "cat"]), ("10", ["bee", "cat"])):
        for name in classes:
            for number in range(2):
                picture(tmp_path / device / name / f"{number}.png", 50 * CLASSES.index(name))
    picture(tmp_path / "test" / "cat" / "0.jpg", 100)
    return tmp_path


def test_a_device_lacking_the_first_class_has_the_same_labels(root: Path) -> None:
    data = load(config(root), num_devices=3, seed=0)
    assert [data.train(d).y.tolist() for d in range(3)] == [[0, 0, 1, 1, 2, 2], [0, 0, 2, 2], [1, 1, 2, 2]]
    for device in range(3):
        samples = data.train(device)
        assert (samples.x.shape[1:], samples.x.dtype) == ((3, 4, 4), torch.uint8)
        assert torch.equal(samples.x[:, 0, 0, 0], (samples.y * 50).to(torch.uint8))
    server = data.server_test()
    assert server is not None
    assert server.y.tolist() == [2]
    assert (data.num_classes, data.skipped) == (3, 0)


def test_labels_follow_the_list_not_the_alphabet(root: Path) -> None:
    data = load(config(root, classes=["cat", "ant", "bee"]), num_devices=3, seed=0)
    assert data.train(2).y.tolist() == [0, 0, 2, 2]


def test_devices_can_be_named(root: Path) -> None:
    data = load(config(root, kwargs={"devices": ["10", "0"], "image_size": 4}), num_devices=2, seed=0)
    assert [data.num_samples(d) for d in range(2)] == [4, 6]


def test_corrupt_images_are_counted_and_skipped(root: Path) -> None:
    (root / "0" / "ant" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    whole = (root / "2" / "cat" / "0.png").read_bytes()
    (root / "2" / "cat" / "short.png").write_bytes(whole[: len(whole) // 2])
    (root / "test" / "cat" / "empty.jpg").write_bytes(b"")
    (root / "0" / "ant" / "notes.txt").write_text("not an image, not counted")
    for _ in range(2):  # decoded, then from the cache
        data = load(config(root), num_devices=3, seed=0)
        assert data.skipped == 3
        assert [data.num_samples(d) for d in range(3)] == [6, 4, 4]


def test_a_device_with_corrupt_images_only_is_refused(root: Path) -> None:
    for path in (root / "2").glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"device 1 has no image that can be read \(.*/2\)"):
        load(config(root), num_devices=3, seed=0)


def test_new_images_are_noticed(root: Path) -> None:
    before = load(config(root), num_devices=3, seed=0)
    picture(root / "0" / "ant" / "new.png", 0)
    after = load(config(root), num_devices=3, seed=0)
    assert (before.num_samples(0), after.num_samples(0)) == (6, 7)
    assert before.digest()["data"] != after.digest()["data"]


def test_one_pool_is_partitioned(tmp_path: Path) -> None:
    for number in range(12):
        picture(tmp_path / CLASSES[number % 3] / f"{number}.png", number)
    partition = {"name": "classes", "classes_per_device": 1}
    data = load(config(tmp_path, partition=partition), num_devices=3, seed=0)
    assert [data.train(d).y.tolist() for d in range(3)] == [[0] * 4, [1] * 4, [2] * 4]
    assert data.server_test() is None


def test_sizes_and_grey(root: Path) -> None:
    picture(root / "0" / "ant" / "large.png", 200, size=33)
    data = load(config(root, kwargs={"image_size": 16, "channels": 1}), num_devices=3, seed=0)
    samples = data.train(0)
    assert samples.x.shape == (7, 1, 16, 16)
    assert 200 in samples.x
    batch = data.test_transform(samples.x, torch.Generator())
    assert torch.allclose(batch, (samples.x / 255 - 0.5) / 0.5)


def test_transparent_and_palette_images_are_read(root: Path) -> None:
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(root / "10" / "bee" / "transparent.png")
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).convert("P").save(root / "10" / "bee" / "palette.gif")
    data = load(config(root), num_devices=3, seed=0)
    assert (data.num_samples(2), data.skipped) == (6, 0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"classes": None}, r"data\.classes is \[\]; 'folder' needs the list"),
        ({"classes": ["ant", "ant"]}, r"data\.classes is \['ant', 'ant'\]"),
        ({"classes": ["ant", "bee"]}, r"data\.classes does not name 'cat'"),
        ({"root": "/no/such/root"}, r"data\.root: /no/such/root is no folder"),
        ({"kwargs": {"devices": ["0", "2", "7"]}}, r"data\.kwargs\.devices names '7'"),
        ({"kwargs": {"image_size": 0}}, r"data\.kwargs: the keywords of 'folder' do not fit: .*image_size"),
        ({"kwargs": {"size": 3}}, r"data\.kwargs: .*`size`"),
        ({"partition": {"name": "shards"}}, r"data\.partition\.name is 'shards', but 'folder' says itself"),
    ],
)
def test_mistakes_are_one_sentence(root: Path, settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load(config(root, **settings), num_devices=3, seed=0)


def test_the_number_of_folders_is_the_number_of_devices(root: Path) -> None:
    with pytest.raises(ValueError, match=r"folders for 3 devices, and the fleet has 5"):
        load(config(root), num_devices=5, seed=0)


def test_an_empty_device_is_refused(root: Path) -> None:
    (root / "11" / "ant").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"11 holds no images for device 3"):
        load(config(root), num_devices=4, seed=0)
