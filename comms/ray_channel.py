"""The object-store channel: packets in Ray's shared memory, put once, read without a copy."""

from typing import Any

import ray

from .codecs import Array


class RayChannel:
    """Packets as Ray objects, owned by the process that puts them (the server: an object dies with its owner)."""

    def put(self, packet: Array) -> Any:
        """Store a packet in the object store; its reference."""
        return ray.put(packet)

    def get(self, reference: Any) -> Array:
        """The packet, as a read-only view of shared memory."""
        packet: Array = ray.get(reference)
        return packet
