"""Views of the replay buffer on disk: one file each, whole or not there at all, and checked when it is read.

A file holds a view's packets and 8 bytes of xxh3-64 of the view's key and the packets. It is written under another name
and then renamed, so that a full disk leaves nothing half-written behind. The folder is made when it is first needed, and
is no archive: what the files are is known to this object alone.
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
    """A file is not what was written."""


class _File(NamedTuple):
    path: Path
    num_bytes: int


class Spill:
    """Files by view. The budget is its owner's to keep."""

    def __init__(self, scratch: Scratch | None = None) -> None:
        """No file and no folder yet. ``scratch``: where that folder will be."""
        self._scratch = scratch or Scratch()
        self._files: dict[ViewKey, _File] = {}
        self._folder: ScratchFolder | None = None
        self._written = 0  # a file's name is never used again
        self.num_bytes = 0

    def __len__(self) -> int:
        """Number of files."""
        return len(self._files)

    def __contains__(self, key: ViewKey) -> bool:
        """Whether a view is here."""
        return key in self._files

    def write(self, key: ViewKey, body: Array) -> None:
        """Add a file. Raises ``OSError``; nothing is left of it then."""
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
        """What was written. Raises ``OSError`` or ``DamagedFile``."""
        file = self._files[key]
        found = np.fromfile(file.path, np.uint8)
        body = found[:-CHECKSUM_BYTES]
        if found[-CHECKSUM_BYTES:].tobytes() != _checksum(key, body):
            raise DamagedFile("its checksum is wrong")
        return body

    def remove(self, key: ViewKey) -> None:
        """Remove a view's file, be it damaged or gone."""
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
    """Of key and content: one view's file cannot pass for another's."""
    digest = xxhash.xxh3_64(msgspec.msgpack.encode(key))
    digest.update(body.data)
    return digest.digest()
