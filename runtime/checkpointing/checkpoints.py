"""Checkpoints: the state of a run as it was when a version had closed, in files that are named by what they hold.

    fedbonsai.json           whose checkpoints these are (``marker``); made before anything else, in an empty place only
    3f2a...c1.data           a tensor, a packet, or the graph that they hang on; never changed, shared by checkpoints
    00000012.checkpoint      a manifest, written last: which files make up the state after version 12

So an unchanged tensor is not written again, and a checkpoint whose writing was broken off is none: nothing names its files,
and the next one removes them. A manifest says of itself and of all its files how long they are, and their hash (xxh3).

Only these files are ever removed, by their names, in a place with this run's marker; a file of data that no manifest of the
run names is hashed before. What else lies there is left alone.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from ...comms.channel import Channel, Stored
from ..configuration.config import CheckpointSettings
from ..errors import ConfigError, Damaged, RunError
from ..storage.files import Files
from . import manifest as manifests
from .manifest import Manifest
from .place import CheckpointFolder
from .schedule import CheckpointSchedule

T = TypeVar("T")
_NONE: Mapping[int, str] = MappingProxyType({})


@dataclass(frozen=True)
class Found:
    """The newest sound checkpoint, if there is one, and a sentence for each that was passed over."""

    manifest: Manifest | None
    notices: tuple[str, ...] = ()


class Checkpoints:
    """Writes checkpoints of one run to a place, and reads them."""

    def __init__(
        self, files: Files, *, channel: Channel, run: str, settings: CheckpointSettings, token: str = ""
    ) -> None:
        """``run``: names the run whose they are. ``token``: of their place, where it was claimed before."""
        self._files, self._channel, self._run = files, channel, run
        self.place = CheckpointFolder(files, run=run, token=token)
        self._keep, self._rhythm = settings.keep, CheckpointSchedule(settings)
        self._sizes: dict[str, int] = {}  # of our files that are there
        self._manifests: list[Manifest] = []
        self._of_paths: dict[tuple[str, int, int], str] = {}
        self._named: set[str] = set()  # by the checkpoint that is being written
        self._written: set[str] = set()  # files of data that a checkpoint of this run names, or named
        self.written_bytes = 0

    def start(self, manifest: Manifest | None) -> None:
        """The run goes on after a checkpoint, or begins: what of ours is there and is newer, or lies about, goes."""
        self._sizes = self.place.enter()
        sound = list(self._sound())
        self._written = {name for each in sound for name in each.files}
        older = [] if manifest is None else [each for each in sound if each.version < manifest.version]
        self._manifests = [*reversed(older), *([manifest] if manifest is not None else [])]
        self._rhythm.start(manifest.version if manifest is not None else 0)
        self._clean()

    def due(self, version: int) -> bool:
        """Whether a checkpoint of this version is to be written now."""
        return self._rhythm.due(version)

    def begin(self) -> None:
        """A checkpoint is to be written: what is stored from now on belongs to it. Raises ``RunError``."""
        self._reported(self.place.check)
        self._named = set()
        self._rhythm.begin()

    def store(self, data: bytes) -> Stored:
        """A file of these bytes, which the value of the checkpoint may hold."""
        name = self._reported(lambda: self.keep(data))
        return Stored(name, lambda: self._data(name, len(data)))

    def keep(self, data: bytes) -> str:
        """Make sure that there is a file of these bytes; its name."""
        name = manifests.data_name(data)
        if self._sizes.get(name) != len(data):
            self._files.write(name, data)
            self._sizes[name] = len(data)
            self.written_bytes += len(data)
        self._named.add(name)
        self._written.add(name)
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
        self._reported(lambda: self._write(value, version, events))

    def _write(self, value: Any, version: int, events: int) -> None:
        """Files first, then the manifest; then what is too many goes."""
        from .snapshot import (
            StateEncoder,  # here, as in ``read``: a driver that looks for a checkpoint imports no torch
        )

        freezer = StateEncoder(self._channel, keep=self.keep, keep_file=self.keep_file, name=self._named.add)
        root = self.keep(freezer.freeze(value))
        files = {name: self._sizes[name] for name in sorted(self._named)}
        manifest = Manifest(run=self._run, version=version, events=events, root=root, files=files)
        self._files.settle()
        self._files.write(manifest.name, manifest.encode())
        self._files.settle()
        self._manifests = [m for m in self._manifests if m.version != version] + [manifest]
        self._sizes[manifest.name] = 0
        self._clean()
        self._rhythm.end(version)

    def _reported(self, write: Callable[[], T]) -> T:
        """The result of ``write``; its failure becomes a ``RunError`` of one sentence."""
        try:
            return write()
        except OSError as error:
            text = f"a checkpoint could not be written: {error}; those before it are whole"
            raise RunError(f"{text}: make room, and resume the run", stage="checkpoint") from error

    def read(self, manifest: Manifest) -> Any:
        """The value of a checkpoint. Raises ``Damaged``."""
        from .restore import StateDecoder

        def read(name: str) -> bytes:
            return self._data(name, manifest.files[name])

        return StateDecoder(self._channel, files=manifest.files, read=read).thaw(read(manifest.root))

    def newest(self, *, most_events: int | None = None, unfit: Mapping[int, str] = _NONE) -> Found:
        """The newest checkpoint all of whose files are there and sound.

        ``most_events``: of a log that is shorter than it was. ``unfit``: versions whose checkpoints are known to be damaged,
        and why. Raises ``ConfigError`` for one of another format, and where there are some, but none is sound.
        """
        notices: list[str] = []
        for name in manifests.newest_first(self._files.names()):
            try:
                manifest = self._manifest(name)
                if manifest.version in unfit:
                    raise Damaged(unfit[manifest.version])
                if most_events is not None and manifest.events > most_events:
                    raise Damaged(f"the log has {most_events} sound events, where it counts {manifest.events}")
                for data, num_bytes in manifest.files.items():
                    self._data(data, num_bytes)
                return Found(manifest, tuple(notices))
            except Damaged as error:
                notices.append(f"checkpoint {name} is damaged ({error}); the one before it is used")
        if notices:
            raise ConfigError(
                f"of {len(notices)} checkpoints none can be used; the newest: {notices[0].partition('; the one')[0]}"
            )
        return Found(None)

    def _sound(self) -> Iterator[Manifest]:
        """Manifests of this run that can be read, newest first."""
        for name in manifests.newest_first(self._sizes):
            with suppress(Damaged):  # it is removed with what lies about
                yield self._manifest(name)

    def _manifest(self, name: str) -> Manifest:
        """A manifest. Raises ``Damaged``, and ``ConfigError`` for one of another format."""
        try:
            data = self._files.read(name, most=manifests.MOST_BYTES)
        except OSError as error:
            raise Damaged(f"it cannot be read: {error}") from error
        return manifests.decode(data, name=name, run=self._run)

    def _data(self, name: str, num_bytes: int) -> bytes:
        """A file of a checkpoint. Raises ``Damaged``."""
        try:
            data = self._files.read(name, most=num_bytes)
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error}") from error
        if len(data) != num_bytes or name != manifests.data_name(data):
            raise Damaged(f"{name} is not what was written")
        return data

    def _clean(self) -> None:
        """Remove the oldest checkpoints, and those of our files that none names."""
        self._manifests = self._manifests[-self._keep :]
        named = {manifest.name for manifest in self._manifests}
        for manifest in self._manifests:
            named.update(manifest.files)
        loose = [name for name in self._sizes if name not in named]
        for name in sorted(loose, key=manifests.is_data):  # what names others goes first
            if manifests.is_manifest(name) or self._is_ours(name):
                self._files.remove(name)
            del self._sizes[name]
        self._of_paths = {path: name for path, name in self._of_paths.items() if name in named}
        self._written &= named

    def _is_ours(self, name: str) -> bool:
        """Whether a file of data was written by this run: it says so itself, or the file is named by what it holds."""
        if name in self._written:
            return True
        try:
            self._data(name, self._sizes[name])
        except Damaged:
            return False
        return True
