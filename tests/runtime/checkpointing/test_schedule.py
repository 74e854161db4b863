"""When checkpoints are due, by a clock that the test sets."""

import pytest
from fedbonsai.runtime.checkpointing.schedule import CheckpointSchedule
from fedbonsai.runtime.configuration.config import CheckpointSettings


@pytest.fixture
def now():
    return [100.0]


@pytest.fixture
def rhythm(now):
    return lambda **settings: CheckpointSchedule(CheckpointSettings(**settings), now=lambda: now[0])


def test_it_is_due_after_versions_or_seconds(rhythm, now):
    assert [rhythm(every=3).due(version) for version in (1, 2, 3)] == [False, False, True]
    assert not rhythm(every=None).due(99)
    either = rhythm(every=100, seconds=9.0)
    assert not either.due(1)
    now[0] += 9.0
    assert either.due(1)


def test_versions_count_from_the_last_one(rhythm):
    since = rhythm(every=3)
    since.start(4)
    assert [since.due(version) for version in (5, 6, 7)] == [False, False, True]
    since.begin()
    since.end(7)
    assert [since.due(version) for version in (8, 9, 10)] == [False, False, True]


@pytest.mark.parametrize(("share", "waits_s"), [(0.2, 12.0), (0.5, 3.0), (None, 0.0)])
def test_after_one_that_took_long_the_next_waits(rhythm, now, share, waits_s):
    sparing = rhythm(share=share)
    assert sparing.due(1)
    sparing.begin()
    now[0] += 3.0
    sparing.end(1)
    if waits_s:
        now[0] += waits_s - 0.01
        assert not sparing.due(2)
        now[0] += 0.01
    assert sparing.due(2)
