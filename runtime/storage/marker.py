"""The marker of a folder that fedbonsai writes: the proof that files in it are its own, and may be replaced or removed.

    fedbonsai.json    {"kind": "run", "format": 2, "run": "", "token": "5d1c..."}

It is the first file in a folder that was empty, made only where it is not there yet: of two processes that found the folder
empty, one gets it. Files that are still being written carry the token in their name.
"""

import secrets
from typing import Literal

import msgspec

NAME = "fedbonsai.json"
MOST_BYTES = 10_000
FORMAT = 2  # of the folders of runs, and of checkpoints

Kind = Literal["run", "checkpoints"]


class Marker(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a folder holds. ``run``: whose checkpoints. ``token``: random, and in no other folder."""

    kind: Kind
    format: int
    run: str = ""
    token: str

    @property
    def partial(self) -> str:
        """The end of the name of a file that is still being written."""
        return f".{self.token}.partial"


def new_marker(kind: Kind, *, run: str = "") -> Marker:
    """The marker of a new folder."""
    return Marker(kind=kind, format=FORMAT, run=run, token=secrets.token_hex(8))


def encode(marker: Marker) -> bytes:
    """The bytes of its file."""
    return msgspec.json.encode(marker) + b"\n"


def decode(data: bytes) -> Marker | None:
    """The marker in a file; None where the file is no marker."""
    try:
        marker = msgspec.json.decode(data, type=Marker)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return marker if marker.token.isalnum() else None
