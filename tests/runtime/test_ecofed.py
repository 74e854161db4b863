"""The frozen trunk, whole runs: the bits of a frozen FedAvg, only activations are sent, actors that die during a stream."""

import os
import signal
import sys
from dataclasses import dataclass
from itertools import pairwise

import fedbonsai
import pytest
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.host.partition_host import PartitionHost
from fedbonsai.learning.parts.part import Part
from fedbonsai.policies.decision import Decision
from fedbonsai.runtime.errors import ConfigError
from fedbonsai.runtime.events import Notice, PlanEnded, VersionClosed
from msgspec.structs import replace

from .processes import actor_pids, killed_in_mid_stream

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
    """FedAvg that trains only the blocks behind ``depth``."""

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
    found, _ = finished(**ecofed(cut=cut, depth=depth, window=window, bits=0, period=1))
    assert found["model_hash"] == expected["model_hash"]


def test_only_activations_are_sent_and_far_fewer_bytes_by_default():
    plain, ended = finished(**ecofed(bits=0))
    assert set(plain["up_by_kind"]) == {"activations", "control", "host"}
    assert set(plain["down_by_kind"]) == {"control", "host"}
    assert all(report.plan.part.cached and not report.plan.part.sent for report in ended)
    assert len({report.plan.split.trunk for report in ended}) == 1
    coded, _ = finished(**ecofed())
    assert 8 < plain["up_by_kind"]["activations"] / coded["up_by_kind"]["activations"] < 32


def test_a_replay_needs_no_bytes_and_no_device_and_trains_on_uploaded_views():
    run = fedbonsai.run(BASE | ecofed(period=3) | {"stop": {"rounds": 4}})
    travelled, plans = [0], {}
    for event in run:
        if isinstance(event, VersionClosed):
            travelled.append(event.up_bytes + event.down_bytes)
        if isinstance(event, PlanEnded):
            plans.setdefault(event.report.plan.version, []).append(event.report)
    spent = [after - before for before, after in pairwise(travelled)]
    # Devices upload in rounds 0 and 3; the plans of the rounds between send nothing.
    assert spent[1] == spent[2] == 0
    assert min(spent[0], spent[3]) > 100_000
    for version in (1, 2):
        for report in plans[version]:
            assert (report.plan.split.view is None, report.outcome.value, report.virtual.up_bytes) == (False, "done", 0)
            assert report.samples == next(r.samples for r in plans[0] if r.plan.device == report.plan.device)
    losses = [sum(r.loss * r.samples for r in plans[version]) for version in range(4)]
    assert losses[2] < losses[1] < losses[0]


def test_devices_without_a_view_upload_and_views_expire():
    changes = {"policy": [{"name": "random", "cohort": 2}, {"name": "ecofed", "period": 8}], "stop": {"rounds": 4}}
    _, ended = finished(**changes)
    uploads = [(r.plan.version, r.plan.device) for r in ended if r.plan.split.view is None]
    assert [version for version, _ in uploads] == [0, 0]
    _, ended = finished(**changes, replay={"lifetime": 1})
    uploads = [r.plan.version for r in ended if r.plan.split.view is None]
    assert uploads[:2] == [0, 0]
    assert len(uploads) > 2


def test_a_budget_too_small_for_one_view_is_refused():
    words = r"^replay.memory_bytes is 1000; what device \d uploads takes about \d+ bytes, and a host must have room"
    with pytest.raises(ConfigError, match=words):
        finished(**ecofed(), replay={"memory_bytes": 1000})


def test_a_random_trunk_gives_a_notice():
    run = fedbonsai.run(BASE | ecofed() | {"stop": {"rounds": 1}})
    texts = [event.text for event in run if isinstance(event, Notice)]
    assert any("the frozen trunk has random weights" in text for text in texts)
    assert run.summary["init"]["mode"] == "random"


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


def test_mistakes_are_refused_with_the_allowed_values():
    with pytest.raises(ConfigError, match=r"cuts behind 'nowhere'; the clean cuts are: features\.0 \(16x8x8\)"):
        finished(**ecofed(cut="nowhere"))
    with pytest.raises(ConfigError, match="bits is 1; it must be 0 or between 2 and 8"):
        finished(**ecofed(bits=1))
    shy = {"classes": [{"name": "shy", "flop_per_s": 1e9, "may_send": ["weights", "activations"]} | LINK]}
    with pytest.raises(ConfigError, match=r"fleet class 'shy' may send only .* makes it send labels"):
        finished(**ecofed(), fleet=shy)
    with pytest.raises(
        ConfigError, match=r"cuts behind 'features\.0', which must be 'features\.2' or a block behind it"
    ):
        finished(**ecofed(cut="features.2", depth="features.0"))
    with pytest.raises(
        ConfigError, match=r"cuts behind 'features\.0', which must be 'features\.2' or a block behind it"
    ):
        finished(**ecofed(first="features.2", cut="auto", depth="features.0"))
    with pytest.raises(ConfigError, match=r"depth is ''; depth must name the last block of the trunk, one for all"):
        finished(**ecofed(cut="auto"))


@pytest.mark.soak
@pytest.mark.usefixtures("cluster")
def test_on_ray_the_run_is_the_same_also_when_actors_are_killed_during_a_stream():
    changes = {**ecofed(period=1), "training": {"batch_size": 4}, "stop": {"rounds": 3}}
    expected, _ = finished(**changes)
    summary = killed_in_mid_stream(BASE | changes, "PartitionHostActor", "WorkerActor")
    same = ("model_hash", "up_by_kind", "down_by_kind", "virtual_s", "outcomes")
    assert {key: summary[key] for key in same} == {key: expected[key] for key in same}


WATCHED = '''
from os import getpid
from pathlib import Path

import xxhash
from torch import nn


def digest(layer):
    hashed = xxhash.xxh3_64()
    for name, tensor in layer.state_dict().items():
        if name != "num_batches_tracked":
            hashed.update(tensor.numpy().tobytes())
    return hashed.hexdigest()


class Watched:
    """Writes down its number and the hash of its tensors whenever it is used."""

    def forward(self, x):
        with (Path({folder!r}) / f"{{getpid()}}.seen").open("a") as file:
            print(self.number, digest(self), file=file)
        return super().forward(x)


class Convolution(Watched, nn.Conv2d):
    pass


class Norm(Watched, nn.BatchNorm2d):
    pass


class Linear(Watched, nn.Linear):
    pass


def make(num_classes):
    trunk = [Convolution(1, 8, 3, padding=1), Norm(8), nn.ReLU(), Convolution(8, 8, 3, padding=1), Norm(8), nn.ReLU()]
    layers = [*trunk, nn.MaxPool2d(2), nn.Flatten(), Linear(128, num_classes)]
    for number, layer in enumerate(layers):
        layer.number = number
    return nn.Sequential(*layers)
'''


@pytest.mark.parametrize("backend", ["inline", pytest.param("ray", marks=pytest.mark.ray)])
def test_the_trunk_has_the_same_hash_from_start_to_end_on_server_hosts_and_devices(
    tmp_path, monkeypatch, request, backend
):
    if backend == "ray":
        request.getfixturevalue("cluster")
    (tmp_path / "watched.py").write_text(WATCHED.format(folder=str(tmp_path)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "watched", raising=False)
    # Devices run convolution 0 and its statistics, hosts 3 and its statistics, both frozen, and train 8.
    changes = ecofed(cut="0", depth="3") | {"model": "watched:make", "evaluation": {"where": "server"}}
    run = fedbonsai.run(BASE | changes | {"stop": {"rounds": 5}}, backend=backend, workers=2)
    plans = [event.report.plan for event in run if isinstance(event, PlanEnded)]
    assert [plan.split.view is None for plan in plans] == [version % 2 == 0 for version in range(5) for _ in range(4)]
    assert len({plan.split.trunk for plan in plans}) == 1
    seen = {number: {} for number in (0, 1, 3, 4, 8)}  # by layer and process
    for file in tmp_path.glob("*.seen"):
        for number, found in map(str.split, file.read_text().splitlines()):
            seen[int(number)].setdefault(file.name, set()).add(found)
    import watched

    model = watched.make(10)
    model.load_state_dict(run.weights())
    for number in (0, 1, 3, 4):
        assert set.union(*seen[number].values()) == {watched.digest(model[number])}
        assert (len(seen[number]) > 1) == (backend == "ray")  # the server's process evaluates
    assert len(set.union(*seen[8].values())) > len(plans)


@pytest.mark.usefixtures("cluster")
def test_on_ray_replays_need_no_device():
    changes = {**ecofed(period=3, bits=0), "stop": {"rounds": 3}}
    expected, _ = finished(**changes)
    run = fedbonsai.run(BASE | changes, backend="ray", workers=2)
    for event in run:
        if isinstance(event, VersionClosed) and event.version == 1:
            for pid in actor_pids("WorkerActor"):  # the next two rounds are replays, which need no worker
                os.kill(pid, signal.SIGSTOP)
        if isinstance(event, VersionClosed) and event.version == 3:
            for pid in actor_pids("WorkerActor"):
                os.kill(pid, signal.SIGCONT)
    assert run.summary["model_hash"] == expected["model_hash"]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("bits", [pytest.param(0, marks=pytest.mark.soak), 4])
def test_on_ray_a_host_that_dies_before_a_replay_changes_nothing(bits):
    """Its views are uploaded again: the same plans, the same outcomes and figures, the same model."""
    changes = {**ecofed(period=3, bits=bits), "stop": {"rounds": 4}}
    expected, planned = finished(**changes)
    run = fedbonsai.run(BASE | changes, backend="ray", workers=2)
    notices, ended = [], []
    for event in run:
        if isinstance(event, VersionClosed) and event.version == 1:
            for pid in actor_pids("PartitionHostActor"):
                os.kill(pid, signal.SIGKILL)
        notices += [event.text] if isinstance(event, Notice) else []
        ended += [event.report] if isinstance(event, PlanEnded) else []
    same = ("model_hash", "up_by_kind", "down_by_kind", "virtual_s", "outcomes", "accuracy")
    assert {key: run.summary[key] for key in same} == {key: expected[key] for key in same}
    plans = [[(r.plan.version, r.plan.device, r.plan.split.view, r.outcome) for r in each] for each in (ended, planned)]
    assert sorted(plans[0], key=str) == sorted(plans[1], key=str)
    replays = [report.plan for report in ended if report.plan.version == 1]
    assert all(plan.split.view is not None and plan.attempt > 0 for plan in replays)
    assert (
        sum("uploads a view again that its partition host has lost" in text for text in notices) == 3
    )  # of 1, 2 and 4


def test_a_resumed_run_whose_checkpoint_lacks_views_has_them_uploaded_again(tmp_path, monkeypatch):
    changes = {**ecofed(period=4), "stop": {"rounds": 4}}
    expected, _ = finished(**changes)
    monkeypatch.setattr(PartitionHost, "bodies", lambda self, keys: {})  # as a host that could not save its views
    run = fedbonsai.run(BASE | changes, out=tmp_path / "run")
    for event in run:
        if isinstance(event, VersionClosed) and event.version == 2:
            break
    run.close()
    resumed = fedbonsai.run(BASE | changes, resume=tmp_path / "run")
    list(resumed)
    assert resumed.summary["model_hash"] == expected["model_hash"]
    assert resumed.summary["outcomes"] == expected["outcomes"]
