"""A run on Ray: a cluster started or joined, a placement group, the engine in the server's actor, workers in the bundles.

    driver (here)                     server bundle                    worker bundles
    creates the placement group
    step()  ------------------------> Service(Engine)  -- plans ----> Worker(Device)
            <------------ events ---                   <-- updates --

A placement group dies with the process that made it, so the driver makes it; all that the run made goes when it closes.
"""

import os
from functools import partial
from typing import Any

import msgspec
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from ..actors.ray_host import start_host
from ..actors.ray_pool import Bundle, RayPool, WorkerFailure
from ..clusters import ray_cluster
from ..clusters.fleet import Fleet
from ..comms.ray_channel import RayChannel
from ..learning.workload import WorkloadSettings
from ..policies.policy import Policy
from .config import Config
from .engine import Engine
from .errors import ClusterError, FedbonsaiError, RunError
from .service import Service, Step

_FETCH_TIMEOUT_S = 120.0


class RaySession:
    """Everything on Ray that one run made."""

    def __init__(self, config: Config, policy: Policy) -> None:
        """Start or join, place, and build the engine in its actor."""
        self._cluster: Any = None
        self._placement: Any = None
        self._host: Any = None
        try:
            self._open(config, policy)
        except BaseException:
            self.close()
            raise

    def step(self) -> Step:
        """The next batch of events."""
        try:
            return msgspec.msgpack.decode(ray.get(self._host.call.remote("step")), type=Step)
        except RayActorError as error:
            raise RunError(f"the server actor died: {str(error).splitlines()[0]}", stage="server") from error

    def weights(self, which: str) -> dict[str, torch.Tensor]:
        """Weights by name, copied out of the object store."""
        tensors: dict[str, torch.Tensor] = ray.get(self._host.call.remote("weights", which), timeout=_FETCH_TIMEOUT_S)
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def close(self) -> None:
        """Release what the run made, in the reverse order."""
        if self._host is not None:
            try:
                ray.get(self._host.call.remote("close"), timeout=5)
            except (RayActorError, RayTaskError, GetTimeoutError):
                pass  # it is gone or busy: its workers go with the placement group below
            ray.kill(self._host, no_restart=True)
            self._host = None
        if self._placement is not None:
            ray.util.remove_placement_group(self._placement)
            self._placement = None
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None

    def _open(self, config: Config, policy: Policy) -> None:
        """The steps of getting ready; each names what is wrong in one sentence."""
        options, fleet = config.ray, config.load_fleet()
        workers = config.workers or _cores()
        modules = _user_modules(config, policy)
        if options.address is None:
            self._cluster = ray_cluster.start_local(
                num_cpus=max(float(_cores()), workers * (options.cpus or 0) + options.server_cpus),
                object_store_bytes=options.object_store_bytes,
                dashboard=options.dashboard,
                runtime_env=ray_cluster.runtime_env_for(modules, local=True),
            )
        else:
            self._cluster = ray_cluster.join(
                options.address, runtime_env=ray_cluster.runtime_env_for(modules, local=False)
            )
            ray_cluster.check_nodes(data_root=config.data.root)
        cpus = options.cpus or (max(float(_cores()), 1.0) - options.server_cpus) / workers
        bundles, specs, selectors = _bundles(config, fleet, workers=workers, cpus=cpus)
        self._placement = ray_cluster.make_placement_group(
            specs, timeout_s=options.placement_timeout_s, label_selectors=selectors
        )
        make_pool = partial(_make_pool, placement=self._placement, bundles=bundles, timeout_s=options.placement_timeout_s)
        self._host = start_host(placement=self._placement, bundle=0, cpus=options.server_cpus)
        try:
            ray.get(self._host.make.remote(partial(_make_service, config, policy, make_pool)))
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ValueError | FedbonsaiError):
                raise cause from None
            if isinstance(cause, WorkerFailure):
                raise ClusterError(str(cause)) from None
            raise
        except RayActorError as error:
            raise RunError(f"the server actor died while it started: {str(error).splitlines()[0]}") from error


def _make_pool(settings: WorkloadSettings, *, placement: Any, bundles: list[Bundle], timeout_s: float) -> RayPool:
    """The pool, in the server's process."""
    return RayPool(settings, placement=placement, bundles=bundles, timeout_s=timeout_s)


def _make_service(config: Config, policy: Policy, make_pool: Any) -> Service:
    """The engine and its service, in the server's process."""
    return Service(Engine(config, policy, make_pool=make_pool, channel=RayChannel()))


def _bundles(
    config: Config, fleet: Fleet, *, workers: int, cpus: float
) -> tuple[list[Bundle], list[dict[str, float]], list[dict[str, str]]]:
    """Bundle 0 is the server's; then the shared pool; then, for each class that names nodes of its own, one a device."""
    options = config.ray
    resources = {"CPU": cpus}
    if options.gpus:
        resources["GPU"] = options.gpus
    if options.memory_bytes:
        resources["memory"] = float(options.memory_bytes)
    specs: list[dict[str, float]] = [{"CPU": options.server_cpus}]
    selectors: list[dict[str, str]] = [{}]
    bundles = []
    own = [device_class for device_class in fleet.classes if device_class.placed]
    shared = workers if len(own) < len(fleet.classes) else 0
    for _ in range(shared):
        bundles.append(Bundle(index=len(specs), cpus=cpus, gpus=options.gpus, memory_bytes=options.memory_bytes))
        specs.append(dict(resources))
        selectors.append({})
    for device_class in own:
        for _ in range(device_class.count):
            bundles.append(Bundle(index=len(specs), group=device_class.name, cpus=cpus))
            specs.append({"CPU": cpus} | ({device_class.resource: 1.0} if device_class.resource else {}))
            selectors.append(device_class.label_selector or {})
    return bundles, specs, selectors


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _user_modules(config: Config, policy: Policy) -> list[str]:
    """Modules of the user's own that the configuration or the policy names; workers must be able to import them."""
    named = {text.partition(":")[0] for text in _strings(config.to_dict()) if _is_path(text)}
    named.add(type(policy).__module__)
    return sorted(name for name in named if name.partition(".")[0] not in ("fedbonsai", "__main__"))


def _strings(value: Any) -> list[str]:
    """All ``name`` entries in nested plain data."""
    if isinstance(value, dict):
        found = [value["name"]] if isinstance(value.get("name"), str) else []
        return found + [text for inner in value.values() for text in _strings(inner)]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in _strings(inner)]
    return []


def _is_path(text: str) -> bool:
    """Whether a name is ``module:attribute``."""
    module, colon, attribute = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")])
