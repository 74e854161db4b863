"""Clusters of several nodes on this machine, of which one can be killed."""

import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import ray
from fedbonsai.clusters.ray_backend.ray_cluster import _environment, _loopback_only
from ray._private.node import Node
from ray._private.parameter import RayParams

from .processes import descends, wait_until

QUICK = {  # Ray notices a dead node after 1 to 2 s instead of 15 to 20
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}
STANDS_STILL = """
import time
from pathlib import Path
import ray
import torch

def loss(output, target):
    node = Path({folder!r}) / "node"
    if node.exists() and ray.is_initialized() and ray.get_runtime_context().get_node_id() == node.read_text():
        node.with_name("caught").touch()
        time.sleep(1000)
    return torch.nn.functional.cross_entropy(output, target)
"""
CPUS, OF_WORKER = 2, 1.8  # of nodes on which one worker finds room, beside the server and the hosts


class OtherNode:
    """A second node on this machine, which can be killed with all its processes, and started again as another node."""

    def __init__(self, cluster, *, num_cpus, resources=None, labels=None):
        self._cluster, self._num_cpus = cluster, num_cpus
        self._resources, self._labels = resources or {}, labels or {}
        self._node = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *problem):
        self.kill()
        self.wait_until_noticed()

    def start(self):
        """Start the node."""
        known = {found["NodeID"] for found in ray.nodes()}
        with _environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._cluster.token} | QUICK), _loopback_only():
            self._node = Node(
                RayParams(
                    gcs_address=self._cluster.address, redis_address=self._cluster.address, node_ip_address="127.0.0.1",
                    num_cpus=self._num_cpus, num_gpus=0, resources=self._resources, labels=self._labels,
                    object_store_memory=200 * 2**20,
                    min_worker_port=0, max_worker_port=0, node_manager_port=0, include_log_monitor=False,
                ),
                head=False, shutdown_at_exit=False, spawn_reaper=False,
            )  # fmt: skip

        def new():
            return [found["NodeID"] for found in ray.nodes() if found["Alive"] and found["NodeID"] not in known]

        wait_until(new, told="the node has not come up")
        (self.node_id,) = new()

    def pids(self):
        """All processes of the node."""
        roots = [process.pid for process in self._roots()]
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return {pid for pid in pids if any(descends(pid, root) for root in roots)}

    def kill(self):
        """Kill the node as a power cut would, if it runs. Ray notices it later."""
        if self._node is None:
            return
        for pid in self.pids():
            with suppress(ProcessLookupError):  # ended with its parent
                os.kill(pid, signal.SIGKILL)
        for process in self._roots():
            process.wait()

    def wait_until_noticed(self):
        """Wait until Ray lists only the head as alive, so that the next test does not find this node."""
        wait_until(
            lambda: sum(found["Alive"] for found in ray.nodes()) == 1, told="the death of the node was not noticed"
        )

    def _roots(self):
        return [found.process for kind in self._node.all_processes.values() for found in kind]


class Trap:
    """A loss function that can be made to block on one node, so that plans are in flight there when the node is killed."""

    LOSS = "standing_still:loss"  # for ``training.loss``

    def __init__(self, folder):
        """Write the module of the loss into a folder that is on the import path."""
        sys.modules.pop("standing_still", None)  # that of another test, in another folder
        (folder / "standing_still.py").write_text(STANDS_STILL.format(folder=str(folder)))
        self._node, self._caught = folder / "node", folder / "caught"

    def set(self, node):
        """Kill the node when it computes its next loss."""
        self._node.write_text(node.node_id)
        threading.Thread(target=self._kill, args=[node], daemon=True).start()

    def _kill(self, node):
        wait_until(self._caught.exists)
        self._node.unlink()
        self._caught.unlink()
        node.kill()
