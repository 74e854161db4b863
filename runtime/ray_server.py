"""What the server's actor builds in its own process: the engine, with workers on Ray and packets in the object store."""

from functools import partial
from typing import Any

from ..actors.ray_pool import Bundle, RayPool
from ..comms.ray_channel import RayChannel
from ..policies.policy import Policy
from .config import Config
from .engine import Engine
from .service import Service


def make_service(config: Config, policy: Policy, *, placement: Any, bundles: list[Bundle]) -> Service:
    """The engine and its service; workers are started in ``bundles`` of the placement group."""
    make_pool = partial(RayPool, placement=placement, bundles=bundles, timeout_s=config.ray.placement_timeout_s)
    return Service(Engine(config, policy, make_pool=make_pool, channel=RayChannel()))
