"""A run on Ray: a cluster started or joined, a bundle for each actor, the engine in the server's actor, workers in the others.

    driver (here)                     server's bundle                  workers' bundles, nodes of real devices
    reserves the bundles
    step()  ------------------------> Service(Engine)  -- plans ----> Worker(Device)
            <------------ events ---                   <-- updates --

A placement group dies with the process that made it, so the driver makes them; all that the run made goes when it closes.
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayTaskError

from ...actors.pool import WorkerFailure
from ...actors.ray_backend.faults import first_line, gone
from ...actors.ray_backend.object_actor import start_host
from ...actors.ray_backend.ray_place import ActorPlacement
from ...clusters.ray_backend.checks import check_nodes, versions_here
from ...clusters.ray_backend.nodes import await_devices, waiting
from ...clusters.ray_backend.placement import Request, Reservation
from ...clusters.ray_backend.ray_cluster import Cluster, attached, connect, join
from ...clusters.ray_backend.real_devices import RealDevice, Site, real_devices
from ...clusters.scratch import Scratch, reap_runs
from ...clusters.user_modules import runtime_env_for
from ...comms.codec import Array
from ...comms.errors import StoreFull
from ...comms.ray_channel import store_told
from ...policies.policy import Policy
from ..configuration.config import Config
from ..configuration.user_modules import named_modules
from ..errors import ClusterError, FedbonsaiError, RunError, ServerDied
from .ray_connection import Connection, cores
from .ray_server import Layout, make_service
from .save_plan import SavePlan
from .step import EventBatch

_SERVER_DIED = (RayActorError, OutOfMemoryError)  # the second: killed by Ray's memory monitor
_LOOK_EVERY_S = 1.0  # whether Ray itself still lives


class RaySession:
    """Everything on Ray that one run made."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        save: SavePlan | None = None,
        *,
        connection: Connection,
        replaces: str = "",
    ) -> None:
        """``replaces``: how the server died that this session's is to replace; "": it is the first."""
        self._config, self._policy, self._save, self._replaces = config, policy, save, replaces
        self._connection = connection
        self._scratch = Scratch()
        self._cluster: Cluster | None = None
        self._reservation: Reservation | None = None
        self._host: Any = None
        self._node = ""  # the server's

    def open(self) -> Iterator[str]:
        """Start or join, place, and build the engine in its actor; what is waited for meanwhile. ``close`` after any error."""
        reap_runs()
        config, options = self._config, self._config.ray
        joined = options.address is not None
        runtime_env = runtime_env_for(named_modules(config, self._policy), joined=joined)
        cluster = self._cluster = yield from self._reach(runtime_env)
        notices: list[str] = []
        if not cluster.started:
            root = None if config.data.download else config.data.root
            notices += check_nodes(data_root=root, versions=versions_here())
        devices = real_devices(config.load_fleet(), join_timeout_s=options.placement_timeout_s)
        sites = yield from self._await_devices(devices, notices)
        layout = yield from self._place(devices, sites, notices)
        own_env = runtime_env if not cluster.started and not joined else cluster.runtime_env
        self._host = start_host(layout.server, runtime_env=own_env)
        make = partial(
            make_service, config, self._policy, self._save, layout=layout, scratch=self._scratch, notices=notices
        )
        made = self._host.make.remote(make)
        told = "waiting for server and workers to start, and to load model and data"
        yield from waiting(lambda: self._is_ready(made, ClusterError), lambda: told)
        self._built(made)

    def step(self, logged: int) -> EventBatch:
        """The next batch of events."""
        try:
            return msgspec.msgpack.decode(self._get(self._host.call.remote("step", logged)), type=EventBatch)
        except _SERVER_DIED as error:
            raise self._died(error) from error

    def save(self, logged: int, *, timeout_s: float) -> None:
        """Write a checkpoint, if there is something new. Raises ``RunError`` where that did not come to an end in time."""
        self._call("save", logged, timeout_s=timeout_s)

    def weights(self, which: str, metadata: Mapping[str, str], *, timeout_s: float) -> Array:
        """Weights, copied out of the object store."""
        data: Array = self._call("weights", which, metadata, timeout_s=timeout_s)
        return data.copy()

    def close(self) -> None:
        """Release what the run made, in the reverse order."""
        if not ray.is_initialized():  # somebody else has ended this Ray already
            self._host = self._reservation = None
        lives = self._cluster is None or not self._cluster.ended()
        if self._host is not None and lives:
            # Gone or busy: its workers go with their placement groups below.
            with suppress(*_SERVER_DIED, RayTaskError, GetTimeoutError):
                ray.get(self._host.call.remote("close"), timeout=5)
            ray.kill(self._host, no_restart=True)
        self._host = None
        # A Ray that we started goes with all that is on it; and if its processes were told to end along with this one, nobody
        # would answer for a minute.
        if self._reservation is not None and (self._cluster is None or not self._cluster.started):
            self._reservation.close()
        self._reservation = None
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None
        self._connection.close()
        self._scratch.close()

    def _call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Call the service."""
        try:
            with store_told():
                return self._get(self._host.call.remote(method, *arguments), timeout_s=timeout_s)
        except StoreFull as error:
            raise RunError(str(error), stage="server") from error
        except GetTimeoutError as error:
            raise RunError(f"the server did not answer {method!r} within {timeout_s:g} s", stage="server") from error
        except _SERVER_DIED as error:
            raise self._died(error) from error

    def _get(self, reference: Any, *, timeout_s: float | None = None) -> Any:
        """What a call gave. Raises what it raised, ``GetTimeoutError``, and ``ServerDied`` where Ray itself has ended."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._is_ready(reference, ServerDied):
            if until is not None and time.monotonic() >= until:
                raise GetTimeoutError
        return ray.get(reference)

    def _is_ready(self, reference: Any, fault: type[FedbonsaiError]) -> bool:
        """Whether a call is over; waits a moment for it. Raises ``fault`` where a Ray that we have started has ended."""
        if ray.wait([reference], timeout=_LOOK_EVERY_S)[0]:
            return True
        assert self._cluster is not None
        if why := self._cluster.ended():
            raise fault(f"the local Ray has ended: {why}")
        return False

    def _reach(self, runtime_env: dict[str, Any]) -> Generator[str, None, Cluster]:
        """Start a local Ray, or join the one that is named. Raises ``ValueError``, and ``ClusterError`` where none comes up."""
        options = self._config.ray
        if options.address is not None:
            return join(options.address, runtime_env=runtime_env)
        local = self._connection.local
        if local is None:  # whoever calls has connected this process
            cluster = attached({})
            if cluster is None:
                raise ClusterError("this process was connected to a Ray, which it has left meanwhile")
            return cluster
        try:
            yield from waiting(lambda: local.is_ready(_LOOK_EVERY_S), lambda: "waiting for a local Ray to start")
            return connect(local)
        except RuntimeError as error:
            raise ClusterError(str(error)) from error
        except BaseException:
            local.close()
            raise

    def _await_devices(
        self, devices: Sequence[RealDevice], notices: list[str]
    ) -> Generator[str, None, dict[int, Site]]:
        """The nodes of real devices that are there. Raises ``ValueError`` where fewer have joined than must."""
        cpus, least = self._config.ray.cpus, self._least(devices)
        if self._replaces:  # whoever is missing may join later
            devices = [replace(device, join_timeout_s=0.0) for device in devices]
        sites = yield from await_devices(devices, cpus=cpus)
        missing = [device for device in devices if device.number not in sites]
        if not missing:
            return sites
        first, rule = missing[0], self._config.ray.min_real_devices
        why = f"{first.name} is missing: {first.wants(cpus)} has not joined"
        count = f"{len(sites)} of {len(devices)} real devices are there"
        if len(sites) < least:
            needed = (
                "all are needed (ray.min_real_devices is null)" if rule is None else f"ray.min_real_devices is {rule}"
            )
            raise ValueError(f"{count}, and {needed}; {why} within {first.join_timeout_s:g} s")
        notices.append(f"{count}, and the run goes on with them; {why}")
        return sites

    def _least(self, devices: Sequence[RealDevice]) -> int:
        """Real devices without which the run does not begin; it goes on with any number. Raises ``ValueError``."""
        rule = self._config.ray.min_real_devices
        if rule is not None and rule > len(devices):
            raise ValueError(f"ray.min_real_devices is {rule}; the fleet has {len(devices)} real devices")
        return 0 if self._replaces else len(devices) if rule is None else rule

    def _place(
        self, devices: Sequence[RealDevice], sites: Mapping[int, Site], notices: list[str]
    ) -> Generator[str, None, Layout]:
        """Reserve the bundles of server, workers and partition hosts. Raises ``ValueError`` where they find no place.

        After the death of a server one worker is enough to go on with, and the others may find their places later.
        """
        options, fleet = self._config.ray, self._config.load_fleet()
        count = self._config.workers or cores()
        spare = max(float(cores()), 1.0) - options.server_cpus - options.host_cpus * fleet.hosts.count
        wanted = {"CPU": options.cpus or spare / count}
        if options.memory_bytes:
            wanted["memory"] = float(options.memory_bytes)
        workers = [Request("worker", wanted)] * (count if len(devices) < fleet.num_devices else 0)
        requests = [Request("server", {"CPU": options.server_cpus}), *workers]
        requests += [Request("partition host", {"CPU": options.host_cpus})] * fleet.hosts.count
        last = 1 + len(workers)
        order = (
            [0, *range(last, len(requests)), *range(1, last)] if self._replaces else None
        )  # what must be there first
        kept = {site.node for site in sites.values()}
        self._reservation = Reservation(requests, keep_off=kept, order=order)

        def one_of_each(placed: list[bool]) -> bool:
            return placed[0] and (not workers or any(placed[1:last]))

        enough = one_of_each if self._replaces else all
        yield from self._reservation.wait(timeout_s=options.placement_timeout_s, enough=enough)
        if why := self._reservation.explain():
            notices.append(f"the run goes on with the bundles that have a place; {why}")
        places = [
            ActorPlacement(name=f"bundle {index}", cpus=request.resources["CPU"], placement=group)
            for index, (request, group) in enumerate(zip(requests, self._reservation.groups, strict=True))
        ]
        at_work = [replace(place, memory_bytes=options.memory_bytes) for place in places[1:last]]
        return Layout(
            server=places[0],
            workers=at_work,
            hosts=places[last:],
            devices=devices,
            least_devices=self._least(devices),
        )

    def _built(self, made: Any) -> None:
        """The server's actor has built the engine, or not: raise what a user should hear."""
        try:
            self._node = ray.get(made)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ValueError | FedbonsaiError):
                raise cause from None
            if isinstance(cause, WorkerFailure | StoreFull):
                raise ClusterError(str(cause)) from None
            raise
        except _SERVER_DIED as error:
            raise ServerDied(f"the server actor died while it started: {first_line(error)}") from error

    def _died(self, error: BaseException) -> ServerDied:
        return ServerDied(f"the server actor died: {gone(self._node) or first_line(error)}")
