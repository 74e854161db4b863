"""Index maps: which channels narrow parts hold where the model's weights decide it, and which devices have which maps.

Rules that rank channels (``l1``, ``batchnorm``) rank them by the server's model when a plan first names their ``turn``; all
parts of that turn, of any width, use the same ranking, so that narrower parts are contained in wider ones. A map is a packet of
its own, named by the hash of its content. It is sent to a device once, counted in the ledger as ``map``, and named by its hash
from then on. Where the channels follow from the plan itself (``prefix``, ``rolling``) there is no map.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

from msgspec.structs import replace
from torch import Tensor

from ...comms.channel import Channel
from ...comms.codec import Array
from ...comms.links.memory import LinkState
from ...learning.architecture import Kept
from ...learning.parts.channels import score_channels
from ...learning.parts.part import Part
from ...learning.workload import Workload
from ...policies.plan import Plan
from ...policies.report import Report
from ..messages.index_map import seal_map
from ..messages.messages import Dispatch, Message
from ..plan_listener import PlanListener

_RANKED = ("l1", "batchnorm")
_MAX_RANKINGS = 8
MAX_MAPS = 1024  # that server and devices keep


class IndexMaps(PlanListener):
    """Chooses channels, names the choice in plans, and sends each map to a device once."""

    SAVED: ClassVar = {  # by a checkpoint
        "_rankings": OrderedDict[tuple[str, str, int], Array],
        "_maps": OrderedDict[str, Array],
        "_messages": dict[str, Message],
        "_held": dict[int, set[str]],
        "_sent": dict[int, str],
    }
    SAVED_AS: ClassVar = SAVED
    NOT_SAVED = ("_channel", "_workload", "_tensors", "_expected")

    def __init__(self, channel: Channel, workload: Workload, tensors: Mapping[str, Tensor]) -> None:
        """``tensors``: the server's, of the current version; they change in place."""
        self._channel, self._workload, self._tensors = channel, workload, tensors
        self._rankings: OrderedDict[tuple[str, str, int], Array] = (
            OrderedDict()
        )  # by family, rule, turn: [channel] score
        self._maps: OrderedDict[str, Array] = OrderedDict()  # the most recently used last
        self._messages: dict[str, Message] = {}
        self._held: dict[int, set[str]] = {}  # by device, the maps that it has acknowledged
        self._sent: dict[int, str] = {}  # by plan in flight, its map
        self._expected: dict[tuple[str, str, int], Array] = {}  # rankings of this version that no plan has used yet

    def channels(self, part: Part) -> Kept:
        """The channels that a plan with this narrow part would be sent now. Nothing that decides later plans is changed."""
        if part.index_map or part.channels not in _RANKED:
            return self._workload.channels(part)
        key = part.model, part.channels, part.turn
        if key in self._rankings:
            scores = self._rankings[key]
        else:
            if key not in self._expected:
                self._expected[key] = self._scores(part)
            scores = self._expected[key]
        return self._workload.family(part.model).choose(part, scores=scores)

    def version_closed(self) -> None:
        """The model has changed: rankings that no plan has used are out of date."""
        self._expected.clear()

    def _scores(self, part: Part) -> Array:
        """The ranking by the model of now, [channel]."""
        groups = self._workload.family(part.model).groups
        prefix = f"{part.model}:" if part.model else ""
        tensors = {name: self._tensors[prefix + name] for name in groups.owners}
        return score_channels(groups, tensors, rule=part.channels)

    def named(self, plan: Plan) -> Plan:
        """The plan with the index map that its rule chooses now; unchanged where there is none."""
        part = plan.part
        if part.width == 1 or part.channels not in _RANKED:
            return plan
        key = part.model, part.channels, part.turn
        if key not in self._rankings:
            self._rankings[key] = self._scores(part)
            if len(self._rankings) > _MAX_RANKINGS:
                self._rankings.popitem(last=False)
        kept = self._workload.family(part.model).choose(part, scores=self._rankings[key])
        name = self._workload.add_map(kept)
        if name not in self._maps:
            packet = seal_map(kept, name)
            self._maps[name] = kept
            self._messages[name] = Message(self._channel.put(packet), packet.nbytes, "map")
        self._maps.move_to_end(name)
        if len(self._maps) > MAX_MAPS:
            oldest, _ = self._maps.popitem(last=False)
            del self._messages[oldest]
            self._workload.drop_map(oldest)
        return replace(plan, part=replace(part, index_map=name))

    def attached(self, dispatch: Dispatch) -> Dispatch:
        """A dispatch with the packet of its map: among its messages, unless the device has it already."""
        name = dispatch.plan.part.index_map
        if not name:
            return dispatch
        self._sent[dispatch.plan.id] = name
        message = self._messages[name]
        if name in self._held.get(dispatch.plan.device, ()):
            return dataclasses.replace(dispatch, held=(message.reference,))
        return dataclasses.replace(dispatch, messages=(message, *dispatch.messages))

    def to_evaluate(self, dispatch: Dispatch) -> Dispatch | None:
        """A dispatch that evaluates, with the map of its part, which the device has; None if the map was dropped here."""
        name = dispatch.plan.part.index_map
        if not name:
            return dispatch
        return dataclasses.replace(dispatch, held=(self._messages[name].reference,)) if name in self._messages else None

    def ended(self, plan: Plan, report: Report, state: LinkState | None) -> None:
        """The device has the plan's map now; one that misses a map has none for certain."""
        name = self._sent.pop(plan.id, "")
        if report.out_of_sync:
            self._held.pop(plan.device, None)
        elif name:
            self._held.setdefault(plan.device, set()).add(name)

    def released(self, plan: Plan) -> None:
        """It is not known whether the device has the map."""
        self._sent.pop(plan.id, None)

    def device_left(self, device: int) -> None:
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
