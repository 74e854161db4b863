"""The place of a run's checkpoints: its marker says whose it is. Nothing is written to a place that is not this run's own."""

from collections.abc import Mapping
from contextlib import suppress

from . import manifest, marker
from .checkpoint_files import Files
from .errors import ConfigError, Damaged, RunError


class Place:
    """Where the checkpoints of ``run`` are."""

    def __init__(self, files: Files, *, run: str) -> None:
        """Nothing is read yet."""
        self._files, self._run = files, run
        self._subject = f"checkpoint.to is {files.place!r}, which"

    def claim(self, *, resumes: bool) -> None:
        """Make the place this run's own: an empty one, or, where it ``resumes``, its own. Raises ``ConfigError``."""
        try:
            names = self._files.names()
            found = self._marker(names)
            if names and not (found is not None and found.run == self._run):
                self._check_free(found, names)
            if not resumes and any(map(manifest.is_manifest, names)):
                raise ConfigError(f"{self._subject} holds checkpoints already; resume their run, or name a new place")
            if found is None or found.run != self._run:
                self._files.remove(marker.NAME)  # of a run that has written nothing
                self._files.create(marker.NAME, marker.encode(marker.new_marker("checkpoints", run=self._run)))
        except OSError as error:
            raise ConfigError(f"{self._subject} cannot be used: {error.strerror or error}") from error

    def release(self) -> None:
        """Give up what ``claim`` has made this run's own, where nothing was written to it."""
        if set(self._files.names()) == {marker.NAME}:
            self._files.remove(marker.NAME)
            self._files.remove_place()

    def enter(self) -> dict[str, int]:
        """The bytes of all files of checkpoints that are there; what was broken off is removed. Raises ``RunError``."""
        names = self._files.names()
        found = self._marker(names)
        if found is None or found.run != self._run:
            raise RunError(f"{self._subject} is no longer this run's own", stage="checkpoint")
        self._files.partial = found.partial
        for name in names:
            if name.endswith(found.partial):
                self._files.remove(name)
        ours = {name for name in names if manifest.is_manifest(name) or manifest.is_data(name)}
        return {name: size for name, size in names.items() if name in ours and size >= 0}

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
