"""The index of views: evictions, expiry and settlements."""

import copy

import numpy as np
import pytest
from fedbonsai.actors.messages.host_messages import ReplaySettings
from fedbonsai.actors.replay.replay_index import Settlement
from fedbonsai.actors.replay.upload import PACKET_BYTES, VIEW_BYTES, ViewKey
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Optimiser, Training
from fedbonsai.policies.plan import Plan, Split

from .settled_index import SettledIndex

LENGTHS = (1000, 1000, 407)
COUNTED = VIEW_BYTES + 3 * PACKET_BYTES + 2407
ON_DISK = 1000 + 1000 + 408 + 8


def plan(
    number: int, device: int = 0, *, version: int = 0, view: str | None = None, cut: str = "a", trunk: str = "t"
) -> Plan:
    return Plan(
        id=number,
        device=device,
        version=version,
        part=Part(blocks=("a",), trained=()),
        training=Training(optimiser=Optimiser(learning_rate=0.1)),
        seed=0,
        split=Split(cut=cut, depth=cut, host=device % 2, mode="ecofed", trunk=trunk, view=view),
    )


def index(**settings: int) -> SettledIndex:
    return SettledIndex(ReplaySettings(**{"memory_bytes": 10**6, "disk_bytes": 0} | settings), num_hosts=2)


def uploaded(replay: SettledIndex, of: Plan, *, version: int | None = None) -> Settlement:
    """A complete upload."""
    replay.sent(of)
    now = of.version if version is None else version
    settlement = replay.end(of, LENGTHS, version=now, sound=True)
    assert settlement is not None
    return settlement


def devices(replay: SettledIndex) -> list[int]:
    return sorted(row[2] for row in replay.listed(0))


def test_only_a_complete_upload_becomes_a_view() -> None:
    replay = index()
    whole = Plan(id=1, device=0, version=0, part=Part(blocks=("a",), trained=("a",)), training=plan(1).training, seed=0)
    assert replay.end(whole, (), version=0, sound=True) is None
    assert replay.end(plan(2), LENGTHS[:1], version=0, sound=False) == Settlement(0, 2, keep=False, drop=())
    assert len(replay) == 0
    assert uploaded(replay, plan(3, 5, version=4)) == Settlement(1, 3, keep=True, drop=())
    assert replay.listed(6) == [("t", "a", 5, "3", 2, COUNTED)]
    assert uploaded(replay, plan(4, 5, version=7)).drop == (ViewKey(trunk="t", cut="a", device=5, view="3"),)
    assert replay.listed(7) == [("t", "a", 5, "4", 0, COUNTED)]


def test_a_device_has_at_most_views_per_device_of_each_trunk_and_cut() -> None:
    replay = index(views_per_device=2)
    for number in range(1, 5):
        uploaded(replay, plan(number))
    uploaded(replay, plan(5, 2))
    uploaded(replay, plan(6, trunk="u"))
    uploaded(replay, plan(7, cut="b"))
    assert [row[:4] for row in replay.listed(0)] == [
        ("t", "a", 0, "3"),
        ("t", "a", 0, "4"),
        ("t", "a", 2, "5"),
        ("t", "b", 0, "7"),
        ("u", "a", 0, "6"),
    ]


def test_beyond_the_budgets_the_least_recently_used_view_is_evicted_with_a_notice() -> None:
    replay = index(memory_bytes=COUNTED, disk_bytes=2 * ON_DISK + 1)
    for number, device in enumerate((0, 2, 4), start=1):
        uploaded(replay, plan(number, device))
    again = plan(9, 0, view="1")
    replay.sent(again)  # used just now
    assert replay.end(again, (), version=0, sound=True) == Settlement(0, 9, keep=False, drop=())
    assert uploaded(replay, plan(4, 6)).drop == (ViewKey(trunk="t", cut="a", device=2, view="2"),)
    assert devices(replay) == [0, 4, 6]
    assert replay.notices() == [
        "view '2' of device 2 (trunk t, cut 'a') was evicted from the replay buffer (number 1 beyond replay.memory_bytes, "
        f"{COUNTED}, and replay.disk_bytes, {2 * ON_DISK + 1})"
    ]
    for number in range(5, 13):
        uploaded(replay, plan(number, 2 * number))
    assert replay.evicted == 9
    assert [notice.partition("(number ")[2][0] for notice in replay.notices()] == ["2", "4", "8"]
    assert replay.notices() == []


def test_each_host_has_its_own_budget() -> None:
    replay = index(memory_bytes=2 * COUNTED)
    for number, device in enumerate((0, 2, 1, 3, 4), start=1):
        uploaded(replay, plan(number, device))
    assert devices(replay) == [1, 2, 3, 4]


def test_views_expire_after_their_lifetime() -> None:
    replay = index(lifetime=2)
    gone = [uploaded(replay, plan(number + 1, 2 * number, version=number)).drop for number in range(4)]
    assert [[key.device for key in keys] for keys in gone] == [[], [], [], [0]]
    assert [row[4] for row in replay.listed(4)] == [2, 1]
    found = replay.end(plan(9), (), version=4, sound=False)
    assert found is not None
    assert [key.device for key in found.drop] == [2]
    assert len(replay) == 2


def test_a_view_that_is_dropped_during_a_replay_is_dropped_at_its_host_afterwards() -> None:
    replay = index(memory_bytes=COUNTED)
    upload, again = plan(1, 0), plan(2, 0, view="1")
    uploaded(replay, upload)
    replay.sent(again)
    assert uploaded(replay, plan(3, 2)).drop == ()  # plan 2 still needs view 1
    assert devices(replay) == [2]
    assert replay.task_fields(again).get("upload") == upload  # as it does if its host loses it now
    found = replay.end(again, (), version=0, sound=True)
    assert found == Settlement(0, 2, keep=False, drop=(ViewKey(trunk="t", cut="a", device=0, view="1"),))
    assert replay.task_fields(again).get("upload") is None


def test_an_unknown_view_has_no_upload() -> None:
    replay, again = index(), plan(2, view="7")
    replay.sent(again)
    assert replay.task_fields(again).get("upload") is None
    assert replay.end(again, (), version=0, sound=False) == Settlement(0, 2, keep=False, drop=())


def test_erasing_a_device_leaves_none_of_its_views() -> None:
    replay = index(views_per_device=2)
    for number, device in enumerate((1, 1, 3), start=1):
        uploaded(replay, plan(number, device))
    assert (replay.erase(1), replay.erase(1), devices(replay)) == (2, 0, [3])
    found = replay.end(plan(9, 5), (), version=0, sound=False)
    assert found is not None
    assert [(key.device, key.view) for key in found.drop] == [(1, "1"), (1, "2")]


@pytest.mark.parametrize("disk_bytes", [0, 2 * ON_DISK])
def test_a_restored_index_decides_as_the_saved_one(disk_bytes: int) -> None:
    """With the same evictions, in the same order."""
    first, second = (index(memory_bytes=2 * COUNTED, disk_bytes=disk_bytes, views_per_device=2) for _ in range(2))
    generator = np.random.default_rng(0)

    def step(replay: SettledIndex, number: int, device: int, view: int) -> object:
        rows = [row for row in replay.listed(0) if row[2] == device]
        name = rows[view % len(rows)][3] if rows and view % 2 else None
        one = plan(number, device, view=name)
        replay.sent(one)
        return replay.end(one, LENGTHS, version=0, sound=True)

    moves = [(number, *generator.integers(0, 8, 2).tolist()) for number in range(1, 120)]
    for move in moves[:60]:
        step(first, *move)
    second.restore(copy.deepcopy(first.saved()))
    for move in moves[60:]:
        assert step(first, *move) == step(second, *move)
    assert first.listed(0) == second.listed(0)
    assert [(key, disk) for key, _, disk in first.placed()] == [(key, disk) for key, _, disk in second.placed()]
    assert first.evicted > 0
