"""Index maps: which channels narrow parts hold where the model's weights decide it, and which devices have which maps.

Rules that rank channels (``l1``, ``batchnorm``) rank them by the server's model when a plan first names their ``turn``; all
parts of that turn, of any width, use the same ranking, so that narrower parts are contained in wider ones. A map is a packet of
its own, named by the hash of its content. It is sent to a device once, counted in the ledger as ``map``, and named by its hash
from then on. Where the channels follow from the plan itself (``prefix``, ``rolling``) there is no map.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from msgspec.structs import replace
from torch import Tensor

from ...comms.channel import Channel
from ...comms.codec import Array
from ...comms.links.state import LinkState
from ...learning.architecture import Kept
from ...learning.parts.channels import map_hash, score_channels
from ...learning.parts.part import Part
from ...learning.workload import Workload
from ...policies.plan import Plan
from ...policies.report import Report
from ..messages.index_map import MAX_MAPS, packet_bytes, seal_map
from ..messages.messages import Dispatch, Message
from ..plan_listener import PlanListener

_RANKED = ("l1", "batchnorm")
_MAX_RANKINGS = 64
_MAX_HELD = 8  # maps of one device that are remembered; an older one is sent to it again
_Ranking = tuple[str, str, int]  # family, rule and turn


class IndexMaps(PlanListener):
    """Chooses channels, names the choice in plans, and sends each map to a device once."""

    SAVED: ClassVar = {  # by a checkpoint
        "_rankings": OrderedDict[_Ranking, Array],
        "_maps": OrderedDict[str, Array],
        "_messages": dict[str, Message],
        "_held": dict[int, tuple[str, ...]],
        "_sent": dict[int, str],
    }
    SAVED_AS: ClassVar = SAVED
    NOT_SAVED = ("_channel", "_workload", "_tensors", "_expected", "_names")

    def __init__(self, channel: Channel, workload: Workload, tensors: Mapping[str, Tensor]) -> None:
        """``tensors``: the server's, of the current version; they change in place."""
        self._channel, self._workload, self._tensors = channel, workload, tensors
        self._rankings: OrderedDict[_Ranking, Array] = OrderedDict()  # [channel] score; the most recently used last
        self._maps: OrderedDict[str, Array] = OrderedDict()  # the most recently used last
        self._messages: dict[str, Message] = {}
        self._held: dict[int, tuple[str, ...]] = {}  # by device, the maps that it has acknowledged, the newest last
        self._sent: dict[int, str] = {}  # by plan in flight, its map
        self._expected: dict[_Ranking, Array] = {}  # rankings of this version that no plan has used yet
        self._names: dict[tuple[_Ranking, float, int], str] = {}  # of the maps that parts would name in this version

    def channels(self, part: Part) -> Kept:
        """The channels that a plan with this narrow part would be sent now. Nothing that decides later plans is changed."""
        if part.index_map or not _is_ranked(part):
            return self._workload.channels(part)
        key = part.model, part.channels, part.turn
        if key in self._rankings:
            scores = self._rankings[key]
        else:
            if key not in self._expected:
                self._expected[key] = self._scores(part)
            scores = self._expected[key]
        return self._workload.family(part.model).choose(part, scores=scores)

    def num_bytes(self, part: Part, device: int) -> int:
        """Bytes of the map that a plan with this part would take to a device now; 0 if it needs none, or has it."""
        if not _is_ranked(part) or self._name(part) in self._held.get(device, ()):
            return 0
        return packet_bytes(self._workload.family(part.model).groups)

    def _name(self, part: Part) -> str:
        """The name of the map that a plan with this part would have now."""
        key = (part.model, part.channels, part.turn), part.width, part.min_channels
        if key not in self._names:
            self._names[key] = map_hash(self.channels(part))
        return self._names[key]

    def version_closed(self) -> None:
        """The model has changed: rankings that no plan has used are out of date."""
        self._expected.clear()
        self._names.clear()

    def _scores(self, part: Part) -> Array:
        """The ranking by the model of now, [channel]."""
        groups = self._workload.family(part.model).groups
        prefix = f"{part.model}:" if part.model else ""
        tensors = {name: self._tensors[prefix + name] for name in groups.owners}
        return score_channels(groups, tensors, rule=part.channels)

    def named(self, plan: Plan) -> Plan:
        """The plan with the index map that its rule chooses now; unchanged where there is none."""
        part = plan.part
        if not _is_ranked(part):
            return plan
        self._use_ranking(part)
        name = self._name(part)
        if name not in self._maps:
            kept = self.channels(part)
            self._workload.add_map(kept)
            packet = seal_map(kept, name)
            self._maps[name] = kept
            self._messages[name] = Message(self._channel.put(packet), packet.nbytes, "map")
        self._maps.move_to_end(name)
        self._drop_maps(keep={name, *self._sent.values()})
        return replace(plan, part=replace(part, index_map=name))

    def _use_ranking(self, part: Part) -> None:
        """The ranking of a part is fixed from now on."""
        key = part.model, part.channels, part.turn
        if key not in self._rankings:
            found = self._expected.pop(key, None)
            self._rankings[key] = found if found is not None else self._scores(part)
        self._rankings.move_to_end(key)
        if len(self._rankings) > _MAX_RANKINGS:
            self._rankings.popitem(last=False)
            self._names.clear()

    def _drop_maps(self, *, keep: Collection[str]) -> None:
        """Drop the maps that were not used for longest, if there are too many, but those to ``keep``."""
        if len(self._maps) <= MAX_MAPS:
            return
        oldest = next((name for name in self._maps if name not in keep), None)
        if oldest is not None:
            del self._maps[oldest], self._messages[oldest]
            self._workload.drop_map(oldest)

    def attached(self, dispatch: Dispatch) -> Dispatch:
        """A dispatch with the packet of its map: among its messages, unless the device has it already."""
        name = dispatch.plan.part.index_map
        if not name:
            return dispatch
        self._sent[dispatch.plan.id] = name
        message = self._messages[name]
        if name in self._held.get(dispatch.plan.device, ()):
            return dataclasses.replace(dispatch, held=(message,))
        return dataclasses.replace(dispatch, messages=(message, *dispatch.messages))

    def to_evaluate(self, dispatch: Dispatch) -> Dispatch | None:
        """A dispatch that evaluates, with the map of its part, which the device has; None if the map was dropped here."""
        name = dispatch.plan.part.index_map
        if not name:
            return dispatch
        return dataclasses.replace(dispatch, held=(self._messages[name],)) if name in self._messages else None

    def ended(self, plan: Plan, report: Report, state: LinkState | None) -> None:
        """The device has the plan's map now; one that misses a map has none for certain."""
        name = self._sent.pop(plan.id, "")
        if report.out_of_sync:
            self._held.pop(plan.device, None)
        elif name:
            others = tuple(each for each in self._held.get(plan.device, ()) if each != name)
            self._held[plan.device] = (*others, name)[-_MAX_HELD:]

    def released(self, plan: Plan) -> None:
        """It is not known whether the device has the map."""
        self._sent.pop(plan.id, None)

    def device_reset(self, device: int) -> None:
        """A device that comes back has no map."""
        self._held.pop(device, None)

    def saved(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {name: getattr(self, name) for name in self.SAVED}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        for name in self.SAVED:
            setattr(self, name, saved[name])
        for kept in self._maps.values():
            self._workload.add_map(kept)
        self.version_closed()


def _is_ranked(part: Part) -> bool:
    """Whether the channels of a part depend on the model's weights."""
    return part.width < 1 and part.channels in _RANKED
