"""The devices that are chosen when plans have ended."""

import pytest
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.scheduling.asynchronous import Asynchronous


def devices(decision):
    return [plan.device for plan in decision.plans]


def test_at_the_start_as_many_devices_as_the_concurrency(make_view):
    decided, _ = Asynchronous(concurrency=3, buffer=2).decide(make_view(seed=1), None, Decision())
    assert len(devices(decided)) == 3
    assert (decided.close_at, decided.keep_open) == (2, True)
    everybody, _ = Asynchronous().decide(make_view(), None, Decision())
    assert sorted(devices(everybody)) == [0, 1, 2, 3]


def test_then_one_for_each_plan_that_has_ended_also_in_a_round_that_has_begun(make_view, make_plan):
    busy = {0: make_plan(0), 2: make_plan(2)}
    drawn = set()
    for seed in range(20):
        view = make_view(in_flight=busy, seed=seed, dispatched=3)
        (device,) = devices(Asynchronous(concurrency=3).decide(view, None, Decision())[0])
        drawn.add(device)
    assert drawn == {1, 3}
    nobody, _ = Asynchronous(concurrency=2).decide(make_view(in_flight=busy), None, Decision())
    assert (devices(nobody), nobody.keep_open) == ([], True)


def test_a_device_without_the_memory_is_left_out(make_view):
    decided, _ = Asynchronous().decide(make_view(memory_mb={1: 100}), None, Decision())
    assert sorted(devices(decided)) == [0, 2, 3]
    assert [device for device, _ in decided.left_out] == [1]


@pytest.mark.parametrize("wrong", [{"buffer": 0}, {"concurrency": 0}, {"concurrency": 1.5}], ids=str)
def test_fields_are_checked(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} is"):
        Asynchronous(**wrong)
