"""Checkpoints: the state of a run after a closed version, in files that are named by their hashes (``folder``).

An unchanged tensor is not written again. A checkpoint whose writing was interrupted does not count, since its manifest is
written last; its files are removed when the next one is written. A manifest holds the sizes and hashes of all files, its own
included, so every file is verified when it is read.

Only files of checkpoints are ever removed, by their names, in a place with this run's marker. A file of data that no manifest
of the run names is hashed first: it is removed only if its name is its hash. All other files are left alone.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from ...comms.channel import Channel, StoredBytes
from ..configuration.config import CheckpointSettings
from ..errors import ConfigError, Damaged, RunError
from ..storage.files import Files
from . import folder
from .folder import CheckpointFolder, Manifest

T = TypeVar("T")
_NONE: Mapping[int, str] = MappingProxyType({})


@dataclass(frozen=True)
class Newest:
    """The newest intact checkpoint, if there is one, and a notice for each damaged one that was skipped."""

    manifest: Manifest | None
    notices: tuple[str, ...] = ()


class CheckpointSchedule:
    """When a checkpoint is due: after so many versions or seconds, unless writing would take more than its share of the time.

    Seconds are this machine's.
    """

    def __init__(self, settings: CheckpointSettings, *, now: Callable[[], float] = time.monotonic) -> None:
        """At the start of the run."""
        self._settings, self._now = settings, now
        self._last_version, self._last_s = 0, now()
        self._began_s = self._took_s = 0.0

    def start(self, version: int) -> None:
        """The run continues from a checkpoint of that version, or begins at 0."""
        self._last_version = version

    def due(self, version: int) -> bool:
        """Whether a checkpoint of this version is due now."""
        settings, since_s = self._settings, self._now() - self._last_s
        by_version = settings.every is not None and version - self._last_version >= settings.every
        by_seconds = settings.seconds is not None and since_s >= settings.seconds
        if settings.share is not None and since_s * settings.share < self._took_s * (1 - settings.share):
            return False
        return by_version or by_seconds

    def begin(self) -> None:
        """Writing a checkpoint begins."""
        self._began_s = self._now()

    def end(self, version: int) -> None:
        """The checkpoint of this version is written."""
        self._last_version, self._last_s = version, self._now()
        self._took_s = self._last_s - self._began_s


class Checkpoints:
    """Writes and reads the checkpoints of one run in one place."""

    def __init__(
        self, files: Files, *, channel: Channel, run: str, settings: CheckpointSettings, token: str = ""
    ) -> None:
        """``run``: identifies the run. ``token``: of the place, if it was claimed before."""
        self._files, self._channel, self._run = files, channel, run
        self.place = CheckpointFolder(files, run=run, token=token)
        self._keep, self._schedule = settings.keep, CheckpointSchedule(settings)
        self._sizes: dict[str, int] = {}  # of the checkpoint files in the place, by name
        self._manifests: list[Manifest] = []
        self._of_paths: dict[tuple[str, int, int], str] = {}
        self._named: set[str] = set()  # files of the checkpoint that is being written
        self._written: set[str] = set()  # files of data that a checkpoint of this run names or named
        self.written_bytes = 0

    def start(self, manifest: Manifest | None) -> None:
        """The run continues from a checkpoint, or begins; removes this run's newer checkpoints and unnamed files."""
        self._sizes = self.place.enter()
        intact = list(self._intact())
        self._written = {name for each in intact for name in each.files}
        older = [] if manifest is None else [each for each in intact if each.version < manifest.version]
        self._manifests = [*reversed(older), *([manifest] if manifest is not None else [])]
        self._schedule.start(manifest.version if manifest is not None else 0)
        self._clean()

    def due(self, version: int) -> bool:
        """Whether a checkpoint of this version is due now."""
        return self._schedule.due(version)

    def begin(self) -> None:
        """Begin a checkpoint, to which all that is stored from now on belongs. Raises ``RunError``."""
        self._reported(self.place.check)
        self._named = set()
        self._schedule.begin()

    def store(self, data: bytes) -> StoredBytes:
        """Write a file of these bytes; the checkpoint's value may hold the reference that is returned."""
        name = self._reported(lambda: self.keep(data))
        return StoredBytes(name, lambda: self._data(name, len(data)))

    def keep(self, data: bytes) -> str:
        """Write a file of these bytes unless it exists; returns its name."""
        name = folder.data_name(data)
        if self._sizes.get(name) != len(data):
            self._files.write(name, data)
            self._sizes[name] = len(data)
            self.written_bytes += len(data)
        self._named.add(name)
        self._written.add(name)
        return name

    def keep_file(self, path: Path) -> str:
        """As ``keep``, with the bytes of a file, which is read again only after it has changed."""
        found = path.stat()
        key = str(path), found.st_mtime_ns, found.st_size
        if key not in self._of_paths:
            self._of_paths[key] = self.keep(path.read_bytes())
        self._named.add(self._of_paths[key])
        return self._of_paths[key]

    def write(self, value: Any, *, version: int, events: int) -> None:
        """Write a checkpoint, after ``begin``. Raises ``RunError`` if that fails, as on a full disk."""
        self._reported(lambda: self._write(value, version, events))

    def _write(self, value: Any, version: int, events: int) -> None:
        """Write the files, then the manifest; then remove the oldest checkpoints."""
        from .snapshot import (
            StateEncoder,  # here, as in ``read``: a driver that looks for a checkpoint imports no torch
        )

        encoder = StateEncoder(self._channel, keep=self.keep, keep_file=self.keep_file, name=self._named.add)
        root = self.keep(encoder.encode(value))
        files = {name: self._sizes[name] for name in sorted(self._named)}
        manifest = Manifest(run=self._run, version=version, events=events, root=root, files=files)
        self._files.sync()
        self._files.write(manifest.name, manifest.encode())
        self._files.sync()
        self._manifests = [m for m in self._manifests if m.version != version] + [manifest]
        self._sizes[manifest.name] = 0
        self._clean()
        self._schedule.end(version)

    def _reported(self, write: Callable[[], T]) -> T:
        """The result of ``write``; an ``OSError`` becomes a ``RunError``."""
        try:
            return write()
        except OSError as error:
            text = f"a checkpoint could not be written: {error}; earlier checkpoints are intact"
            raise RunError(f"{text}: make room, and resume the run", stage="checkpoint") from error

    def read(self, manifest: Manifest) -> Any:
        """The value of a checkpoint. Raises ``Damaged``."""
        from .restore import StateDecoder

        def read(name: str) -> bytes:
            return self._data(name, manifest.files[name])

        return StateDecoder(self._channel, files=manifest.files, read=read).decode(read(manifest.root))

    def newest(self, *, most_events: int | None = None, unfit: Mapping[int, str] = _NONE) -> Newest:
        """The newest checkpoint whose files are all intact.

        ``most_events``: events in the log; a checkpoint taken after more of them cannot be used. ``unfit``: versions whose
        checkpoints are known to be damaged, and why. Raises ``ConfigError`` for another format, and if there are checkpoints
        but none is intact.
        """
        notices: list[str] = []
        for name in folder.newest_first(self._files.names()):
            try:
                manifest = self._manifest(name)
                if manifest.version in unfit:
                    raise Damaged(unfit[manifest.version])
                if most_events is not None and manifest.events > most_events:
                    raise Damaged(
                        f"the log has {most_events} intact events; at the checkpoint it had {manifest.events}"
                    )
                for data, num_bytes in manifest.files.items():
                    self._data(data, num_bytes)
                return Newest(manifest, tuple(notices))
            except Damaged as error:
                notices.append(f"checkpoint {name} is damaged ({error}); the one before it is used")
        if notices:
            raise ConfigError(
                f"of {len(notices)} checkpoints none can be used; the newest: {notices[0].partition('; the one')[0]}"
            )
        return Newest(None)

    def _intact(self) -> Iterator[Manifest]:
        """Readable manifests of this run, newest first."""
        for name in folder.newest_first(self._sizes):
            with suppress(Damaged):  # it is removed with the unnamed files
                yield self._manifest(name)

    def _manifest(self, name: str) -> Manifest:
        """Read a manifest. Raises ``Damaged``, and ``ConfigError`` for another format."""
        try:
            data = self._files.read(name, most=folder.MOST_BYTES)
        except OSError as error:
            raise Damaged(f"it cannot be read: {error}") from error
        return folder.decode_manifest(data, name=name, run=self._run)

    def _data(self, name: str, num_bytes: int) -> bytes:
        """Read and verify a file of data. Raises ``Damaged``."""
        try:
            data = self._files.read(name, most=num_bytes)
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error}") from error
        if len(data) != num_bytes or name != folder.data_name(data):
            raise Damaged(f"{name} has another size or hash than when it was written")
        return data

    def _clean(self) -> None:
        """Remove the oldest checkpoints, and the run's files that no checkpoint names."""
        self._manifests = self._manifests[-self._keep :]
        named = {manifest.name for manifest in self._manifests}
        for manifest in self._manifests:
            named.update(manifest.files)
        unnamed = [name for name in self._sizes if name not in named]
        for name in sorted(unnamed, key=folder.is_data):  # manifests before the files that they name
            if folder.is_manifest(name) or self._is_ours(name):
                self._files.remove(name)
            del self._sizes[name]
        self._of_paths = {path: name for path, name in self._of_paths.items() if name in named}
        self._written &= named

    def _is_ours(self, name: str) -> bool:
        """Whether a file of data was written by this run: it is recorded, or the file's name is its hash."""
        if name in self._written:
            return True
        try:
            self._data(name, self._sizes[name])
        except Damaged:
            return False
        return True
