from pathlib import Path

import numpy as np
import pytest
from fedbonsai.learning.data.cache import Arrays, ArraySamples, cached, file_digest


class Maker:
    """Makes arrays and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Arrays:
        self.calls += 1
        return {"x": np.arange(6, dtype=np.uint8).reshape(3, 2), "count": np.array(7)}


def mapped_file(array: np.ndarray) -> bool:
    while array.base is not None and not isinstance(array, np.memmap):
        array = array.base
    return isinstance(array, np.memmap)


def test_made_once_then_mapped_read_only(tmp_path: Path) -> None:
    make = Maker()
    for _ in range(3):
        arrays = cached(tmp_path, "toy", make)
        assert arrays["x"].tolist() == [[0, 1], [2, 3], [4, 5]]
        assert int(arrays["count"]) == 7
        assert mapped_file(arrays["x"])
        assert not arrays["x"].flags.writeable
    assert make.calls == 1
    assert [path.name for path in (tmp_path / ".fedbonsai").iterdir()] == ["toy-v2"]  # nothing temporary is left


def test_each_key_has_its_own_content(tmp_path: Path) -> None:
    make = Maker()
    cached(tmp_path, "one", make)
    cached(tmp_path, "two", make)
    assert make.calls == 2


def test_a_root_that_cannot_be_written_keeps_them_in_memory(tmp_path: Path) -> None:
    (tmp_path / ".fedbonsai").write_text("in the way")
    make = Maker()
    for _ in range(2):
        assert cached(tmp_path, "toy", make)["x"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert make.calls == 2


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"not an array"])
def test_damaged_files_are_made_again(tmp_path: Path, content: bytes) -> None:
    make = Maker()
    cached(tmp_path, "toy", make)
    (tmp_path / ".fedbonsai" / "toy-v2" / "x.npy").write_bytes(content)
    assert cached(tmp_path, "toy", make)["x"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert make.calls == 2


def test_of_a_damaged_folder_only_our_own_files_are_removed(tmp_path: Path) -> None:
    make = Maker()
    cached(tmp_path, "toy", make)
    folder = tmp_path / ".fedbonsai" / "toy-v2"
    (folder / "x.npy").write_bytes(b"")
    (folder / "mine.txt").write_text("mine")
    for _ in range(2):
        assert cached(tmp_path, "toy", make)["x"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_another_process_may_write_first(tmp_path: Path) -> None:
    other = Maker()

    def make() -> Arrays:
        cached(tmp_path, "toy", other)  # another process finishes first
        return other()

    assert cached(tmp_path, "toy", make)["x"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert [path.name for path in (tmp_path / ".fedbonsai").iterdir()] == ["toy-v2"]


def test_taking_copies(tmp_path: Path) -> None:
    arrays = cached(tmp_path, "toy", Maker())
    samples = ArraySamples(arrays["x"], np.array([10, 20, 30]))
    taken = samples.take(np.array([2, 0]))
    assert (taken.x.tolist(), taken.y.tolist()) == ([[4, 5], [0, 1]], [30, 10])
    taken.x.zero_()  # writing to a copy is allowed, and changes nothing else
    assert samples.take(np.array([2])).x.tolist() == [[4, 5]]


def test_the_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    digest = file_digest([first, second], root=tmp_path)
    assert digest == file_digest([first, second], root=tmp_path)
    second.write_bytes(b"3")
    assert digest != file_digest([first, second], root=tmp_path)
    (tmp_path / "c").write_bytes(b"2")
    assert digest != file_digest([first, tmp_path / "c"], root=tmp_path)
