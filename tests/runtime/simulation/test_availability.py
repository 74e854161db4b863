"""Availability and disruptions: windows by hand, shares by counting, all of it from the seed alone."""

import math
from itertools import pairwise

import pytest
from fedbonsai.runtime.simulation.availability import AvailabilitySchedule
from fedbonsai.runtime.simulation.disruptions import NO_DISRUPTION, DisruptionSampler


def edges(schedule, device, until_s):
    """The seconds at which a device becomes reachable or unreachable."""
    found, time_s = [], 0.0
    while True:
        reachable = schedule.reachable(device, time_s)
        time_s = schedule.until_s(device, time_s) if reachable else schedule.next_s(device, time_s)
        if time_s > until_s:
            return found
        found.append(time_s)


@pytest.fixture(name="schedule")
def schedule_fixture(make_fleet):
    return lambda *, devices=1, seed=1, **availability: AvailabilitySchedule(
        make_fleet(*[1] * devices, availability=availability), seed=seed
    )


@pytest.mark.parametrize(
    ("availability", "expected"),
    [
        ({}, []),
        ({"joins_s": 5, "leaves_s": 9}, [5, 9]),
        ({"leaves_s": 9}, [9]),
        ({"on_s": 3, "every_s": 10, "phase_s": 4}, [4, 7, 14, 17, 24, 27]),
        ({"on_s": 3, "every_s": 10, "phase_s": 9}, [2, 9, 12, 19, 22, 29]),
        ({"on_s": 10, "every_s": 10}, []),
        ({"trace": [[0, 3, 5], [0, 1, 2], [0, 4, 6], [0, 6, 8]]}, [1, 2, 3, 8]),
        ({"trace": [[0, 0, 5]], "joins_s": 2}, [2, 5]),
        # reachable while all rules say so: 4-7, 14-17, 24-27; 0-5, 16-25
        ({"on_s": 3, "every_s": 10, "phase_s": 4, "trace": [[0, 0, 5], [0, 16, 25]]}, [4, 5, 16, 17, 24, 25]),
    ],
    ids=str,
)
def test_windows_by_hand(schedule, availability, expected):
    assert edges(schedule(**availability), 0, 30) == expected


def test_a_window_includes_its_first_second_and_not_its_last(schedule):
    found = schedule(joins_s=5, leaves_s=9)
    assert [found.reachable(0, time_s) for time_s in (4.9, 5, 8.9, 9)] == [False, True, True, False]
    assert schedule(joins_s=5, leaves_s=9).next_s(0, 9) == math.inf
    assert schedule(share=0).next_s(0, 0) == math.inf
    assert schedule(share=0.5, trace=[[0, 1, 2]]).next_s(0, 3) == math.inf


def test_phases_differ_between_devices_and_follow_from_the_seed(schedule):
    first = [edges(schedule(devices=3, seed=1, on_s=3, every_s=10), device, 30) for device in range(3)]
    assert len({tuple(each) for each in first}) == 3
    assert first == [edges(schedule(devices=3, seed=1, on_s=3, every_s=10), device, 30) for device in range(3)]
    assert first != [edges(schedule(devices=3, seed=2, on_s=3, every_s=10), device, 30) for device in range(3)]


def test_a_share_of_the_time_in_periods_of_a_mean_length(schedule):
    found = schedule(devices=200, share=0.75, mean_on_s=30)
    unreachable = [len(found.unreachable(time_s)) for time_s in range(0, 4000, 100)]
    assert sum(unreachable) / len(unreachable) / 200 == pytest.approx(0.25, abs=0.02)
    assert unreachable[0] == pytest.approx(50, abs=15)  # from the first second on
    periods = [b - a for a, b in pairwise(edges(schedule(share=0.75, mean_on_s=30, seed=8), 0, 40_000))]
    assert sorted(sum(each) / len(each) for each in (periods[::2], periods[1::2])) == pytest.approx([10, 30], rel=0.2)


def test_the_answers_do_not_depend_on_how_often_it_is_asked(schedule):
    often, seldom = schedule(share=0.5, mean_on_s=10), schedule(share=0.5, mean_on_s=10)
    expected = {time_s: (often.reachable(0, time_s), often.next_s(0, time_s)) for time_s in range(1000)}
    for time_s in (17, 400, 401, 999):
        assert (seldom.reachable(0, time_s), seldom.next_s(0, time_s)) == expected[time_s]


def test_disruptions_follow_from_seed_device_and_plan(make_fleet, make_plan):
    fleet = make_fleet(1, 1, dropout=0.3, jitter=0.2)
    plans = [make_plan(plan_id, plan_id % 2) for plan_id in range(1, 2001)]
    disruptions = [DisruptionSampler(fleet, seed=1).of(plan) for plan in plans]
    again = DisruptionSampler(fleet, seed=1)
    assert [again.of(plan) for plan in reversed(plans)] == disruptions[::-1]
    assert [DisruptionSampler(fleet, seed=2).of(plan) for plan in plans] != disruptions
    for stage in ("down", "train", "up"):
        assert sum(disruption.lost_in == stage for disruption in disruptions) == pytest.approx(200, abs=45)
    shares = [disruption.share for disruption in disruptions if disruption.lost_in]
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.05)
    for name in ("compute", "down", "up"):
        factors = [getattr(disruption, name) for disruption in disruptions]
        assert sum(factors) / len(factors) == pytest.approx(1.0, abs=0.02)
        assert math.sqrt(sum(math.log(f) ** 2 for f in factors) / len(factors)) == pytest.approx(0.2, rel=0.1)


def test_without_chances_nothing_is_drawn(make_fleet, make_plan):
    assert DisruptionSampler(make_fleet(1, availability=0.5), seed=1).of(make_plan(1)) is NO_DISRUPTION
    only = DisruptionSampler(make_fleet(1, jitter={"links": 0.5}), seed=1).of(make_plan(1))
    assert only.compute == 1.0
    assert only.lost_in is None
    assert only.down != only.up
