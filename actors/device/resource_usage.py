"""Measures wall seconds and peak resident memory of the process while a plan runs.

Linux lets a process reset its high-water mark of resident memory (``/proc/self/clear_refs``); elsewhere the mark since the
process started is used, and 0 on systems that have none.
"""

import contextlib
import sys
import time
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class ResourceUsage:
    """``with ResourceUsage() as usage: ...``, then ``usage.wall_s`` and ``usage.peak_memory_bytes``.

    Must not be nested or used from several threads: a process has one mark.
    """

    wall_s = 0.0
    peak_memory_bytes = 0

    def __enter__(self) -> "ResourceUsage":
        """Start the clock, and reset the high-water mark if possible."""
        with contextlib.suppress(OSError):  # not Linux, or not permitted: the mark covers the process's whole life
            _CLEAR.write_text("5")
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        """Take both figures."""
        self.wall_s = time.perf_counter() - self._start
        self.peak_memory_bytes = peak_resident_bytes()


def peak_resident_bytes() -> int:
    """High-water mark of this process's resident memory; 0 if the system has none."""
    with contextlib.suppress(OSError):  # no /proc: use getrusage below
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
