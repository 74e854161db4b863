"""One device's upload on its way into the replay buffer: packets by number, until all are there and become one array.

What a view counts for is the bytes of its packets, and fixed amounts for each packet and for the view: no less than what
Python and numpy need to keep track of them.
"""

import msgspec
import numpy as np

from ...comms.codec import Array
from ...policies.plan import Plan

VIEW_BYTES = 2048
PACKET_BYTES = 16  # its length, and what aligns it
_ALIGNMENT = 8  # a packet's arrays are aligned within it


class UploadFault(Exception):
    """What is wrong with an upload under way. One sentence."""


class ViewKey(msgspec.Struct, frozen=True, kw_only=True):
    """Which upload a view is: of which trunk (hash), index map (hash; "" means all channels), cut, device, and its own id."""

    trunk: str
    cut: str
    device: int
    view: str
    index_map: str = ""

    @property
    def stream(self) -> tuple[str, str, str, int]:
        """What views must share for a newer one to stand in for an older one."""
        return self.trunk, self.index_map, self.cut, self.device

    def __str__(self) -> str:
        """One line, for notices and errors."""
        channels = f", index map {self.index_map}" if self.index_map else ""
        return f"view {self.view!r} of device {self.device} (trunk {self.trunk}, cut {self.cut!r}{channels})"


def view_key(plan: Plan, view: str) -> ViewKey:
    """What names a view of a split plan's device."""
    assert plan.split is not None
    return ViewKey(
        trunk=plan.split.trunk, index_map=plan.part.index_map, cut=plan.split.cut, device=plan.device, view=view
    )


class ViewUpload:
    """Copies of the packets that have come: what they came in (an object store's memory, say) is not held on to."""

    def __init__(self, key: ViewKey, *, limit_bytes: int) -> None:
        """No packet yet. Beyond ``limit_bytes`` only lengths are kept: the upload can be counted, not used."""
        self._key, self._limit_bytes = key, limit_bytes
        self._packets: dict[int, Array] = {}
        self._lengths: dict[int, int] = {}
        self.num_bytes = VIEW_BYTES

    @property
    def held_bytes(self) -> int:
        """What it takes now."""
        return 0 if self.num_bytes > self._limit_bytes else self.num_bytes

    def add(self, number: int, packet: Array) -> None:
        """Packets may come in any order, each once. Raises ``UploadFault``."""
        if not isinstance(packet, np.ndarray) or packet.dtype != np.uint8 or packet.ndim != 1:
            raise UploadFault(f"packet {number} of {self._key} is no array of bytes")
        if number < 0 or number in self._lengths:
            why = "is there already" if number in self._lengths else "cannot be"
            raise UploadFault(f"packet {number} of {self._key} {why}")
        self._lengths[number] = packet.nbytes
        self.num_bytes += packet.nbytes + PACKET_BYTES
        if self.num_bytes > self._limit_bytes:
            self._packets.clear()
        else:
            self._packets[number] = packet.copy()

    def check(self, packets: int) -> None:
        """Raises ``UploadFault`` unless it is of this many packets, at least one, and all are there."""
        if packets < 1:
            raise UploadFault(f"{self._key} ended after {packets} packets; a view has at least one")
        last = max(self._lengths, default=0)
        if last >= packets:
            raise UploadFault(f"packet {last} of {self._key} is beyond the end of the upload, which has {packets}")
        if len(self._lengths) < packets:
            missing = next(number for number in range(packets) if number not in self._lengths)
            raise UploadFault(
                f"{self._key} ended with {len(self._lengths)} of {packets} packets; the first that is missing is {missing}"
            )

    def join(self) -> tuple[Array, Array]:
        """[packet] lengths, and all packets in order as one array; they are freed one after another while it is filled."""
        assert self._packets, "it was too large, or is joined already"
        lengths = np.array([self._lengths[number] for number in range(len(self._lengths))], np.int64)
        starts = _starts(lengths)
        body = np.zeros(starts[-1], np.uint8)
        for number, (start, length) in enumerate(zip(starts, lengths.tolist(), strict=False)):
            body[start : start + length] = self._packets.pop(number)
        return lengths, body


def split(body: Array, lengths: Array) -> list[Array]:
    """The packets of ``join``, read-only and without a copy."""
    frozen = body.view()
    frozen.flags.writeable = False
    return [frozen[start : start + length] for start, length in zip(_starts(lengths), lengths.tolist(), strict=False)]


def counted_bytes(lengths: Array) -> int:
    """[packet] lengths: what a view of such packets counts for in memory."""
    return VIEW_BYTES + PACKET_BYTES * len(lengths) + int(lengths.sum())


def joined_bytes(lengths: Array) -> int:
    """[packet] lengths: the bytes of the one array that ``join`` makes of such packets."""
    return _starts(lengths)[-1]


def _starts(lengths: Array) -> list[int]:
    """[packet] where each starts, and where the last one's padding ends."""
    padded = -(-lengths // _ALIGNMENT) * _ALIGNMENT
    return [0, *np.cumsum(padded).tolist()]
