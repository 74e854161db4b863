"""A device's way to the host's leg of its plan, wherever that is."""

from typing import Protocol

from ...comms.codec import Array


class StreamFault(Exception):
    """The host could not take a packet, or not begin at all. One sentence says why."""


class HostLink(Protocol):
    """A device's way to the host's leg of its plan."""

    def send(self, packet: Array, *, window: int) -> None:
        """Send activations; at most ``window`` are under way. Raises ``StreamFault``."""
        ...

    def answer(self) -> Array:
        """Wait for the packet that answers the oldest of those sent, where they are answered. Raises ``StreamFault``."""
        ...

    def flush(self) -> None:
        """Wait until all that was sent has been taken. Raises ``StreamFault``."""
        ...
