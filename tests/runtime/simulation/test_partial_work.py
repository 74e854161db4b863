"""Devices that stop early: how many steps fit, what they count, with every method, under both clocks."""

import time
from dataclasses import dataclass, field

import fedbonsai
import pytest
import torch
from fedbonsai.learning.spec import Training
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.estimate import Estimate
from fedbonsai.policies.partitioning.local_loss import LocalLoss
from fedbonsai.policies.partitioning.splitfed import SplitFed
from fedbonsai.policies.plan import Objective
from fedbonsai.policies.policy import chain
from fedbonsai.policies.report import Report
from fedbonsai.policies.selection.plain import All
from fedbonsai.runtime.errors import RunError
from fedbonsai.runtime.events import PlanEnded, VersionClosed
from fedbonsai.runtime.simulation.costs import share_done, stop_early
from msgspec.structs import replace

LINK = {"memory_bytes": 10**9, "up_bytes_per_s": 10**6, "down_bytes_per_s": 10**6}
SAMPLES, BATCH = 40, 8  # five steps


def two_seconds_a_step(plan):
    """A second down, two for each step, one up."""
    return Estimate(compute_s=2.0 * plan.training.steps, seconds=2.0 + 2.0 * plan.training.steps)


@pytest.mark.parametrize(
    ("deadline_s", "share", "steps"),
    [
        (12.0, 1.0, None),
        (11.9, 1.0, 4),
        (8.0, 1.0, 3),
        (7.99, 1.0, 2),
        (0.1, 1.0, 1),  # it arrives late, with one step
        (12.0, 0.9, 4),
        (8.0, 0.5, 2),
        (None, 0.5, 2),
        (None, 0.01, 1),
        (None, 1.0, None),
    ],
)
def test_the_most_steps_that_fit_by_hand(make_plan, deadline_s, share, steps):
    plan = make_plan(1, deadline_s=deadline_s).with_("test", training=Training(batch_size=BATCH))
    counted = []

    def estimate(shorter):
        counted.append(shorter)
        return two_seconds_a_step(shorter)

    def cut(plan, **how):
        return stop_early(plan, num_samples=SAMPLES, estimate=estimate, **how)

    found = cut(plan, share=share)
    if steps is None:
        assert found is plan
        return
    assert (found.training.steps, found.whole_steps) == (steps, 5)
    assert len(counted) <= 4
    assert cut(found) is found  # once
    assert f"{steps} steps of 5 of batch 8" in str(found)
    measured = replace(plan, objective=Objective(kind="evaluate"))
    assert cut(measured, share=share) is measured


@pytest.mark.parametrize(
    ("plan", "steps", "share"),
    [
        ({}, 5, 1.0),
        ({}, 0, 1.0),
        ({"whole_steps": 5}, 2, 0.4),
        ({"whole_steps": 5}, 5, 0.6),  # no device makes itself heavier by what it claims: it was sent three
        ({"train_s": 1.0}, 5, 1.0),
        ({"train_s": 1.0}, 9, 1.0),
        ({"train_s": 1.0}, 1, 0.2),
        ({"train_s": 1.0}, 0, 0.0),
    ],
)
def test_what_an_update_counts(make_plan, plan, steps, share):
    training = Training(batch_size=BATCH, steps=3 if "whole_steps" in plan else None)
    plan = make_plan(1, **plan).with_("test", training=training)
    assert share_done(Report(plan=plan, steps=steps), num_samples=SAMPLES) == share


BASE = {
    "backend": "inline",
    "seed": 5,
    "fleet": {
        "classes": [{"name": f"c{i}", "flop_per_s": 1e8 / 4**i} | LINK for i in range(2)],
        "hosts": {"count": 1},
    },
    "data": {"name": "synthetic", "kwargs": {"shape": [1, 8, 8], "samples_per_device": SAMPLES, "test_samples": 50}},
    "training": {"batch_size": BATCH},
    "evaluation": {"where": "none"},
    "stop": {"rounds": 1},
}


def finished(by=None, **changes):
    """The weights, plans' ends by device, and ends of versions of a run."""
    run = fedbonsai.run(BASE | changes, policy=by)
    events = list(run)
    ended = [event.report for event in events if isinstance(event, PlanEnded)]
    assert [report.error for report in ended if report.error] == []
    closed = [event for event in events if isinstance(event, VersionClosed)]
    return run, {report.plan.device: report for report in ended}, closed


@dataclass(frozen=True)
class These:
    """Plans of so many steps for some devices."""

    steps: dict[int, int] = field(default_factory=dict)

    def init(self):
        return None

    def decide(self, view, state, decision):
        if view.dispatched:
            return decision, state
        plans = [view.new_plan(device).with_("these", training=Training(batch_size=BATCH, steps=steps))
                 for device, steps in self.steps.items()]  # fmt: skip
        return Decision(plans=tuple(plans)), state


@pytest.fixture(scope="module")
def whole_s():
    """Seconds of the faster device's plan."""
    _, ended, _ = finished()
    return ended[0].virtual.seconds


def closing(after_s, *others):
    return {"policy": ["all", *others, {"name": "closing", "after_s": after_s, "partial": True}]}


def test_a_slow_device_sends_its_first_steps_which_count_in_proportion(whole_s):
    run, ended, closed = finished(**closing(1.01 * whole_s))
    fast, slow = ended[0], ended[1]
    assert (fast.steps, fast.plan.whole_steps) == (5, 0)
    assert 1 <= slow.steps == slow.plan.training.steps < slow.plan.whole_steps == 5
    assert slow.virtual.seconds <= 1.01 * whole_s
    assert closed[0].folded == 2
    # As each by itself, weighted by hand.
    base, _, _ = finished(These({0: 5}), training={"batch_size": BATCH, "optimiser": {"learning_rate": 0.0}})
    one, _, _ = finished(These({0: 5}))
    other, _, _ = finished(These({1: slow.steps}))
    weights, share = {name: found.weights() for name, found in (("b", base), ("o", one), ("t", other))}, slow.steps / 5
    for name, tensor in run.weights().items():
        moved = (weights["o"][name] - weights["b"][name]) + share * (weights["t"][name] - weights["b"][name])
        torch.testing.assert_close(tensor, weights["b"][name] + moved / (1 + share), rtol=0, atol=1e-6)


def test_an_estimate_is_what_is_charged(whole_s):
    estimates = {}

    @dataclass(frozen=True)
    class Estimating(These):
        def decide(self, view, state, decision):
            if not view.dispatched:
                plans = tuple(view.new_plan(d).with_("test", deadline_s=1.01 * whole_s) for d in view.devices)
                estimates.update({plan.device: view.estimate(plan.device, plan) for plan in plans})
                decision = Decision(plans=plans)
            return decision, state

    _, ended, _ = finished(Estimating())
    for device, estimate in estimates.items():
        charged = ended[device].virtual
        assert (charged.seconds, charged.flops) == (pytest.approx(estimate.seconds), estimate.flops)


@pytest.mark.parametrize(
    "others",
    [
        [{"name": "splitfed", "cut": "features.0"}],
        [{"name": "splitfed", "cut": "features.0", "window": 3}],
        [{"name": "local_loss"}],
        [{"name": "residuals"}],
    ],
    ids=str,
)
def test_every_method_may_stop_early(others):
    _, ended, _ = finished(policy=["all", *others])
    seconds = sorted(report.virtual.seconds for report in ended.values())
    _, ended, closed = finished(**closing((seconds[0] + 2 * seconds[1]) / 3, *others))
    assert closed[0].folded == 2
    assert 1 <= ended[1].steps == ended[1].plan.training.steps < ended[1].plan.whole_steps == 5


def test_behind_asynchronous_each_plan_has_its_own_deadline(whole_s):
    policy = ["asynchronous", {"name": "closing", "after_s": 1.5 * whole_s, "partial": True}]
    run = fedbonsai.run(BASE | {"policy": policy, "server": {"staleness": {"rule": "constant"}}, "stop": {"rounds": 4}})
    ended = [event.report for event in run if isinstance(event, PlanEnded)]
    done = [report for report in ended if report.outcome.value == "done"]
    assert len(done) == 4
    assert {report.plan.device: report.plan.whole_steps for report in done} == {0: 0, 1: 5}
    assert all(report.virtual.seconds <= 1.5 * whole_s for report in done)


def test_the_current_rate_of_the_link_is_known(whole_s):
    # A device whose link is 0.4 of what its class declares, from the start: whole, its update would be late.
    slow = {"classes": [{"name": "c", "flop_per_s": 1e8, "rates": [[0, 0, 4 * 10**5, 4 * 10**5]]} | LINK]}
    _, whole, _ = finished(fleet=slow)
    deadline_s = 0.5 * (whole_s + whole[0].virtual.seconds)
    _, ended, closed = finished(fleet=slow, **closing(deadline_s))
    assert closed[0].folded == 1
    assert ended[0].steps < 5
    assert ended[0].virtual.seconds <= deadline_s


def early(chance):
    return {"classes": [{"name": "c", "count": 6, "flop_per_s": 1e8, "dropout": {"early": chance}} | LINK]}


def test_a_device_may_stop_for_a_reason_of_its_own_and_a_cut_changes_nothing_of_that():
    run, ended, _ = finished(fleet=early(0.5))
    steps = [(ended[device].steps, ended[device].plan.whole_steps) for device in range(6)]
    assert {whole for _, whole in steps} == {0, 5}
    assert all(done == 5 if not whole else 1 <= done < 5 for done, whole in steps)
    again, _, _ = finished(fleet=early(0.5))
    split, _, _ = finished(fleet=early(0.5), policy=["all", {"name": "splitfed", "cut": "features.2"}])
    assert run.summary["model_hash"] == again.summary["model_hash"] == split.summary["model_hash"]
    other, _, _ = finished(fleet=early(0.0))
    assert other.summary["model_hash"] != run.summary["model_hash"]


def test_a_view_is_uploaded_whole_or_not_at_all():
    run = fedbonsai.run(BASE | {"fleet": early(1.0), "preset": "ecofed", "stop": {"rounds": 1}})
    with pytest.raises(RunError, match="the device dropped out"):
        list(run)


def test_nothing_to_do_is_done_in_any_time():
    training = {"training": {"epochs": 0}}
    for clock in ("virtual", "wall"):
        _, ended, closed = finished(**closing(5.0), **training, clock=clock)
        assert [report.steps for report in ended.values()] == [0, 0]
        assert closed[0].folded == 2


def slow_transform(x, generator):
    """A batch takes its time."""
    time.sleep(0.01)
    return x


@dataclass(frozen=True)
class Hurried:
    """All plans have a deadline; versions wait for them."""

    def init(self):
        return None

    def decide(self, view, state, decision):
        plans = tuple(plan.with_("hurried", deadline_s=0.005) for plan in decision.plans)
        return replace(decision, plans=plans), state


@pytest.mark.parametrize("others", [(), (SplitFed(cut="features.0"),), (SplitFed(window=3),), (LocalLoss(),)], ids=str)
def test_under_the_wall_clock_a_device_uses_its_own_clock(others):
    link = dict.fromkeys(("up_bytes_per_s", "down_bytes_per_s"), 10**15)
    fleet = {"classes": [{"name": "c", "count": 2, "flop_per_s": 1e12, "memory_bytes": 10**9} | link]}
    data = BASE["data"] | {"train_transforms": [f"{__name__}:slow_transform"]}
    _, ended, closed = finished(chain(All(), *others, Hurried()), clock="wall", fleet=fleet, data=data)
    assert [report.steps for report in ended.values()] == [1, 1]  # one is made in any case
    assert all(report.plan.train_s <= 0.005 for report in ended.values())
    assert closed[0].folded == 2
