"""Uploads of views: packets by number, which are joined into one array once all have been received.

The size of a view is the bytes of its packets, plus fixed amounts for each packet and for the view: at least what Python and
numpy need for their objects.
"""

import msgspec
import numpy as np

from ...comms.codec import Array
from ...policies.plan import Plan

VIEW_BYTES = 2048
PACKET_BYTES = 16  # length and alignment
_ALIGNMENT = 8  # a packet's arrays are aligned within it


class UploadFault(Exception):
    """An upload is not valid. One sentence says why."""


class ViewKey(msgspec.Struct, frozen=True, kw_only=True):
    """The key of a view: hash of the trunk, hash of the index map ("" means all channels), cut, device, and the view's id."""

    trunk: str
    cut: str
    device: int
    view: str
    index_map: str = ""

    @property
    def stream(self) -> tuple[str, str, str, int]:
        """Views with equal streams replace each other, the oldest first."""
        return self.trunk, self.index_map, self.cut, self.device

    def __str__(self) -> str:
        """One line, for notices and errors."""
        channels = f", index map {self.index_map}" if self.index_map else ""
        return f"view {self.view!r} of device {self.device} (trunk {self.trunk}, cut {self.cut!r}{channels})"


def view_key(plan: Plan, view: str) -> ViewKey:
    """The key of a view with id ``view`` of a split plan's device."""
    assert plan.split is not None
    return ViewKey(
        trunk=plan.split.trunk, index_map=plan.part.index_map, cut=plan.split.cut, device=plan.device, view=view
    )


class ViewUpload:
    """Copies of the packets received so far, so that their source (Ray's object store, for example) can be freed."""

    def __init__(self, key: ViewKey, *, limit_bytes: int) -> None:
        """Empty. Beyond ``limit_bytes`` only lengths are kept: the upload's size is known, but it cannot be used."""
        self._key, self._limit_bytes = key, limit_bytes
        self._packets: dict[int, Array] = {}
        self._lengths: dict[int, int] = {}
        self.num_bytes = VIEW_BYTES

    @property
    def held_bytes(self) -> int:
        """Bytes that the upload takes now."""
        return 0 if self.num_bytes > self._limit_bytes else self.num_bytes

    def add(self, number: int, packet: Array) -> None:
        """Add a copy of a packet, in any order, each number once. Raises ``UploadFault``."""
        if not isinstance(packet, np.ndarray) or packet.dtype != np.uint8 or packet.ndim != 1:
            raise UploadFault(f"packet {number} of {self._key} is not an array of bytes")
        if number < 0 or number in self._lengths:
            why = "was received already" if number in self._lengths else "has a negative number"
            raise UploadFault(f"packet {number} of {self._key} {why}")
        self._lengths[number] = packet.nbytes
        self.num_bytes += packet.nbytes + PACKET_BYTES
        if self.num_bytes > self._limit_bytes:
            self._packets.clear()
        else:
            self._packets[number] = packet.copy()

    def check(self, packets: int) -> None:
        """Raise ``UploadFault`` unless the upload has exactly this many packets, at least one."""
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
        """[packet] lengths, and all packets in order as one array. Each packet is freed once it is copied."""
        assert self._packets, "the upload was too large, or is joined already"
        lengths = np.array([self._lengths[number] for number in range(len(self._lengths))], np.int64)
        starts = _starts(lengths)
        body = np.zeros(starts[-1], np.uint8)
        for number, (start, length) in enumerate(zip(starts, lengths.tolist(), strict=False)):
            body[start : start + length] = self._packets.pop(number)
        return lengths, body


def split(body: Array, lengths: Array) -> list[Array]:
    """The packets in the array of ``join``, as read-only views without a copy."""
    frozen = body.view()
    frozen.flags.writeable = False
    return [frozen[start : start + length] for start, length in zip(_starts(lengths), lengths.tolist(), strict=False)]


def counted_bytes(lengths: Array) -> int:
    """[packet] lengths: the size of a view of such packets in memory."""
    return VIEW_BYTES + PACKET_BYTES * len(lengths) + int(lengths.sum())


def joined_bytes(lengths: Array) -> int:
    """[packet] lengths: the bytes of the array that ``join`` makes of such packets."""
    return _starts(lengths)[-1]


def _starts(lengths: Array) -> list[int]:
    """[packet + 1] the start of each packet, and the end of the last one's padding."""
    padded = -(-lengths // _ALIGNMENT) * _ALIGNMENT
    return [0, *np.cumsum(padded).tolist()]
