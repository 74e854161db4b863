"""A replay buffer that a checkpoint can hold: which views, where they are, and in which order they were used.

A view's packets never change, so whoever saves them says which he has already, and is given the others.
"""

from collections import OrderedDict
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

from ..comms.codecs import Array
from ..learning.spec import CountOrZero
from .replay import ReplayBuffer, ViewGone, ViewRecord
from .replay_upload import ViewKey


@dataclass(frozen=True)
class SavedViews:
    """What a checkpoint must hold of a buffer; uploads under way begin again with their plans.

    ``records``: in the order of their commits. ``memory``, ``disk``: which views are there, used longest ago first.
    ``bodies``: the packets of those that whoever saves does not have yet. ``evicted``, ``damaged``: as in the buffer.
    """

    records: tuple[tuple[ViewKey, ViewRecord], ...]
    memory: tuple[ViewKey, ...]
    disk: tuple[ViewKey, ...]
    bodies: dict[ViewKey, Array]
    evicted: CountOrZero
    damaged: CountOrZero


class LastingReplayBuffer(ReplayBuffer):
    """Saves and restores a replay buffer, to the order in which it evicts."""

    def saved(self, known: Collection[ViewKey]) -> SavedViews:
        """All but the packets of ``known`` views. A file that cannot be read drops its view, as it does when it is used."""
        bodies = {key: body for key, body in self._memory.items() if key not in known}
        for key in self._spill.keys():  # noqa: SIM118 (a tuple of them: reading may drop one)
            if key not in known:
                with suppress(ViewGone):
                    bodies[key] = self._read_file(key, uses=False)
        return SavedViews(
            records=tuple(self._records.items()),
            memory=tuple(self._memory),
            disk=self._spill.keys(),
            bodies=bodies,
            evicted=self.evicted,
            damaged=self.damaged,
        )

    def restore(self, saved: SavedViews) -> None:
        """Begin with what was saved. The packets come by ``restore_body``, in the order of ``memory`` and of ``disk``."""
        self.close()
        for key, record in saved.records:
            self._records[key] = record
            self._streams.setdefault(key.stream, OrderedDict())[key] = None
        self.evicted, self.damaged = saved.evicted, saved.damaged

    def restore_body(self, key: ViewKey, body: Array, *, disk: bool) -> None:
        """Put a view's packets where they were."""
        if not disk:
            self._keep(key, body)
            return
        try:
            self._spill.write(key, body)
        except OSError as error:
            self._lose(key, f"could not be written to disk ({error})")
