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
    """Three devices with unequal classes; device 10 lacks the first class. The grey value encodes the class."""
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
        ({"root": "/no/such/root"}, r"data\.root: /no/such/root is not a folder"),
        ({"kwargs": {"devices": ["0", "2", "7"]}}, r"data\.kwargs\.devices names '7'"),
        ({"kwargs": {"image_size": 0}}, r"data\.kwargs: the keywords of 'folder' do not fit: .*image_size"),
        ({"kwargs": {"size": 3}}, r"data\.kwargs: .*`size`"),
        ({"partition": {"name": "shards"}}, r"data\.partition\.name is 'shards', but 'folder' defines the owner"),
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


def deep(path: Path, values: list[int], *, dtype: type = np.uint16) -> None:
    """A grey image with one row for each value."""
    Image.fromarray(np.array([[value] * len(values) for value in values], dtype=dtype)).save(path)


@pytest.mark.parametrize("suffix", ["png", "tif", "ppm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_of_16_bits_keep_their_depth(root: Path, channels: int, suffix: str) -> None:
    deep(root / "2" / "ant" / f"0deep.{suffix}", [0, 257, 32896, 65535])
    data = load(config(root, kwargs={"image_size": 4, "channels": channels}), num_devices=3, seed=0)
    samples = data.train(1)
    names = sorted(path.name for path in (root / "2" / "ant").iterdir())
    found = samples.x[names.index(f"0deep.{suffix}")]
    assert (samples.x.dtype, tuple(found.shape)) == (torch.float32, (channels, 4, 4))
    expected = torch.tensor([0, 1 / 255, 128 / 255, 1])  # as the same image in 8 bits
    for channel in found:
        torch.testing.assert_close(channel, expected[:, None].expand(4, 4), rtol=1e-6, atol=0)
    # Images of bytes are converted to the same scale; the server's images, which are all bytes, stay bytes.
    torch.testing.assert_close(samples.x[-1, 0, 0, 0], torch.tensor(100 / 255), rtol=1e-6, atol=0)
    server = data.server_test()
    assert server is not None
    assert server.x.dtype == torch.uint8
    batch = data.test_transform(samples.x, torch.Generator())
    shift, spread = (0.5, 0.5) if channels == 1 else (0.485, 0.229)
    torch.testing.assert_close(batch[:, 0], (samples.x[:, 0] - shift) / spread, rtol=1e-5, atol=1e-6)


def test_deep_images_are_scaled_in_floats(root: Path) -> None:
    deep(root / "2" / "ant" / "0deep.png", [1000, 2000])
    data = load(config(root, kwargs={"image_size": 1, "channels": 1}), num_devices=3, seed=0)
    torch.testing.assert_close(data.train(1).x[1].item(), 1500 / 65535, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("values", "told"), [([0, 70_000], "from 0 to 70000"), ([-1, 5], "from -1 to 5"), ([0, 9], "from 0 to 9")]
)
def test_images_of_numbers_without_a_known_scale_are_refused(root: Path, values: list[int], told: str) -> None:
    deep(root / "2" / "ant" / "numbers.tif", values, dtype=np.int32)
    with pytest.raises(ValueError, match=f"^data.root: .*numbers.tif holds values {told}.*8 or 16 bits"):
        load(config(root), num_devices=3, seed=0)


def test_images_of_floats_are_on_the_scale_of_1_or_refused(root: Path) -> None:
    path = root / "2" / "ant" / "0floats.tif"
    deep(path, [0, 1], dtype=np.float32)
    assert load(config(root, kwargs={"image_size": 2}), num_devices=3, seed=0).train(1).x[1, 0, :, 0].tolist() == [
        0.0,
        1.0,
    ]
    deep(path, [0, 2], dtype=np.float32)
    with pytest.raises(ValueError, match="holds values from 0 to 2"):
        load(config(root, kwargs={"image_size": 2}), num_devices=3, seed=0)
