"""Starts a local Ray, or joins a running one; and ends or leaves it.

A Ray that is started here serves one run: it listens on the loopback interface, requires a token of its own, prints nothing on
the terminal, and ends with ``close``. Two of them at the same time share nothing. A Ray that is joined, or that the caller had
already initialised, is only disconnected from: the actors and placement groups of the run end with its job or are released by
the run, and a namespace of its own keeps its names apart.

Ray offers no argument for some of this, so some of its internals are used, each with the reason beside it (tested with 2.60).
"""

import contextlib
import logging
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import ray
from ray._private import ray_constants, worker
from ray._private import utils as ray_utils
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # the stub lists a part of the module
from ray._raylet import Config as RaySettings  # type: ignore[attr-defined]

from .local_ray import LocalRay, root_cause
from .reach import bound_to_loopback, check_reachable, check_token, muted_stderr, parse_address, resolve_auto


@dataclass
class Cluster:
    """A Ray that this process is connected to. A context manager: leaving it closes it.

    ``started``: it was started here, so that ``close`` ends it. ``namespace``: for the names of this run's actors; pass it to
    ``.options``. ``token``: the token that another process needs to join a Ray that was started here ("" otherwise).
    ``runtime_env``: for the options of tasks and actors, where it could not be set at connection ({} otherwise). ``ended``: why
    a Ray that was started here has ended; "" while it runs.
    """

    address: str
    namespace: str
    started: bool
    token: str = field(default="", repr=False)
    runtime_env: dict[str, Any] = field(default_factory=dict)
    ended: Callable[[], str] = field(default=lambda: "", repr=False)
    _release: Callable[[], None] | None = field(default=None, repr=False)

    def close(self) -> None:
        """End a Ray that was started here, or disconnect from one that was joined. A second call does nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> "Cluster":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def start_local(
    *,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    object_store_bytes: int | None = None,
    preallocate: bool = False,
    dashboard: bool = False,
    env_vars: Mapping[str, str] | None = None,
    resources: Mapping[str, float] | None = None,
    labels: Mapping[str, str] | None = None,
) -> Cluster:
    """Start a Ray of one node on this machine. If this process is already connected to one, that one is used and left running.

    ``num_cpus``, ``num_gpus``: None takes all of the machine. ``object_store_bytes``: None takes a quarter of the memory, at
    most 1 GB. ``preallocate`` touches all of the store at the start, which occupies that memory permanently and costs
    start-up time (1 s for 512 MB, 4 s for 2 GB on two cores); writes are faster until the store would have been filled once.
    ``env_vars``: set in every worker. Raises ``ValueError`` for a store that does not fit, ``RuntimeError`` where Ray does
    not start within five minutes; none of its processes is left then.
    """
    if (cluster := attached({})) is not None:
        return cluster
    return connect(
        LocalRay(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            object_store_bytes=object_store_bytes,
            preallocate=preallocate,
            dashboard=dashboard,
            env_vars=env_vars,
            resources=resources,
            labels=labels,
        )
    )


def connect(local: LocalRay) -> Cluster:
    """Connect this process to a local Ray that is starting. Raises the errors of ``start_local``."""
    address = local.address()
    namespace = f"fedbonsai-{uuid.uuid4().hex}"
    try:
        with (
            signals_later(),
            muted_stderr(),
            _environment(local.env | {"RAY_BACKEND_LOG_LEVEL": "fatal"}),
            _loopback_only(),
        ):
            _reread_settings()
            ray.init(address=address, namespace=namespace, **_QUIET)
    except BaseException as error:
        why = local.ended() or root_cause(error)
        with contextlib.closing(local):
            _disconnect()
        if not isinstance(error, Exception):  # Ctrl-C
            raise
        raise RuntimeError(f"a local Ray could not be started: {why}") from error
    # The raylet's messages about dead workers would be printed in spite of log_to_driver=False.
    worker._worker_logs_enabled = False

    def release() -> None:
        with contextlib.closing(local):
            _disconnect()

    return Cluster(address, namespace, started=True, token=local.token, ended=local.ended, _release=release)


def join(address: str, *, runtime_env: Mapping[str, Any] | None = None) -> Cluster:
    """Connect to a running Ray: ``auto``, ``host:port`` of its head, or ``ray://host:port`` of its client server.

    A token is read from where Ray reads it: ``RAY_AUTH_MODE=token`` and ``RAY_AUTH_TOKEN`` or ``RAY_AUTH_TOKEN_PATH``.
    ``runtime_env``: for the whole job. If this process is already connected, that Ray is used, and ``Cluster.runtime_env``
    must be passed in the options of each actor. Raises ``ValueError`` in one sentence, within seconds, for an address that
    is malformed, cannot be reached or is not that of a Ray, for a token that is refused, and for another version of Ray or
    Python.
    """
    if (cluster := attached(dict(runtime_env or {}))) is not None:
        return cluster
    target = resolve_auto() if address == "auto" else address
    host, port, client = parse_address(target)
    shown = repr(address) if address == target else f"{address!r} ({target})"
    check_reachable(shown, host, port)
    _reread_settings()
    namespace = f"fedbonsai-{uuid.uuid4().hex}"
    if not client:
        check_token(shown, f"{host}:{port}")
    try:
        loopback = _loopback_only() if bound_to_loopback(host, port) else contextlib.nullcontext()
        with signals_later(), muted_stderr(), loopback:
            ray.init(address=target, namespace=namespace, runtime_env=dict(runtime_env or {}) or None, **_QUIET)
    except (RuntimeError, OSError, ImportError, ValueError) as error:  # ConnectionError is an OSError
        ray.shutdown()
        raise ValueError(f"ray.address is {shown}, which cannot be joined: {root_cause(error)}") from error
    worker._worker_logs_enabled = False
    return Cluster(target, namespace, started=False, _release=_disconnect)


_QUIET = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}


def attached(runtime_env: dict[str, Any]) -> Cluster | None:
    """The Ray to which this process is already connected, which ``close`` leaves as it is; None where there is none."""
    if not ray.is_initialized():
        return None
    address = ray.get_runtime_context().gcs_address
    return Cluster(address, f"fedbonsai-{uuid.uuid4().hex}", started=False, runtime_env=runtime_env)


def _disconnect() -> None:
    """End this process's connection."""
    ray.shutdown()
    worker._worker_logs_enabled = True
    _reread_settings()


def _reread_settings() -> None:
    """Make Ray read the environment again: it reads mode and token once, and would keep those of the last cluster."""
    RaySettings.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def signals_later() -> Iterator[None]:
    """Defer SIGINT and SIGTERM while this process connects to a Ray; a second signal is handled immediately.

    An interrupted ``ray.init`` leaves processes for a minute, or crashes. It also replaces the caller's handler of SIGTERM
    by its own, and Ray offers no argument against that; where the caller has no handler, Ray's stays.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    current = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in current.items() if callable(handler)}
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            handlers[signal.Signals(number)](number, frame)

    original = ray_utils.set_sigterm_handler
    if signal.SIGTERM in handlers:
        ray_utils.set_sigterm_handler = lambda handler: None
    for number in handlers:
        signal.signal(number, note)
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = original
        for number, handler in handlers.items():
            signal.signal(number, handler)  # also where Ray's core has installed its own below Python's
    for first in received[:1]:
        handlers[signal.Signals(first)](first, None)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """The process's environment with ``changes``; afterwards it is restored, and Ray's own additions are removed."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 for this process, which has already imported Ray: the node's address is 127.0.0.1."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
