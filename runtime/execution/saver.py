"""Writes and restores checkpoints of an engine: its state, the best weights so far, and the packets of buffered views.

Runs in the engine's process. The packets of a view never change, so they are fetched from their host and written once. A
checkpoint may lack views; their devices upload them again when they are needed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ...actors.replay.upload import ViewKey, joined_bytes
from ...comms.channel import StoredBytes
from ...learning.store import same_shape_and_type
from ...policies.checks.type_check import mismatch
from ..engine.engine import Engine
from ..errors import Damaged, UnfitCheckpoint
from .save_plan import SavePlan, open_checkpoints

_SAVED = {
    "engine": dict[str, Any],
    "best": dict[str, Tensor] | None,
    "views": dict[ViewKey, StoredBytes],
}


class Saver:
    """The checkpoints of one engine."""

    def __init__(self, engine: Engine, plan: SavePlan) -> None:
        """Raises ``ValueError`` if the place of the plan cannot be used."""
        self._engine, self._plan = engine, plan
        self._checkpoints = open_checkpoints(plan, channel=engine.channel)
        self._views: dict[ViewKey, StoredBytes] = {}  # views whose packets were written

    def start(self) -> dict[str, Tensor] | None:
        """Restore the checkpoint that the plan names, if any; the best weights.

        Raises ``ValueError`` if the run had other data, and ``UnfitCheckpoint`` if the checkpoint is not of this run or is
        damaged; the engine cannot be used then.
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
        """Whether a checkpoint of this version should be written now."""
        return self._checkpoints.due(version)

    def save(self, version: int, *, events: int, best: Mapping[str, Tensor] | None) -> None:
        """Write a checkpoint. Raises ``RunError`` if that fails."""
        self._checkpoints.begin()
        self._save_views()
        value = {"engine": self._engine.saved(), "best": best, "views": self._views}
        self._checkpoints.write(value, version=version, events=events)

    def check(self, saved: Any) -> None:
        """Raise ``Damaged`` if this is no checkpoint of the engine, and ``ValueError`` if the run had other data."""
        if found := mismatch(saved, _SAVED, into_structs=False):
            raise Damaged(f"{found[0]} {found[1]}")
        best: dict[str, Tensor] | None = saved["best"]
        model = self._engine.weights()
        if best is not None and not (
            list(best) == list(model) and all(same_shape_and_type(best[n], model[n]) for n in model)
        ):
            raise Damaged("the best weights are those of another model")
        self._engine.check(saved["engine"])

    def _restore(self, saved: Any) -> dict[str, Tensor] | None:
        """Restore a checkpoint that was checked; the best weights. Raises ``Damaged``."""
        self._engine.restore(saved["engine"])
        self._restore_views(saved["views"])
        self._engine.resume()
        best: dict[str, Tensor] | None = saved["best"]
        return best

    def _save_views(self) -> None:
        """Write the packets of views that are in no checkpoint yet, but for those that a host lacks or is too busy to send."""
        saved, missing = dict[ViewKey, StoredBytes](), dict[int, list[ViewKey]]()
        for key, view, _ in self._engine.replay.placed():
            if key in self._views:
                saved[key] = self._views[key]
            else:
                missing.setdefault(view.host, []).append(key)
        for host, keys in missing.items():
            for key, body in self._engine.pool.bodies(host, keys).items():
                saved[key] = self._checkpoints.store(body.tobytes())
        self._views = saved

    def _restore_views(self, stored: Mapping[ViewKey, StoredBytes]) -> None:
        """Send the hosts the packets of their views, one view at a time. Raises ``Damaged``."""
        for key, view, _ in self._engine.replay.placed():
            if key not in stored:
                continue
            self._views[key] = stored[key]
            body = np.frombuffer(stored[key].read(), np.uint8)
            if body.nbytes != joined_bytes(view.lengths):
                raise Damaged(f"the packets of {key} are not as long as it says")
            self._engine.pool.put(view.host, key, view.lengths, body)
