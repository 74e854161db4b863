"""The dense models of the newest version that a worker has opened: a packet that many devices are sent is opened once.

A cache: any worker runs any device with the same bits, whatever is in it.
"""

from typing import NamedTuple

from ...comms.codec import Array, Arrays, ArraySpec, CodecSpec
from ...learning.parts.submodel import SubModel
from ...policies.plan import Plan
from ..messages.dense_packets import open_weights
from ..messages.messages import array_specs

_MOST = 8  # parts of a version, such as widths


class OpenedWeights:
    """Opened models of one version.

    A packet is recognised by the place of its bytes in memory, which cannot be another's as long as it is held here; only
    read-only packets, as channels yield them, are kept.
    """

    def __init__(self) -> None:
        """Nothing is opened."""
        self._version: int | None = None
        self._opened: list[_Opened] = []  # the oldest first

    def open(self, packet: Array, plan: Plan, submodel: SubModel) -> Arrays:
        """The tensors of a packet, read-only, as ``open_weights`` yields them; raises a ``PacketError`` for an invalid one."""
        if packet.flags.writeable:
            return open_weights(packet, plan, submodel)
        if plan.version != self._version:
            self._version, self._opened = plan.version, []
        about = _place(packet), plan.codec_down, array_specs(submodel.down)
        for one in self._opened:
            if one.about == about:
                return one.arrays
        arrays = open_weights(packet, plan, submodel)
        for array in arrays.values():
            array.flags.writeable = False
        self._opened = [*self._opened, _Opened(packet, about, arrays)][-_MOST:]
        return arrays


class _Opened(NamedTuple):
    """An opened packet, and what its tensors depend on beside its bytes and the version."""

    packet: Array
    about: tuple[tuple[int, int], tuple[CodecSpec, ...], tuple[ArraySpec, ...]]
    arrays: Arrays


def _place(packet: Array) -> tuple[int, int]:
    """Address and length of a packet."""
    return packet.__array_interface__["data"][0], packet.nbytes
