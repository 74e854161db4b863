"""Checkpoints: the state of a run as it was when a version had closed, in files that are named by what they hold.

    3f2a...c1.data           a tensor, a packet, or the graph that they hang on; never changed, shared by checkpoints
    00000012.checkpoint      a manifest, written last: which files make up the state after version 12

So an unchanged tensor is not written again, and a checkpoint whose writing was broken off is none: nothing names its files,
and the next one removes them. A manifest says of itself and of all its files how long they are, and their hash (xxh3).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import xxhash

from ..comms.channel import Channel
from .checkpoint_files import Files
from .checkpoint_rhythm import Rhythm
from .config import CheckpointSettings
from .errors import ConfigError, RunError
from .snapshot import Freezer, Stored, Thawer

T = TypeVar("T")
FORMAT = 1
_MANIFEST, _DATA = ".checkpoint", ".data"


class Damaged(Exception):
    """A checkpoint is not what was written. One sentence."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint: after which version it was taken, how many events the run had had, and its files' bytes by name.

    ``run``: whose it is. ``root``: the file of the graph.
    """

    run: str
    version: int
    events: int
    root: str
    files: dict[str, int]


@dataclass(frozen=True)
class Found:
    """The newest sound checkpoint, if there is one, and a sentence for each that was passed over."""

    manifest: Manifest | None
    notices: tuple[str, ...] = ()


class Checkpoints:
    """Writes checkpoints of one run to a place, and reads them."""

    def __init__(self, files: Files, *, channel: Channel, run: str, settings: CheckpointSettings) -> None:
        """``run``: names the run whose they are."""
        self._files, self._channel, self._run = files, channel, run
        self._keep, self._rhythm = settings.keep, Rhythm(settings)
        self._sizes: dict[str, int] = {}  # of all files that are there
        self._manifests: list[Manifest] = []
        self._of_paths: dict[tuple[str, int, int], str] = {}
        self._named: set[str] = set()  # by the checkpoint that is being written
        self.written_bytes = 0

    def start(self, manifest: Manifest | None) -> None:
        """The run goes on after a checkpoint, or begins: what is there and is newer, or lies about, goes."""
        self._sizes = self._files.names()
        older = [] if manifest is None else [m for m in self._sound(self._sizes) if m.version < manifest.version]
        self._manifests = [*reversed(older), *([manifest] if manifest is not None else [])]
        self._rhythm.start(manifest.version if manifest is not None else 0)
        self._clean()

    @property
    def is_empty(self) -> bool:
        """Whether there is none."""
        return not any(name.endswith(_MANIFEST) for name in self._files.names())

    def due(self, version: int) -> bool:
        """Whether a checkpoint of this version is to be written now."""
        return self._rhythm.due(version)

    def begin(self) -> None:
        """A checkpoint is to be written: what is stored from now on belongs to it."""
        self._named = set()
        self._rhythm.begin()

    def store(self, data: bytes) -> Stored:
        """A file of these bytes, which the value of the checkpoint may hold."""
        name = self._told(lambda: self.keep(data))
        return Stored(name, lambda: self._data(name, len(data)))

    def keep(self, data: bytes) -> str:
        """Make sure that there is a file of these bytes; its name."""
        name = f"{_hash(data)}{_DATA}"
        if self._sizes.get(name) != len(data):
            self._files.write(name, data)
            self._sizes[name] = len(data)
            self.written_bytes += len(data)
        self._named.add(name)
        return name

    def keep_file(self, path: Path) -> str:
        """The same with the bytes of a file, which are not read again before it has changed."""
        found = path.stat()
        key = str(path), found.st_mtime_ns, found.st_size
        if key not in self._of_paths:
            self._of_paths[key] = self.keep(path.read_bytes())
        self._named.add(self._of_paths[key])
        return self._of_paths[key]

    def write(self, value: Any, *, version: int, events: int) -> None:
        """Write a checkpoint, after ``begin``. Raises ``RunError`` where that fails: a full disk, a place that is gone."""
        self._told(lambda: self._write(value, version, events))

    def _write(self, value: Any, version: int, events: int) -> None:
        """Files first, then the manifest; then what is too many goes."""
        freezer = Freezer(self._channel, keep=self.keep, keep_file=self.keep_file, name=self._named.add)
        root = self.keep(freezer.freeze(value))
        files = {name: self._sizes[name] for name in sorted(self._named)}
        manifest = Manifest(run=self._run, version=version, events=events, root=root, files=files)
        body = msgspec.json.encode(manifest)
        self._files.settle()
        self._files.write(_name(version), _head(body) + body)
        self._files.settle()
        self._manifests = [m for m in self._manifests if m.version != version] + [manifest]
        self._sizes[_name(version)] = 0
        self._clean()
        self._rhythm.end(version)

    def _told(self, write: Callable[[], T]) -> T:
        """What fails is told in one sentence."""
        try:
            return write()
        except OSError as error:
            text = f"a checkpoint could not be written: {error}; those before it are whole"
            raise RunError(f"{text}: make room, and resume the run", stage="checkpoint") from error

    def read(self, manifest: Manifest) -> Any:
        """The value of a checkpoint. Raises ``Damaged``."""

        def read(name: str) -> bytes:
            return self._data(name, manifest.files.get(name, -1))

        return Thawer(self._channel, read=read).thaw(read(manifest.root))

    def newest(self, *, most_events: int | None = None) -> Found:
        """The newest checkpoint all of whose files are there and sound. ``most_events``: of a log that is shorter than it was.

        Raises ``ConfigError`` for one of a newer format, and where there are some, but none is sound.
        """
        notices: list[str] = []
        sizes = self._files.names()
        for name in _manifests(sizes):
            try:
                manifest = self._manifest(name)
                if manifest.run != self._run:
                    raise ConfigError(
                        f"checkpoint {name} is another run's; checkpoint.to must be a place of this run's own"
                    )
                if most_events is not None and manifest.events > most_events:
                    raise Damaged(f"the log has {most_events} events, where it counts {manifest.events}")
                for data, num_bytes in manifest.files.items():
                    self._data(data, num_bytes)
                return Found(manifest, tuple(notices))
            except Damaged as error:
                notices.append(f"checkpoint {name} is damaged ({error}); the one before it is used")
        if notices:
            raise ConfigError(
                f"of {len(notices)} checkpoints none can be used; the newest: {notices[0].partition(';')[0]}"
            )
        return Found(None)

    def _sound(self, sizes: dict[str, int]) -> Iterator[Manifest]:
        """Manifests that can be read, newest first."""
        for name in _manifests(sizes):
            try:
                yield self._manifest(name)
            except Damaged:  # it is removed with what lies about
                continue

    def _manifest(self, name: str) -> Manifest:
        """A manifest. Raises ``Damaged``, and ``ConfigError`` for one of a newer format."""
        try:
            data = self._files.read(name)
        except OSError as error:
            raise Damaged(f"it cannot be read: {error}") from error
        head, _, body = data.partition(b"\n")
        mark, _, number = head.partition(b" ")[0].partition(b"/")
        if mark == _MARK and number.isdigit() and int(number) > FORMAT:
            raise ConfigError(
                f"checkpoint {name} has format {int(number)}, which is newer than the {FORMAT} that this fedbonsai reads"
            )
        if head + b"\n" != _head(body):
            raise Damaged("its checksum is wrong")
        return msgspec.json.decode(body, type=Manifest)

    def _data(self, name: str, num_bytes: int) -> bytes:
        """A file of a checkpoint. Raises ``Damaged``."""
        try:
            data = self._files.read(name)
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error}") from error
        if len(data) != num_bytes or name != f"{_hash(data)}{_DATA}":
            raise Damaged(f"{name} is not what was written")
        return data

    def _clean(self) -> None:
        """Remove the oldest checkpoints, and all files that none names."""
        self._manifests = self._manifests[-self._keep :]
        named = {_name(manifest.version) for manifest in self._manifests}
        for manifest in self._manifests:
            named.update(manifest.files)
        loose = [name for name in self._sizes if name.endswith((_MANIFEST, _DATA)) and name not in named]
        for name in sorted(loose, key=lambda name: name.endswith(_DATA)):  # what names others goes first
            self._files.remove(name)
            del self._sizes[name]
        self._of_paths = {path: name for path, name in self._of_paths.items() if name in named}


_MARK = b"fedbonsai-checkpoint"


def _head(body: bytes) -> bytes:
    """The first line of a manifest."""
    return _MARK + b"/%d %s\n" % (FORMAT, _hash(body).encode())


def _hash(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _name(version: int) -> str:
    return f"{version:08d}{_MANIFEST}"


def _manifests(sizes: dict[str, int]) -> list[str]:
    """Names of manifests, newest first."""
    return sorted(
        (name for name in sizes if name.endswith(_MANIFEST)), key=lambda name: (len(name), name), reverse=True
    )
