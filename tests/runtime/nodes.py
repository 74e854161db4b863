"""Clusters of several nodes on this machine, of which one can be killed."""

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import ray
from fedbonsai.clusters.ray_cluster import _environment, _loopback_only
from ray._private.node import Node
from ray._private.parameter import RayParams

from .processes import descends

QUICK = {  # Ray notices a dead node after 1 to 2 s instead of 15 to 20
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}


@contextmanager
def another_node(cluster, *, num_cpus, resources=None):
    """A second node on this machine; how it is killed, with all that runs there."""
    with _environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token} | QUICK), _loopback_only():
        node = Node(
            RayParams(
                gcs_address=cluster.address, redis_address=cluster.address, node_ip_address="127.0.0.1",
                num_cpus=num_cpus, num_gpus=0, resources=resources or {}, object_store_memory=200 * 2**20,
                min_worker_port=0, max_worker_port=0, node_manager_port=0, include_log_monitor=False,
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
