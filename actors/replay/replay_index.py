"""The index of views. The server alone decides which views exist, so failures of hosts and their number change nothing.

Wu et al., "EcoFed: Efficient Communication for DNN Partitioning-based Federated Learning", IEEE TPDS 35(3), 2024,
arXiv 2304.05495. A *view* is one complete upload of one device; its partition host has the packets. If the host loses
them (it died, a file is damaged), they are uploaded again: the index holds the plan of each upload, and a device that repeats
it sends the same packets, since the trunk never changes.

    a complete upload ── a view ──┬── replaced by a newer view of its device
                                  ├── evicted as the least recently used
                                  └── expired after ``lifetime`` versions
                                        └── dropped at its host, once no replay of it is in flight

Departures: the paper's buffer is unbounded, and drops a device's last upload when the next one begins. Here an upload counts
once it is complete, and bytes in memory and on disk have budgets.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...comms.codec import Array, NumBytes
from ...learning.spec import CountOrZero
from ...policies.plan import Plan
from ..messages.host_messages import ReplaySettings
from ..plan_listener import PlanListener, PlanResult
from .upload import ViewKey, view_key
from .view_tiers import Tiers, sizes_of


@dataclass(frozen=True)
class IndexedView:
    """A view. ``version``: of the model at its upload. ``lengths``: [packet] bytes. ``upload``: the plan that uploaded it."""

    version: CountOrZero
    lengths: Array
    upload: Plan

    @property
    def host(self) -> int:
        """Number of the host with its packets."""
        assert self.upload.split is not None
        return self.upload.split.host


@dataclass(frozen=True)
class Settlement:
    """What a host does at the end of a plan. ``keep``: whether the plan's upload becomes a view. ``drop``: views to drop."""

    host: int
    plan_id: int
    keep: bool
    drop: tuple[ViewKey, ...]


class ReplayIndex(PlanListener):
    """The views of all hosts, within a budget for each host.

    ``evicted``: number of views evicted for the budgets. A notice reports the first, and every doubling of their number.
    """

    SAVED: ClassVar[dict[str, Any]] = {  # by a checkpoint
        "_views": dict[ViewKey, IndexedView],
        "_in_use": dict[ViewKey, IndexedView],
        "_to_drop": list[list[ViewKey]],
        "evicted": NumBytes,
        "_notices": list[str],
    }
    SAVED_AS: ClassVar = SAVED | {"memory": list[ViewKey], "disk": list[ViewKey]}  # least recently used first
    NOT_SAVED = ("_settings", "_tiers", "_streams", "_settle")

    def __init__(
        self,
        settings: ReplaySettings,
        *,
        num_hosts: int,
        settle: Callable[[Settlement], None] = lambda settlement: None,
    ) -> None:
        """Empty. ``settle``: sends a settlement to its host."""
        self._settings, self._settle = settings, settle
        self._tiers = [
            Tiers(memory_budget=settings.memory_bytes, disk_budget=settings.disk_bytes) for _ in range(num_hosts)
        ]
        self._views: dict[ViewKey, IndexedView] = {}
        self._streams: dict[tuple[str, str, str, int], OrderedDict[ViewKey, None]] = {}  # oldest first
        self._in_use: dict[ViewKey, IndexedView] = {}  # views that plans in flight replay
        self._to_drop: list[list[ViewKey]] = [[] for _ in range(num_hosts)]
        self.evicted = 0
        self._notices: list[str] = []

    def __len__(self) -> int:
        """Number of views."""
        return len(self._views)

    def sent(self, plan: Plan) -> None:
        """Mark the view that a plan replays as used; its packets stay until the plan has ended."""
        if (key := _replayed(plan)) is not None and key in self._views:
            view = self._views[key]
            self._tiers[view.host].use(key)
            self._in_use[key] = view

    def task_fields(self, plan: Plan) -> Mapping[str, Any]:
        """``upload``: the plan that uploaded the view to be replayed, in case it must be uploaded again."""
        key = _replayed(plan)
        return {"upload": self._in_use[key].upload} if key in self._in_use else {}

    def arrived(self, result: PlanResult) -> None:
        """A complete upload becomes a view; its host keeps it, and drops the views that the index has dropped since."""
        if (settlement := self._settlement(result)) is not None:
            self._settle(settlement)

    def view_fields(self, version: int) -> Mapping[str, Any]:
        """``replay``: see ``listed``."""
        return {"replay": self.listed(version)}

    def _settlement(self, result: PlanResult) -> Settlement | None:
        """The settlement of a plan; None if it uses no views."""
        plan, split = result.plan, result.plan.split
        if split is None or split.method.trains_front:
            return None
        self._expire(result.version)
        if (key := _replayed(plan)) is not None:
            if self._in_use.pop(key, None) is not None and key not in self._views:
                self._to_drop[split.host].append(key)
        elif result.sound:
            key = view_key(plan, str(plan.id))
            self._commit(key, IndexedView(plan.version, np.array(result.stream_bytes, np.int64), plan))
        drop, self._to_drop[split.host] = tuple(self._to_drop[split.host]), []
        return Settlement(split.host, plan.id, keep=key in self._views and not split.replays, drop=drop)

    def listed(self, version: int) -> list[tuple[str, str, int, str, int, int]]:
        """(trunk, cut, device, view, age in versions, bytes) of every view, sorted by host first."""
        lifetime = self._settings.lifetime
        rows = sorted(
            (view.host, key.trunk, key.cut, key.device, key.view, version - view.version, sizes_of(view.lengths).memory)
            for key, view in self._views.items()
            if lifetime is None or version - view.version <= lifetime
        )
        return [row[1:] for row in rows]

    def erase(self, device: int) -> int:
        """Drop all views of a device; returns their number. A host drops the packets when its next plan ends."""
        keys = [key for key in self._views if key.device == device]
        for key in keys:
            self._drop(key)
        return len(keys)

    def placed(self) -> Iterator[tuple[ViewKey, IndexedView, bool]]:
        """(key, view, whether it is on disk) of all views; for each host those on disk first, least recently used first."""
        for tiers in self._tiers:
            for keys, disk in ((tiers.disk, True), (tiers.memory, False)):
                yield from ((key, self._views[key], disk) for key in keys)

    def notices(self) -> list[str]:
        """Notices about evictions, since the last call."""
        notices, self._notices = self._notices, []
        return notices

    def saved(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        values = {name: getattr(self, name) for name in self.SAVED}
        memory = [key for key, _, disk in self.placed() if not disk]
        return values | {"memory": memory, "disk": [key for key, _, disk in self.placed() if disk]}

    def restore(self, saved: dict[str, Any]) -> None:
        """Restore a saved state."""
        for name in self.SAVED:
            setattr(self, name, saved[name])
        for key in self._views:
            self._streams.setdefault(key.stream, OrderedDict())[key] = None
        for keys, disk in ((saved["disk"], True), (saved["memory"], False)):
            for key in keys:
                view = self._views[key]
                self._tiers[view.host].add(key, sizes_of(view.lengths), disk=disk)

    def _commit(self, key: ViewKey, view: IndexedView) -> None:
        """Add a view; beyond ``views_per_device`` it replaces the oldest of its stream."""
        siblings = self._streams.get(key.stream, ())
        while len(siblings) >= self._settings.views_per_device:
            self._drop(next(iter(siblings)))
        tiers, sizes = self._tiers[view.host], sizes_of(view.lengths)
        for action, other in tiers.make_room(sizes.memory):
            if action == "evict":
                self._evict(other)
        tiers.add(key, sizes)
        self._views[key] = view
        self._streams.setdefault(key.stream, OrderedDict())[key] = None

    def _expire(self, version: int) -> None:
        """Drop the views that are older than ``lifetime`` versions."""
        if (lifetime := self._settings.lifetime) is not None:
            for key in [key for key, view in self._views.items() if version - view.version > lifetime]:
                self._drop(key)

    def _evict(self, key: ViewKey) -> None:
        """Drop a view for a budget."""
        self._drop(key)
        self.evicted += 1
        if self.evicted.bit_count() == 1:
            self._notices.append(
                f"{key} was evicted from the replay buffer (number {self.evicted} beyond replay.memory_bytes, "
                f"{self._settings.memory_bytes}, and replay.disk_bytes, {self._settings.disk_bytes})"
            )

    def _drop(self, key: ViewKey) -> None:
        """Drop a view; its host drops the packets with the next settlement, or after the replay that needs them."""
        view = self._views.pop(key)
        self._tiers[view.host].remove(key)
        stream = self._streams[key.stream]
        del stream[key]
        if not stream:
            del self._streams[key.stream]
        if key not in self._in_use:
            self._to_drop[view.host].append(key)


def _replayed(plan: Plan) -> ViewKey | None:
    """The key of the view that a plan replays; None if it replays none."""
    return view_key(plan, plan.split.view) if plan.split is not None and plan.split.view is not None else None
