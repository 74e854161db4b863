"""The actor of a worker on Ray: a ``Device`` in a process of its own. That of a real device has a memory."""

import gc
from collections.abc import Mapping, Sequence

import ray

from ...clusters.allocator import importing
from ...clusters.ray_backend.checks import check_versions
from ...clusters.ray_backend.real_devices import Site
from ...comms.codec import Array
from ...comms.links.state import LinkState
from ...learning.workload_settings import WorkloadSettings
from ..device.device_with_memory import DeviceWithMemory
from ..device.plan_runner import PlanRunner
from ..enforcement.enforced_device import EnforcedDevice, make_device
from .actor import prepare_process, remote_method
from .actor_placement import ActorPlacement
from .host_actor import HostSlot, RayLink


class WorkerActor:
    """A device in a process of its own; or in a child of it, under memory limits."""

    def __init__(self, settings: WorkloadSettings, enforce: bool = False, has_memory: bool = False) -> None:
        """Set threads before anything is computed. ``enforce``: memory budgets, if this node can.

        ``has_memory``: it is one real device, which keeps its end of the link.
        """
        prepare_process()
        with importing():
            device = make_device(settings, enforce=enforce, whole_states=has_memory)
        self._device: PlanRunner = DeviceWithMemory(device) if has_memory else device
        if not isinstance(device, EnforcedDevice):
            import torch  # a child has its own

            torch.set_num_threads(settings.threads)

    @remote_method
    def warm_up(self, versions: Mapping[str, str], model: bool) -> str:
        """Load the data and, if ``model``, the global model; the id of the node.

        Raises ``ValueError`` if the node's ``versions`` are not the server's.
        """
        check_versions(versions)
        self._device.warm_up(model=model)
        gc.freeze()  # what torch, Ray and the data have made stays; collections during plans do not look through it
        node: str = ray.get_runtime_context().get_node_id()
        return node

    @remote_method
    def time_steps(self, messages: Sequence[bytes]) -> list[float | None]:
        """Seconds of a training step of each of these plans; see ``Device.time_steps``."""
        return self._device.time_steps(messages)

    @remote_method
    @ray.method(num_returns=3)  # type: ignore[untyped-decorator, unused-ignore]
    def run(
        self, plan: bytes, state: LinkState | None, slot: HostSlot | None, *packets: Array
    ) -> tuple[bytes, Array | None, LinkState | None]:
        """Carry out a plan: report, update and state, each with a reference of its own.

        Packets and state arrive as views of the object store; a real device has its own state, and returns None in its place.
        ``slot``: of a split plan, at its partition host.
        """
        return self._device.run(plan, packets, state, RayLink(slot) if slot is not None else None)


def start_worker(
    settings: WorkloadSettings, placement: ActorPlacement, site: Site | None = None, *, enforce: bool = False
) -> WorkerActor:
    """Start the actor of a worker; its handle. ``site``: of a real device. ``enforce``: memory budgets."""
    handle: WorkerActor = (
        ray.remote(WorkerActor).options(**placement.options(site)).remote(settings, enforce, site is not None)
    )
    return handle
