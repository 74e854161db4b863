"""The frozen blocks that a device holds: those that it has received, and those of the initial model."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from ...comms.codec import Array
from ...comms.errors import MismatchedPacket
from ...comms.packet import PacketKind, claimed_kind, read_stamp
from ...learning.parts.part import Part
from ...learning.workload import Workload
from ..messages.block_packet import MAX_BLOCKS, open_block
from ..messages.trunk import Trunk


class HeldBlocks:
    """Received blocks by hash. Blocks of the initial model are never sent."""

    def __init__(self, workload: Workload) -> None:
        """No block was received."""
        self._workload, self._trunk = workload, Trunk(workload)
        self._held: OrderedDict[str, dict[str, Tensor]] = OrderedDict()  # the most recently used last

    def take(self, part: Part, packets: Sequence[Array]) -> list[Array]:
        """Keep the blocks among the packets of a plan; returns the other packets.

        Raises a ``PacketError`` for a block that ``part`` does not name.
        """
        others, named = [], {int(name, 16): (block, name) for block, name in part.cached}
        for packet in packets:
            if claimed_kind(packet) != PacketKind.BLOCK:
                others.append(packet)
                continue
            stamp = read_stamp(packet)
            if stamp.state_hash not in named:
                raise MismatchedPacket(f"a block with the hash {stamp.state_hash:016x}, which the plan does not name")
            block, name = named[stamp.state_hash]
            if name not in self._held:
                self._held[name] = open_block(packet, block, name, self._workload.spec)
        return others

    def tensors(self, part: Part) -> dict[str, Tensor]:
        """The tensors of the blocks in ``part.cached``; raises ``OutOfSync`` for a block that the device does not hold."""
        found: dict[str, Tensor] = {}
        initial = []
        for block, name in part.cached:
            if name in self._held:
                self._held.move_to_end(name)
                found |= self._held[name]
            else:
                initial.append((block, name))
        while len(self._held) > MAX_BLOCKS:
            self._held.popitem(last=False)
        return found | self._trunk.tensors(initial)
