"""The index of views and a host's buffer against a plain model, in random walks with tiny budgets.

Index and plain model agree after every step, whatever happens to the host. A replay reads what was uploaded, bit for bit;
the buffer keeps no other views longer than they are needed; its budgets hold.
"""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from fedbonsai.actors.messages.host_messages import ReplaySettings
from fedbonsai.actors.replay.buffer import ReplayBuffer, ViewGone
from fedbonsai.actors.replay.spill import CHECKSUM_BYTES
from fedbonsai.actors.replay.upload import PACKET_BYTES, VIEW_BYTES, ViewKey, view_key
from fedbonsai.clusters.scratch import Scratch
from fedbonsai.comms.codec import Array
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Optimiser, Training
from fedbonsai.policies.plan import Plan, Split
from hypothesis import given
from hypothesis import strategies as st

from .settled_index import SettledIndex

DEVICES, CUTS = (0, 1, 2, 3), ("c", "d")
LARGEST = VIEW_BYTES + 3 * PACKET_BYTES + 3 * 900
TRAINING = Training(optimiser=Optimiser(learning_rate=0.1))


class Plain:
    """Lists, least recently used first, and bytes."""

    def __init__(self, limits: ReplaySettings) -> None:
        self.limits = limits
        self.views: dict[ViewKey, tuple[int, list[Array]]] = {}  # in the order of their commits
        self.memory: list[ViewKey] = []
        self.disk: list[ViewKey] = []
        self.evicted = 0

    def num_bytes(self, key: ViewKey) -> int:
        return VIEW_BYTES + sum(PACKET_BYTES + len(packet) for packet in self.views[key][1])

    def file_bytes(self, key: ViewKey) -> int:
        return CHECKSUM_BYTES + sum((len(packet) + 7) // 8 * 8 for packet in self.views[key][1])

    def memory_total(self) -> int:
        return sum(map(self.num_bytes, self.memory))

    def disk_total(self) -> int:
        return sum(map(self.file_bytes, self.disk))

    def drop(self, key: ViewKey) -> None:
        for place in (self.memory, self.disk):
            if key in place:
                place.remove(key)
        del self.views[key]

    def commit(self, key: ViewKey, version: int, packets: list[Array]) -> None:
        siblings = [other for other in self.views if other.stream == key.stream]
        for other in siblings[: max(0, len(siblings) + 1 - self.limits.views_per_device)]:
            self.drop(other)
        self.views[key] = version, packets
        self.memory.append(key)
        while self.memory_total() > self.limits.memory_bytes:
            oldest, budget = self.memory[0], self.limits.disk_bytes
            while self.disk and self.file_bytes(oldest) <= budget < self.disk_total() + self.file_bytes(oldest):
                self.evict(self.disk[0])
            if self.disk_total() + self.file_bytes(oldest) > budget:
                self.evict(oldest)
            else:
                self.disk.append(self.memory.pop(0))

    def evict(self, key: ViewKey) -> None:
        self.drop(key)
        self.evicted += 1

    def use(self, key: ViewKey) -> None:
        place = self.memory if key in self.memory else self.disk
        place.remove(key)
        fits = self.memory_total() + self.num_bytes(key) <= self.limits.memory_bytes
        (self.memory if place is self.memory or fits else self.disk).append(key)

    def expire(self, version: int) -> None:
        for key in [key for key, (made, _) in self.views.items() if version - made > (self.limits.lifetime or 0)]:
            self.drop(key)


class Walk:
    """Applies every step to all three."""

    def __init__(self, root: Path, limits: ReplaySettings) -> None:
        self.limits, self.root = limits, root
        self.index, self.plain = SettledIndex(limits, num_hosts=1), Plain(limits)
        self.buffer = self.new_buffer()
        self.version, self.number = 0, 0
        self.replays: dict[int, Plan] = {}  # in flight, by device
        self.sent: dict[ViewKey, list[Array]] = {}  # by view, ever
        self.seen: Counter[str] = Counter()
        self.generator = np.random.default_rng(0)

    def new_buffer(self) -> ReplayBuffer:
        limits = self.limits
        return ReplayBuffer(memory_bytes=limits.memory_bytes, disk_bytes=limits.disk_bytes, scratch=Scratch())

    def plan(self, device: int, cut: str, view: str | None) -> Plan:
        self.number += 1
        split = Split(cut=cut, depth=cut, mode="ecofed", trunk="t", view=view)
        part = Part(blocks=("b",), trained=())
        return Plan(
            id=self.number, device=device, version=self.version, part=part, training=TRAINING, seed=0, split=split
        )

    def record(self, key: ViewKey, packets: list[Array]) -> None:
        """The packets of an upload reach the host."""
        self.buffer.begin(key)
        for number in reversed(range(len(packets))):
            self.buffer.add(key, number, packets[number])
        self.buffer.check(key, len(packets))

    def settle(self, plan: Plan, packets: list[Array], *, sound: bool) -> None:
        found = self.index.end(plan, [len(packet) for packet in packets], version=self.version, sound=sound)
        assert found is not None
        self.plain.expire(self.version)
        self.buffer.drop(found.drop)
        key = view_key(plan, str(plan.id))
        if found.keep:
            self.buffer.commit(key, len(packets))
            self.plain.commit(key, self.version, packets)
        else:
            self.buffer.abort(key)

    def upload(self, device: int, cut: str, size: int) -> None:
        if device in self.replays:
            return
        plan, sound = self.plan(device, cut, None), size % 7 > 0
        packets = [self.generator.integers(0, 256, size + number, np.uint8) for number in range(1 + size % 3)]
        self.index.sent(plan)
        key = view_key(plan, str(plan.id))
        self.sent[key] = packets
        self.record(key, packets)
        self.settle(plan, packets, sound=sound)

    def begin_replay(self, device: int, cut: str, size: int) -> None:
        mine = [key for key in self.plain.views if (key.device, key.cut) == (device, cut)]
        if device in self.replays or not mine:
            return
        key = mine[size % len(mine)]
        self.seen["used from disk"] += key in self.plain.disk
        plan = self.replays[device] = self.plan(device, cut, key.view)
        self.index.sent(plan)
        self.plain.use(key)

    def end_replay(self, device: int, cut: str, size: int) -> None:
        if device not in self.replays:
            return
        plan = self.replays.pop(device)
        assert plan.split is not None
        key = view_key(plan, str(plan.split.view))
        self.seen["dropped meanwhile"] += key not in self.plain.views
        upload = self.index.task_fields(plan).get("upload")
        assert upload is not None
        assert view_key(upload, str(upload.id)) == key
        try:
            found = self.buffer.read(key)
        except ViewGone:
            self.seen["uploaded again"] += 1
            self.record(key, self.sent[key])
            self.buffer.commit(key, len(self.sent[key]))
            found = self.buffer.read(key)
        assert [packet.tobytes() for packet in found] == [packet.tobytes() for packet in self.sent[key]]
        self.settle(plan, [], sound=True)

    def expire(self, device: int, cut: str, size: int) -> None:
        self.version += 1

    def die(self, device: int, cut: str, size: int) -> None:
        """The host dies, in a fifth of the steps."""
        if size % 5 == 0:
            self.seen["damaged"] += self.buffer.damaged
            self.buffer.close()
            self.buffer = self.new_buffer()

    def damage(self, device: int, cut: str, size: int) -> None:
        """Flip one bit of a file."""
        if files := sorted(self.root.rglob("*.view")):
            path = files[size % len(files)]
            content = bytearray(path.read_bytes())
            content[size % len(content)] ^= 1
            path.write_bytes(content)

    def check(self) -> None:
        index, plain, buffer = self.index, self.plain, self.buffer
        placed = [(key, disk) for key, _, disk in index.placed()]
        assert placed == [(key, True) for key in plain.disk] + [(key, False) for key in plain.memory]
        lifetime = self.limits.lifetime or 0
        assert index.listed(self.version) == sorted(
            (k.trunk, k.cut, k.device, k.view, self.version - made, plain.num_bytes(k))
            for k, (made, _) in plain.views.items()
            if self.version - made <= lifetime
        )
        assert index.evicted == plain.evicted
        needed = {view_key(plan, str(plan.split.view)) for plan in self.replays.values() if plan.split is not None}
        stored = {*buffer.tiers.memory, *buffer.tiers.disk}
        pending = {key for keys in index._to_drop for key in keys}
        assert stored <= set(plain.views) | needed | pending
        assert len(buffer) == len(stored)
        assert buffer.tiers.memory_bytes <= self.limits.memory_bytes
        assert buffer.tiers.disk_bytes <= self.limits.disk_bytes
        sizes = sum(path.stat().st_size for path in self.root.rglob("*.view"))
        assert sizes == buffer.tiers.disk_bytes

    def end(self) -> None:
        for device in DEVICES:
            self.end_replay(device, "", 0)
        self.seen["evicted"] += self.plain.evicted
        self.seen["damaged"] += self.buffer.damaged
        self.buffer.close()
        assert not list(self.root.rglob("*.view"))


STEPS = (
    "upload",
    "upload",
    "upload",
    "begin_replay",
    "begin_replay",
    "end_replay",
    "end_replay",
    "expire",
    "die",
    "damage",
)
LIMITS = st.builds(
    ReplaySettings,
    memory_bytes=st.integers(LARGEST, 3 * LARGEST),
    disk_bytes=st.integers(0, 4 * 2700),
    views_per_device=st.integers(1, 3),
    lifetime=st.integers(0, 9),
)
STEP = st.tuples(st.sampled_from(STEPS), st.sampled_from(DEVICES), st.sampled_from(CUTS), st.integers(1, 900))


def walk(limits: ReplaySettings, steps: list[tuple[str, int, str, int]]) -> Counter[str]:
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as root:
        tempfile.tempdir = root
        try:
            walked = Walk(Path(root), limits)
            for name, device, cut, size in steps:
                getattr(walked, name)(device, cut, size)
                walked.check()
            walked.end()
        finally:
            tempfile.tempdir = before
    return walked.seen


@given(LIMITS, st.lists(STEP, max_size=40))
def test_a_replay_reads_what_was_uploaded(limits: ReplaySettings, steps: list[tuple[str, int, str, int]]) -> None:
    walk(limits, steps)


def test_a_long_walk_meets_every_case() -> None:
    generator = np.random.default_rng(1)
    steps = [
        (str(generator.choice(STEPS)), int(generator.choice(DEVICES)), str(generator.choice(CUTS)), size)
        for size in generator.integers(1, 901, 1500).tolist()
    ]
    seen = walk(ReplaySettings(memory_bytes=LARGEST, disk_bytes=6000, views_per_device=2, lifetime=20), steps)
    wanted = ("evicted", "damaged", "used from disk", "dropped meanwhile", "uploaded again")
    assert min(seen[what] for what in wanted) >= 5, seen
