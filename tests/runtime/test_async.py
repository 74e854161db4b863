"""Asynchronous rounds, whole runs: staleness by hand, calls of the policy, all methods in flight at once, the same bits."""

from dataclasses import dataclass, field

import fedbonsai
import pytest
from fedbonsai.comms.codec import CodecSpec
from fedbonsai.policies.compression.residuals import Residuals
from fedbonsai.policies.partitioning.splitfed import SplitFed
from fedbonsai.policies.policy import NEEDS_PLANS, chain
from fedbonsai.policies.scheduling.asynchronous import Asynchronous
from fedbonsai.runtime.errors import ConfigError
from fedbonsai.runtime.events import PlanEnded, VersionClosed
from msgspec.structs import replace

LINK = {"memory_bytes": 10**9, "up_bytes_per_s": 10**9, "down_bytes_per_s": 10**9}
GENERATED = {"shape": [1, 8, 8], "samples_per_device": 40, "test_samples": 50}
STALENESS = {"rule": "polynomial", "a": 0.5}
BASE = {
    "backend": "inline",
    "seed": 5,
    # All have the same number of samples: the second takes 2.5 times as long as the first, the third 6.25.
    "fleet": {
        "classes": [{"name": f"c{i}", "flop_per_s": 1e8 / 2.5**i} | LINK for i in range(3)],
        "hosts": {"count": 2},
    },
    "data": {"name": "synthetic", "kwargs": GENERATED},
    "server": {"staleness": STALENESS},
    "evaluation": {"where": "none"},
    "stop": {"rounds": 12},
}


def chained(*policies, buffer=1, concurrency=1.0):
    return {"policy": [{"name": "asynchronous", "buffer": buffer, "concurrency": concurrency}, *policies]}


def finished(by=None, **changes):
    run = fedbonsai.run(BASE | changes, policy=by)
    events = list(run)
    ended = [event for event in events if isinstance(event, PlanEnded)]
    closed = [event for event in events if isinstance(event, VersionClosed)]
    assert [event.report.error for event in ended if event.report.outcome.value not in ("done", "late")] == []
    return run.summary, ended, closed


def test_no_device_waits_and_staleness_is_the_number_of_versions_closed_meanwhile():
    _, ended, closed = finished(**chained())
    folded = [(event.report.plan.device, event.staleness) for event in ended if event.report.outcome.value == "done"]
    # The first ends at 1, 2, 3, ..., the second at 2.5, 5, 7.5, the third at 6.25, and each end closes a version.
    assert folded == [
        (0, 0), (0, 0), (1, 2), (0, 1), (0, 0), (1, 2), (0, 1), (0, 0), (2, 8), (0, 1), (1, 4), (0, 1),
    ]  # fmt: skip
    assert [event.folded for event in closed] == [1] * 12
    assert [event.staleness for event in closed] == [staleness for _, staleness in folded]
    # Plans in flight at the end of the run are late; the first device gets no further plan.
    assert sorted(event.report.plan.device for event in ended if event.report.outcome.value == "late") == [1, 2]


def test_a_version_closes_at_as_many_updates_as_the_buffer_holds():
    _, ended, closed = finished(**chained(buffer=3), stop={"rounds": 3})
    assert [event.folded for event in closed] == [3, 3, 3]
    assert [event.staleness for event in ended if event.report.outcome.value == "done"] == [0, 0, 0, 1, 0, 0, 1, 0, 2]


@dataclass(frozen=True)
class Counting(Asynchronous):
    """Records its calls."""

    asked: list[int] = field(default_factory=list)

    def decide(self, view, state, decision):
        self.asked.append(view.version)
        return super().decide(view, state, decision)


@pytest.mark.parametrize("buffer", [1, 2, 4])
def test_a_policy_is_called_at_the_start_and_after_every_end_of_a_plan(buffer):
    policy = Counting(buffer=buffer)
    _, ended, _ = finished(policy, stop={"rounds": 4})
    done = sum(event.report.outcome.value == "done" for event in ended)
    assert len(policy.asked) == done == 4 * buffer  # not after the last, which ends the run
    assert [policy.asked.count(version) for version in range(4)] == [buffer] * 4


def test_a_first_version_that_closes_at_all_updates_is_that_of_fedavg():
    expected, _, _ = finished(preset="fedavg", stop={"rounds": 1})
    # The first two have started again meanwhile, but the second update of the first device is the third to arrive.
    found, ended, _ = finished(**chained(buffer=3, concurrency=3), stop={"rounds": 1})
    assert [event.report.plan.device for event in ended[:3]] == [0, 0, 1]
    assert found["model_hash"] != expected["model_hash"]
    alike = {"classes": [{"name": "c", "count": 3, "flop_per_s": 1e8} | LINK]}
    expected, _, _ = finished(preset="fedavg", fleet=alike, stop={"rounds": 1})
    found, _, _ = finished(**chained(buffer=3), fleet=alike, stop={"rounds": 1})
    assert found["model_hash"] == expected["model_hash"]


def test_an_update_beyond_the_largest_staleness_is_late():
    _, ended, _ = finished(**chained(), server={"staleness": STALENESS | {"most": 1}})
    late = [event for event in ended if event.report.outcome.value == "late" and event.staleness]
    assert {event.report.plan.device for event in late} == {1, 2}
    assert all(event.staleness > 1 for event in late)
    assert all(event.report.error == "its version had closed" for event in late)


@pytest.mark.parametrize(
    "others",
    [
        [{"name": "splitfed", "cut": "features.0"}],
        [{"name": "local_loss"}],
        [{"name": "ecofed", "period": 3}],
        [{"name": "residuals"}],
        [{"name": "residuals", "up": "half_step", "down": "half_step"}],
    ],
    ids=str,
)
def test_every_method_may_be_in_flight(others):
    summary, ended, _ = finished(**chained(*others, buffer=2))
    assert max(event.staleness for event in ended) >= 2
    assert summary["resyncs"] == 0


@dataclass(frozen=True)
class Varied:
    """Another kind of plan by device and version: split, residuals, the head alone, coarse codes, plain."""

    needs = NEEDS_PLANS

    def init(self):
        return None

    def decide(self, view, state, decision):
        ways = [
            lambda given: by(SplitFed(cut="features.0"), view, given),
            lambda given: by(Residuals(), view, given),
            lambda given: changed(given, lambda plan: {"part": replace(plan.part, trained=plan.part.blocks[-1:])}),
            lambda given: changed(
                given, lambda plan: {"codec_up": (CodecSpec("uniform", {"bits": 4}), CodecSpec("entropy"))}
            ),
            lambda given: given,
        ]
        plans = []
        for plan in decision.plans:
            plans += ways[(2 * plan.device + view.version) % len(ways)](replace(decision, plans=(plan,))).plans
        return replace(decision, plans=tuple(plans)), state


def by(policy, view, decision):
    return policy.decide(view, policy.init(), decision)[0]


def changed(decision, change):
    return replace(decision, plans=tuple(plan.with_("varied", **change(plan)) for plan in decision.plans))


def kind(event):
    plan = event.report.plan
    return plan.split is not None, plan.link_up is not None, len(plan.part.trained), bool(plan.codec_up)


def test_different_plans_parts_and_codecs_of_different_versions_are_in_flight_at_once():
    policy = chain(Asynchronous(), Varied())
    summary, ended, _ = finished(policy, stop={"rounds": 40}, codecs={"down": ["lz4"]})
    done = [event for event in ended if event.report.outcome.value == "done"]
    assert len({kind(event) for event in done}) == 5
    assert len({kind(event) for event in done if event.staleness}) >= 3
    assert len(done) == 40
    again, _, _ = finished(policy, stop={"rounds": 40}, codecs={"down": ["lz4"]})
    assert again["model_hash"] == summary["model_hash"]


def test_it_learns_and_late_updates_are_scaled():
    common = {
        "data": {"name": "digits"},
        "evaluation": {"where": "server"},
        "training": {"batch_size": 16, "epochs": 2},
    }
    rounds = {"stop": {"rounds": 8}}
    scaled, _, _ = finished(**chained(buffer=2), **common, **rounds)
    constant, _, _ = finished(**chained(buffer=2), **common, **rounds, server={"staleness": {"rule": "constant"}})
    assert scaled["accuracy"] > 0.85
    assert scaled["model_hash"] != constant["model_hash"]


def test_without_a_rule_for_late_updates_it_is_refused():
    with pytest.raises(ConfigError, match=r"^server.staleness is null; policy\[0\] \(asynchronous\) needs a rule"):
        finished(**chained(), server={})


@pytest.mark.usefixtures("cluster")
def test_on_ray_the_run_is_the_same():
    changes = chained(buffer=2)
    expected, _, _ = finished(**changes)
    summary, _, _ = finished(**changes, backend="ray", workers=2)
    same = ("model_hash", "up_by_kind", "down_by_kind", "virtual_s", "outcomes")
    assert {key: summary[key] for key in same} == {key: expected[key] for key in same}
