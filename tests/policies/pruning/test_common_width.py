"""One width for all devices, on the network of ``network.py``: 16 bytes of memory for each weight."""

import json

import pytest
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.plan import Objective
from fedbonsai.policies.pruning.capacity import NARROWEST
from fedbonsai.policies.pruning.common_width import AllSmall
from msgspec.structs import replace

from .network import WEIGHTS, make_fleet, weights


def decide(view, state=None, policy=None, devices=None):
    policy = policy or AllSmall(min_channels=1)
    plans = tuple(view.new_plan(device) for device in (view.devices if devices is None else devices))
    decision, state = policy.decide(view, policy.init() if state is None else state, Decision(plans=plans))
    return decision, json.loads(json.dumps(state))


def widths(decision):
    return {plan.device: plan.part.width for plan in decision.plans}


def test_the_widest_model_that_the_device_with_the_least_memory_holds():
    view = make_fleet(seconds=(1, 1, 1), memory={1: 200_000})
    decision, state = decide(view)
    (width,) = set(widths(decision).values())
    assert 0.95 * 200_000 <= 16 * weights(width) <= 200_000
    assert state == {"width": width}
    assert [plan.reasons for plan in decision.plans] == [(f"all_small: {width:.3g} of the channels",)] * 3
    assert decision.left_out == ()


def test_where_all_hold_the_whole_model_it_stays_whole():
    view = make_fleet(seconds=(1, 2), memory={0: 16 * WEIGHTS, 1: 16 * WEIGHTS})
    decision, state = decide(view)
    assert [plan.part for plan in decision.plans] == [view.new_plan(device).part for device in (0, 1)]
    assert state == {"width": 1.0}


def test_speed_does_not_count():
    slow, fast = make_fleet(seconds=(1, 1000), memory={0: 200_000}), make_fleet(seconds=(1, 1), memory={0: 200_000})
    assert decide(slow)[1] == decide(fast)[1]


def test_devices_that_were_not_chosen_count_too():
    view = make_fleet(seconds=(1, 1, 1), memory={2: 200_000})
    decision, state = decide(view, devices=[0])
    assert widths(decision) == {0: state["width"]}
    assert state == decide(view)[1]


def test_a_device_that_the_narrowest_does_not_fit_is_left_out_and_does_not_count():
    view = make_fleet(seconds=(1, 1, 1), memory={0: 100, 1: 200_000})
    decision, state = decide(view)
    assert set(widths(decision)) == {1, 2}
    assert state == decide(make_fleet(seconds=(1, 1, 1), memory={1: 200_000}))[1]
    ((device, reason),) = decision.left_out
    assert device == 0
    assert reason.startswith("memory: needs ")


def test_where_it_fits_no_device_all_are_left_out():
    decision, state = decide(make_fleet(seconds=(1, 1), memory={0: 100, 1: 100}))
    assert (decision.plans, [device for device, _ in decision.left_out]) == ((), [0, 1])
    assert state == {"width": NARROWEST}


def test_the_width_is_kept():
    state = decide(make_fleet(seconds=(1, 1), memory={0: 200_000}))[1]
    later = make_fleet(seconds=(1, 1), version=9)
    assert set(widths(decide(later, state)[0]).values()) == {state["width"]}
    learned = make_fleet(seconds=(1, 1), version=9, memory_budgets={1: 100_000})
    decision, again = decide(learned, state)
    assert (set(widths(decision)), again) == ({0}, state)
    assert [device for device, _ in decision.left_out] == [1]


def test_a_least_number_of_channels_is_in_every_part():
    view = make_fleet(seconds=(1, 1), memory={0: 200_000})
    decision, _ = decide(view, policy=AllSmall(min_channels=8))
    assert {plan.part.min_channels for plan in decision.plans} == {8}
    assert {plan.part.channels for plan in decision.plans} == {"prefix"}


def test_without_plans_nothing_is_chosen():
    view = make_fleet(seconds=(1, 1))
    assert decide(view, devices=[]) == (Decision(), {"width": None})


def test_plans_that_evaluate_are_not_changed():
    view = make_fleet(seconds=(1, 1), memory={0: 200_000})
    plan = replace(view.new_plan(0), objective=Objective(kind="evaluate"))
    policy = AllSmall()
    decision, _ = policy.decide(view, policy.init(), Decision(plans=(plan, view.new_plan(1)), left_out=((3, "x"),)))
    assert (decision.plans[0], decision.left_out) == (plan, ((3, "x"),))


def test_fields_are_checked():
    with pytest.raises(ValueError, match="min_channels is 0: expected `int` >= 1"):
        AllSmall(min_channels=0)
