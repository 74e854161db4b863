"""The process that starts a local Ray for ``local_ray.LocalRay``, and ends it with all of its processes and files.

It writes one line of JSON to standard output: ``{"address": ...}``, or ``{"error": ...}``; and another ``{"error": ...}`` where
the Ray later loses a vital process. It ends Ray when its standard input is closed: by ``close``, which writes a byte before, or
by the end of the process that started it. Where Ray itself has ended that process (it does so when the raylet is lost), the
error is written to standard error from here.

The processes of a Ray are recognised by its session folder, to whose logs they all write. The internals of Ray that are used
here are those that ``ray start`` uses, one of them the method of a node that starts the dashboard, and two functions that wait
for started processes (``_wait_longer``; tested with 2.60).
"""

import json
import os
import re
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from ray._common.utils import get_system_memory
from ray._private import node as ray_node
from ray._private import ray_constants, services
from ray._private.parameter import RayParams

from ..scratch import claim, reap, reap_runs
from ..units import format_quantity
from .local_ray import root_cause

DEFAULT_STORE_BYTES = 10**9  # a smaller store is reused sooner, which makes writing to it fast
STORE_DIRECTORY = "/dev/shm"
_LOOK_EVERY_S = 0.2
_END_S = 20.0  # time limit for killed processes to end
_VITAL = ("gcs_server", "raylet")


class _Node(ray_node.Node):  # type: ignore[misc]
    """A Ray node that is known while it starts, so that its processes can be ended if it never comes up."""

    made: "_Node | None" = None
    all_processes: dict[str, Any]

    session: Path | None = None

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        _Node.made = self
        self.all_processes = {}
        super().__init__(*arguments, **settings)

    def _init_temp(self, *arguments: Any) -> None:
        """Make the session folder, and make this process its owner."""
        super()._init_temp(*arguments)
        self.session = Path(self._session_dir)
        self._owns = claim(self.session)

    def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        """Start the dashboard if it is asked for.

        Else Ray would start its process all the same, for reports of usage, and wait for it: a second of the first round.
        """
        if include_dashboard:
            super().start_api_server(include_dashboard=include_dashboard, raise_on_failure=raise_on_failure)


class Launcher:
    """Starts one Ray, watches it, and ends it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """``settings``: ``start_s``, and the arguments of ``ray_cluster.start_local`` that are settings of Ray."""
        self._settings = settings
        self._ending = threading.Lock()
        self._lost = ""
        self._started = self._closed = False
        self._out, self._error, nothing = os.dup(1), os.dup(2), os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # other output of this process must not reach the driver
            os.dup2(nothing, stream)

    def run(self) -> NoReturn:
        """Start Ray, and stay until it is ended."""
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            node = self._start()
        except ValueError as error:
            self._end(error=str(error), refused=True)
        except BaseException as error:  # Ray raises plain exceptions here; every error is reported to the driver
            self._end(error=root_cause(error))
        self._started = True
        self._tell(address=node.gcs_address)
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        while True:
            signal.pause()  # Ray's processes end with the thread that has started them (PR_SET_PDEATHSIG)

    def _start(self) -> _Node:
        settings = self._settings
        store = store_bytes(settings["object_store_bytes"])
        ray_constants.ENABLE_RAY_CLUSTER = False  # else the node's address is the machine's own, and not loopback
        _wait_longer()
        parameters = RayParams(
            node_ip_address="127.0.0.1",
            num_cpus=settings["num_cpus"],
            num_gpus=settings["num_gpus"],
            object_store_memory=store,
            resources=settings["resources"],
            labels=settings["labels"],
            include_dashboard=settings["dashboard"],
            include_log_monitor=False,  # it would carry the workers' output to the driver
            no_monitor=True,  # the autoscaler's: there is one node
        )
        node = _Node(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True)
        assert node.session is not None
        reap(path for path in node.session.parent.glob("session_*") if path != node.session)
        return node

    def _watch(self) -> None:
        """End Ray when the driver asks for it, or has ended, or Ray has not started in time; report lost processes."""
        start_s = self._settings["start_s"]
        until = time.monotonic() + start_s
        while True:
            if select.select([0], [], [], _LOOK_EVERY_S)[0]:
                if not os.read(0, 1024):
                    self._end()
                self._closed = True
            lost = _lost()
            late = "" if time.monotonic() < until else f"it has not started within {start_s:g} s"
            if (lost or late) and not self._started:
                self._end(error=lost or late)
            elif lost and not self._lost:
                self._lost = lost
                self._tell(error=lost)

    def _tell(self, **message: Any) -> None:
        """Write one line for the driver."""
        with suppress(OSError):  # it has ended
            os.write(self._out, json.dumps(message).encode() + b"\n")

    def _end(self, **message: Any) -> NoReturn:
        """Kill all processes of this Ray, remove its session folder, report why, and end this process."""
        self._ending.acquire()  # never released: a second thread waits until the process ends
        node = _Node.made
        session = node.session if node is not None else None
        known = processes_of(session) if session is not None else []
        for infos in list(node.all_processes.values()) if node is not None else ():
            for info in infos:
                info.process.kill()
        if session is not None:
            end_processes(session, known)
            remove_session(session)
        reap_runs()  # temporary files of the run, whose server and hosts were killed here
        if message:
            self._tell(**message)
        elif self._lost and not self._closed:
            os.write(self._error, f"error: the local Ray has ended: {self._lost}\n".encode())
        os._exit(1 if message else 0)


def end_processes(session: Path, known: Iterable[int] = (), *, seconds: float = _END_S) -> None:
    """Kill the processes of a session, until none is left and those ``known`` to be of it have released their locks."""
    until, seen = time.monotonic() + seconds, set(known)
    while time.monotonic() < until:
        pids = processes_of(session)
        seen.update(pids)
        for pid in pids:
            with suppress(ProcessLookupError):  # gone in the meantime
                os.kill(pid, signal.SIGKILL)
        if not pids and all(map(_has_ended, seen)):
            break
        time.sleep(0.02)


def _has_ended(pid: int) -> bool:
    """Whether a killed process is gone or a zombie. Before, it has no open files in /proc, but may still hold locks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (OSError, IndexError):
        return True


def processes_of(session: Path) -> list[int]:
    """Processes that write to the output logs of a session: Ray's own, its workers, and their children.

    A driver writes to logs of other names.
    """
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if _writes_to(entry, session / "logs")]


def _writes_to(process: Path, logs: Path) -> bool:
    """Whether a process (its folder in /proc) has a file of standard output or error there open for writing."""
    try:
        for entry in (process / "fd").iterdir():
            with suppress(FileNotFoundError):  # closed in the meantime
                target = Path(os.readlink(entry).removesuffix(" (deleted)"))
                if target.parent == logs and target.suffix in (".out", ".err"):
                    flags = re.search(r"flags:\s*(\d+)", (process / "fdinfo" / entry.name).read_text())
                    if flags is not None and int(flags[1], 8) & (os.O_WRONLY | os.O_RDWR):
                        return True
    except OSError:  # it has ended, or belongs to another user
        pass
    return False


def remove_session(session: Path) -> None:
    """Remove a session folder, and Ray's link ``session_latest`` where it points to it."""
    shutil.rmtree(session, ignore_errors=True)
    latest = session.parent / "session_latest"
    with suppress(OSError):  # it is not a link, or belongs to another user
        if latest.readlink() == session:
            latest.unlink()


def store_bytes(requested: int | None) -> int:
    """Size of the object store; None chooses one that fits. Raises ``ValueError`` for a size that does not fit."""
    free = shutil.disk_usage(STORE_DIRECTORY).free if os.path.isdir(STORE_DIRECTORY) else None
    least: int = ray_constants.OBJECT_STORE_MINIMUM_MEMORY_BYTES
    if requested is None:
        chosen = min(DEFAULT_STORE_BYTES, int(get_system_memory()) // 4)
        # Where shared memory is tiny (a container's 64 MB), Ray puts the store on disk, where any size fits.
        return max(least, min(chosen, int(0.8 * free)) if free is not None and 0.8 * free >= least else chosen)
    if requested < least or (free is not None and requested > free):
        most = (
            f" and at most the {format_quantity(free, kind='bytes')} free in {STORE_DIRECTORY}"
            if free is not None
            else ""
        )
        raise ValueError(f"ray.object_store_bytes is {requested}; it must be at least {least}{most}")
    return requested


def _wait_longer() -> None:
    """Make Ray wait for the processes that it starts until this process gives up (``Launcher._watch``), and in Python.

    ``services.get_node``: Ray waits 30 s for the node to come up, without a setting for it. ``node.wait_for_persisted_port``:
    Ray waits for the port of ``gcs_server`` in C++ while holding Python's lock, even where that process has ended.
    """
    find_node, find_port = services.get_node, ray_node.wait_for_persisted_port

    def retried(find: Callable[[], Any]) -> Any:
        while True:
            try:
                return find()
            except RuntimeError:
                time.sleep(0.01)

    services.get_node = lambda *where: retried(lambda: find_node(*where))
    ray_node.wait_for_persisted_port = lambda *where, **_: retried(lambda: find_port(*where, timeout_ms=0))


def _lost() -> str:
    """Which vital process of this Ray has ended; "" where none has."""
    processes = _Node.made.all_processes if _Node.made is not None else {}
    for kind in _VITAL:
        for info in processes.get(kind, ()):
            if (code := info.process.poll()) is not None:
                return f"its {kind} has ended (exit code {code})"
    return ""


if __name__ == "__main__":
    Launcher(json.loads(sys.argv[1])).run()
