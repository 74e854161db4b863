"""The object-store channel: packets in Ray's shared memory, put once, read without a copy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from .codec import Array
from .errors import StoreFull


class RayChannel:
    """Packets as Ray objects, owned by the process that puts them (the server: an object dies with its owner)."""

    def put(self, packet: Array) -> Any:
        """Store a packet in the object store; its reference. Raises ``StoreFull``."""
        with store_told():
            return ray.put(packet)

    def get(self, reference: Any) -> Array:
        """The packet, as a read-only view of shared memory."""
        with store_told():
            packet: Array = ray.get(reference)
        return packet


@contextmanager
def store_told() -> Iterator[None]:
    """What Ray says of a full store, here or of a call that could not store what it gives, in one sentence: ``StoreFull``.

    A store that is full spills to disk, and what has no room yet waits for some 10 s; then Ray gives up.
    """
    try:
        yield
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise StoreFull(
            "the object store is full, and the disk to which Ray spills what does not fit has no room, or cannot be written; "
            "give ray.object_store_bytes more (or the nodes of the cluster, where one is joined), or make room on the disk"
        ) from error
