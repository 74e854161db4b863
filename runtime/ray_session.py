"""A run on Ray: a cluster started or joined, a placement group, the engine in the server's actor, workers in the bundles.

    driver (here)                     server bundle                    worker bundles
    creates the placement group
    step()  ------------------------> Service(Engine)  -- plans ----> Worker(Device)
            <------------ events ---                   <-- updates --

A placement group dies with the process that made it, so the driver makes it; all that the run made goes when it closes.
"""

import os
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
import ray
import torch
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayTaskError

from ..actors.allocator import HUGE_PAGES
from ..actors.pool import WorkerFailure
from ..actors.ray_host import start_host
from ..actors.ray_worker import Bundle
from ..clusters.checks import check_nodes, versions_here
from ..clusters.fleet import Fleet
from ..clusters.placement import make_placement_group
from ..clusters.ray_cluster import Cluster, join, start_local
from ..clusters.user_modules import runtime_env_for
from ..comms.errors import StoreFull
from ..comms.ray_channel import store_told
from ..policies.policy import Policy
from .config import Config, RayOptions
from .errors import ClusterError, FedbonsaiError, RunError, ServerDied
from .named_modules import named_modules
from .ray_server import make_service
from .saver import SavePlan
from .service import Step

_SERVER_DIED = (RayActorError, OutOfMemoryError)  # the second: killed by Ray's memory monitor


class RaySession:
    """Everything on Ray that one run made."""

    def __init__(self, config: Config, policy: Policy, save: SavePlan | None = None) -> None:
        """Start or join, place, and build the engine in its actor."""
        self._cluster: Cluster | None = None
        self._placement: Any = None
        self._host: Any = None
        try:
            self._open(config, policy, save)
        except BaseException:
            self.close()
            raise

    def step(self) -> Step:
        """The next batch of events."""
        try:
            return msgspec.msgpack.decode(ray.get(self._host.call.remote("step")), type=Step)
        except _SERVER_DIED as error:
            raise _died(error) from error

    def save(self, *, timeout_s: float) -> None:
        """Write a checkpoint, if there is something new. Raises ``RunError`` where that did not come to an end in time."""
        self._call("save", timeout_s=timeout_s)

    def weights(self, which: str, *, timeout_s: float) -> dict[str, torch.Tensor]:
        """Weights by name, copied out of the object store."""
        tensors: dict[str, torch.Tensor] = self._call("weights", which, timeout_s=timeout_s)
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def _call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Call the service."""
        try:
            with store_told():
                return ray.get(self._host.call.remote(method, *arguments), timeout=timeout_s)
        except StoreFull as error:
            raise RunError(str(error), stage="server") from error
        except GetTimeoutError as error:
            raise RunError(f"the server did not answer {method!r} within {timeout_s:g} s", stage="server") from error
        except _SERVER_DIED as error:
            raise _died(error) from error

    def close(self) -> None:
        """Release what the run made, in the reverse order."""
        if not ray.is_initialized():  # somebody else has ended this Ray already
            self._host = self._placement = None
        if self._host is not None:
            # Gone or busy: its workers go with the placement group below.
            with suppress(*_SERVER_DIED, RayTaskError, GetTimeoutError):
                ray.get(self._host.call.remote("close"), timeout=5)
            ray.kill(self._host, no_restart=True)
            self._host = None
        if self._placement is not None:
            # A Ray that we started goes with all that is on it; and if its processes were told to end along with this one,
            # nobody would answer for a minute.
            if self._cluster is None or not self._cluster.started:
                ray.util.remove_placement_group(self._placement)
            self._placement = None
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None

    def _open(self, config: Config, policy: Policy, save: SavePlan | None) -> None:
        """The steps of getting ready; each names what is wrong in one sentence."""
        options, fleet = config.ray, config.load_fleet()
        workers = config.workers or _cores()
        modules = named_modules(config, policy)
        joined = options.address is not None
        runtime_env = runtime_env_for(modules, joined=joined)
        self._cluster = _reach(options, runtime_env)
        if not self._cluster.started:
            check_nodes(data_root=None if config.data.download else config.data.root, versions=versions_here())
        cpus = (
            options.cpus
            or (max(float(_cores()), 1.0) - options.server_cpus - options.host_cpus * fleet.hosts.count) / workers
        )
        bundles, specs, selectors, names = _bundles(config, fleet, workers=workers, cpus=cpus)
        hosts = list(range(len(specs), len(specs) + fleet.hosts.count))
        specs += [{"CPU": options.host_cpus} for _ in hosts]
        selectors += [{} for _ in hosts]
        names += ["partition host" for _ in hosts]
        self._placement = make_placement_group(
            specs, strategy="PACK", timeout_s=options.placement_timeout_s, label_selectors=selectors, names=names
        )
        make = partial(make_service, config, policy, save, placement=self._placement, bundles=bundles, hosts=hosts)
        own_env = runtime_env if not self._cluster.started and not joined else self._cluster.runtime_env
        self._host = start_host(placement=self._placement, bundle=0, cpus=options.server_cpus, runtime_env=own_env)
        try:
            ray.get(self._host.make.remote(make))
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ValueError | FedbonsaiError):
                raise cause from None
            if isinstance(cause, WorkerFailure | StoreFull):
                raise ClusterError(str(cause)) from None
            raise
        except _SERVER_DIED as error:
            raise ServerDied(f"the server actor died while it started: {str(error).splitlines()[0]}") from error


def _reach(options: RayOptions, runtime_env: dict[str, Any]) -> Cluster:
    """Start a local Ray, or join the one that is named. Raises ``ValueError``, and ``ClusterError`` where none comes up."""
    if options.address is not None:
        return join(options.address, runtime_env=runtime_env)
    try:
        return start_local(
            num_cpus=_cores(),
            num_gpus=0,
            object_store_bytes=options.object_store_bytes,
            preallocate=options.preallocate,
            dashboard=options.dashboard,
            env_vars=({} if "GLIBC_TUNABLES" in os.environ else HUGE_PAGES) | runtime_env.get("env_vars", {}),
        )
    except RuntimeError as error:
        raise ClusterError(str(error)) from error


def _died(error: BaseException) -> ServerDied:
    return ServerDied(f"the server actor died: {str(error).splitlines()[0]}")


def _bundles(
    config: Config, fleet: Fleet, *, workers: int, cpus: float
) -> tuple[list[Bundle], list[dict[str, float]], list[dict[str, str]], list[str]]:
    """Bundle 0 is the server's; then the shared pool; then, for each class that is placed, one for each device.

    The workers' bundles, and for all bundles their resources, node labels and names.
    """
    options = config.ray
    resources = {"CPU": cpus}
    if options.memory_bytes:
        resources["memory"] = float(options.memory_bytes)
    specs: list[dict[str, float]] = [{"CPU": options.server_cpus}]
    selectors: list[dict[str, str]] = [{}]
    names, bundles = ["server"], []
    placed = [kind for kind in fleet.classes if kind.placed]
    for _ in range(workers if len(placed) < len(fleet.classes) else 0):
        bundles.append(Bundle(index=len(specs), cpus=cpus, memory_bytes=options.memory_bytes))
        specs.append(dict(resources))
        selectors.append({})
        names.append("worker")
    for kind in placed:
        for _ in range(kind.count):
            bundles.append(Bundle(index=len(specs), group=kind.name, cpus=cpus))
            specs.append({"CPU": cpus} | ({kind.resource: 1.0} if kind.resource else {}))
            selectors.append(kind.label_selector or {})
            names.append(f"device of class {kind.name}")
    return bundles, specs, selectors, names


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
