"""A whole node of a cluster is killed: its actors are placed elsewhere, or the run ends and says why."""

import re

import fedbonsai
import pytest
import ray
from fedbonsai.actors.messages.host_messages import ReplaySettings
from fedbonsai.actors.pool import WorkerFailure
from fedbonsai.actors.ray_backend import actor_group
from fedbonsai.actors.ray_backend.actor_placement import ActorPlacement
from fedbonsai.actors.ray_backend.host_actor import HostSlot
from fedbonsai.actors.ray_backend.partition_hosts import PartitionHosts
from fedbonsai.clusters.ray_backend.ray_cluster import start_local
from fedbonsai.clusters.scratch import Scratch
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.spec import Call
from fedbonsai.learning.workload_settings import WorkloadSettings
from fedbonsai.runtime.errors import RunError
from fedbonsai.runtime.events import Notice, PlanEnded, VersionClosed
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .chaos import CONFIG as CHAOS
from .nodes import QUICK, OtherNode, Trap

CONFIG = CHAOS | {"training": CHAOS.get("training", {}) | {"loss": Trap.LOSS}}
SETTINGS = WorkloadSettings(model=Call("digits_cnn"), data=DataConfig(), metrics=None, num_devices=1, seed=0)
HEAD_CPUS, OF_WORKER = 3, 0.97
BESIDE_SERVER, ALONE = 2.9, 3.0  # what tenants reserve on the head node
FOR_ONE_WORKER = 1.4  # enough for the server, the hosts and one worker


@ray.remote
class Tenant:
    """Reserves cores of the head node, so that only the server fits beside it, or nothing."""

    def is_there(self):
        return True


@pytest.fixture(scope="module", autouse=True)
def head(own_ray):
    with start_local(num_cpus=HEAD_CPUS, env_vars=QUICK) as cluster:
        yield cluster


@pytest.fixture
def trap(tmp_path, monkeypatch):
    (folder := tmp_path / "trap").mkdir()
    monkeypatch.syspath_prepend(folder)
    return Trap(folder)


def lose_the_other_node(cluster, config, trap, *, frees, takes=BESIDE_SERVER, **how):
    """The events of a run whose actors are on another node, which is killed in mid-round.

    ``takes``: cores of the head node that tenants reserve, which leave room for the server or for nothing. ``frees``: those of
    them that are released when the node is killed.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    stays, leaves = [
        Tenant.options(num_cpus=cpus, scheduling_strategy=here).remote() for cpus in (takes - frees, frees)
    ]
    events = []
    try:
        assert ray.get([tenant.is_there.remote() for tenant in (stays, leaves)])
        with OtherNode(cluster, num_cpus=3 if takes == ALONE else 2) as other:
            for event in fedbonsai.run(config, backend="ray", workers=2, **how):
                events.append(event)
                if isinstance(event, VersionClosed) and event.version == 3:
                    assert len({node for found in groups() for node in found["bundles_to_node_id"].values()}) == (
                        1 + (takes < ALONE)
                    )
                    ray.kill(leaves)
                    trap.set(other)
    finally:
        for tenant in (stays, leaves):
            ray.kill(tenant)
    return events


def groups():
    """The placement groups that are placed."""
    return [found for found in ray.util.placement_group_table().values() if found["state"] == "CREATED"]


def test_what_was_on_a_node_that_dies_is_placed_again(head, trap):
    config = CONFIG | {"ray": {"cpus": OF_WORKER}, "stop": {"rounds": 6}}
    config["fleet"] = CONFIG["fleet"] | {"hosts": {"count": 1}}
    expected = fedbonsai.run(config, backend="inline")
    list(expected)
    events = lose_the_other_node(head, config, trap, frees=BESIDE_SERVER)
    notices = [event.text for event in events if isinstance(event, Notice)]
    (died,) = [text for text in notices if text.startswith("partition host 0 died (")]
    gone = died.partition("(")[2].partition(" is gone)")[0]
    assert gone.startswith("node 127.0.0.1 (")
    for bundle in (1, 2):
        assert f"worker of bundle {bundle} died ({gone} is gone) and is replaced" in notices
    reports = [event.report for event in events if isinstance(event, PlanEnded)]
    assert any(report.plan.attempt for report in reports)
    assert {report.outcome.value for report in reports} <= {"done", "late"}
    assert events[-1].model_hash == expected.summary["model_hash"]


@pytest.mark.soak
def test_with_the_servers_node_the_run_moves_and_goes_on_from_its_checkpoint_with_the_workers_that_have_room(
    head, trap, tmp_path
):
    config = CONFIG | {"ray": {"cpus": OF_WORKER}, "stop": {"rounds": 6}}
    config["fleet"] = CONFIG["fleet"] | {"hosts": {"count": 1}}
    expected = fedbonsai.run(config, backend="inline")
    list(expected)
    events = lose_the_other_node(head, config, trap, frees=FOR_ONE_WORKER, takes=ALONE, out=tmp_path / "run")
    notices = [event.text for event in events if isinstance(event, Notice)]
    (died,) = [text for text in notices if text.startswith("the server actor died: ")]
    assert re.fullmatch(r"the server actor died: node 127\.0\.0\.1 \(\w+\) is gone; it is replaced", died)
    (fewer,) = [text for text in notices if text.startswith("the run goes on with the bundles that have a place; ")]
    assert re.search(r"; bundle [23] of 4 \(worker: 0\.97 CPU\) cannot be placed: the most that is left", fewer)
    assert events[-1].model_hash == expected.summary["model_hash"]


@pytest.mark.soak
def test_where_nothing_is_left_for_the_server_the_run_ends_and_names_the_node(head, trap, tmp_path):
    ray_options = {"cpus": OF_WORKER, "placement_timeout_s": 1}
    config = CONFIG | {"ray": ray_options, "stop": {"rounds": 1000}}
    why = r"^stage server: the server actor died: node 127\.0\.0\.1 \(\w+\) is gone, and no other can take its place: bundle "
    with pytest.raises(RunError, match=rf"{why}.*; go on with --resume '.*/run'$"):
        lose_the_other_node(head, config, trap, frees=0.05, takes=ALONE, out=tmp_path / "run")


@pytest.mark.soak
def test_where_nothing_is_left_to_run_on_the_run_ends(head, trap):
    config = CONFIG | {
        "policy": [{"name": "random", "cohort": 1.0}],
        "ray": {"cpus": OF_WORKER, "placement_timeout_s": 1},
    }
    why = r"died \(node 127.* is gone\) and could not be replaced \(its bundle has found no place within 5 s\)$"
    with pytest.raises(RunError, match=rf"^no worker is left for the simulated devices: worker of bundle \d {why}"):
        lose_the_other_node(head, config | {"stop": {"rounds": 1000}}, trap, frees=0.05)


def hosts_in(server, bundles, *, replay=None, timeout_s=5):
    """Partition hosts in these bundles, beside a server in another one."""
    placements = [
        ActorPlacement(name=f"partition host {number}", group=str(number), cpus=0.1, bundle=bundle, fallback=server)
        for number, bundle in enumerate(bundles)
    ]
    return PartitionHosts(
        SETTINGS, replay or ReplaySettings(), scratch=Scratch(), placements=placements, placement_timeout_s=timeout_s
    )


@pytest.fixture
def bundles_of():
    """``bundles_of({"CPU": 1}, ...)``: bundles, each in a placement group of its own."""
    groups = []

    def make(*bundles):
        groups[:] = [ray.util.placement_group([bundle]) for bundle in bundles]
        return groups

    yield make
    for group in groups:
        ray.util.remove_placement_group(group)


@pytest.mark.soak
def test_a_host_whose_bundle_finds_no_place_goes_on_beside_the_server(head, bundles_of, monkeypatch):
    monkeypatch.setattr(actor_group, "_MIN_PLACEMENT_S", 2.0)
    with OtherNode(head, num_cpus=1, resources={"elsewhere": 1}) as other:
        server, *bundles = bundles_of({"CPU": 1}, {"CPU": 0.1}, {"CPU": 0.1, "elsewhere": 1})
        hosts = hosts_in(server, bundles, timeout_s=0)
        first, second = hosts.wait_for(0), hosts.wait_for(1)
        assert hosts.node_of(HostSlot(second.handle, 1, 0, [])) == other.node_id
        other.kill()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(second.handle.heartbeat.remote(), timeout=30)
    hosts.evict(other.node_id, "power cut")
    assert not hosts.is_ready(1)
    moved = hosts.wait_for(1)
    ray.get(moved.handle.heartbeat.remote())
    early = "partition host 1 died while it started ("  # Ray sent the next one to the node before it was sure that it is gone
    assert [text for text in hosts.notices if not text.startswith(early)] == [
        "partition host 1 died (power cut) and is replaced",
        "partition host 1: its bundle has found no place within 2 s; it goes on beside the server",
    ]
    assert first.node == moved.node == ray.get_runtime_context().get_node_id()
    assert hosts.wait_for(0) is first
    hosts.close()


def test_a_host_that_cannot_start_ends_the_run_only_where_it_is_needed(bundles_of):
    server, *bundles = bundles_of({"CPU": 1}, {"CPU": 0.1})
    hosts = hosts_in(server, bundles, replay="no settings")
    assert not hosts.is_ready(0)
    while references := hosts.references():
        hosts.arrived(ray.wait(references)[0][0])
    hosts.check_late()
    with pytest.raises(WorkerFailure, match=r"^partition host 0 could not be started \('str' object has no attribute "):
        hosts.is_ready(0)
