"""The frozen trunk, whole runs: bits of a frozen FedAvg, nothing but activations on the way, actors that die in mid-stream."""

import os
import signal
import threading
from dataclasses import dataclass

import fedbonsai
import pytest
from fedbonsai.actors.device import Device
from fedbonsai.clusters.ray_cluster import start_local
from fedbonsai.learning.part import Part
from fedbonsai.policies.decision import Decision
from fedbonsai.runtime.errors import ConfigError, RunError
from fedbonsai.runtime.events import Notice, PlanEnded, VersionClosed
from msgspec.structs import replace

from .processes import actor_pids

LINK = {"memory_bytes": 10**9, "up_bytes_per_s": 10**9, "down_bytes_per_s": 10**9}
BASE = {
    "backend": "inline",
    "seed": 5,
    "fleet": {
        "classes": [{"name": f"c{i}", "flop_per_s": 1e9 / 16**i} | LINK for i in range(4)],
        "hosts": {"count": 2},
    },
    "data": {"name": "digits", "partition": {"name": "dirichlet", "alpha": 1.0}},
    "evaluation": {"where": "none"},
    "stop": {"rounds": 2},
}
ALL = {"name": "random", "cohort": 1.0}


@dataclass(frozen=True)
class Frozen:
    """FedAvg that trains what is behind block ``depth`` only."""

    depth: str

    def init(self):
        return None

    def decide(self, view, state, decision):
        if view.dispatched:
            return decision, state
        plans = [view.new_plan(device) for device in view.devices]
        names = plans[0].part.blocks
        part = Part(blocks=names, trained=names[names.index(self.depth) + 1 :])
        return Decision(plans=tuple(replace(plan, part=part) for plan in plans)), state


def ecofed(**fields):
    return {"policy": [ALL, {"name": "ecofed", **fields}]}


def finished(by=None, **changes):
    run = fedbonsai.run(BASE | changes, policy=by)
    ended = [event.report for event in run if isinstance(event, PlanEnded)]
    assert [report.error for report in ended if report.error] == []
    return run.summary, ended


@pytest.mark.parametrize(
    ("cut", "depth"), [("features.0", "features.0"), ("features.0", "features.2"), ("features.2", "classifier.0")]
)
@pytest.mark.parametrize("window", [1, 8])
def test_in_float32_it_is_fedavg_with_a_frozen_trunk_bit_for_bit(cut, depth, window):
    expected, _ = finished(Frozen(depth))
    found, _ = finished(**ecofed(cut=cut, depth=depth, window=window, bits=0))
    assert found["model_hash"] == expected["model_hash"]


def test_nothing_but_activations_travels_and_far_fewer_bytes_by_default():
    plain, ended = finished(**ecofed(bits=0))
    assert set(plain["up_by_kind"]) == {"activations", "control"}
    assert set(plain["down_by_kind"]) == {"control"}
    assert all(report.plan.part.cached and not report.plan.part.sent for report in ended)
    assert len({report.plan.split.trunk for report in ended}) == 1
    coded, _ = finished(**ecofed())
    assert 8 < plain["up_by_kind"]["activations"] / coded["up_by_kind"]["activations"] < 32


def test_a_device_with_another_trunk_refuses(monkeypatch):
    honest = Device._open

    def other(self, plan, packets):
        if plan.device == 1:
            (name, _), *rest = plan.part.cached
            plan = replace(plan, part=replace(plan.part, cached=((name, "0" * 16), *rest)))
        return honest(self, plan, packets)

    monkeypatch.setattr(Device, "_open", other)
    run = fedbonsai.run(BASE | ecofed() | {"stop": {"rounds": 1}})
    ended = {event.report.plan.device: event.report for event in run if isinstance(event, PlanEnded)}
    assert (ended[1].outcome.value, ended[1].stage) == ("failed", "open")
    assert "block 'features.0' of the trunk is" in ended[1].error
    assert run.summary["outcomes"]["done"] == 3


def test_mistakes_are_told_with_what_is_allowed():
    with pytest.raises(ConfigError, match=r"cuts behind 'nowhere'; the clean cuts are: features\.0 \(16x8x8\)"):
        finished(**ecofed(cut="nowhere"))
    with pytest.raises(ConfigError, match="bits is 1; it must be 0 or between 2 and 8"):
        finished(**ecofed(bits=1))
    shy = {"classes": [{"name": "shy", "flop_per_s": 1e9, "may_send": ["weights", "activations"]} | LINK]}
    with pytest.raises(ConfigError, match=r"fleet class 'shy' may send only .* makes it send labels"):
        finished(**ecofed(), fleet=shy)
    with pytest.raises(RunError, match=r"the trunk ends at the cut or behind it, before the last block: features\.2"):
        finished(**ecofed(cut="features.2", depth="features.0"))


@pytest.fixture(scope="module")
def cluster():
    with start_local(num_cpus=2) as running:
        yield running


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("victim", ["", "PartitionHostActor", "Worker"])
def test_on_ray_it_is_the_same_also_when_an_actor_is_killed_in_mid_stream(victim):
    changes = {**ecofed(), "training": {"batch_size": 4, "epochs": 4}}
    expected, _ = finished(**changes)
    run = fedbonsai.run(BASE | changes, backend="ray", workers=2)
    notices, ended = [], []
    for event in run:
        if isinstance(event, VersionClosed) and event.version == 1 and victim:
            threading.Timer(0.5, lambda: os.kill(actor_pids(victim)[0], signal.SIGKILL)).start()
        notices += [event.text] if isinstance(event, Notice) else []
        ended += [event.report] if isinstance(event, PlanEnded) else []
    assert bool(victim) == any("died" in text and "replaced" in text for text in notices), notices
    assert any(report.plan.attempt for report in ended) == bool(victim)
    same = ("model_hash", "up_by_kind", "down_by_kind", "virtual_s", "outcomes")
    assert {key: run.summary[key] for key in same} == {key: expected[key] for key in same}
