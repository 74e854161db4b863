"""The channel between processes: packets in Ray's object store (shared memory), stored once and read without a copy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from .codec import Array
from .errors import StoreFull


class RayChannel:
    """Packets as Ray objects. Each is owned by the process that stores it, and is lost when that process ends."""

    def put(self, packet: Array) -> Any:
        """Stores a packet and returns its Ray reference. Raises ``StoreFull``."""
        with raising_store_full():
            return ray.put(packet)

    def get(self, reference: Any) -> Array:
        """Returns the packet, a read-only view of shared memory."""
        with raising_store_full():
            packet: Array = ray.get(reference)
        return packet


@contextmanager
def raising_store_full() -> Iterator[None]:
    """Raises Ray's errors of a full object store as ``StoreFull``, also those of a remote call whose result did not fit.

    A full store spills to disk. Ray retries an object that does not fit for some 10 s before it raises.
    """
    try:
        yield
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise StoreFull(
            "the object store is full, and the disk to which Ray spills has no room or cannot be written; increase "
            "ray.object_store_bytes (on a joined cluster, that of its nodes), or make room on the disk"
        ) from error
