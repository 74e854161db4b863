"""Views of the replay buffer on disk: one file each, written atomically and checked when it is read.

A file holds a view's packets and 8 bytes of xxh3-64 of the view's key and the packets. It is written under another name and
then renamed, so that a full disk leaves no partial file. The folder is made when it is first needed; the index of its files is
in this object alone, so they cannot be read again without it.
"""

import os
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

from ...clusters.scratch import Scratch, ScratchFolder
from ...comms.codec import Array
from .upload import ViewKey

CHECKSUM_BYTES = 8


class DamagedFile(Exception):
    """A file does not hold what was written."""


class _File(NamedTuple):
    path: Path
    num_bytes: int


class Spill:
    """Files by view. The caller keeps the budget."""

    def __init__(self, scratch: Scratch | None = None) -> None:
        """Makes no folder yet. ``scratch``: where the folder will be."""
        self._scratch = scratch or Scratch()
        self._files: dict[ViewKey, _File] = {}
        self._folder: ScratchFolder | None = None
        self._written = 0  # number in the next file's name, which is never reused
        self.num_bytes = 0

    def __len__(self) -> int:
        """Number of files."""
        return len(self._files)

    def __contains__(self, key: ViewKey) -> bool:
        """Whether a view has a file."""
        return key in self._files

    def write(self, key: ViewKey, body: Array) -> None:
        """Write a view's file. Raises ``OSError``, and leaves no file."""
        assert key not in self._files
        if self._folder is None:
            self._folder = self._scratch.folder("replay")
        path = self._folder.path / f"{self._written}.view"
        partial = path.with_suffix(".part")
        self._written += 1
        try:
            with partial.open("wb") as file:
                file.write(body.data)
                file.write(_checksum(key, body))
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        self._files[key] = _File(path, body.nbytes + CHECKSUM_BYTES)
        self.num_bytes += body.nbytes + CHECKSUM_BYTES

    def read(self, key: ViewKey) -> Array:
        """A view's packets. Raises ``OSError`` or ``DamagedFile``."""
        file = self._files[key]
        content = np.fromfile(file.path, np.uint8)
        body = content[:-CHECKSUM_BYTES]
        if content[-CHECKSUM_BYTES:].tobytes() != _checksum(key, body):
            raise DamagedFile("its checksum is wrong")
        return body

    def remove(self, key: ViewKey) -> None:
        """Remove a view's file, which may be damaged or missing."""
        file = self._files.pop(key)
        self.num_bytes -= file.num_bytes
        file.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the files and their folder."""
        self._files.clear()
        self.num_bytes = 0
        if self._folder is not None:
            self._folder.close()
            self._folder = None


def _checksum(key: ViewKey, body: Array) -> bytes:
    """Covers key and content, so one view's file cannot pass for another's."""
    digest = xxhash.xxh3_64(msgspec.msgpack.encode(key))
    digest.update(body.data)
    return digest.digest()
