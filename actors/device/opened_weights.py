"""The dense model that a worker opened last: a packet that many devices are sent is opened once.

A cache: any worker runs any device with the same bits, whatever is in it.
"""

from typing import NamedTuple

from ...comms.codec import Array, Arrays, ArraySpec, CodecSpec
from ...learning.parts.submodel import SubModel
from ...policies.plan import Plan
from ..messages.dense_packets import open_weights
from ..messages.messages import array_specs


class OpenedWeights:
    """The packet that was opened last, and its tensors.

    The packet is recognised by the place of its bytes in memory, which cannot be another's as long as it is held here; only
    read-only packets, as channels yield them, are kept. One packet alone is, since a full object store cannot evict it: no
    more than a worker needs while it carries out a plan.
    """

    def __init__(self) -> None:
        """Nothing is opened."""
        self._last: _Opened | None = None

    def open(self, packet: Array, plan: Plan, submodel: SubModel) -> Arrays:
        """The tensors of a packet, read-only, as ``open_weights`` yields them; raises a ``PacketError`` for an invalid one."""
        if packet.flags.writeable:
            return open_weights(packet, plan, submodel)
        about = _place(packet), plan.version, plan.codec_down, array_specs(submodel.down)
        if self._last is None or self._last.about != about:
            self._last = None  # the packet before is no longer held while this one is opened
            arrays = open_weights(packet, plan, submodel)
            for array in arrays.values():
                array.flags.writeable = False
            self._last = _Opened(packet, about, arrays)
        return self._last.arrays


class _Opened(NamedTuple):
    """An opened packet, and what its tensors depend on beside its bytes."""

    packet: Array
    about: tuple[tuple[int, int], int, tuple[CodecSpec, ...], tuple[ArraySpec, ...]]
    arrays: Arrays


def _place(packet: Array) -> tuple[int, int]:
    """Address and length of a packet."""
    return packet.__array_interface__["data"][0], packet.nbytes
