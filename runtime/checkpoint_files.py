"""The files that checkpoints are made of: in a folder of this machine, or behind any URL that fsspec knows.

Here a file is written under another name, reaches the disk, and is renamed: it is there whole, or not at all. An object
store does the same by itself; whatever does not, is found out by the hashes of what is read (``checkpoints``).
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

_PARTIAL = ".partial"


class Files(Protocol):
    """Files by name, in one place. What fails raises ``OSError``, a file that is not there ``FileNotFoundError``."""

    def names(self) -> dict[str, int]:
        """The bytes of every file, by name; empty where there is no such place yet."""
        ...

    def read(self, name: str) -> bytes:
        """All of a file."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """A file as a whole, in place of one that is there."""
        ...

    def settle(self) -> None:
        """Wait until all that was written is there to stay."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file; harmless where it is gone."""
        ...


class Folder:
    """Files in a folder."""

    def __init__(self, path: Path) -> None:
        """``path`` is made when something is written."""
        self._path = path

    def names(self) -> dict[str, int]:
        """Files that are complete."""
        if not self._path.is_dir():
            return {}
        with os.scandir(self._path) as found:
            return {entry.name: entry.stat().st_size for entry in found if not entry.name.endswith(_PARTIAL)}

    def read(self, name: str) -> bytes:
        """All of a file."""
        return (self._path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """A file as a whole."""
        self._path.mkdir(parents=True, exist_ok=True)
        partial = self._path / (name + _PARTIAL)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path / name)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

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

    def names(self) -> dict[str, int]:
        """All files of the place."""
        self._system.invalidate_cache()
        try:
            found = self._system.ls(self._root, detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in found if entry["type"] == "file"}

    def read(self, name: str) -> bytes:
        """All of a file."""
        data: bytes = self._system.cat_file(f"{self._root}/{name}")
        return data

    def write(self, name: str, data: bytes) -> None:
        """A file as a whole."""
        self._system.makedirs(self._root, exist_ok=True)
        self._system.pipe_file(f"{self._root}/{name}", data)

    def settle(self) -> None:
        """It is, after each write."""

    def remove(self, name: str) -> None:
        """Remove a file."""
        with suppress(FileNotFoundError):
            self._system.rm_file(f"{self._root}/{name}")


def open_files(place: str) -> Files:
    """The files of a folder, or of a URL. Raises ``ValueError``."""
    return Remote(place) if "://" in place else Folder(Path(place))
