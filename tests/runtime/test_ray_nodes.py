"""A whole node of a cluster is killed: what was there is placed again elsewhere, or the run ends and says why."""

import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import fedbonsai
import pytest
import ray
from fedbonsai.clusters.ray_cluster import _environment, _loopback_only, start_local
from fedbonsai.runtime.errors import RunError
from fedbonsai.runtime.events import Notice, PlanEnded, VersionClosed
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .chaos import CONFIG
from .processes import descends

QUICK = {  # Ray notices a dead node after 1 to 2 s instead of 15 to 20
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}
HEAD_CPUS, OF_WORKER = 3, 0.97
BESIDE_SERVER, ALONE = 2.5, 3.0  # what somebody else takes of the head node


@ray.remote
class Tenant:
    """Somebody else on the head node: while it is there, only the server fits beside it, or nothing."""

    def is_there(self):
        return True


@pytest.fixture(scope="module", autouse=True)
def head(own_ray):
    with start_local(num_cpus=HEAD_CPUS, env_vars=QUICK) as cluster:
        yield cluster


@contextmanager
def another_node(cluster, *, num_cpus):
    """A second node on this machine; how it is killed, with all that runs there."""
    with _environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token} | QUICK), _loopback_only():
        node = Node(
            RayParams(
                gcs_address=cluster.address, redis_address=cluster.address, node_ip_address="127.0.0.1",
                num_cpus=num_cpus, num_gpus=0, object_store_memory=200 * 2**20, min_worker_port=0, max_worker_port=0,
                node_manager_port=0, include_log_monitor=False,
            ),
            head=False, shutdown_at_exit=False, spawn_reaper=False,
        )  # fmt: skip
    while sum(found["Alive"] for found in ray.nodes()) < 2:
        time.sleep(0.1)

    def kill():
        roots = [process.process.pid for kind in node.all_processes.values() for process in kind]
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        for pid in [pid for pid in pids if any(descends(pid, root) for root in roots)]:
            os.kill(pid, signal.SIGKILL)

    try:
        yield kill
    finally:
        node.kill_all_processes(check_alive=False, allow_graceful=False)


def lose_the_other_node(cluster, config, *, tenant_leaves, takes=BESIDE_SERVER, **how):
    """A run that is on the other node, all but the server where the tenant leaves it room; which is killed in mid-round.

    Its events.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    tenant = Tenant.options(num_cpus=takes, scheduling_strategy=here).remote()
    events = []
    try:
        assert ray.get(tenant.is_there.remote())
        with another_node(cluster, num_cpus=3 if takes == ALONE else 2) as kill:
            for event in fedbonsai.run(config, backend="ray", workers=2, **how):
                events.append(event)
                if isinstance(event, VersionClosed) and event.version == 3:
                    assert {len(set(found["bundles_to_node_id"].values())) for found in groups()} == {
                        1 + (takes < ALONE)
                    }
                    if tenant_leaves:
                        ray.kill(tenant)
                    threading.Timer(0.2, kill).start()
    finally:
        ray.kill(tenant)
    return events


def groups():
    """Placement groups that are there."""
    return [found for found in ray.util.placement_group_table().values() if found["state"] == "CREATED"]


def test_what_was_on_a_node_that_dies_is_placed_again(head):
    config = CONFIG | {"ray": {"cpus": OF_WORKER}, "stop": {"rounds": 6}}
    config["fleet"] = CONFIG["fleet"] | {"hosts": {"count": 1}}
    expected = fedbonsai.run(config, backend="inline")
    list(expected)
    events = lose_the_other_node(head, config, tenant_leaves=True)
    (died,) = {event.text for event in events if isinstance(event, Notice) and "partition host 0 died" in event.text}
    gone = died.partition("(")[2].partition(" is gone)")[0]
    assert gone.startswith("node 127.0.0.1 (")
    notices = [event.text for event in events if isinstance(event, Notice)]
    for bundle in (1, 2):
        assert f"worker of bundle {bundle} died ({gone} is gone) and is replaced" in notices
    reports = [event.report for event in events if isinstance(event, PlanEnded)]
    assert any(report.plan.attempt for report in reports)
    assert {report.outcome.value for report in reports} <= {"done", "late"}
    assert events[-1].model_hash == expected.summary["model_hash"]


def test_with_the_servers_node_the_run_moves_and_goes_on_from_its_checkpoint(head, tmp_path):
    config = CONFIG | {"ray": {"cpus": OF_WORKER}, "stop": {"rounds": 6}}
    config["fleet"] = CONFIG["fleet"] | {"hosts": {"count": 1}}
    expected = fedbonsai.run(config, backend="inline")
    list(expected)
    events = lose_the_other_node(head, config, tenant_leaves=True, takes=ALONE, out=tmp_path / "run")
    (told,) = [event.text for event in events if isinstance(event, Notice) and "server" in event.text]
    assert told.startswith("the server actor died: ")
    assert told.endswith("; it is replaced")
    assert events[-1].model_hash == expected.summary["model_hash"]


def test_where_nothing_is_left_to_run_on_the_run_ends(head):
    config = CONFIG | {
        "policy": [{"name": "random", "cohort": 1.0}],
        "ray": {"cpus": OF_WORKER, "placement_timeout_s": 1},
    }
    why = r"died \(node 127.* is gone\) and could not be replaced \(its bundle has found no place within 5 s\)$"
    with pytest.raises(RunError, match=rf"^no worker is left for the simulated devices: worker of bundle \d {why}"):
        lose_the_other_node(head, config | {"stop": {"rounds": 1000}}, tenant_leaves=False)
