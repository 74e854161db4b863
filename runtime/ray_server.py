"""What the server's actor builds in its own process: the engine, with workers on Ray and packets in the object store."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..actors.ray_devices import RealDevices
from ..actors.ray_hosts import RayHosts
from ..actors.ray_place import Place
from ..actors.ray_pool import RayPool
from ..clusters.real_devices import RealDevice
from ..clusters.scratch import Scratch
from ..comms.ray_channel import RayChannel
from ..learning.workload import WorkloadSettings
from ..policies.policy import Policy
from .config import Config
from .engine import Engine
from .saver import SavePlan
from .service import Service


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the actors of a run are: bundles of server, workers and partition hosts, and the real devices.

    ``least_devices``: real devices without which the run does not begin.
    """

    server: Place
    workers: Sequence[Place]
    hosts: Sequence[Place]
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
) -> Service:
    """The engine and its service. ``scratch``: for temporary files. ``notices``: what happened before."""
    options = config.ray

    def make_pool(settings: WorkloadSettings) -> RayPool:
        partition_hosts = RayHosts(
            settings,
            config.replay,
            scratch=scratch,
            places=layout.hosts,
            server=layout.server,
            timeout_s=options.placement_timeout_s,
            stuck_after_s=options.stuck_after_s,
        )
        return RayPool(
            settings,
            places=layout.workers,
            devices=RealDevices(layout.devices, cpus=options.cpus),
            least_devices=layout.least_devices,
            timeout_s=options.placement_timeout_s,
            hosts=partition_hosts,
            stuck_after_s=options.stuck_after_s,
        )

    engine = Engine(config, policy, make_pool=make_pool, channel=RayChannel(), scratch=scratch)
    return Service(engine, save, notices)
