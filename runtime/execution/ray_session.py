"""A run on Ray: a cluster started or joined, a bundle for each actor, the engine in the server's actor, workers in the others.

    driver (here)                     server's bundle                  workers' bundles, nodes of real devices
    reserves the bundles
    step()  ------------------------> ServerActor(Engine)  -- plans ----> WorkerActor(Device)
            <------------ events ---                       <-- updates --

A placement group dies with the process that created it, so the driver creates them. ``close`` releases all that the run
created.
"""

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayTaskError

from ...actors.pool import WorkerFailure
from ...actors.ray_backend.failures import first_line, node_failure
from ...clusters.ray_backend.checks import check_nodes, nodes_emulating_bf16, versions_here
from ...clusters.ray_backend.nodes import waiting
from ...clusters.ray_backend.ray_cluster import Cluster, attached, connect, join
from ...clusters.ray_backend.real_devices import real_devices
from ...clusters.scratch import Scratch, reap_runs
from ...clusters.user_modules import runtime_env_for
from ...comms.codec import Array
from ...comms.errors import StoreFull
from ...comms.ray_channel import raising_store_full
from ...policies.policy import Policy
from ..configuration.config import Config
from ..configuration.policy_checks import distils
from ..configuration.user_modules import named_modules
from ..errors import ClusterError, FedbonsaiError, RunError, ServerDied
from .layout import Bundles, wait_for_devices
from .ray_connection import Connection
from .save_plan import SavePlan
from .server_actor import ServerActor, start_server
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
        replaces: bool = False,
    ) -> None:
        """``replaces``: whether this session's server replaces one that died, so that the run goes on."""
        self._config, self._policy, self._save, self._replaces = config, policy, save, replaces
        self._connection = connection
        self._scratch = Scratch()
        self._cluster: Cluster | None = None
        self._bundles: Bundles | None = None
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
        sites = yield from wait_for_devices(devices, config, replaces=self._replaces, notices=notices)
        self._bundles = Bundles(config, devices, sites, has_distiller=distils(self._policy), replaces=self._replaces)
        yield from self._bundles.wait(notices)
        layout = self._bundles.layout()
        own_env = runtime_env if not cluster.started and not joined else cluster.runtime_env
        self._server = start_server(layout.server, runtime_env=own_env)
        # Asked now, when the real devices have joined. A Ray that was started here has one node.
        emulating = None if cluster.started or config.training.precision == "float32" else nodes_emulating_bf16()
        made = self._server.make.remote(config, self._policy, self._save, layout, self._scratch, notices, emulating)
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
            self._server = self._bundles = None
        lives = self._cluster is None or not self._cluster.ended()
        if self._server is not None and lives:
            # If it has died or is busy, its workers end with their placement groups below.
            with suppress(*_SERVER_DIED, RayTaskError, GetTimeoutError):
                ray.get(self._server.close.remote(), timeout=5)
            ray.kill(self._server, no_restart=True)
        self._server = None
        # A Ray that we started ends with all that is on it; and if its processes got a signal to end along with this one, it
        # would not answer for a minute.
        if self._bundles is not None and (self._cluster is None or not self._cluster.started):
            self._bundles.close()
        self._bundles = None
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
            with raising_store_full():
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
