"""Files of checkpoints, in a local folder or behind any URL that fsspec supports.

In a folder a file is written under another name, synced to disk and renamed, so it exists completely or not at all. Object
stores write atomically themselves; for other places the hashes that ``checkpoints`` verifies detect incomplete files. Only
regular files are read, and never more bytes than the caller allows.
"""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

NO_FILE = -1  # in place of the size of an entry that is not a regular file


class Files(Protocol):
    """Files by name, in one place. Failures raise ``OSError``, a missing file ``FileNotFoundError``.

    ``place``: as the user named it. ``partial``: suffix of the names of files that are being written; "" where none is used.
    """

    place: str
    partial: str

    def names(self) -> dict[str, int]:
        """Sizes of all entries by name, ``NO_FILE`` for those that are not files; empty if the place does not exist."""
        ...

    def read(self, name: str, *, most: int) -> bytes:
        """The contents of a file; of one longer than ``most`` bytes, the first ``most + 1``."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically, replacing an existing one."""
        ...

    def create(self, name: str, data: bytes) -> None:
        """Write a new file. Raises ``FileExistsError`` if it exists."""
        ...

    def sync(self) -> None:
        """Wait until all that was written is durable."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        ...

    def remove_place(self) -> None:
        """Remove the place itself, if it is empty."""
        ...


class Folder:
    """Files in a folder."""

    def __init__(self, path: Path) -> None:
        """``path``: created at the first write."""
        self._path = path
        self.place, self.partial = str(path), ".partial"

    def names(self) -> dict[str, int]:
        """Sizes of all entries of the folder."""
        try:
            with os.scandir(self._path) as found:
                return {entry.name: entry.stat().st_size if entry.is_file() else NO_FILE for entry in found}
        except FileNotFoundError:
            return {}

    def read(self, name: str, *, most: int) -> bytes:
        """The contents of a file."""
        return read_file(self._path / name, most=most)

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically."""
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
        """Write a new file."""
        self._path.mkdir(parents=True, exist_ok=True)
        with (self._path / name).open("xb") as file:
            file.write(data)

    def sync(self) -> None:
        """Sync the folder itself to disk."""
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
        with suppress(OSError):  # it is not empty, or does not exist
            self._path.rmdir()


class Remote:
    """Files behind a URL, by fsspec."""

    def __init__(self, url: str) -> None:
        """Raises ``ValueError`` for a URL whose protocol is unknown, or whose package is not installed."""
        import fsspec

        try:
            found: tuple[Any, str] = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"checkpoint.to is {url!r}, which cannot be used: {error}") from error
        self._system, self._root = found[0], found[1].rstrip("/")
        self.place, self.partial = url, ""

    def names(self) -> dict[str, int]:
        """Sizes of all entries of the place."""
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
        """The contents of a file."""
        data: bytes = self._system.cat_file(f"{self._root}/{name}", start=0, end=most + 1)
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a file; atomic where the store's own writes are."""
        self._system.makedirs(self._root, exist_ok=True)
        self._system.pipe_file(f"{self._root}/{name}", data)

    def create(self, name: str, data: bytes) -> None:
        """Write a new file. Not atomic: in an object store two processes may both succeed at the same time."""
        if self._system.exists(f"{self._root}/{name}"):
            raise FileExistsError(f"{name} exists already")
        self.write(name, data)

    def sync(self) -> None:
        """Nothing to do: every write is durable."""

    def remove(self, name: str) -> None:
        """Remove a file."""
        with suppress(FileNotFoundError):
            self._system.rm_file(f"{self._root}/{name}")

    def remove_place(self) -> None:
        """Remove the folder, if the place has folders."""
        with suppress(OSError):
            self._system.rmdir(self._root)


def open_files(place: str) -> Files:
    """The files of a folder, or of a URL. Raises ``ValueError``."""
    return Remote(place) if "://" in place else Folder(Path(place))


def read_file(path: Path, *, most: int) -> bytes:
    """The contents of a regular file; of one longer than ``most`` bytes, the first ``most + 1``.

    Raises ``OSError`` for anything else, such as a device or a pipe, which could be read without end.
    """
    flags = (getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))  # opening a pipe would block
    number = os.open(path, os.O_RDONLY | sum(flags))
    found = os.fstat(number)
    if not stat.S_ISREG(found.st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    with open(number, "rb") as file:
        return file.read(min(most, found.st_size) + 1)
