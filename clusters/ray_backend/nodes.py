"""The nodes of the Ray cluster that this process is connected to."""

import time
from collections.abc import Generator, Sequence

import ray
from ray._private.state import available_resources_per_node

from ..waiting import waiting
from .node import Node
from .real_devices import RealDevice, Site, locate

_LOOK_EVERY_S = 0.5


def cluster_nodes(*, free: bool = False) -> list[Node]:
    """The nodes that are alive, with all they have or, when ``free``, with what nobody has reserved."""
    unused = available_resources_per_node() if free else {}
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            dict(unused.get(node["NodeID"], {}) if free else node["Resources"]),
            node.get("Labels", {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def await_devices(devices: Sequence[RealDevice], *, cpus: float | None) -> Generator[str, None, dict[int, Site]]:
    """The nodes of real devices, once all are there or have been awaited for their time; yields what is waited for.

    ``cpus``: as ``locate``.
    """
    began = time.monotonic()
    found: dict[int, Site] = {}

    def missing() -> list[RealDevice]:
        return [device for device in devices if device.number not in found]

    def are_there() -> bool:
        found.clear()  # nothing is reserved yet, and a node may have left again
        found.update(locate(devices, cluster_nodes(free=True), cpus=cpus))
        if all(time.monotonic() - began >= device.join_timeout_s for device in missing()):
            return True
        time.sleep(_LOOK_EVERY_S)
        return False

    yield from waiting(
        are_there, lambda: f"waiting for {', '.join(f'{d.name}: {d.wants(cpus)}' for d in missing()[:3])}"
    )
    return found
