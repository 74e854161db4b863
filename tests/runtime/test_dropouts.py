"""Devices that become unreachable and drop out, in whole runs: selection, rounds, and the same bits on every backend."""

from collections import Counter
from dataclasses import dataclass

import fedbonsai
import pytest
from fedbonsai.policies.decision import Decision
from fedbonsai.runtime.errors import RunError
from fedbonsai.runtime.events import Evaluated, Notice, PlanEnded, RoundStarted, VersionClosed

LINK = {"memory_bytes": 10**9, "up_bytes_per_s": 10**6, "down_bytes_per_s": 10**6}
FREQUENT = {"share": 0.6, "mean_on_s": 3}  # a plan takes 1.1 s


def fleet_of(*classes, **extras):
    return {
        "classes": [{"name": f"c{i}", "flop_per_s": 1e8} | LINK | each for i, each in enumerate(classes)],
        "hosts": {"count": 2},
    } | extras


def config_of(*classes, **changes):
    base = {
        "backend": "inline",
        "seed": 5,
        "fleet": fleet_of(*classes),
        "data": {"name": "synthetic", "kwargs": {"shape": [1, 8, 8], "samples_per_device": 40, "test_samples": 50}},
        "evaluation": {"where": "none"},
        "stop": {"rounds": 6},
    }
    return base | changes


def events_of(*classes, by=None, **changes):
    run = fedbonsai.run(config_of(*classes, **changes), policy=by)
    events = list(run)
    return events, run.summary


def only(events, kind):
    return [event for event in events if isinstance(event, kind)]


def ends(events):
    return [
        (e.report.plan.device, e.report.plan.version, e.report.outcome.value, e.report.stage)
        for e in only(events, PlanEnded)
    ]


@pytest.fixture(scope="module")
def plan_s():
    """Seconds of one plan on a device without others."""
    events, _ = events_of({}, stop={"rounds": 1})
    return only(events, VersionClosed)[0].time_s


def test_unreachable_devices_are_left_out_with_the_reason(plan_s):
    events, summary = events_of({"count": 2}, {"availability": {"joins_s": 2.5 * plan_s}}, stop={"rounds": 4})
    assert [started.left_out for started in only(events, RoundStarted)] == [{"unreachable": 1}] * 3 + [{}]
    assert ends(events)[-1] == (2, 3, "done", "")
    assert summary["outcomes"]["done"] == 9


def test_when_no_device_is_reachable_time_advances_until_one_is(plan_s):
    events, summary = events_of({"count": 2, "availability": {"on_s": 10, "every_s": 100, "phase_s": 50}})
    closed = only(events, VersionClosed)
    assert [each.time_s for each in closed] == pytest.approx([50 + (n + 1) * plan_s for n in range(6)])
    assert summary["outcomes"]["done"] == 12


def test_when_no_device_will_ever_be_reachable_the_run_ends_with_the_cause(plan_s):
    run = fedbonsai.run(config_of({"count": 2, "availability": {"leaves_s": 2 * plan_s}}))
    events = []
    with pytest.raises(RunError, match=r"chose no device .*2 for unreachable \(device 0: at this time\)"):
        events.extend(run)
    assert len(only(events, VersionClosed)) == 2


@dataclass(frozen=True)
class Nobody:
    """Chooses no device."""

    def init(self):
        return None

    def decide(self, view, state, decision):
        return Decision(), state


def test_a_policy_that_never_chooses_a_device_ends_the_run_once_all_were_reachable():
    with pytest.raises(RunError, match="chose no device"):
        events_of({"count": 3, "availability": FREQUENT}, by=Nobody())


@dataclass(frozen=True)
class Blind:
    """Plans for all devices, also unreachable ones."""

    def init(self):
        return None

    def decide(self, view, state, decision):
        if view.dispatched:
            return decision, state
        return Decision(plans=tuple(view.new_plan(device) for device in view.devices)), state


def test_a_plan_for_an_unreachable_device_is_lost_at_once():
    events, _ = events_of({}, {"availability": {"joins_s": 99}}, by=Blind(), stop={"rounds": 1})
    assert ends(events) == [(1, 0, "lost", "down"), (0, 0, "done", "")]
    assert only(events, PlanEnded)[0].time_s == 0.0


def test_a_round_in_which_all_plans_are_lost_closes_with_a_notice():
    classes = {"count": 2, "dropout": 1.0}, {"availability": {"joins_s": 0.05}}
    events, summary = events_of(*classes, stop={"rounds": 3})
    (notice,) = only(events, Notice)
    assert notice.text == "round 0 closed with nothing folded: 2 lost"
    assert only(events, VersionClosed)[0].folded == 0
    assert summary["outcomes"] | {"lost": 0, "done": 0} == dict.fromkeys(summary["outcomes"], 0)
    assert sum(summary["lost"].values()) == summary["outcomes"]["lost"] == 6
    assert set(summary["lost"]) <= {"down", "train", "up"}


def test_a_run_in_which_no_device_ever_delivers_fails():
    with pytest.raises(RunError, match=r"no device delivered an update .* lost: the device dropped out"):
        events_of({"count": 2, "dropout": {"during": 1.0}})


def test_lost_updates_change_nothing_and_losses_follow_from_the_seed():
    classes = ({"count": 4, "dropout": 0.4, "jitter": 0.3, "availability": FREQUENT},)
    first, again, other = (events_of(*classes, seed=seed) for seed in (5, 5, 6))
    assert ends(first[0]) == ends(again[0]) != ends(other[0])
    assert first[1] | {"wall_s": 0, "round_wall_s": 0, "peak_memory_bytes": 0} == again[1] | {
        "wall_s": 0,
        "round_wall_s": 0,
        "peak_memory_bytes": 0,
    }
    stages = Counter(stage for *_, outcome, stage in ends(first[0]) if outcome == "lost")
    assert set(stages) == {"down", "train", "up"}
    # A lost update has no effect: three devices of which two are lost in every round give the model of one device.
    alone, _ = events_of({}, {"count": 2, "availability": {"share": 0}}, stop={"rounds": 2})
    beside, _ = events_of({}, {"count": 2, "dropout": {"after": 1.0}}, stop={"rounds": 2})
    assert alone[-1].model_hash == beside[-1].model_hash


def test_estimates_do_not_depend_on_random_disruptions():
    seen = []

    @dataclass(frozen=True)
    class Looks(Blind):
        def decide(self, view, state, decision):
            seen.append([view.estimate(device, view.new_plan(device)).seconds for device in view.devices])
            return super().decide(view, state, decision)

    events, _ = events_of({"count": 3, "jitter": 0.5}, by=Looks())
    assert len({seconds for each in seen for seconds in each}) == 1
    assert len({event.report.virtual.seconds for event in only(events, PlanEnded)}) == 18


def test_only_reachable_devices_evaluate():
    changes = {
        "data": {
            "name": "synthetic",
            "kwargs": {"shape": [1, 8, 8], "samples_per_device": 40},
            "test_share": 0.2,
        },
        "evaluation": {"where": "devices"},
        "stop": {"rounds": 2},
    }
    events, _ = events_of({"count": 2}, {"availability": {"joins_s": 999}}, **changes)
    assert [event.num_devices for event in only(events, Evaluated)] == [2, 2]


METHODS = {
    "fedavg": {},
    "residuals": {"policy": ["all", {"name": "residuals", "up": "half_step", "down": "half_step"}]},
    "splitfed": {"policy": ["all", {"name": "splitfed", "cut": "features.0"}]},
    "splitfed shared": {"policy": ["all", {"name": "splitfed", "head": "shared"}]},
    "local loss": {"policy": ["all", "local_loss"]},
    "ecofed": {"policy": ["all", {"name": "ecofed", "period": 3}]},
    "asynchronous": {
        "policy": [{"name": "asynchronous", "buffer": 2}],
        "server": {"staleness": {"rule": "constant"}},
    },
    "asynchronous ecofed": {
        "policy": [{"name": "asynchronous", "buffer": 2}, {"name": "ecofed", "period": 3}],
        "server": {"staleness": {"rule": "constant"}},
    },
    "asynchronous residuals": {
        "policy": [{"name": "asynchronous", "buffer": 2}, "residuals"],
        "server": {"staleness": {"rule": "constant"}},
    },
}
PLAN_S = {"residuals": 0.8, "splitfed": 0.35, "splitfed shared": 0.35, "local loss": 0.25, "ecofed": 0.02}


def lossy(method):
    """Four devices that are reachable in periods, each as long as three plans."""
    mean_on_s = 3 * PLAN_S.get(method.removeprefix("asynchronous").strip(), 1.1)
    return {
        "count": 4,
        "dropout": {"somewhere": 0.2, "early": 0.2},
        "jitter": 0.2,
        "availability": FREQUENT | {"mean_on_s": mean_on_s},
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_method_continues_when_plans_are_lost(method):
    events, summary = events_of(lossy(method), **METHODS[method], stop={"rounds": 12})
    outcomes = summary["outcomes"]
    assert min(outcomes["lost"], outcomes["done"]) > 4
    assert outcomes["failed"] == outcomes["rejected"] == 0
    ended = Counter(event.report.plan.id for event in only(events, PlanEnded))
    assert set(ended.values()) == {1}  # each plan ends once
    lost = [event.report for event in only(events, PlanEnded) if event.report.outcome.value == "lost"]
    assert all(report.error and report.stage for report in lost)
    if method in ("splitfed", "local loss", "ecofed"):
        assert "stream" in summary["lost"]
    if method == "asynchronous residuals":  # a lost plan is not acknowledged, and costs no dense model
        assert summary["resyncs"] <= 1


def test_an_aborted_stream_leaves_no_view():
    # The device of every upload drops out during the stream, or leaves: no host ever has a view, so there are no replays.
    dies = {"count": 2, "dropout": {"during": 1.0}}
    events, _ = events_of(dies, {}, **METHODS["ecofed"])
    for event in only(events, PlanEnded):
        plan = event.report.plan
        assert plan.split.view is None or plan.device == 2
    assert any(event.report.plan.split.view for event in only(events, PlanEnded))


def test_under_the_wall_clock_a_notice_says_that_the_fleets_faults_are_ignored():
    events, summary = events_of({"count": 2, "dropout": 1.0}, clock="wall", stop={"rounds": 1})
    assert "availability, dropout and jitter" in only(events, Notice)[0].text
    assert summary["outcomes"]["done"] == 2


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("workers", "method"), [(1, "asynchronous"), pytest.param(2, "ecofed", marks=pytest.mark.soak)]
)
def test_on_ray_the_run_is_the_same_with_any_number_of_workers(workers, method):
    expected, there = events_of(lossy(method), **METHODS[method])
    found, here = events_of(lossy(method), **METHODS[method], backend="ray", workers=workers)
    assert ends(found) == ends(expected)
    same = ("model_hash", "up_by_kind", "down_by_kind", "virtual_s", "outcomes", "lost")
    assert {key: here[key] for key in same} == {key: there[key] for key in same}
