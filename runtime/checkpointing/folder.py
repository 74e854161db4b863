"""The place of a run's checkpoints: its files and their names, manifests, and the marker that says whose it is.

    fedbonsai.json           the marker (``storage.marker``); made before anything else, in an empty place only
    3f2a...c1.data           a tensor, a packet, or a graph of values; named by its hash, never changed, shared by checkpoints
    00000012.checkpoint      a manifest, written last: the files that make up the state after version 12

A manifest is

    fedbonsai-checkpoint/2 <hash of what follows>
    {"run": "...", "version": 12, "events": 345, "root": "3f2a...c1.data", "files": {"3f2a...c1.data": 4711, ...}}

Hashes are xxh3-128 in hexadecimal digits. Nothing is written to a place that is not this run's own.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress

import msgspec
import xxhash

from ...learning.spec import CountOrZero
from ..errors import ConfigError, Damaged, RunError
from ..storage import marker
from ..storage.files import Files

FORMAT = 8
MOST_BYTES = 256 * 1024**2  # of a manifest, enough for a million files
_MAGIC = b"fedbonsai-checkpoint"
_MANIFEST, _DATA = re.compile(r"\d{8,18}\.checkpoint"), re.compile(r"[0-9a-f]{32}\.data")


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One checkpoint: the version it was taken after, the number of events until then, and the sizes of its files by name.

    ``run``: identifies the run. ``root``: the file that holds the graph of values.
    """

    run: str
    version: CountOrZero
    events: CountOrZero
    root: str
    files: dict[str, CountOrZero]

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.version:08d}.checkpoint"

    def encode(self) -> bytes:
        """The contents of its file."""
        body = msgspec.json.encode(self)
        return _head(body) + body


def decode_manifest(data: bytes, *, name: str, run: str) -> Manifest:
    """The manifest of ``run`` in the file ``name``. Raises ``Damaged``, and ``ConfigError`` for another format."""
    head, _, body = data.partition(b"\n")
    magic, _, number = head.partition(b" ")[0].partition(b"/")
    if magic == _MAGIC and number.isdigit() and len(number) < 10 and int(number) != FORMAT:
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
        raise Damaged("it belongs to another run or version")
    if manifest.root not in manifest.files or not all(map(is_data, manifest.files)):
        raise Damaged("it names files that cannot be part of a checkpoint")
    return manifest


def data_name(data: bytes) -> str:
    """The name of the file that holds these bytes."""
    return f"{_hash(data)}.data"


def is_manifest(name: str) -> bool:
    """Whether a file name is that of a manifest."""
    return _MANIFEST.fullmatch(name) is not None


def is_data(name: str) -> bool:
    """Whether a file name is that of a file of data."""
    return _DATA.fullmatch(name) is not None


def newest_first(names: Iterable[str]) -> list[str]:
    """The names that are manifests', by descending version."""
    return sorted(filter(is_manifest, names), key=lambda name: (len(name), name), reverse=True)


def _head(body: bytes) -> bytes:
    return _MAGIC + b"/%d %s\n" % (FORMAT, _hash(body).encode())


def _hash(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


class CheckpointFolder:
    """The place of the checkpoints of ``run``. ``token``: of the marker that ``claim`` made or found; "" before."""

    def __init__(self, files: Files, *, run: str, token: str = "") -> None:
        """Reads nothing yet."""
        self._files, self._run, self.token = files, run, token
        self._subject = f"checkpoint.to is {files.place!r}, which"

    def claim(self, *, resumes: bool) -> None:
        """Make an empty place this run's own, or check that it is, where the run ``resumes``. Raises ``ConfigError``.

        A place in which a run has written nothing but its marker counts as empty. It gets a new marker with another token, so
        that the other run, if it is still alive, fails before it writes.
        """
        try:
            names = self._files.names()
            found = self._marker(names)
            ours = found is not None and found.run == self._run
            if names and not ours:
                self._check_free(found, names)
            if not resumes and any(map(is_manifest, names)):
                raise ConfigError(f"{self._subject} holds checkpoints already; resume their run, or name a new place")
            if found is None or not (resumes and ours):
                self._remove_partial(found, names)
                self._files.remove(marker.NAME)
                found = marker.new_marker("checkpoints", run=self._run)
                self._files.create(marker.NAME, marker.encode(found))
        except OSError as error:
            raise ConfigError(f"{self._subject} cannot be used: {error.strerror or error}") from error
        self.token = found.token

    def release(self) -> None:
        """Remove the place that ``claim`` has made this run's own, if nothing was written to it since."""
        names = self._files.names()
        found = self._marker(names)
        if set(names) == {marker.NAME} and found is not None and found.token == self.token:
            self._files.remove(marker.NAME)
            self._files.remove_place()

    def enter(self) -> dict[str, int]:
        """The sizes of all checkpoint files in the place, by name; removes partly written ones. Raises ``RunError``."""
        names = self._files.names()
        found = self.check(names)
        self._files.partial = found.partial
        self._remove_partial(found, names)
        ours = {name for name in names if is_manifest(name) or is_data(name)}
        return {name: size for name, size in names.items() if name in ours and size >= 0}

    def check(self, names: Mapping[str, int] | None = None) -> marker.Marker:
        """The marker. Raises ``RunError`` if it is not the one that ``claim`` left: another run has claimed the place."""
        found = self._marker(self._files.names() if names is None else names)
        if found is None or found.token != self.token:
            raise RunError(f"{self._subject} is no longer this run's own", stage="checkpoint")
        return found

    def _remove_partial(self, found: marker.Marker | None, names: Mapping[str, int]) -> None:
        """Remove partly written files, whose names carry the marker's token."""
        for name in names:
            if found is not None and name.endswith(found.partial):
                self._files.remove(name)

    def _marker(self, names: Mapping[str, int]) -> marker.Marker | None:
        """The marker of a place of checkpoints; None where there is none."""
        if names.get(marker.NAME, -1) < 0:
            return None
        found = marker.decode(self._files.read(marker.NAME, most=marker.MOST_BYTES))
        if found is not None and found.format > marker.FORMAT:
            raise ConfigError(
                f"{self._subject} has format {found.format}, which is newer than the {marker.FORMAT} that this fedbonsai reads"
            )
        return found if found is not None and found.kind == "checkpoints" else None

    def _check_free(self, found: marker.Marker | None, names: Mapping[str, int]) -> None:
        """Raise ``ConfigError`` for a place that is neither empty nor this run's, and say what it holds."""
        if set(names) == {marker.NAME} and (found is not None or not names[marker.NAME]):
            return  # of a run that has written nothing
        if found is not None:
            raise ConfigError(
                f"{self._subject} holds the checkpoints of another run; every run needs a place of its own"
            )
        for name in newest_first(names):
            with suppress(Damaged):  # raises ConfigError for another format
                decode_manifest(self._files.read(name, most=MOST_BYTES), name=name, run=self._run)
        listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ConfigError(
            f"{self._subject} is not empty, and holds no checkpoints of fedbonsai ({listed}); name a new folder"
        )
