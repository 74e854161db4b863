"""The server's actor on Ray: the service, with an engine whose workers are on Ray and whose packets are in the object store."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray

from ...actors.ray_backend.actor import prepare_process, remote_method
from ...actors.ray_backend.actor_placement import ActorPlacement
from ...actors.ray_backend.device_registry import DeviceRegistry
from ...actors.ray_backend.partition_hosts import PartitionHosts
from ...actors.ray_backend.ray_distiller import RayDistiller
from ...actors.ray_backend.ray_pool import RayPool
from ...clusters.allocator import importing
from ...clusters.scratch import Scratch
from ...comms.codec import Array
from ...comms.ray_channel import RayChannel
from ...learning.workload_settings import WorkloadSettings
from ...policies.policy import Policy
from ..configuration.config import Config
from ..configuration.resolution import workload_settings
from .layout import Layout
from .save_plan import SavePlan

if TYPE_CHECKING:
    from .service import Service


class ServerActor:
    """A ``Service`` in a process of its own. The methods are those of ``Service``, but for ``make``."""

    _service: "Service"

    def __init__(self) -> None:
        """The service is made by ``make``, which can raise errors to its caller; an error here would look like a death."""
        prepare_process()

    @remote_method
    def make(
        self,
        config: Config,
        policy: Policy,
        save: SavePlan | None,
        layout: Layout,
        scratch: Scratch,
        notices: Sequence[str],
        emulating: Sequence[str] | None,
    ) -> str:
        """Start the workers, and build the engine; the id of the node.

        ``scratch``: for temporary files. ``notices``: what an operator should know of what happened before. ``emulating``:
        nodes without bf16 instructions (None: this machine is the only one).
        """
        self._service = _make_service(config, policy, save, layout, scratch, notices, emulating)
        node: str = ray.get_runtime_context().get_node_id()
        return node

    @remote_method
    def step(self, logged: int) -> bytes:
        """The next batch of events."""
        return self._service.step(logged)

    @remote_method
    def save(self, logged: int) -> None:
        """Write a checkpoint, if there is something new."""
        self._service.save(logged)

    @remote_method
    def weights(self, which: str, metadata: Mapping[str, str]) -> Array:
        """Weights, as the bytes of a safetensors file."""
        return self._service.weights(which, metadata)

    @remote_method
    def close(self) -> None:
        """End the workers, the partition hosts and the distiller."""
        self._service.close()


def start_server(placement: ActorPlacement, *, runtime_env: Mapping[str, Any]) -> ServerActor:
    """Start the actor of a server; its handle."""
    options = placement.options() | ({"runtime_env": dict(runtime_env)} if runtime_env else {})
    handle: ServerActor = ray.remote(ServerActor).options(**options).remote()
    return handle


def _measured_kernels(config: Config, policy: Policy) -> tuple[Config, list[str]]:
    """The configuration with the kernels of sparse products, which the workers need, and notices about them."""
    if config.kernels.sparse == "dense":
        return config, []  # without an import of torch: the first worker starts meanwhile
    with importing():
        from ..engine.kernel_measurement import with_kernels

    return with_kernels(config, policy)


def _start_pool(config: Config, settings: WorkloadSettings, layout: Layout, scratch: Scratch) -> RayPool:
    """Start the partition hosts, and the workers."""
    options = config.ray
    hosts = PartitionHosts(
        settings,
        config.replay,
        scratch=scratch,
        placements=layout.hosts,
        placement_timeout_s=options.placement_timeout_s,
        stuck_after_s=options.stuck_after_s,
    )
    return RayPool(
        settings,
        placements=layout.workers,
        devices=DeviceRegistry(layout.devices, cpus=options.cpus),
        min_devices=layout.min_devices,
        placement_timeout_s=options.placement_timeout_s,
        hosts=hosts,
        stuck_after_s=options.stuck_after_s,
        enforce=config.memory.is_enforced("ray"),
    )


def _make_service(
    config: Config,
    policy: Policy,
    save: SavePlan | None,
    layout: Layout,
    scratch: Scratch,
    notices: Sequence[str],
    emulating: Sequence[str] | None,
) -> "Service":
    options = config.ray
    config, measured = _measured_kernels(config, policy)
    settings = workload_settings(config, num_devices=config.load_fleet().num_devices)
    pool = _start_pool(config, settings, layout, scratch)
    distiller = None
    if layout.distiller is not None:
        distiller = RayDistiller(
            settings,
            placement=layout.distiller,
            placement_timeout_s=options.placement_timeout_s,
            stuck_after_s=options.stuck_after_s,
        )
    try:
        if distiller is not None:
            distiller.start()

        with importing():  # only now, while the first worker starts
            import torch

            from ..engine.engine import Engine
            from .service import Service

        torch.set_num_threads(config.threads)  # for evaluation on the server
        engine = Engine(
            config,
            policy,
            settings=settings,
            pool=pool,
            channel=RayChannel(),
            distiller=distiller,
            scratch=scratch,
            emulating=emulating,
        )
        return Service(engine, save, [*notices, *measured])
    except BaseException:
        if distiller is not None:
            distiller.close()
        pool.close()
        raise
