"""A local Ray of one node, started for one run and ended with it.

    this process                 launcher (ray_launcher.py)         Ray
    LocalRay(...)  ------------> starts the node -----------------> gcs_server, raylet, agents, workers
    address()      <------------ one line: the address, or why not
    close()        ---- EOF ---> ends them, removes the session folder

The launcher is a process of its own for three reasons. It notices when this process ends for any reason, and then ends Ray
(Ray's own agents would live for another minute). While Ray starts, this process can import modules. And where Ray's
``gcs_server`` is lost while a process waits for it, Ray ends the waiting process after a minute; that is the launcher.

Nothing here imports Ray.
"""

import json
import os
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

START_S = 300.0  # time limit of a start on a loaded machine; an idle one takes 2 to 4 s
_END_S = 30.0
_LOOK_EVERY_S = 0.2  # so that Ctrl-C is handled


class LocalRay:
    """A local Ray that starts in the background.

    ``token``: the token that it requires. ``env``: additional environment of its processes, and of processes that join it.
    """

    def __init__(
        self,
        *,
        num_cpus: float | None = None,
        num_gpus: float | None = None,
        object_store_bytes: int | None = None,
        preallocate: bool = False,
        dashboard: bool = False,
        env_vars: Mapping[str, str] | None = None,
        resources: Mapping[str, float] | None = None,
        labels: Mapping[str, str] | None = None,
        start_s: float = START_S,
    ) -> None:
        """Begin to start it. ``start_s``: time limit in seconds; for the others see ``ray_cluster.start_local``."""
        self.token = secrets.token_hex(32)
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_preallocate_plasma_memory": "1" if preallocate else "0",
            # Their defaults of 30 to 60 s are less than a loaded machine needs.
            "RAY_gcs_server_port_wait_time_s": f"{start_s:.0f}",
            "RAY_agent_register_timeout_ms": f"{1000 * start_s:.0f}",
            "RAY_worker_register_timeout_seconds": f"{start_s:.0f}",
            # 60 s by default: where ``gcs_server`` is lost, all other processes wait for it, and it never comes back.
            "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
            **(env_vars or {}),
        }
        settings = {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "object_store_bytes": object_store_bytes,
            "dashboard": dashboard,
            "resources": dict(resources or {}),
            "labels": dict(labels or {}),
            "start_s": start_s,
        }
        self._start_s = start_s
        self._answer: dict[str, Any] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedbonsai.clusters.ray_backend.ray_launcher", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # ``select`` does not see what Python has buffered
            env=os.environ | self.env,
            start_new_session=True,  # Ctrl-C goes to this process only, which then ends the launcher
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def is_ready(self, timeout_s: float) -> bool:
        """Whether ``address`` would return or raise immediately; waits up to ``timeout_s`` for that."""
        return bool(self._answer or select.select([self._stdout], [], [], timeout_s)[0])

    def address(self) -> str:
        """The address; waits until Ray has started.

        Raises ``ValueError`` for a setting that is refused, ``RuntimeError`` where Ray does not start. After an error no
        process of this Ray is left.
        """
        try:
            self._answer = self._answer or json.loads(self._line() or "{}")
        except BaseException:  # also Ctrl-C
            self.close()
            raise
        if "address" not in self._answer:
            why = self.ended()
            self.close()
            if self._answer.get("refused"):
                raise ValueError(why)
            raise RuntimeError(f"a local Ray could not be started: {why}")
        return str(self._answer["address"])

    def ended(self) -> str:
        """Why this Ray has ended, as a sentence without its subject; "" while it runs."""
        over = self._process.poll() is not None
        if "error" not in self._answer and (over or select.select([self._stdout], [], [], 0)[0]):
            self._answer = json.loads(self._line() or "{}")
            if "error" not in self._answer:  # it was killed
                self._answer["error"] = f"its launcher has ended (exit code {self._process.wait()})"
        return str(self._answer.get("error", ""))

    def close(self) -> None:
        """End it, if it has not ended, and wait until none of its processes is left."""
        with suppress(BrokenPipeError, ValueError):  # the launcher has ended; it was closed before
            self._stdin.write(b".")
        with suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:  # Ray's remaining processes end with the launcher, their parent
            self._process.kill()
            self._process.wait()
        self._stdout.close()

    def _line(self) -> str:
        """The next line of the launcher; "" where it has ended. Raises ``RuntimeError`` after the time limit."""
        until = time.monotonic() + self._start_s + _END_S  # the launcher gives up earlier
        while not select.select([self._stdout], [], [], _LOOK_EVERY_S)[0]:
            if time.monotonic() > until:
                raise RuntimeError(f"a local Ray could not be started: it has not started within {self._start_s:g} s")
        return self._stdout.readline().decode()


def root_cause(error: BaseException) -> str:
    """The first line of the innermost cause of an exception, without its traceback."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
