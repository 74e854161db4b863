"""When a checkpoint is due: after so many versions or seconds, but never so often that writing them takes much of the time."""

import time
from collections.abc import Callable

from ..configuration.config import CheckpointSettings


class CheckpointSchedule:
    """Of one run's checkpoints, in this machine's seconds."""

    def __init__(self, settings: CheckpointSettings, *, now: Callable[[], float] = time.monotonic) -> None:
        """At the start of the run."""
        self._settings, self._now = settings, now
        self._last_version, self._last_s = 0, now()
        self._began_s = self._took_s = 0.0

    def start(self, version: int) -> None:
        """The run goes on from a checkpoint of that version, or begins at 0."""
        self._last_version = version

    def due(self, version: int) -> bool:
        """Whether a checkpoint of this version is to be written now."""
        settings, since_s = self._settings, self._now() - self._last_s
        by_version = settings.every is not None and version - self._last_version >= settings.every
        by_seconds = settings.seconds is not None and since_s >= settings.seconds
        if settings.share is not None and since_s * settings.share < self._took_s * (1 - settings.share):
            return False
        return by_version or by_seconds

    def begin(self) -> None:
        """One is being written."""
        self._began_s = self._now()

    def end(self, version: int) -> None:
        """It is there."""
        self._last_version, self._last_s = version, self._now()
        self._took_s = self._last_s - self._began_s
