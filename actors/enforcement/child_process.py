"""The child process, as its worker holds it: started, asked, and ended."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from ...clusters.user_modules import ModulesBeside
from ...comms.codec import Array
from ...learning.workload_settings import WorkloadSettings
from .data_segment import MALLOC
from .frames import read_frame, write_frame

# Without the current folder on the import path, which ``-c`` adds.
_START = "import sys; sys.path.pop(0); from fedbonsai.actors.enforcement.child import main; main()"
_ENDS_WITHIN_S = 5.0


class ChildDied(Exception):
    """The child has ended without an answer. One phrase says how: "ended by SIGKILL", "exited with code 1"."""


class ChildProcess:
    """A child that is starting, or is ready."""

    def __init__(self, settings: WorkloadSettings, *, model: bool = True, whole_states: bool = False) -> None:
        """Start the process, and do not wait for it. It loads the data and, if ``model``, the model before it is idle.

        ``whole_states``: of its ``Device``.
        """
        path = [entry or os.getcwd() for entry in sys.path]
        environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
        environment |= MALLOC | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
        reader, self._lifeline = os.pipe()  # its other end closes when this process ends, however it does
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(reader)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                pass_fds=(reader,),
            )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(reader)
        self._ready = False
        self.idle_bytes = 0
        beside = [(str(each.folder), sorted(each.names)) for each in sys.meta_path if isinstance(each, ModulesBeside)]
        plain = msgspec.to_builtins(settings)
        with suppress(OSError):  # it has ended already, which ``wait_until_ready`` finds
            start = {"settings": plain, "path": path, "beside": beside, "model": model, "whole_states": whole_states}
            write_frame(self._stdin, start)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    @property
    def _stdin(self) -> Any:
        return self._process.stdin

    def wait_until_ready(self) -> None:
        """Wait until it is idle. Raises ``ChildDied``, and what it could not load as ``ValueError`` or ``RuntimeError``."""
        if self._ready:
            return
        header, _ = self.receive()
        if header["kind"] == "error":
            raise (ValueError if header["value"] else RuntimeError)(header["text"])
        self._ready, self.idle_bytes = True, header["idle"]

    def send(self, header: Mapping[str, Any], arrays: Sequence[Array] = ()) -> None:
        """Send a request, or an answer that the child waits for. Raises ``ChildDied``."""
        try:
            write_frame(self._stdin, header, arrays)
        except OSError as error:
            raise ChildDied(self._end()) from error

    def receive(self) -> tuple[dict[str, Any], list[Array]]:
        """Wait for its next message. Raises ``ChildDied``."""
        assert self._process.stdout is not None
        try:
            return read_frame(self._process.stdout)  # type: ignore[arg-type]
        except EOFError as error:
            raise ChildDied(self._end()) from error

    def close(self) -> None:
        """End it, and wait until it has ended."""
        if self._lifeline < 0:
            return
        os.close(self._lifeline)
        self._lifeline = -1
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):  # a request that it did not take is flushed in vain
                    stream.close()

    def _end(self) -> str:
        """How it ended."""
        try:
            code = self._process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if code >= 0:
            return f"exited with code {code}"
        try:
            return f"ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"ended by signal {-code}"
