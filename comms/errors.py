"""What can be wrong with a packet. The runtime counts such an update as rejected, and the round goes on.

PacketError
├── TruncatedPacket     shorter than it says, or than it must be
├── CorruptPacket       checksum or structure is wrong
├── UnsupportedPacket   another format version, kind or codec
├── MismatchedPacket    sizes, plan or version are not the ones expected
├── OutOfSync           builds on a state that the receiver does not hold: the link is resynchronised
└── UnfitPacket         well-formed, but holds NaN or infinity
"""


class PacketError(Exception):
    """Any fault of a received packet."""


class TruncatedPacket(PacketError):
    """Shorter than it says, or than it must be."""


class CorruptPacket(PacketError):
    """The checksum or the structure is wrong."""


class UnsupportedPacket(PacketError):
    """Another format version, kind or codec than this receiver can read."""


class MismatchedPacket(PacketError):
    """Well-formed, but not what was expected: sizes, plan or version differ."""


class UnfitPacket(PacketError):
    """Well-formed and expected, but its values are not finite."""


class OutOfSync(PacketError):
    """It builds on a state that the receiver does not hold."""


class StoreFull(Exception):
    """What is to be handed over finds no room in the object store, nor on disk. One sentence says what to do."""
