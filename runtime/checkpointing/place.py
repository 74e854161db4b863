"""The place of a run's checkpoints: its marker says whose it is. Nothing is written to a place that is not this run's own."""

from collections.abc import Mapping
from contextlib import suppress

from ..errors import ConfigError, Damaged, RunError
from ..storage import marker
from ..storage.files import Files
from . import manifest


class CheckpointFolder:
    """Where the checkpoints of ``run`` are. ``token``: of the marker that ``claim`` made or found; "" before."""

    def __init__(self, files: Files, *, run: str, token: str = "") -> None:
        """Nothing is read yet."""
        self._files, self._run, self.token = files, run, token
        self._subject = f"checkpoint.to is {files.place!r}, which"

    def claim(self, *, resumes: bool) -> None:
        """Make the place this run's own: an empty one, or, where it ``resumes``, its own. Raises ``ConfigError``.

        A place in which a run has written nothing counts as empty. The marker is then made anew, with another token, so that
        a run which is still there ends before it writes.
        """
        try:
            names = self._files.names()
            found = self._marker(names)
            ours = found is not None and found.run == self._run
            if names and not ours:
                self._check_free(found, names)
            if not resumes and any(map(manifest.is_manifest, names)):
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
        """Give up what ``claim`` has made this run's own, where nothing was written to it."""
        names = self._files.names()
        found = self._marker(names)
        if set(names) == {marker.NAME} and found is not None and found.token == self.token:
            self._files.remove(marker.NAME)
            self._files.remove_place()

    def enter(self) -> dict[str, int]:
        """The bytes of all files of checkpoints that are there; what was broken off is removed. Raises ``RunError``."""
        names = self._files.names()
        found = self.check(names)
        self._files.partial = found.partial
        self._remove_partial(found, names)
        ours = {name for name in names if manifest.is_manifest(name) or manifest.is_data(name)}
        return {name: size for name, size in names.items() if name in ours and size >= 0}

    def check(self, names: Mapping[str, int] | None = None) -> marker.Marker:
        """The marker. Raises ``RunError`` where it is another than ``claim`` left: the place is another run's by now."""
        found = self._marker(self._files.names() if names is None else names)
        if found is None or found.token != self.token:
            raise RunError(f"{self._subject} is no longer this run's own", stage="checkpoint")
        return found

    def _remove_partial(self, found: marker.Marker | None, names: Mapping[str, int]) -> None:
        """Remove the files whose writing was broken off: their names carry the marker's token."""
        for name in names:
            if found is not None and name.endswith(found.partial):
                self._files.remove(name)

    def _marker(self, names: Mapping[str, int]) -> marker.Marker | None:
        """The marker, where it is one of checkpoints."""
        if names.get(marker.NAME, -1) < 0:
            return None
        found = marker.decode(self._files.read(marker.NAME, most=marker.MOST_BYTES))
        if found is not None and found.format > marker.FORMAT:
            raise ConfigError(
                f"{self._subject} has format {found.format}, which is newer than the {marker.FORMAT} that this fedbonsai reads"
            )
        return found if found is not None and found.kind == "checkpoints" else None

    def _check_free(self, found: marker.Marker | None, names: Mapping[str, int]) -> None:
        """Raise ``ConfigError`` for a place that is not empty, and not this run's, with what is there."""
        if set(names) == {marker.NAME} and (found is not None or not names[marker.NAME]):
            return  # of a run that has written nothing
        if found is not None:
            raise ConfigError(
                f"{self._subject} holds those of another run; checkpoint.to must be a place of this run's own"
            )
        for name in manifest.newest_first(names):
            with suppress(Damaged):  # raises for one of another format
                manifest.decode(self._files.read(name, most=manifest.MOST_BYTES), name=name, run=self._run)
        listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ConfigError(
            f"{self._subject} is not empty, and holds no checkpoints of fedbonsai ({listed}); name a new folder"
        )
