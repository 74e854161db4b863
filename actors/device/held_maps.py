"""The index maps that a device has received."""

from collections import OrderedDict
from collections.abc import Sequence

from ...comms.codec import Array
from ...comms.errors import OutOfSync
from ...comms.packet import PacketKind, claimed_kind
from ...learning.parts.part import Part
from ...learning.workload import Workload
from ..messages.index_map import MAX_MAPS, open_map


class HeldMaps:
    """Adds received maps to the workload, in which parts are compiled."""

    def __init__(self, workload: Workload) -> None:
        """No map."""
        self._workload = workload
        self._names: OrderedDict[str, None] = OrderedDict()  # the most recently used last

    def take(self, part: Part, packets: Sequence[Array]) -> list[Array]:
        """Keep the map among the packets of a plan; returns the other packets.

        Raises a ``PacketError`` for a packet that is not the map that ``part`` names, and ``OutOfSync`` if the map is missing.
        """
        is_map = [claimed_kind(packet) == PacketKind.INDEX_MAP for packet in packets]
        for packet in (packet for packet, found in zip(packets, is_map, strict=True) if found):
            self._workload.add_map(open_map(packet, part.index_map or "0", self._workload.family(part.model).groups))
            self._names[part.index_map] = None
        if part.index_map:
            if part.index_map not in self._names:
                raise OutOfSync(f"the device does not have the index map {part.index_map}")
            self._names.move_to_end(part.index_map)
            if len(self._names) > MAX_MAPS:
                self._workload.drop_map(self._names.popitem(last=False)[0])
        return [packet for packet, found in zip(packets, is_map, strict=True) if not found]
