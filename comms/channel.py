"""The channel stores sealed packets and returns references to them. Here the one within a process; ``ray_channel`` has the
one between processes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .codec import Array


@dataclass(frozen=True)
class StoredBytes:
    """Bytes in a file of a checkpoint that are read only when needed. ``read``: reads and checks them."""

    name: str
    read: Callable[[], bytes]


class Channel(Protocol):
    """Stores a packet once, for any number of readers."""

    def put(self, packet: Array) -> Any:
        """Stores a packet and returns a reference to it."""
        ...

    def get(self, reference: Any) -> Array:
        """Returns the packet of a reference, read-only."""
        ...


class LocalChannel:
    """A channel whose references are the packets themselves, made read-only as in an object store."""

    def put(self, packet: Array) -> Array:
        """Makes the packet read-only and returns it."""
        packet.flags.writeable = False
        return packet

    def get(self, reference: Array) -> Array:
        """Returns the packet."""
        return reference
