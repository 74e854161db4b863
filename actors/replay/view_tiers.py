"""Which views are in memory and which on disk, under a budget for each: the accounts of a replay buffer, without packets.

A partition host keeps packets by these accounts, and the server keeps the same accounts to know which views there are.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal, NamedTuple

from ...comms.codec import Array
from .spill import CHECKSUM_BYTES
from .upload import ViewKey, counted_bytes, joined_bytes


class Sizes(NamedTuple):
    """What a view counts for in memory, and as a file."""

    memory: int
    disk: int


def sizes_of(lengths: Array) -> Sizes:
    """``lengths``: [packet] bytes."""
    return Sizes(counted_bytes(lengths), joined_bytes(lengths) + CHECKSUM_BYTES)


class Tiers:
    """Views in the order of their use, those used longest ago first. What one ``make_room`` costs does not grow with them.

    ``memory_bytes``, ``disk_bytes``: held now.
    """

    def __init__(self, *, memory_budget: int, disk_budget: int) -> None:
        """Empty. Raises ``ValueError``."""
        for name, value, least in (("memory_budget", memory_budget, 1), ("disk_budget", disk_budget, 0)):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.memory_budget, self.disk_budget = memory_budget, disk_budget
        self.memory: OrderedDict[ViewKey, Sizes] = OrderedDict()
        self.disk: OrderedDict[ViewKey, Sizes] = OrderedDict()
        self.memory_bytes = self.disk_bytes = 0

    def __contains__(self, key: ViewKey) -> bool:
        """Whether a view is here."""
        return key in self.memory or key in self.disk

    def __len__(self) -> int:
        """Number of views."""
        return len(self.memory) + len(self.disk)

    def make_room(self, num_bytes: int) -> Iterator[tuple[Literal["spill", "evict"], ViewKey]]:
        """Until so many bytes more fit into memory: the views to be written to disk, and those to be dropped, one by one."""
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
        """A view as the one used last; in memory there is room for it, or it is on ``disk``."""
        if disk:
            self._add_to_disk(key, sizes)
        else:
            self.memory[key] = sizes
            self.memory_bytes += sizes.memory

    def use(self, key: ViewKey) -> bool:
        """A view is the one used last now. Whether it moves from disk to memory: where there is room.

        Views are drawn at random: to change places with one in memory would cost a write, and win nothing.
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
        """Forget a view, if it is here."""
        if key in self.memory:
            self.memory_bytes -= self.memory.pop(key).memory
        elif key in self.disk:
            self.disk_bytes -= self.disk.pop(key).disk

    def _add_to_disk(self, key: ViewKey, sizes: Sizes) -> None:
        self.disk[key] = sizes
        self.disk_bytes += sizes.disk
