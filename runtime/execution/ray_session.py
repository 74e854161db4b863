"""A run on Ray: a cluster started or joined, a bundle for each actor, the engine in the server's actor, workers in the others.

    driver (here)                     server's bundle                  workers' bundles, nodes of real devices
    reserves the bundles
    step()  ------------------------> ServerActor(Engine)  -- plans ----> WorkerActor(Device)
            <------------ events ---                       <-- updates --

A placement group dies with the process that created it, so the driver creates them. ``close`` releases all that the run
created.
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import msgspec
import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayTaskError

from ...actors.pool import WorkerFailure
from ...actors.ray_backend.actor_placement import ActorPlacement
from ...actors.ray_backend.failures import first_line, node_failure
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
from .save_plan import SavePlan
from .server_actor import Layout, ServerActor, start_server
from .step import EventBatch

_SERVER_DIED = (RayActorError, OutOfMemoryError)  # the second: killed by Ray's memory monitor
_POLL_S = 1.0  # between two checks whether Ray itself is alive


class RaySession:
    """All that one run created on Ray."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        save: SavePlan | None = None,
        *,
        connection: Connection,
        replaces: str = "",
    ) -> None:
        """``replaces``: how the server died that this session's server replaces; "": it is the first."""
        self._config, self._policy, self._save, self._replaces = config, policy, save, replaces
        self._connection = connection
        self._scratch = Scratch()
        self._cluster: Cluster | None = None
        self._reservation: Reservation | None = None
        self._server: ServerActor | None = None
        self._node = ""  # the server's

    def open(self) -> Iterator[str]:
        """Start or join a cluster, place the actors, and build the engine; yields what is waited for.

        ``close`` must be called after any error.
        """
        reap_runs()
        config, options = self._config, self._config.ray
        joined = options.address is not None
        runtime_env = runtime_env_for(named_modules(config, self._policy), joined=joined)
        cluster = self._cluster = yield from self._connect(runtime_env)
        notices: list[str] = []
        if not cluster.started:
            root = None if config.data.download else config.data.root
            notices += check_nodes(data_root=root, versions=versions_here())
        devices = real_devices(config.load_fleet(), join_timeout_s=options.placement_timeout_s)
        sites = yield from self._await_devices(devices, notices)
        layout = yield from self._place(devices, sites, notices)
        own_env = runtime_env if not cluster.started and not joined else cluster.runtime_env
        self._server = start_server(layout.server, runtime_env=own_env)
        made = self._server.make.remote(config, self._policy, self._save, layout, self._scratch, notices)
        text = "waiting for server and workers to start, and to load model and data"
        yield from waiting(lambda: self._is_ready(made, ClusterError), lambda: text)
        self._node = _server_node(made)

    def step(self, logged: int) -> EventBatch:
        """The next batch of events."""
        try:
            return msgspec.msgpack.decode(self._get(self._opened.step.remote(logged)), type=EventBatch)
        except _SERVER_DIED as error:
            raise self._died(error) from error

    def save(self, logged: int, *, timeout_s: float) -> None:
        """Write a checkpoint, if there is something new. Raises ``RunError`` if that did not end in time."""
        with self._errors_of("save", timeout_s):
            self._get(self._opened.save.remote(logged), timeout_s=timeout_s)

    def weights(self, which: str, metadata: Mapping[str, str], *, timeout_s: float) -> Array:
        """Weights, copied out of the object store."""
        with self._errors_of("weights", timeout_s):
            data: Array = self._get(self._opened.weights.remote(which, metadata), timeout_s=timeout_s)
            return data.copy()

    def close(self) -> None:
        """Release what the run created, in the reverse order."""
        if not ray.is_initialized():  # it was shut down from outside
            self._server = self._reservation = None
        lives = self._cluster is None or not self._cluster.ended()
        if self._server is not None and lives:
            # If it has died or is busy, its workers end with their placement groups below.
            with suppress(*_SERVER_DIED, RayTaskError, GetTimeoutError):
                ray.get(self._server.close.remote(), timeout=5)
            ray.kill(self._server, no_restart=True)
        self._server = None
        # A Ray that we started ends with all that is on it; and if its processes got a signal to end along with this one, it
        # would not answer for a minute.
        if self._reservation is not None and (self._cluster is None or not self._cluster.started):
            self._reservation.close()
        self._reservation = None
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None
        self._connection.close()
        self._scratch.close()

    @property
    def _opened(self) -> ServerActor:
        assert self._server is not None, "the session is not open"
        return self._server

    @contextmanager
    def _errors_of(self, method: str, timeout_s: float) -> Iterator[None]:
        """Turn what a call to the server raised into the errors of a run."""
        try:
            with store_told():
                yield
        except StoreFull as error:
            raise RunError(str(error), stage="server") from error
        except GetTimeoutError as error:
            raise RunError(f"the server did not answer {method!r} within {timeout_s:g} s", stage="server") from error
        except _SERVER_DIED as error:
            raise self._died(error) from error

    def _get(self, reference: Any, *, timeout_s: float | None = None) -> Any:
        """The result of a call. Raises what it raised, ``GetTimeoutError``, and ``ServerDied`` if Ray itself has ended."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._is_ready(reference, ServerDied):
            if end is not None and time.monotonic() >= end:
                raise GetTimeoutError
        return ray.get(reference)

    def _is_ready(self, reference: Any, fault: type[FedbonsaiError]) -> bool:
        """Whether a call has ended; waits a moment for it. Raises ``fault`` if a Ray that we have started has ended."""
        if ray.wait([reference], timeout=_POLL_S)[0]:
            return True
        assert self._cluster is not None
        if why := self._cluster.ended():
            raise fault(f"the local Ray has ended: {why}")
        return False

    def _connect(self, runtime_env: dict[str, Any]) -> Generator[str, None, Cluster]:
        """Start a local Ray, or join the configured one. Raises ``ValueError``, and ``ClusterError`` if it does not start."""
        options = self._config.ray
        if options.address is not None:
            return join(options.address, runtime_env=runtime_env)
        local = self._connection.local
        if local is None:  # the caller has connected this process
            cluster = attached({})
            if cluster is None:
                raise ClusterError("this process was connected to a Ray, which it has left meanwhile")
            return cluster
        try:
            yield from waiting(lambda: local.is_ready(_POLL_S), lambda: "waiting for a local Ray to start")
            return connect(local)
        except RuntimeError as error:
            raise ClusterError(str(error)) from error
        except BaseException:
            local.close()
            raise

    def _await_devices(
        self, devices: Sequence[RealDevice], notices: list[str]
    ) -> Generator[str, None, dict[int, Site]]:
        """The nodes of the real devices that have joined. Raises ``ValueError`` if too few have."""
        cpus, least = self._config.ray.cpus, self._min_devices(devices)
        if self._replaces:  # the others may join later
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

    def _min_devices(self, devices: Sequence[RealDevice]) -> int:
        """Real devices without which the run does not begin; none if it goes on. Raises ``ValueError``."""
        rule = self._config.ray.min_real_devices
        if rule is not None and rule > len(devices):
            raise ValueError(f"ray.min_real_devices is {rule}; the fleet has {len(devices)} real devices")
        return 0 if self._replaces else len(devices) if rule is None else rule

    def _place(
        self, devices: Sequence[RealDevice], sites: Mapping[int, Site], notices: list[str]
    ) -> Generator[str, None, Layout]:
        """Reserve the bundles of server, workers and partition hosts. Raises ``ValueError`` if they cannot be placed.

        After the death of a server one worker is enough to go on with; the other bundles may be placed later.
        """
        options, fleet = self._config.ray, self._config.load_fleet()
        num_workers, num_hosts = self._config.workers or cores(), fleet.hosts.count
        spare = max(float(cores()), 1.0) - options.server_cpus - options.host_cpus * num_hosts
        of_worker = {"CPU": options.cpus or spare / num_workers}
        if options.memory_bytes:
            of_worker["memory"] = float(options.memory_bytes)
        workers = [Request("worker", of_worker)] * (num_workers if len(devices) < fleet.num_devices else 0)
        hosts = [Request("partition host", {"CPU": options.host_cpus})] * num_hosts
        requests = [Request("server", {"CPU": options.server_cpus}), *workers, *hosts]
        first_host = 1 + len(workers)
        # When a server is replaced, it and the hosts are needed before any worker.
        order = [0, *range(first_host, len(requests)), *range(1, first_host)] if self._replaces else None
        self._reservation = Reservation(requests, keep_off={site.node for site in sites.values()}, order=order)

        def server_and_a_worker(placed: list[bool]) -> bool:
            return placed[0] and (not workers or any(placed[1:first_host]))

        enough = server_and_a_worker if self._replaces else all
        yield from self._reservation.wait(timeout_s=options.placement_timeout_s, enough=enough)
        if why := self._reservation.explain():
            notices.append(f"the run goes on with the bundles that have a place; {why}")
        server, *others = self._reservation.groups
        return Layout(
            server=ActorPlacement(name="server", cpus=options.server_cpus, bundle=server),
            workers=[
                ActorPlacement(
                    name=f"worker of bundle {index}",
                    cpus=of_worker["CPU"],
                    memory_bytes=options.memory_bytes,
                    bundle=bundle,
                )
                for index, bundle in enumerate(others[: len(workers)], start=1)
            ],
            hosts=[
                ActorPlacement(
                    name=f"partition host {number}",
                    group=f"partition host {number}",
                    cpus=options.host_cpus,
                    bundle=bundle,
                    fallback=server,
                )
                for number, bundle in enumerate(others[len(workers) :])
            ],
            devices=devices,
            min_devices=self._min_devices(devices),
        )

    def _died(self, error: BaseException) -> ServerDied:
        return ServerDied(f"the server actor died: {node_failure(self._node) or first_line(error)}")


def _server_node(made: Any) -> str:
    """The node of a server whose ``make`` has ended; raises what a user should know if it has failed."""
    try:
        node: str = ray.get(made)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ValueError | FedbonsaiError):
            raise cause from None
        if isinstance(cause, WorkerFailure | StoreFull):
            raise ClusterError(str(cause)) from None
        raise
    except _SERVER_DIED as error:
        raise ServerDied(f"the server actor died while it started: {first_line(error)}") from error
    return node
