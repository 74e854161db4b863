"""Which views are in memory and which are on disk, within a budget for each. It holds sizes only, no packets.

A partition host places packets by it, and the server runs the same code to know which views exist.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal, NamedTuple

from ...comms.codec import Array
from .spill import CHECKSUM_BYTES
from .upload import ViewKey, counted_bytes, joined_bytes


class Sizes(NamedTuple):
    """Bytes of a view in memory, and as a file."""

    memory: int
    disk: int


def sizes_of(lengths: Array) -> Sizes:
    """Sizes of a view whose packets have these [packet] lengths in bytes."""
    return Sizes(counted_bytes(lengths), joined_bytes(lengths) + CHECKSUM_BYTES)


class Tiers:
    """Views in the order of use, least recently used first. The time of one step of ``make_room`` does not grow with them.

    ``memory_bytes``, ``disk_bytes``: used now.
    """

    def __init__(self, *, memory_budget: int, disk_budget: int) -> None:
        """Empty. Raises ``ValueError`` for a budget that is too small."""
        for name, value, least in (("memory_budget", memory_budget, 1), ("disk_budget", disk_budget, 0)):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.memory_budget, self.disk_budget = memory_budget, disk_budget
        self.memory: OrderedDict[ViewKey, Sizes] = OrderedDict()
        self.disk: OrderedDict[ViewKey, Sizes] = OrderedDict()
        self.memory_bytes = self.disk_bytes = 0

    def __contains__(self, key: ViewKey) -> bool:
        """Whether a view is in memory or on disk."""
        return key in self.memory or key in self.disk

    def __len__(self) -> int:
        """Number of views."""
        return len(self.memory) + len(self.disk)

    def make_room(self, num_bytes: int) -> Iterator[tuple[Literal["spill", "evict"], ViewKey]]:
        """Yield the views to write to disk or to drop, one by one, until so many more bytes fit into memory."""
        while self.memory and self.memory_bytes + num_bytes > self.memory_budget:
            key, sizes = next(iter(self.memory.items()))
            if sizes.disk > self.disk_budget:
                self.remove(key)
                yield "evict", key
                continue
            while self.disk_bytes + sizes.disk > self.disk_budget:
                oldest = next(iter(self.disk))
                self.remove(oldest)
                yield "evict", oldest
            self.remove(key)
            self._add_to_disk(key, sizes)
            yield "spill", key

    def add(self, key: ViewKey, sizes: Sizes, *, disk: bool = False) -> None:
        """Add a view as the most recently used one; the caller has made room in memory, or it is on ``disk``."""
        if disk:
            self._add_to_disk(key, sizes)
        else:
            self.memory[key] = sizes
            self.memory_bytes += sizes.memory

    def use(self, key: ViewKey) -> bool:
        """Mark a view as the most recently used one, moving it from disk to memory if there is room. Returns whether it moved.

        Without room it stays: views are drawn at random, so swapping it with one in memory would cost a write for no gain.
        """
        if key in self.memory:
            self.memory.move_to_end(key)
            return False
        sizes = self.disk[key]
        if self.memory_bytes + sizes.memory > self.memory_budget:
            self.disk.move_to_end(key)
            return False
        self.remove(key)
        self.add(key, sizes)
        return True

    def remove(self, key: ViewKey) -> None:
        """Remove a view, if it exists."""
        if key in self.memory:
            self.memory_bytes -= self.memory.pop(key).memory
        elif key in self.disk:
            self.disk_bytes -= self.disk.pop(key).disk

    def _add_to_disk(self, key: ViewKey, sizes: Sizes) -> None:
        self.disk[key] = sizes
        self.disk_bytes += sizes.disk
