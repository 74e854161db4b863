"""Starting a local Ray, or joining one that runs; and leaving it as it was found.

A Ray that is started here is for one run alone: it listens on the loopback interface, asks for a token made for it, keeps
quiet on the terminal, and ends with ``close``. Two of them at once share nothing. A Ray that is joined, or that the caller had
already initialised, is only left: what the run made there (actors, placement groups) goes with the run's job or is released by
the run; names are kept apart by a namespace of the run's own.

Ray offers no argument for some of this, so internals of it are touched, each with its reason beside it (tried on 2.60).
"""

import contextlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private import ray_constants, worker
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # the stub lists a part of the module
from ray._raylet import Config as RaySettings  # type: ignore[attr-defined]

from .local_ray import LocalRay
from .ray_signals import signals_later
from .reach import bound_to_loopback, check_reachable, check_token, muted_stderr, parse_address, resolve_auto


@dataclass
class Cluster:
    """A Ray that this process is connected to. A context manager: leaving it closes it.

    ``started``: by us, so that ``close`` ends it. ``namespace``: for the names of this run's actors; pass it to ``.options``.
    ``token``: what another process would need to join one that we started ("" else). ``runtime_env``: for the options of
    tasks and actors, where it could not be given at connection ({} else). ``ended``: why one that we started is no more; ""
    while it lives.
    """

    address: str
    namespace: str
    started: bool
    token: str = field(default="", repr=False)
    runtime_env: dict[str, Any] = field(default_factory=dict)
    ended: Callable[[], str] = field(default=lambda: "", repr=False)
    _release: Callable[[], None] | None = field(default=None, repr=False)

    def close(self) -> None:
        """End the Ray that we started, or leave the one that we joined. Doing it twice does no harm."""
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
    """Start a Ray of one node on this machine. If this process is connected to one already, that one is used and left running.

    ``num_cpus``, ``num_gpus``: None takes what there is. ``object_store_bytes``: None takes a quarter of the memory, 1 GB at
    most. ``preallocate`` touches all of the store at the start, which takes that memory for good and costs start-up time (1 s
    for 512 MB, 4 s for 2 GB on two cores) for faster writes until it would have been filled once. ``env_vars`` reach every
    worker. Raises ``ValueError`` for a store that does not fit, ``RuntimeError`` where Ray does not come up within five
    minutes; nothing of it is left then.
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
    """Connect this process to a Ray that it has begun to start. Raises what ``start_local`` does."""
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
        why = local.ended() or _first_line(error)
        with contextlib.closing(local):
            _disconnect()
        if not isinstance(error, Exception):  # Ctrl-C
            raise
        raise RuntimeError(f"a local Ray could not be started: {why}") from error
    worker._worker_logs_enabled = (
        False  # the raylet's notes on dead workers are printed in spite of log_to_driver=False
    )

    def release() -> None:
        with contextlib.closing(local):
            _disconnect()

    return Cluster(address, namespace, started=True, token=local.token, ended=local.ended, _release=release)


def join(address: str, *, runtime_env: Mapping[str, Any] | None = None) -> Cluster:
    """Connect to a Ray that runs: ``auto``, ``host:port`` of its head, or ``ray://host:port`` of its client server.

    A token is taken from where Ray takes it: ``RAY_AUTH_MODE=token`` and ``RAY_AUTH_TOKEN`` or ``RAY_AUTH_TOKEN_PATH``.
    ``runtime_env``: for the whole job. If this process is connected already, that Ray is used, and ``Cluster.runtime_env`` is
    for the options of each actor. Raises ``ValueError`` in one sentence, within seconds, for an address that is malformed,
    cannot be reached or is no Ray's, for a token that is refused, and for a Ray or Python of another version.
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
        raise ValueError(f"ray.address is {shown}, which cannot be joined: {_first_line(error)}") from error
    worker._worker_logs_enabled = False
    return Cluster(target, namespace, started=False, _release=_disconnect)


_QUIET = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}


def attached(runtime_env: dict[str, Any]) -> Cluster | None:
    """The Ray to which this process is connected already: nothing of it is ours to release or to silence. None: to none."""
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
    """Make Ray look at the environment again: it reads mode and token once a process, and keeps those of the last cluster."""
    RaySettings.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """The process's environment with ``changes``, for what is started meanwhile; then as it was, Ray's own additions undone."""
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
    """RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 for this process, where Ray is imported already: the node's address is 127.0.0.1."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _first_line(error: BaseException) -> str:
    """What an exception says, in one line without its traceback; the innermost cause knows best."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
