"""The device worker on Ray: a ``Device`` in a process of its own, in its bundle of the placement group."""

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..comms.codecs import Array
from ..comms.link import State
from ..learning.workload import WorkloadSettings
from .allocator import keep_freed_memory
from .device import Device
from .ray_link import RayLink, Way


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """One worker's place: its bundle in the group, the fleet class it is reserved for ("" = any), and its resources."""

    index: int
    group: str = ""
    cpus: float = 1.0
    memory_bytes: int | None = None


class Worker:
    """The actor: a ``Device`` in a process of its own, with one torch thread."""

    def __init__(self, settings: WorkloadSettings) -> None:
        """Set threads before anything is computed."""
        import torch

        torch.set_num_threads(1)
        keep_freed_memory()
        self._device = Device(settings)

    def warm_up(self) -> str:
        """Load data and model; the node's id."""
        self._device.warm_up()
        node: str = ray.get_runtime_context().get_node_id()
        return node

    @ray.method(num_returns=3)  # type: ignore[untyped-decorator, unused-ignore]
    def run(
        self, plan: bytes, state: State | None, way: Way | None, *packets: Array
    ) -> tuple[bytes, Array | None, State | None]:
        """One plan; packets and state arrive as views of the object store. ``way``: to the host of a split plan."""
        return self._device.run(plan, packets, state, RayLink(way) if way is not None else None)


def start_worker(settings: WorkloadSettings, *, placement: Any, bundle: Bundle) -> Any:
    """A worker actor in its bundle. Ray neither restarts it nor repeats a call."""
    options: dict[str, Any] = {
        "num_cpus": bundle.cpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=bundle.index),
    }
    if bundle.memory_bytes:
        options["memory"] = bundle.memory_bytes
    return ray.remote(Worker).options(**options).remote(settings)
