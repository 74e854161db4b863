"""Takes checkpoints of an engine, and puts them back: its state, the best weights so far, and what hosts have buffered.

Lives where the engine lives. What a host has buffered was sent once and never changes, so it is fetched and written once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..actors.replay_saved import SavedViews
from ..actors.replay_upload import ViewKey, joined_bytes
from ..comms.channel import Stored
from ..learning.store import alike
from ..policies.type_check import mismatch
from .checkpoint_files import open_files
from .checkpoints import Checkpoints
from .config import CheckpointSettings
from .engine import Engine
from .errors import Damaged, UnfitCheckpoint
from .manifest import Manifest

_SAVED = {
    "engine": dict[str, Any],
    "best": dict[str, Tensor] | None,
    "hosts": list[tuple[SavedViews | None, dict[ViewKey, Stored]]],
}


@dataclass(frozen=True)
class SavePlan:
    """Where checkpoints of a run go and when; and, of one that is resumed, the one that it goes on from, and what to tell.

    ``run``: names what must be equal in all runs that share a checkpoint.
    """

    place: str
    settings: CheckpointSettings
    run: str
    manifest: Manifest | None = None
    notices: tuple[str, ...] = ()


class Saver:
    """One engine's checkpoints."""

    def __init__(self, engine: Engine, plan: SavePlan, *, num_hosts: int) -> None:
        """Raises ``ValueError`` for a place that cannot be used."""
        self._engine, self._plan, self._num_hosts = engine, plan, num_hosts
        self._checkpoints = open_checkpoints(plan, channel=engine.channel)
        self._bodies: list[dict[ViewKey, Stored]] = [{} for _ in range(num_hosts)]

    def start(self) -> dict[str, Tensor] | None:
        """Put back the checkpoint that the plan names; the best weights.

        Raises ``ValueError`` for other data, and ``UnfitCheckpoint`` for one that is not of this run, or not what was written;
        the engine is of no use then.
        """
        manifest = self._plan.manifest
        best: dict[str, Tensor] | None = None
        if manifest is not None:
            try:
                saved = self._checkpoints.read(manifest)
                self.check(saved)
                best = self._restore(saved)
            except Damaged as error:
                raise UnfitCheckpoint(manifest.version, str(error)) from error
        self._checkpoints.start(manifest)
        return best

    def due(self, version: int) -> bool:
        """Whether a checkpoint of this version is to be written now."""
        return self._checkpoints.due(version)

    def save(self, version: int, *, events: int, best: Mapping[str, Tensor] | None) -> None:
        """Write a checkpoint; raises ``RunError`` where that fails."""
        self._checkpoints.begin()
        hosts = [self._save_host(number) for number in range(self._num_hosts)]
        value = {"engine": self._engine.saved(), "best": best, "hosts": hosts}
        self._checkpoints.write(value, version=version, events=events)

    def check(self, saved: Any) -> None:
        """Raise ``Damaged`` for what is no checkpoint of this engine, and ``ValueError`` for one on other data."""
        if found := mismatch(saved, _SAVED, into_structs=False):
            raise Damaged(f"{found[0]} {found[1]}")
        best: dict[str, Tensor] | None = saved["best"]
        model = self._engine.weights()
        if best is not None and not (list(best) == list(model) and all(alike(best[n], model[n]) for n in model)):
            raise Damaged("the best weights are those of another model")
        if len(saved["hosts"]) != self._num_hosts:
            raise Damaged(f"it has {len(saved['hosts'])} hosts; the fleet has {self._num_hosts}")
        for number, (views, bodies) in enumerate(saved["hosts"]):
            if {key for key, _ in views.records} != set(bodies) if views is not None else bodies:
                raise Damaged(f"the views of host {number} are not those whose packets it names")
        self._engine.check(saved["engine"])

    def _restore(self, saved: Any) -> dict[str, Tensor] | None:
        """Put what was checked in its places; the best weights. Raises ``Damaged``."""
        for number, (views, bodies) in enumerate(saved["hosts"]):
            self._restore_host(number, views, bodies)
        self._engine.restore(saved["engine"])  # last: it begins again with what was in flight
        best: dict[str, Tensor] | None = saved["best"]
        return best

    def _save_host(self, number: int) -> tuple[SavedViews | None, dict[ViewKey, Stored]]:
        """What a host has buffered; bodies that no checkpoint has had yet are written now."""
        known = self._bodies[number]
        views: SavedViews | None = self._engine.pool.call_host(number, "saved", set(known))
        if views is None:
            self._bodies[number] = {}
            return None, {}
        for key, body in views.bodies.items():
            known[key] = self._checkpoints.store(body.tobytes())
        there = {key for key, _ in views.records}
        self._bodies[number] = {key: stored for key, stored in known.items() if key in there}
        views.bodies.clear()
        return views, self._bodies[number]

    def _restore_host(self, number: int, views: SavedViews | None, bodies: Mapping[ViewKey, Stored]) -> None:
        """Fill a host's buffer, one view at a time. Raises ``Damaged``."""
        if views is None or not views.records:
            return
        records = dict(views.records)
        self._bodies[number] = dict(bodies)
        self._engine.pool.call_host(number, "restore", views)
        for disk, keys in ((False, views.memory), (True, views.disk)):
            for key in keys:
                body = np.frombuffer(bodies[key].read(), np.uint8)
                if body.nbytes != joined_bytes(records[key].lengths):
                    raise Damaged(f"the packets of {key} are not as long as it says")
                self._engine.pool.call_host(number, "restore_body", key, body, disk)


def open_checkpoints(plan: SavePlan, *, channel: Any) -> Checkpoints:
    """The checkpoints of a plan's place. Raises ``ValueError``."""
    return Checkpoints(open_files(plan.place), channel=channel, run=plan.run, settings=plan.settings)
