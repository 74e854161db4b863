"""The device worker on Ray: a ``Device`` in a process of its own."""

from collections.abc import Mapping
from typing import Any

import ray

from ...clusters.ray_backend.checks import check_versions
from ...clusters.ray_backend.real_devices import Site
from ...clusters.scratch import reap_runs
from ...comms.codec import Array
from ...comms.links.link import State
from ...learning.workload_settings import WorkloadSettings
from .allocator import keep_freed_memory
from .ray_link import RayLink, Way
from .ray_place import ActorPlacement


class Worker:
    """The actor: a ``Device`` in a process of its own, with one torch thread."""

    def __init__(self, settings: WorkloadSettings) -> None:
        """Set threads before anything is computed."""
        import torch  # here, so that the server does not import it for the worker's sake before it has started it

        from ..device.device import Device

        torch.set_num_threads(1)
        keep_freed_memory()
        reap_runs()
        self._device = Device(settings)

    def warm_up(self, versions: Mapping[str, str]) -> str:
        """Load data and model; the node's id. Raises ``ValueError`` where this node has not the ``versions`` of the server."""
        check_versions(versions)
        self._device.warm_up()
        node: str = ray.get_runtime_context().get_node_id()
        return node

    @ray.method(num_returns=3)  # type: ignore[untyped-decorator, unused-ignore]
    def run(
        self, plan: bytes, state: State | None, way: Way | None, *packets: Array
    ) -> tuple[bytes, Array | None, State | None]:
        """One plan; packets and state arrive as views of the object store. ``way``: to the host of a split plan."""
        return self._device.run(plan, packets, state, RayLink(way) if way is not None else None)


def start_worker(settings: WorkloadSettings, place: ActorPlacement, site: Site | None = None) -> Any:
    """A worker actor in its place; its handle."""
    return ray.remote(Worker).options(**place.options(site)).remote(settings)
