"""The files that checkpoints are made of: in a folder of this machine, or behind any URL that fsspec knows.

In a folder a file is written under another name, brought to the disk, and renamed: it is there whole, or not at all. An object
store does the same by itself; other places are found out by the hashes of what is read (``checkpoints``). Only regular files
are read, and of each no more than was asked for.
"""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

NO_FILE = -1  # in place of the bytes of what is not a regular file


class Files(Protocol):
    """Files by name, in one place. What fails raises ``OSError``, a file that is not there ``FileNotFoundError``.

    ``place``: as it was named. ``partial``: the end of the names of files that are still being written, where there are such.
    """

    place: str
    partial: str

    def names(self) -> dict[str, int]:
        """The bytes of all that is there, by name, ``NO_FILE`` for folders and the like; empty where there is no such place."""
        ...

    def read(self, name: str, *, most: int) -> bytes:
        """All of a file; of one that is longer than ``most`` bytes, ``most + 1`` of them."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """A file as a whole, in place of one that is there."""
        ...

    def create(self, name: str, data: bytes) -> None:
        """A file that is not there yet, else ``FileExistsError``."""
        ...

    def settle(self) -> None:
        """Wait until all that was written is there to stay."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file; harmless where it is gone."""
        ...

    def remove_place(self) -> None:
        """Remove the place itself, if it is empty."""
        ...


class Folder:
    """Files in a folder."""

    def __init__(self, path: Path) -> None:
        """``path`` is made when something is written."""
        self._path = path
        self.place, self.partial = str(path), ".partial"

    def names(self) -> dict[str, int]:
        """All that is in the folder."""
        try:
            with os.scandir(self._path) as found:
                return {entry.name: entry.stat().st_size if entry.is_file() else NO_FILE for entry in found}
        except FileNotFoundError:
            return {}

    def read(self, name: str, *, most: int) -> bytes:
        """All of a file."""
        return read_file(self._path / name, most=most)

    def write(self, name: str, data: bytes) -> None:
        """A file as a whole."""
        self._path.mkdir(parents=True, exist_ok=True)
        partial = self._path / (name + self.partial)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path / name)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def create(self, name: str, data: bytes) -> None:
        """A file that is not there yet."""
        self._path.mkdir(parents=True, exist_ok=True)
        with (self._path / name).open("xb") as file:
            file.write(data)

    def settle(self) -> None:
        """Have the folder itself reach the disk."""
        folder = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self._path / name).unlink(missing_ok=True)

    def remove_place(self) -> None:
        """Remove the folder."""
        with suppress(OSError):  # it is not empty, or gone
            self._path.rmdir()


class Remote:
    """Files behind a URL, by fsspec."""

    def __init__(self, url: str) -> None:
        """Raises ``ValueError`` for a URL whose protocol is not known, or lacks its package."""
        import fsspec

        try:
            found: tuple[Any, str] = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"checkpoint.to is {url!r}, which cannot be used: {error}") from error
        self._system, self._root = found[0], found[1].rstrip("/")
        self.place, self.partial = url, ""

    def names(self) -> dict[str, int]:
        """All that is in the place."""
        self._system.invalidate_cache()
        try:
            found = self._system.ls(self._root, detail=True)
        except FileNotFoundError:
            return {}
        sizes = {
            entry["name"].rpartition("/")[2]: entry["size"] if entry["type"] == "file" else NO_FILE for entry in found
        }
        return {name: size for name, size in sizes.items() if name}  # (an object store may list the place itself)

    def read(self, name: str, *, most: int) -> bytes:
        """All of a file."""
        data: bytes = self._system.cat_file(f"{self._root}/{name}", start=0, end=most + 1)
        return data

    def write(self, name: str, data: bytes) -> None:
        """A file as a whole."""
        self._system.makedirs(self._root, exist_ok=True)
        self._system.pipe_file(f"{self._root}/{name}", data)

    def create(self, name: str, data: bytes) -> None:
        """A file that is not there yet; of two processes that do so at one time, an object store may let both."""
        if self._system.exists(f"{self._root}/{name}"):
            raise FileExistsError(f"{name} is there already")
        self.write(name, data)

    def settle(self) -> None:
        """It is, after each write."""

    def remove(self, name: str) -> None:
        """Remove a file."""
        with suppress(FileNotFoundError):
            self._system.rm_file(f"{self._root}/{name}")

    def remove_place(self) -> None:
        """Remove the folder, where the place has folders."""
        with suppress(OSError):
            self._system.rmdir(self._root)


def open_files(place: str) -> Files:
    """The files of a folder, or of a URL. Raises ``ValueError``."""
    return Remote(place) if "://" in place else Folder(Path(place))


def read_file(path: Path, *, most: int) -> bytes:
    """All of a regular file; of one that is longer than ``most`` bytes, ``most + 1`` of them.

    Raises ``OSError`` for what is none, such as a device or a pipe, which could be read without end.
    """
    flags = (getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))  # (opening a pipe would wait)
    number = os.open(path, os.O_RDONLY | sum(flags))
    found = os.fstat(number)
    if not stat.S_ISREG(found.st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    with open(number, "rb") as file:
        return file.read(min(most, found.st_size) + 1)
