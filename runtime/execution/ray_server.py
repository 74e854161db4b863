"""What the server's actor builds in its own process: the engine, with workers on Ray and packets in the object store."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...actors.ray_backend.ray_devices import RealDevices
from ...actors.ray_backend.ray_hosts import RayHosts
from ...actors.ray_backend.ray_place import ActorPlacement
from ...actors.ray_backend.ray_pool import RayPool
from ...clusters.ray_backend.real_devices import RealDevice
from ...clusters.scratch import Scratch
from ...comms.ray_channel import RayChannel
from ...policies.policy import Policy
from ..configuration.config import Config
from ..configuration.resolution import workload_settings
from .save_plan import SavePlan

if TYPE_CHECKING:
    from .service import Service


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the actors of a run are: bundles of server, workers and partition hosts, and the real devices.

    ``least_devices``: real devices without which the run does not begin.
    """

    server: ActorPlacement
    workers: Sequence[ActorPlacement]
    hosts: Sequence[ActorPlacement]
    devices: Sequence[RealDevice] = ()
    least_devices: int = 0


def make_service(
    config: Config,
    policy: Policy,
    save: SavePlan | None,
    *,
    layout: Layout,
    scratch: Scratch,
    notices: Sequence[str] = (),
) -> "Service":
    """The engine and its service. ``scratch``: for temporary files. ``notices``: what happened before."""
    options, fleet = config.ray, config.load_fleet()
    settings = workload_settings(config, num_devices=fleet.num_devices)
    partition_hosts = RayHosts(
        settings,
        config.replay,
        scratch=scratch,
        places=layout.hosts,
        server=layout.server,
        timeout_s=options.placement_timeout_s,
        stuck_after_s=options.stuck_after_s,
    )
    pool = RayPool(
        settings,
        places=layout.workers,
        devices=RealDevices(layout.devices, cpus=options.cpus),
        least_devices=layout.least_devices,
        timeout_s=options.placement_timeout_s,
        hosts=partition_hosts,
        stuck_after_s=options.stuck_after_s,
    )
    try:
        import torch  # only now, while the first worker starts

        from ..engine.engine import Engine
        from .service import Service

        torch.set_num_threads(1)
        engine = Engine(config, policy, settings=settings, pool=pool, channel=RayChannel(), scratch=scratch)
        return Service(engine, save, notices)
    except BaseException:
        pool.close()
        raise
