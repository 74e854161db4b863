"""The policy on the network of ``network.py``: device 0 trains the whole model in 1 s, the others in 2, 4, 8 and 16 s."""

import json
import time
from collections import Counter

import pytest
from fedbonsai.learning.spec import Training
from fedbonsai.policies.checks.statements import chain_fault, statements_of
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.estimate import Estimate
from fedbonsai.policies.partitioning.ecofed import EcoFed
from fedbonsai.policies.partitioning.local_loss import LocalLoss
from fedbonsai.policies.partitioning.splitfed import SplitFed
from fedbonsai.policies.plan import Objective, Split
from fedbonsai.policies.policy import chain
from fedbonsai.policies.pruning.width import Width, median_s
from fedbonsai.policies.report import Measured, Outcome, Report
from fedbonsai.policies.resolve_policy import make_policy
from fedbonsai.policies.scheduling.asynchronous import Asynchronous
from fedbonsai.policies.scheduling.closing import Closing
from fedbonsai.policies.selection.plain import All, Fastest, RandomCohort
from msgspec.structs import replace

from .network import WEIGHTS, WHOLE_FLOPS, make_fleet, make_plan, weights

EXACT = {"levels": (), "min_channels": 1}
CHANNELS = {"unit": "width", "min_channels": 1}  # levels of 1, 1/2, 1/4, 1/8 and 1/16 of the channels


def decide(policy, view, state=None, devices=None):
    """The decision on plans for ``devices`` (default: all), and the state as a checkpoint restores it."""
    plans = tuple(view.new_plan(device) for device in (view.devices if devices is None else devices))
    decision, state = policy.decide(view, policy.init() if state is None else state, Decision(plans=plans))
    return decision, json.loads(json.dumps(state))


def widths(decision):
    return {plan.device: plan.part.width for plan in decision.plans}


def seconds(view, decision):
    return {plan.device: view.estimate(plan.device, plan).seconds for plan in decision.plans}


def took_part(view, decision, *, train_s=None, version=None):
    """Fields of a later view, in which the plans of a decision have ended."""
    reports = {}
    for plan in decision.plans:
        cost = view.estimate(plan.device, plan)
        measured = Measured(train_s=train_s[plan.device] if train_s else cost.compute_s)
        numbered = replace(plan, id=1 + plan.device + 100 * view.version)
        reports[plan.device] = Report(plan=numbered, steps=1, samples=10, virtual=cost, measured=measured)
    return {
        "version": view.version + 1 if version is None else version,
        "last_reports": reports,
        "participation": dict.fromkeys(reports, 1),
    }


# The deadline rule.


def test_every_device_within_five_percent_below_the_time_of_the_fastest():
    view = make_fleet()
    decision, _ = decide(Width(deadline_s=1.0, **EXACT), view)
    found = seconds(view, decision)
    assert found[0] == 1.0
    assert all(0.95 <= found[device] <= 1.0 for device in (1, 2, 3, 4))
    assert max(found.values()) <= 1.3 * min(found.values())  # device 4 is 16 times slower than device 0


@pytest.mark.parametrize("fixed_s", [0.0, 0.2])
def test_with_levels_never_above_the_budget_and_the_slowest_within_the_time_of_the_fastest(fixed_s):
    view = make_fleet(fixed_s=fixed_s)
    decision, _ = decide(Width(deadline_s=1.0 + fixed_s, min_channels=1), view)
    found = seconds(view, decision)
    assert max(found.values()) == found[0]
    assert found[0] <= 1.3 * found[4]
    assert widths(decision)[0] == 1.0
    assert sorted(widths(decision).values(), reverse=True) == list(widths(decision).values())


def test_levels_of_the_flops_of_a_device_half_as_fast_are_half_the_flops():
    decision, _ = decide(Width(deadline_s=1.0, min_channels=1), make_fleet())
    shares = [weights(width) / WEIGHTS for width in widths(decision).values()]
    for share, level in zip(shares, (1, 0.5, 0.25, 0.125, 0.0625), strict=True):
        assert 0.95 * level <= share <= level


def test_levels_of_the_channels():
    # Weights of 1/2, 1/4, 1/8 and 1/16: 11616, 3248, 984 and 332 of 43712, so 26.6, 7.4, 2.3 and 0.8 %.
    decision, _ = decide(Width(deadline_s=1.0, **CHANNELS), make_fleet(seconds=(1, 1.1, 3.7, 3.8, 13.4, 13.5, 44, 45)))
    assert list(widths(decision).values()) == [1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625]


def test_a_given_deadline():
    decision, state = decide(Width(deadline_s=2.0, **CHANNELS), make_fleet())
    assert widths(decision) == {0: 1.0, 1: 1.0, 2: 0.5, 3: 0.25, 4: 0.25}
    assert [plan.reasons[-1] for plan in decision.plans] == [
        "width: whole, 1 of 2 s",
        "width: whole, 2 of 2 s",
        "width: 0.5 of the channels, 27 % of the FLOPs, 1.06 of 2 s",
        "width: 0.25 of the channels, 7.4 % of the FLOPs, 0.594 of 2 s",
        "width: 0.25 of the channels, 7.4 % of the FLOPs, 1.19 of 2 s",
    ]
    assert state["deadline_s"] is None


def test_a_device_that_no_level_fits_is_left_out():
    decision, state = decide(Width(deadline_s=0.1, **CHANNELS), make_fleet())
    assert set(widths(decision)) == {0, 1, 2, 3}
    assert decision.left_out == ((4, "deadline: needs at least 0.122 s, has 0.1 s"),)
    assert "4" not in state["devices"]
    exact, _ = decide(Width(deadline_s=0.001, levels=(), min_channels=8), make_fleet(seconds=(1, 1)))
    assert not exact.plans
    assert [device for device, _ in exact.left_out] == [0, 1]
    slow, _ = decide(Width(rule="linear", most_pruned=0.999, levels=(0.5,), unit="width"), make_fleet())
    assert slow.left_out[-1] == (4, "speed: needs 26.6 % of the FLOPs, 6.34 % allowed")


def in_steps(device, *, version=0):
    """A plan of five steps of two samples."""
    return make_plan(device, version=version, training=Training(batch_size=2))


def test_a_device_that_no_level_fits_in_time_stops_at_the_deadline():
    # At 1/16 of the channels device 4 takes 16 * 332 / 43712 = 0.122 s for its five steps, and 0.024 s for one.
    policy = Width(deadline_s=0.1, too_slow="fewer_steps", **CHANNELS)
    view = make_fleet(plan_maker=in_steps)
    decision, state = decide(policy, view)
    kept, _ = decide(Width(deadline_s=0.1, **CHANNELS), view)
    assert decision.plans[:4] == kept.plans
    assert [(plan.device, plan.part.width, plan.deadline_s) for plan in decision.plans[4:]] == [(4, 0.0625, 0.1)]
    assert decision.plans[4].reasons == ("width: 0.0625 of the channels, stops after 0.1 s",)
    assert decision.plans[4].part == replace(kept.plans[3].part, width=0.0625)
    assert decision.plans[4].training == view.new_plan(4).training
    assert not decision.left_out
    assert state["devices"]["4"] == {}
    # It has no level, so that it is no wider, nor whole, by a tolerance that is for those that have one.
    later = make_fleet(plan_maker=in_steps, **took_part(view, decision))
    again, _ = decide(policy, later, state)
    assert again.plans[4].deadline_s == 0.1
    faster = make_fleet(seconds=(1, 2, 4, 8, 8), plan_maker=in_steps, **took_part(view, decision))
    again, state = decide(policy, faster, state)
    assert (again.plans[4].deadline_s, again.plans[4].part.width) == (None, 0.0625)
    assert state["devices"]["4"] == {"width": 0.0625, "at": 1}


@pytest.mark.parametrize(("deadline", "stops"), [(0.0244, [2.0]), (0.0242, [])])
def test_a_device_without_the_time_for_one_step_is_left_out(deadline, stops):
    view = make_fleet(seconds=(16,), plan_maker=in_steps)
    decision, state = decide(Width(deadline_s=deadline, too_slow="fewer_steps", **CHANNELS), view)
    assert [plan.deadline_s for plan in decision.plans] == [deadline] * len(stops)
    assert decision.left_out == (() if stops else ((0, "deadline: needs at least 0.0243 s, has 0.0242 s"),))
    assert bool(state["devices"]) == bool(stops)
    whole, _ = decide(Width(deadline_s=0.1, too_slow="fewer_steps", **CHANNELS), make_fleet(seconds=(16,)))
    assert whole.left_out == ((0, "deadline: needs at least 0.122 s, has 0.1 s"),)  # all of its samples are one step


def test_a_device_without_the_memory_is_left_out_however_slow():
    view = make_fleet(seconds=(1, 1, 16, 16), memory={1: 5_311, 3: 5_311}, plan_maker=in_steps)
    decision, _ = decide(Width(deadline_s=0.1, too_slow="fewer_steps", **CHANNELS), view)
    assert [plan.device for plan in decision.plans] == [0, 2]
    reason = "memory: needs at least 0.006 MB, has 0.005 MB"
    assert decision.left_out == ((1, reason), (3, reason))


def test_an_earlier_deadline_of_a_plan_is_kept():
    stops = Width(deadline_s=0.1, too_slow="fewer_steps", **CHANNELS)
    for after_s, expected in ((0.05, 0.05), (0.2, 0.1)):
        policy = chain(All(), Closing(after_s=after_s, partial=True), stops)
        decision, _ = policy.decide(make_fleet(seconds=(64,), plan_maker=in_steps), policy.init(), Decision())
        assert [plan.deadline_s for plan in decision.plans] == [expected]


def test_by_its_measured_speed_a_device_stops_early_or_is_left_out():
    policy = Width(deadline_s=0.1, too_slow="fewer_steps", **CHANNELS)
    for slowness, expected in ((1, None), (2, 0.1), (10, "left out")):
        view = make_fleet(seconds=(8,), clock="wall", plan_maker=in_steps)
        decision, state = decide(policy, view)
        assert decision.plans[0].deadline_s is None  # 0.061 s as declared
        taken = {0: slowness * view.estimate(0, decision.plans[0]).compute_s}
        fields = took_part(view, decision, train_s=taken)
        decision, state = decide(policy, make_fleet(seconds=(8,), clock="wall", plan_maker=in_steps, **fields), state)
        found = decision.plans[0].deadline_s if decision.plans else "left out"
        assert found == expected
        speed = state["devices"]["0"].get("speed")
        assert expected == "left out" or speed == pytest.approx(WHOLE_FLOPS / 8 / slowness)


def test_the_deadline_is_that_of_the_median_device_each_class_at_its_median_samples():
    names = ["fast", "fast", "fast", "slow"]
    view = make_fleet(seconds=(1, 1, 1, 4), samples=(1, 20, 40, 10), names=names)
    assert median_s(view) == 2.0  # 20 samples, not the 1 of device 0
    assert median_s(make_fleet()) == 4.0  # of 1, 2, 4, 8 and 16 s
    assert median_s(make_fleet(seconds=(1, 2, 4, 8))) == 2.0  # the faster one of the two in the middle
    view = make_fleet(seconds=(1, 1, 4), samples=(0, 10, 10), names=["fast", "fast", "slow"])
    assert median_s(view) == 1.0  # device 0 has no samples
    assert median_s(make_fleet(seconds=(1, 2), samples=(1, 1), min_samples=2)) == 0.1  # none has enough


def test_the_deadline_does_not_move_with_the_cohort_nor_with_time():
    view = make_fleet()
    decision, state = decide(Width(**CHANNELS), view, devices=[3, 4])
    assert widths(decision) == {3: 0.5, 4: 0.25}
    later = make_fleet(seconds=(16, 16, 16, 8, 16), **took_part(view, decision))
    decision, state = decide(Width(**CHANNELS), later, state, devices=[3])
    assert (widths(decision), state["deadline_s"]) == ({3: 0.5}, 4.0)


# Linear and fixed.


def test_linear_levels_by_hand():
    # 1 - 0.9 (1 - speed / fastest): 1, 0.55, 0.325, 0.2125, 0.15625 of the FLOPs
    decision, state = decide(Width(rule="linear", **EXACT), make_fleet())
    shares = [weights(width) / WEIGHTS for width in widths(decision).values()]
    for share, level in zip(shares, (1, 0.55, 0.325, 0.2125, 0.15625), strict=True):
        assert 0.95 * level <= share <= level
    assert state["deadline_s"] is None
    snapped, _ = decide(Width(rule="linear", **CHANNELS), make_fleet())
    assert list(widths(snapped).values()) == [1.0, 0.5, 0.5, 0.25, 0.25]  # 26.6 % and 7.4 % of the FLOPs
    assert snapped.plans[1].reasons == ("width: 0.5 of the channels, 27 % of the FLOPs, 55 % allowed",)


def test_linear_with_another_limit():
    decision, _ = decide(Width(rule="linear", most_pruned=0.5, **CHANNELS), make_fleet())
    assert list(widths(decision).values()) == [1.0, 0.5, 0.5, 0.5, 0.5]  # at least 53 % are allowed
    whole, _ = decide(Width(rule="linear", most_pruned=0.0), make_fleet())
    assert set(widths(whole).values()) == {1.0}


def test_fixed_widths_by_class():
    view = make_fleet(names=["desktop", "phone", "phone", "board", "board"])
    policy = make_policy(
        [{"name": "width", "rule": "fixed", "widths": {"desktop": 1.0, "phone": 0.3, "board": 0.0625}}]
    )
    decision, _ = decide(policy, view)
    assert list(widths(decision).values()) == [1.0, 0.3, 0.3, 0.0625, 0.0625]
    assert decision.plans[0].part == view.new_plan(0).part
    assert decision.plans[1].reasons == ("width: 0.3 of the channels, 11 % of the FLOPs",)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"a": 1.0, "b": 0.5, "c": 0.5}, "widths names the class 'c', which the fleet does not have; allowed: a, b"),
        ({"a": 1.0}, "widths has no width for the class 'b'; it must name all of: a, b"),
    ],
)
def test_fixed_widths_must_name_the_classes_of_the_fleet(given, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        decide(Width(rule="fixed", widths=given), make_fleet(seconds=(1, 2), names=["a", "b"]))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rule": "linear", "deadline_s": 3.0}, "deadline_s is 3; it counts only where rule is 'deadline'"),
        ({"widths": {"a": 0.5}}, "widths is {'a': 0.5}; it counts only where rule is 'fixed'"),
        ({"rule": "fixed"}, "rule is 'fixed' and widths is empty; it must give each class of the fleet its width"),
        ({"rule": "fixed", "widths": {"a": 0.0}}, r"widths is \{'a': 0.0\}: expected `float` > 0.0"),
        ({"levels": (1.5,)}, r"levels is \(1.5,\): expected `float` <= 1.0"),
        ({"most_pruned": 1.0}, "most_pruned is 1.0: expected `float` < 1.0"),
        ({"too_slow": "wait"}, "too_slow is 'wait'"),
        (
            {"rule": "linear", "too_slow": "fewer_steps"},
            "too_slow is 'fewer_steps'; it counts only where rule is 'deadline'",
        ),
        ({"channels": "random"}, "channels is 'random'"),
    ],
)
def test_fields_are_checked(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Width(**fields)


# Memory.


def test_memory_is_never_exceeded_whatever_the_rule():
    # 16 bytes for each weight: 699392, 185856 (1/2), 51968 (1/4), 15744 (1/8), 5312 (1/16)
    view = make_fleet(seconds=(1,) * 4, memory={0: 699_392, 1: 699_391, 2: 52_000, 3: 5_311})
    for policy in (Width(**CHANNELS), Width(rule="linear", **CHANNELS)):
        decision, state = decide(policy, view)
        assert widths(decision) == {0: 1.0, 1: 0.5, 2: 0.25}
        assert decision.left_out == ((3, "memory: needs at least 0.006 MB, has 0.005 MB"),)
        assert set(state["devices"]) == {"0", "1", "2"}
    assert decision.plans[2].reasons == (
        "width: 0.25 of the channels, 7.4 % of the FLOPs, memory: needs 0.052 MB, has 0.052 MB",
    )
    fixed = Width(rule="fixed", widths={f"d{device}": 0.5 for device in range(4)}, min_channels=1)
    decision, _ = decide(fixed, view)
    assert widths(decision) == {0: 0.5, 1: 0.5}
    assert decision.left_out[0] == (2, "memory: needs 0.186 MB, has 0.052 MB")


def test_of_own_widths_the_widest_that_memory_holds():
    view = make_fleet(seconds=(1, 1), memory={1: 200_000})
    decision, _ = decide(Width(**EXACT), view)
    assert 0.95 * 200_000 <= 16 * weights(widths(decision)[1]) <= 200_000


def test_a_learned_memory_budget_narrows_at_once_and_without_the_margin():
    view = make_fleet(seconds=(1, 1))
    decision, state = decide(Width(**CHANNELS), view)
    later = make_fleet(seconds=(1, 1), memory_budgets={1: 186_000}, **took_part(view, decision))
    assert widths(decide(Width(**CHANNELS), later, state)[0]) == {0: 1.0, 1: 0.5}
    back = make_fleet(seconds=(1, 1), memory_budgets={1: 699_392}, **took_part(view, decision, version=30))
    state["devices"]["1"] = {"width": 0.5, "at": 1}
    assert widths(decide(Width(deadline_s=2.0, **CHANNELS), back, state)[0]) == {0: 1.0, 1: 1.0}


# Levels over time.


def devices_at(**entries):
    return {"deadline_s": None, "devices": {name.removeprefix("d"): entry for name, entry in entries.items()}}


@pytest.mark.parametrize(
    ("deadline", "expected"),
    [(0.99, 0.5), (1.0, 0.5), (1.14, 0.5), (1.16, 1.0), (0.27, 0.5), (0.26, 0.25)],
)
def test_wider_only_with_a_margin_narrower_at_once(deadline, expected):
    # 1 s for the whole model, 0.2657 s for half of the channels; the device is at one half since long ago.
    view = make_fleet(seconds=(1,), version=20, participation={0: 3})
    policy = Width(deadline_s=deadline, hysteresis=0.15, **CHANNELS)
    assert widths(decide(policy, view, devices_at(d0={"width": 0.5, "at": 0}))[0]) == {0: expected}
    fresh = widths(decide(policy, view)[0])[0]
    assert fresh == (1.0 if deadline >= 1 else expected)  # without a history there is no margin


def test_wider_only_every_so_many_rounds_but_narrower_in_any():
    policy = Width(deadline_s=2.0, every=10, **CHANNELS)
    state = devices_at(d0={"width": 0.5, "at": 5}, d1={"width": 0.5, "at": 5})
    seen = {}
    for version in range(6, 18):
        view = make_fleet(seconds=(1, 9), version=version, participation={0: 1, 1: 1})
        decision, state = decide(policy, view, state)
        seen[version] = tuple(widths(decision).values())
    assert seen == {version: ((1.0 if version >= 15 else 0.5), 0.25) for version in range(6, 18)}
    assert state["devices"]["0"] == {"width": 1.0, "at": 15}


def test_the_level_of_a_fastest_device_stays_where_its_costs_are_slightly_above_the_first():
    view = make_fleet(seconds=(1, 2))
    decision, state = decide(Width(**CHANNELS), view)
    assert widths(decision) == {0: 1.0, 1: 0.5}
    more = make_fleet(seconds=(1, 2), fixed_s=0.14, **took_part(view, decision))  # packets are larger now
    assert widths(decide(Width(**CHANNELS), more, state)[0]) == {0: 1.0, 1: 0.5}
    much = make_fleet(seconds=(1, 2), fixed_s=0.16, **took_part(view, decision))
    assert widths(decide(Width(**CHANNELS), much, state)[0]) == {0: 0.5, 1: 0.5}


def test_only_devices_that_have_taken_part_are_remembered():
    view = make_fleet()
    _, state = decide(Width(**CHANNELS), view)
    assert set(state["devices"]) == {"0", "1", "2", "3", "4"}
    later = make_fleet(version=1, participation={2: 1}, in_flight={3: make_plan(3)})
    _, state = decide(Width(**CHANNELS), later, state, devices=[0])
    assert set(state["devices"]) == {"0", "2", "3"}
    assert decide(Width(**CHANNELS), later, state, devices=[])[1] == state


def test_another_part_of_the_model_is_evaluated_anew():
    view = make_fleet(seconds=(4,), version=3, participation={0: 1})
    state = devices_at(d0={"width": 0.3, "at": 2})  # of levels that there are no more
    assert widths(decide(Width(deadline_s=2.0, **CHANNELS), view, state)[0]) == {0: 0.5}


# The wall clock.


def test_under_the_wall_clock_the_measured_speed_decides():
    policy = Width(deadline_s=1.0, smoothing=0.5, **CHANNELS)
    view = make_fleet(seconds=(1, 1), clock="wall")
    decision, state = decide(policy, view)
    assert widths(decision) == {0: 1.0, 1: 1.0}
    # Device 1 took 4 s, so its speed is a quarter: half of the channels take 4 * 0.2657 = 1.06 s, a quarter 0.3 s.
    fields = took_part(view, decision, train_s=[1.0, 4.0])
    second = make_fleet(seconds=(1, 1), clock="wall", **fields)
    decision, state = decide(policy, second, state)
    assert widths(decision) == {0: 1.0, 1: 0.25}
    assert state["devices"]["1"]["speed"] == pytest.approx(WHOLE_FLOPS / 4)
    assert decision.plans[1].reasons == ("width: 0.25 of the channels, 7.4 % of the FLOPs, 0.297 of 1 s",)
    # Then a quarter of the channels at the declared speed: the mean is 5/8 of it.
    fields = took_part(second, decision, train_s=[1.0, 3248 / WEIGHTS], version=30)
    third = make_fleet(seconds=(1, 1), clock="wall", **fields)
    decision, state = decide(policy, third, state)
    assert state["devices"]["1"]["speed"] == pytest.approx(WHOLE_FLOPS * 5 / 8)
    assert widths(decision) == {0: 1.0, 1: 0.5}  # 0.2657 / (5/8) = 0.43 s
    # The same report again (a selection behind has dropped the plan) changes nothing.
    assert decide(policy, third, state)[1]["devices"]["1"] == state["devices"]["1"]


def test_under_the_virtual_clock_measurements_change_nothing():
    policy = Width(deadline_s=1.0, **CHANNELS)
    view = make_fleet(seconds=(1, 1))
    decision, state = decide(policy, view)
    later = make_fleet(seconds=(1, 1), **took_part(view, decision, train_s=[1.0, 40.0]))
    decision, state = decide(policy, later, state)
    assert widths(decision) == {0: 1.0, 1: 1.0}
    assert "speed" not in state["devices"]["1"]


def test_measured_speeds_count_for_the_linear_rule_too():
    policy = Width(rule="linear", hysteresis=0.0, **EXACT)
    view = make_fleet(seconds=(1, 1), clock="wall")
    decision, state = decide(policy, view)
    later = make_fleet(seconds=(1, 1), clock="wall", **took_part(view, decision, train_s=[1.0, 2.0]))
    decision, _ = decide(policy, later, state)
    assert 0.95 * 0.55 <= weights(widths(decision)[1]) / WEIGHTS <= 0.55


@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": Outcome.FAILED},
        {"measured": Measured(train_s=0.0)},
        {"plan": make_plan(0, training=Training(epochs=0)), "virtual": Estimate()},  # nothing was trained
        {"plan": make_plan(0, split=Split(cut="front"))},  # it waited for its host
    ],
)
def test_reports_that_say_nothing_of_the_speed_are_left_aside(changes):
    view = make_fleet(seconds=(1,), clock="wall")
    report = Report(plan=make_plan(0, id=9), virtual=view.estimate(0, make_plan(0)), measured=Measured(train_s=40.0))
    seen = {}
    for name, last in (("plain", report), ("changed", replace(report, **changes))):
        later = make_fleet(seconds=(1,), clock="wall", version=1, participation={0: 1}, last_reports={0: last})
        decision, state = decide(Width(deadline_s=1.0, **CHANNELS), later)
        seen[name] = widths(decision)[0], "speed" in state["devices"]["0"]
    assert seen == {"plain": (0.125, True), "changed": (1.0, False)}  # 40 s * 984/43712 = 0.9 s


def test_of_a_plan_that_stopped_early_the_steps_that_were_made_count():
    plan = make_plan(0, deadline_s=0.5, train_s=0.5, id=9)
    plan = replace(plan, training=replace(plan.training, batch_size=1))  # 10 steps
    report = Report(plan=plan, steps=4, virtual=Estimate(flops=99), measured=Measured(train_s=0.8))
    view = make_fleet(seconds=(1,), clock="wall", version=1, participation={0: 1}, last_reports={0: report})
    _, state = decide(Width(), view)
    assert state["devices"]["0"]["speed"] == pytest.approx(0.4 * WHOLE_FLOPS / 0.8)


# Channels and turns.


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [("prefix", 0)] * 3 + [("l1", 0)] * 10 + [("l1", 1)] * 2),
        ({"channels": "batchnorm", "warm_up": 0, "refresh": 7}, [("batchnorm", n // 7) for n in range(15)]),
        ({"channels": "prefix", "refresh": 1}, [("prefix", 0)] * 15),
        ({"channels": "rolling", "refresh": 1}, [("rolling", n) for n in range(15)]),
    ],
)
def test_rankings_and_windows_by_round(fields, expected):
    policy = Width(deadline_s=1.0, scaled=True, min_channels=4, **fields)
    found = []
    for version in range(15):
        decision, _ = decide(policy, make_fleet(version=version))
        whole, *narrow = [plan.part for plan in decision.plans]
        assert whole == make_plan(0).part  # nothing is chosen where all channels are held
        assert {(part.min_channels, part.scaled) for part in narrow} == {(4, True)}
        ((channels, turn),) = {(part.channels, part.turn) for part in narrow}
        found.append((channels, turn))
    assert found == expected


def test_a_new_ranking_costs_no_other_estimates():
    found = []
    for version in (3, 13, 200):
        view = make_fleet(version=version)
        decide(Width(), view)
        found.append(view.estimator.calls)
    assert found[0] == found[1] == found[2]


# Chains.


def test_plans_that_are_cut_keep_their_cut_and_both_legs_their_width():
    policy = chain(All(), SplitFed(cut="front"), Width(deadline_s=1.0, **CHANNELS))
    view = make_fleet()
    decision, _ = policy.decide(view, policy.init(), Decision())
    # The device holds half of the work: 0.5, 1, 2, 4 and 8 s for the whole width of it.
    assert widths(decision) == {0: 1.0, 1: 1.0, 2: 0.5, 3: 0.25, 4: 0.25}
    assert {plan.part.blocks for plan in decision.plans} == {("front",)}
    assert {plan.split.cut for plan in decision.plans} == {"front"}


def test_a_selection_before_leaves_memory_to_it_and_one_behind_narrows_its_plans():
    view = make_fleet(memory={4: 16_000})
    policy = chain(RandomCohort(cohort=1.0), Width(deadline_s=100.0, **CHANNELS), Fastest(cohort=2))
    decision, state = policy.decide(view, policy.init(), Decision())
    assert widths(decision) == {0: 1.0, 4: 0.125}  # 1 s, and 16 s * 984/43712 = 0.36 s
    later = make_fleet(memory={4: 16_000}, version=1, participation={0: 1, 4: 1})
    _, state = policy.decide(later, state, Decision())
    assert json.loads(json.dumps(state)) == state


def test_in_asynchronous_rounds():
    policy = chain(Asynchronous(concurrency=3, buffer=1), Width(deadline_s=1.0, **CHANNELS))
    view = make_fleet()
    decision, state = policy.decide(view, policy.init(), Decision())
    assert len(decision.plans) == 3
    assert (decision.close_at, decision.keep_open) == (1, True)
    expected = {0: 1.0, 1: 0.5, 2: 0.25, 3: 0.25, 4: 0.125}
    assert widths(decision).items() <= expected.items()
    flying = {plan.device: plan for plan in decision.plans[1:]}
    again = make_fleet(version=1, in_flight=flying, participation={decision.plans[0].device: 1}, seed=8)
    decision, state = policy.decide(again, state, Decision())
    assert len(decision.plans) == 1
    assert widths(decision).items() <= expected.items()
    nothing = make_fleet(version=1, in_flight={**flying, decision.plans[0].device: decision.plans[0]}, dispatched=1)
    assert policy.decide(nothing, state, Decision())[1] == state


def test_a_deadline_at_which_devices_stop_early_does_not_hide_what_they_need():
    policy = chain(All(), Closing(after_s=1.0, partial=True), Width(deadline_s=1.0, **CHANNELS))
    decision, _ = policy.decide(make_fleet(), policy.init(), Decision())
    assert widths(decision) == {0: 1.0, 1: 0.5, 2: 0.25, 3: 0.25, 4: 0.125}
    assert {plan.deadline_s for plan in decision.plans} == {1.0}


def test_evaluations_and_replays_keep_their_width():
    view = make_fleet(seconds=(1, 16))
    evaluation = replace(view.new_plan(1), objective=Objective(kind="evaluate"))
    decision, state = Width(deadline_s=1.0).decide(view, Width().init(), Decision(plans=(evaluation,)))
    assert decision.plans == (evaluation,)
    assert state["devices"] == {}


def fault(*policies):
    return chain_fault([(type(policy).__name__, statements_of(policy)) for policy in policies])


def test_what_may_stand_before_and_behind_it():
    assert fault(Width()).startswith("Width only changes plans of the policies before it")
    assert not fault(All(), SplitFed(), Width(), RandomCohort(cohort=2))
    assert not fault(Asynchronous(), Width(), Closing(after_s=3.0))
    assert fault(All(), Width(), SplitFed()) == (
        "SplitFed cuts the model behind Width, which sets the width of both sides of a cut; allowed: the other order"
    )
    for cut in (EcoFed(), LocalLoss(), SplitFed(head="shared")):
        name = type(cut).__name__
        assert fault(All(), Width(), cut).startswith(f"Width narrows the model before {name}, whose ")
        assert fault(All(), cut, Width()).startswith(f"Width narrows the model behind {name}, whose ")
        assert not fault(All(), cut, Width(rule="fixed", widths={"a": 1.0, "b": 1.0}))
    assert fault(All(), Width(), Width()).startswith("Width narrows the model behind Width, which sets the widths of")


def test_it_states_that_it_sets_deadlines_where_it_does():
    assert Width().writes == ("part.width",)
    stops = Width(too_slow="fewer_steps")
    assert stops.writes == ("part.width", "deadline_s")
    assert not fault(All(), SplitFed(), stops, Closing(after_s=3.0, partial=True))
    assert fault(All(), EcoFed(), stops).startswith("Width narrows the model behind EcoFed, ")
    assert fault(All(), SplitFed(head="shared"), stops) == (
        "Width has devices stop early behind SplitFed, which sends the plans of a round one after another; "
        "allowed: one of the two"
    )


# Costs of the policy itself.


def test_few_estimates_for_a_whole_fleet():
    view = make_fleet()
    decide(Width(min_channels=1), view)
    tried = Counter(width for _, width in view.estimator.calls)
    assert len(tried) <= 1 + 4 * 4  # dry runs: of all levels together
    view = make_fleet(seconds=(1, 3))
    decide(Width(deadline_s=1.0, **EXACT), view)
    own = [width for device, width in view.estimator.calls if device == 1]
    assert own[0] == 1.0
    assert len(own) <= 1 + 6


def test_ten_thousand_devices_of_five_classes():
    five = make_fleet()
    profiles = [five.profiles[device % 5] for device in range(10_000)]
    samples = [10 + 10 * (device % 3) for device in range(10_000)]
    view = make_fleet(seconds=(1,) * 10_000, profiles=profiles, samples=samples)
    view.estimator.profiles = profiles
    for policy in (Width(), Width(**EXACT)):
        view.estimator.calls.clear()
        plans = tuple(make_plan(device) for device in view.devices)
        began = time.process_time()
        decision, state = policy.decide(view, policy.init(), Decision(plans=plans))
        took_s = time.process_time() - began
        assert len(decision.plans) == len(state["devices"]) == 10_000
        assert len(set(widths(decision).values())) >= 4
        assert len(view.estimator.calls) <= 3 * 5 * 7 + 5 + 30
        assert took_s < 6.0  # 0.14 s on an idle core
