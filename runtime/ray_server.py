"""What the server's actor builds in its own process: the engine, with workers on Ray and packets in the object store."""

from collections.abc import Sequence
from typing import Any

from ..actors.ray_hosts import RayHosts
from ..actors.ray_pool import RayPool
from ..actors.ray_worker import Bundle
from ..comms.ray_channel import RayChannel
from ..learning.workload import WorkloadSettings
from ..policies.policy import Policy
from .config import Config
from .engine import Engine
from .saver import SavePlan
from .service import Service


def make_service(
    config: Config,
    policy: Policy,
    save: SavePlan | None,
    *,
    placement: Any,
    bundles: list[Bundle],
    hosts: list[int],
    notices: Sequence[str] = (),
) -> Service:
    """The engine and its service; workers are started in ``bundles`` of the placement group, partition hosts in ``hosts``.

    ``notices``: what an operator should know of the cluster.
    """
    timeout_s = config.ray.placement_timeout_s

    def make_pool(settings: WorkloadSettings) -> RayPool:
        partition_hosts = RayHosts(
            settings,
            config.replay,
            placement=placement,
            bundles=hosts,
            cpus=config.ray.host_cpus,
            timeout_s=timeout_s,
            stuck_after_s=config.ray.stuck_after_s,
        )
        return RayPool(
            settings,
            placement=placement,
            bundles=bundles,
            timeout_s=timeout_s,
            hosts=partition_hosts,
            stuck_after_s=config.ray.stuck_after_s,
        )

    return Service(Engine(config, policy, make_pool=make_pool, channel=RayChannel()), save, notices)
