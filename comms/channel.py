"""The channel hands a sealed packet to those that hold its reference: within a process here.

Between processes it is ``ray_channel``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .codec import Array


@dataclass(frozen=True)
class Stored:
    """Bytes that lie in a file of a checkpoint, and are not read before they are needed. ``read``: reads and checks them."""

    name: str
    read: Callable[[], bytes]


class Channel(Protocol):
    """``put`` stores a packet once and returns a reference that may be handed to many; ``get`` gives it back, read-only."""

    def put(self, packet: Array) -> Any:
        """Store a packet; its reference."""
        ...

    def get(self, reference: Any) -> Array:
        """The packet behind a reference."""
        ...


class LocalChannel:
    """References are the packets themselves, made read-only as an object store would."""

    def put(self, packet: Array) -> Array:
        """The packet, from now on read-only."""
        packet.flags.writeable = False
        return packet

    def get(self, reference: Array) -> Array:
        """The packet."""
        return reference
