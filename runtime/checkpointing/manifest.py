"""The manifest of a checkpoint, and how the files of checkpoints are named.

    fedbonsai-checkpoint/2 <hash of what follows>
    {"run": "...", "version": 12, "events": 345, "root": "3f2a...c1.data", "files": {"3f2a...c1.data": 4711, ...}}

Hashes are xxh3-128, in hexadecimal digits; a file of data is named by its own.
"""

import re
from collections.abc import Iterable

import msgspec
import xxhash

from ...learning.spec import CountOrZero
from ..errors import ConfigError, Damaged

FORMAT = 2
MOST_BYTES = 256 * 1024**2  # of a manifest; it has a million files then
_MARK = b"fedbonsai-checkpoint"
_MANIFEST, _DATA = re.compile(r"\d{8,18}\.checkpoint"), re.compile(r"[0-9a-f]{32}\.data")


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One checkpoint: after which version it was taken, how many events the run had had, and its files' bytes by name.

    ``run``: whose it is. ``root``: the file of the graph.
    """

    run: str
    version: CountOrZero
    events: CountOrZero
    root: str
    files: dict[str, CountOrZero]

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.version:08d}.checkpoint"

    def encode(self) -> bytes:
        """Its file."""
        body = msgspec.json.encode(self)
        return _head(body) + body


def decode(data: bytes, *, name: str, run: str) -> Manifest:
    """The manifest of ``run`` in the file ``name``. Raises ``Damaged``, and ``ConfigError`` for one of another format."""
    head, _, body = data.partition(b"\n")
    mark, _, number = head.partition(b" ")[0].partition(b"/")
    if mark == _MARK and number.isdigit() and len(number) < 10 and int(number) != FORMAT:
        age = "newer" if int(number) > FORMAT else "older"
        raise ConfigError(
            f"checkpoint {name} has format {int(number)}, which is {age} than the {FORMAT} that this fedbonsai reads"
        )
    if head + b"\n" != _head(body):
        raise Damaged("its checksum is wrong")
    try:
        manifest = msgspec.json.decode(body, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"it cannot be read: {error}") from error
    if manifest.run != run or manifest.name != name:
        raise Damaged("it is one of another run or version")
    if manifest.root not in manifest.files or not all(map(is_data, manifest.files)):
        raise Damaged("it names files that are none of a checkpoint")
    return manifest


def data_name(data: bytes) -> str:
    """The name of a file that holds these bytes."""
    return f"{_hash(data)}.data"


def is_manifest(name: str) -> bool:
    """Whether a file is named as a manifest is."""
    return _MANIFEST.fullmatch(name) is not None


def is_data(name: str) -> bool:
    """Whether a file is named as one of data is."""
    return _DATA.fullmatch(name) is not None


def newest_first(names: Iterable[str]) -> list[str]:
    """Those of the names that are manifests', by version."""
    return sorted(filter(is_manifest, names), key=lambda name: (len(name), name), reverse=True)


def _head(body: bytes) -> bytes:
    return _MARK + b"/%d %s\n" % (FORMAT, _hash(body).encode())


def _hash(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)
