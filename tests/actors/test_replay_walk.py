"""The replay buffer beside a plain model of it, in random walks with tiny budgets."""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedbonsai.actors.replay import ReplayBuffer, ViewGone
from fedbonsai.actors.replay_files import CHECKSUM_BYTES
from fedbonsai.actors.replay_upload import PACKET_BYTES, VIEW_BYTES, UploadFault, ViewKey
from hypothesis import given, settings
from hypothesis import strategies as st

KEYS = [
    ViewKey(trunk="t", cut=cut, device=device, view=view) for cut in ("c", "d") for device in (0, 1) for view in "abc"
]
LARGEST = VIEW_BYTES + 3 * PACKET_BYTES + 3 * 900


class Plain:
    """Lists, used longest ago first, and bytes."""

    def __init__(self, *, budget_bytes: int, disk_bytes: int, views_per_device: int, lifetime: int) -> None:
        self.budget, self.disk_budget, self.per_device, self.lifetime = (
            budget_bytes, disk_bytes, views_per_device, lifetime
        )  # fmt: skip
        self.uploads: dict[ViewKey, tuple[int, dict[int, bytes]]] = {}
        self.views: dict[ViewKey, tuple[int, list[bytes]]] = {}  # in the order of their commits
        self.memory: list[ViewKey] = []
        self.disk: list[ViewKey] = []
        self.evicted = self.damaged = 0

    def num_bytes(self, key: ViewKey) -> int:
        return VIEW_BYTES + sum(PACKET_BYTES + len(packet) for packet in self.views[key][1])

    def file_bytes(self, key: ViewKey) -> int:
        return CHECKSUM_BYTES + sum((len(packet) + 7) // 8 * 8 for packet in self.views[key][1])

    def memory_total(self) -> int:
        return sum(map(self.num_bytes, self.memory))

    def disk_total(self) -> int:
        return sum(map(self.file_bytes, self.disk))

    def drop(self, key: ViewKey) -> None:
        for place in (self.memory, self.disk, self.views):
            if key in place:
                place.pop(key) if isinstance(place, dict) else place.remove(key)

    def commit(self, key: ViewKey) -> None:
        version, packets = self.uploads.pop(key)
        self.drop(key)
        siblings = [other for other in self.views if other.stream == key.stream]
        for other in siblings[: max(0, len(siblings) + 1 - self.per_device)]:
            self.drop(other)
        self.views[key] = version, [packets[number] for number in range(len(packets))]
        self.memory.append(key)
        while self.memory_total() > self.budget:
            oldest = self.memory[0]
            while self.disk and self.file_bytes(oldest) <= self.disk_budget < self.disk_total() + self.file_bytes(
                oldest
            ):
                self.evict(self.disk[0])
            if self.disk_total() + self.file_bytes(oldest) > self.disk_budget:
                self.evict(oldest)
            else:
                self.disk.append(self.memory.pop(0))

    def evict(self, key: ViewKey) -> None:
        self.drop(key)
        self.evicted += 1

    def read(self, key: ViewKey) -> list[bytes]:
        place = self.memory if key in self.memory else self.disk
        place.remove(key)
        fits = self.memory_total() + self.num_bytes(key) <= self.budget
        (self.memory if place is self.memory or fits else self.disk).append(key)
        return self.views[key][1]

    def erase(self, device: int) -> int:
        views = [key for key in self.views if key.device == device]
        uploads = [key for key in self.uploads if key.device == device]
        for key in views:
            self.drop(key)
        for key in uploads:
            del self.uploads[key]
        return len(views) + len(uploads)

    def expire(self, version: int) -> int:
        old = [key for key, (made, _) in self.views.items() if version - made > self.lifetime]
        for key in old:
            self.drop(key)
        return len(old)


class Walk:
    """Every step is done to both, and both must be the same after it."""

    def __init__(self, root: Path, **limits: int) -> None:
        self.root = root
        self.buffer, self.plain = ReplayBuffer(**limits), Plain(**limits)
        self.version = 0
        self.seen: Counter[str] = Counter()
        self.generator = np.random.default_rng(0)

    def packet(self, num_bytes: int) -> Any:
        return self.generator.integers(0, 256, num_bytes, np.uint8)

    def begin(self, key: ViewKey, number: int, size: int) -> None:
        if key in self.plain.uploads:
            with pytest.raises(UploadFault):
                self.buffer.begin(key, version=self.version, samples=1)
            return
        self.buffer.begin(key, version=self.version, samples=1)
        self.plain.uploads[key] = self.version, {}

    def add(self, key: ViewKey, number: int, size: int) -> None:
        packet = self.packet(size)
        if key not in self.plain.uploads or number in self.plain.uploads[key][1]:
            with pytest.raises(UploadFault):
                self.buffer.add(key, number, packet)
            return
        self.buffer.add(key, number, packet)
        self.plain.uploads[key][1][number] = packet.tobytes()

    def commit(self, key: ViewKey, number: int, size: int) -> None:
        count = number + 1
        if set(self.plain.uploads.get(key, (0, {}))[1]) != set(range(count)):
            with pytest.raises(UploadFault):
                self.buffer.commit(key, count)
        elif VIEW_BYTES + sum(len(p) + PACKET_BYTES for p in self.plain.uploads[key][1].values()) > self.plain.budget:
            self.seen["too large"] += 1
            with pytest.raises(ValueError, match="memory_bytes is"):
                self.buffer.commit(key, count)
        else:
            self.buffer.commit(key, count)
            self.plain.commit(key)

    def whole(self, key: ViewKey, number: int, size: int) -> None:
        self.begin(key, 0, 0)
        for one in reversed(range(number + 1)):
            self.add(key, one, size + one)
        self.commit(key, number, 0)

    def abort(self, key: ViewKey, number: int, size: int) -> None:
        self.buffer.abort(key)
        self.plain.uploads.pop(key, None)

    def read(self, key: ViewKey, number: int, size: int) -> None:
        if key not in self.plain.views:
            with pytest.raises(ViewGone):
                self.buffer.read(key)
            return
        self.seen["read from disk"] += key in self.plain.disk
        assert [packet.tobytes() for packet in self.buffer.read(key)] == self.plain.read(key)

    def erase(self, key: ViewKey, number: int, size: int) -> None:
        assert self.buffer.erase(key.device) == self.plain.erase(key.device)

    def expire(self, key: ViewKey, number: int, size: int) -> None:
        self.version += 1
        assert self.buffer.expire(self.version) == self.plain.expire(self.version)

    def damage(self, key: ViewKey, number: int, size: int) -> None:
        """One bit of the file used longest ago. (Only its size tells which that is.)"""
        sizes = Counter(map(self.plain.file_bytes, self.plain.disk))
        if not self.plain.disk or sizes[self.plain.file_bytes(self.plain.disk[0])] > 1:
            return
        oldest = self.plain.disk[0]
        (path,) = (p for p in self.root.rglob("*.view") if p.stat().st_size == self.plain.file_bytes(oldest))
        content = bytearray(path.read_bytes())
        content[size % len(content)] ^= 1 << number
        path.write_bytes(content)
        with pytest.raises(ViewGone):
            self.buffer.read(oldest)
        self.plain.drop(oldest)
        self.plain.damaged += 1

    def check(self) -> None:
        buffer, plain = self.buffer, self.plain
        assert buffer.inventory() == tuple(
            sorted((k.trunk, k.cut, k.device, k.view, v, plain.num_bytes(k)) for k, (v, _) in plain.views.items())
        )
        assert buffer.memory_bytes == plain.memory_total() <= plain.budget
        assert buffer.disk_bytes == plain.disk_total() <= plain.disk_budget
        files = [path for path in self.root.rglob("*") if path.is_file() and path.suffix]
        assert sorted(path.stat().st_size for path in files) == sorted(map(plain.file_bytes, plain.disk))
        assert (buffer.evicted, buffer.damaged) == (plain.evicted, plain.damaged)
        assert len(buffer.notices) == plain.evicted.bit_length() + plain.damaged.bit_length()

    def end(self) -> None:
        """All that should be there can be read, bit for bit; then nothing is left."""
        for key in list(self.plain.views):
            self.read(key, 0, 0)
        self.check()
        self.seen["evicted"] += self.plain.evicted
        self.seen["damaged"] += self.plain.damaged
        self.buffer.close()
        assert not list(self.root.iterdir())


STEPS = ("begin", "add", "add", "commit", "whole", "whole", "whole", "whole", "read", "read", "read", "abort", "erase",
         "expire", "damage")  # fmt: skip
LIMITS = {
    "budget_bytes": st.integers(VIEW_BYTES + PACKET_BYTES, 3 * LARGEST),
    "disk_bytes": st.integers(0, 4 * 2700),
    "views_per_device": st.integers(1, 3),
    "lifetime": st.integers(0, 3),
}
STEP = st.tuples(st.sampled_from(STEPS), st.sampled_from(KEYS), st.integers(0, 2), st.integers(0, 900))


def walk(limits: dict[str, int], steps: list[tuple[str, ViewKey, int, int]]) -> Counter[str]:
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as root:
        tempfile.tempdir = root
        try:
            walked = Walk(Path(root), **limits)
            for name, key, number, size in steps:
                getattr(walked, name)(key, number, size)
                walked.check()
            walked.end()
        finally:
            tempfile.tempdir = before
    return walked.seen


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries(LIMITS), st.lists(STEP, max_size=40))
def test_what_can_be_read_is_what_was_committed(
    limits: dict[str, int], steps: list[tuple[str, ViewKey, int, int]]
) -> None:
    walk(limits, steps)


def test_a_long_walk_meets_everything() -> None:
    generator = np.random.default_rng(1)
    steps = [
        (str(generator.choice(STEPS)), KEYS[generator.integers(len(KEYS))], int(generator.integers(3)), size)
        for size in generator.integers(0, 901, 800).tolist()
    ]
    limits = {"budget_bytes": 2 * LARGEST - 2500, "disk_bytes": 3000, "views_per_device": 2, "lifetime": 3}
    seen = walk(limits, steps) + walk(limits | {"budget_bytes": LARGEST - 500}, steps)
    assert min(seen[what] for what in ("evicted", "damaged", "read from disk", "too large")) >= 10, seen
