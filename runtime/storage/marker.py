"""The marker file of a folder that fedbonsai writes: proof that files in it are its own and may be replaced or removed.

    fedbonsai.json    {"kind": "run", "format": 2, "run": "", "token": "5d1c..."}

It is the first file in an empty folder and is created exclusively: of two processes that find the folder empty, one succeeds.
Files that are being written carry the token in their name.
"""

import secrets
from typing import Literal

import msgspec

NAME = "fedbonsai.json"
MOST_BYTES = 10_000
FORMAT = 2  # of the folders of runs, and of checkpoints

FolderType = Literal["run", "checkpoints"]


class Marker(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``kind``: what the folder holds. ``run``: the run whose checkpoints it holds. ``token``: random, unique to the folder."""

    kind: FolderType
    format: int
    run: str = ""
    token: str

    @property
    def partial(self) -> str:
        """Suffix of the name of a file that is being written."""
        return f".{self.token}.partial"


def new_marker(kind: FolderType, *, run: str = "") -> Marker:
    """A marker for a new folder."""
    return Marker(kind=kind, format=FORMAT, run=run, token=secrets.token_hex(8))


def encode(marker: Marker) -> bytes:
    """The contents of the marker file."""
    return msgspec.json.encode(marker) + b"\n"


def decode(data: bytes) -> Marker | None:
    """The marker in a file; None if the file does not hold one."""
    try:
        marker = msgspec.json.decode(data, type=Marker)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return marker if marker.token.isalnum() else None
