"""SplitFed's second version, whole runs: devices one after another on one copy of their host's blocks."""

import sys

import fedbonsai
import pytest
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.partitioning.splitfed import SplitFed
from fedbonsai.policies.policy import chain
from fedbonsai.policies.selection.plain import All
from fedbonsai.runtime.errors import RunError
from fedbonsai.runtime.events import PlanEnded, VersionClosed

from .processes import killed_in_mid_stream
from .test_split_run import BASE

USER = '''
import torch
from torch import nn
from fedbonsai.learning.data.types import SamplePool, Samples

class Two(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.b(self.a(x).relu())

def five_each(*, num_devices, seed, root, bad=()):
    """Five samples on each device; those of bad devices are NaN."""
    generator = torch.Generator().manual_seed(seed % 1000)
    x = torch.randn(5 * num_devices, 4, generator=generator)
    for device in bad:
        x[5 * device : 5 * device + 5] = float("nan")
    y = torch.arange(5 * num_devices) % 3
    return SamplePool(train=Samples(x, y), owners=torch.arange(5 * num_devices).numpy() // 5, num_classes=3)
'''


@pytest.fixture(scope="module", autouse=True)
def user_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "two_layers.py").write_text(USER)
    sys.path.append(str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("two_layers", None)


def small(*, devices=3, hosts=1, bad=(), policy=None, **changes):
    """A run of equal devices: its events, and its summary."""
    link = {"memory_bytes": 10**9, "up_bytes_per_s": 1e6, "down_bytes_per_s": 1e6, "latency_s": 0.25}
    config = {
        "backend": "inline",
        "model": "two_layers:Two",
        "data": {"name": "two_layers:five_each", "kwargs": {"bad": list(bad)}},
        "fleet": {
            "classes": [{"name": "c", "count": devices, "flop_per_s": 1000} | link],
            "hosts": {"count": hosts, "flop_per_s": 1000},
        },
        "evaluation": {"where": "none"},
        "stop": {"rounds": 1},
    }
    run = fedbonsai.run(config | changes, policy=policy or chain(All(), SplitFed(head="shared")))
    return list(run), run.summary


def ended(events):
    return [event.report for event in events if isinstance(event, PlanEnded)]


def closed_s(events):
    return next(event.time_s for event in events if isinstance(event, VersionClosed))


def test_one_device_for_each_host_is_slots_bit_for_bit():
    fleet = {"classes": BASE["fleet"]["classes"], "hosts": {"count": 4}}
    found = [
        fedbonsai.run(BASE | {"fleet": fleet, "policy": ["all", {"name": "splitfed", "head": head}]})
        for head in ("slots", "shared")
    ]
    hashes = []
    for run in found:
        list(run)
        hashes.append(run.summary["model_hash"])
    assert hashes[0] == hashes[1]


def test_devices_of_one_host_take_turns_one_after_another():
    # Three equal devices: on one host three times the time of one, on three hosts once; on two, two of them take turns.
    for hosts, turns in ((1, 3), (3, 1), (2, 2)):
        events, _ = small(hosts=hosts)
        alone = ended(events)[0].virtual.seconds
        assert all(report.virtual.seconds == pytest.approx(alone) for report in ended(events))
        assert closed_s(events) == pytest.approx(turns * alone)


def test_the_order_is_drawn_again_in_every_round():
    def orders(seed):
        reports = ended(small(devices=6, seed=seed, stop={"rounds": 2})[0])
        return [[report.plan.device for report in reports if report.plan.version == version] for version in (0, 1)]

    first = orders(1)
    assert [sorted(order) for order in first] == [list(range(6))] * 2
    assert first[0] != first[1]
    assert orders(1) == first
    assert orders(2) != first


def test_a_device_that_fails_loses_only_its_own_turn():
    events, summary = small(devices=4, bad=[2], seed=3)
    outcomes = {report.plan.device: report.outcome.value for report in ended(events)}
    assert outcomes == {0: "done", 1: "done", 2: "failed", 3: "done"}
    assert 0 < [report.plan.device for report in ended(events)].index(2) < 3
    assert summary["rounds"] == 1


def test_turns_left_at_a_deadline_are_not_sent_in_the_next_round():
    everyone, _ = small()
    seconds = ended(everyone)[0].virtual.seconds

    class Hurried(SplitFed):
        def decide(self, view, state, decision):
            decision, state = super().decide(view, state, decision)
            return Decision(plans=decision.plans, keep_open=decision.keep_open, close_after_s=1.5 * seconds), state

    events, summary = small(policy=chain(All(), Hurried(head="shared")), stop={"rounds": 2})
    # In each round one is done, one is late, and the third is not sent; the late one is still in flight when the second begins.
    assert summary["outcomes"]["done"] == 2
    assert [report.outcome.value for report in ended(events)].count("late") == 2


def test_a_second_plan_for_a_shared_head_in_training_is_refused():
    class Impatient(SplitFed):
        def decide(self, view, state, decision):
            plans = tuple(self._cut(plan, "a", view.hosts) for plan in decision.plans)
            return Decision(plans=plans), state

    with pytest.raises(RunError, match="while another device trains the shared head of host"):
        small(policy=chain(All(), Impatient(head="shared")))


@pytest.mark.soak
@pytest.mark.usefixtures("cluster")
def test_on_ray_the_run_is_the_same_also_when_a_host_is_killed():
    changes = {
        "policy": ["all", {"name": "splitfed", "head": "shared"}],
        "training": {"batch_size": 4, "epochs": 1},
        "stop": {"rounds": 2},
    }
    expected = fedbonsai.run(BASE | changes)
    list(expected)
    summary = killed_in_mid_stream(BASE | changes, "PartitionHostActor")
    same = ("model_hash", "up_by_kind", "down_by_kind", "virtual_s", "outcomes")
    assert {key: summary[key] for key in same} == {key: expected.summary[key] for key in same}
