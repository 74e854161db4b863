"""Errors of received packets. An update that raises one is counted as rejected, and the round continues.

PacketError
├── TruncatedPacket     shorter than its own length fields say, or than the smallest packet
├── CorruptPacket       wrong checksum or structure
├── UnsupportedPacket   a format version, kind or codec that this receiver cannot read
├── MismatchedPacket    other sizes, plan or version than expected
├── OutOfSync           builds on a state that the receiver does not hold; the link is resynchronised
└── UnfitPacket         well-formed, but holds NaN or infinity

StoreFull               the object store and its disk have no room for a packet
"""


class PacketError(Exception):
    """Base class of all errors of a received packet."""


class TruncatedPacket(PacketError):
    """Shorter than its own length fields say, or than the smallest packet."""


class CorruptPacket(PacketError):
    """The checksum or the structure is wrong."""


class UnsupportedPacket(PacketError):
    """A format version, kind or codec that this receiver cannot read."""


class MismatchedPacket(PacketError):
    """Well-formed, but with other sizes, another plan or another version than expected."""


class UnfitPacket(PacketError):
    """Well-formed and expected, but its values are not finite."""


class OutOfSync(PacketError):
    """The packet builds on a state that the receiver does not hold."""


class StoreFull(Exception):
    """An object does not fit into the object store, nor on the disk that it spills to. The message says what to do."""
