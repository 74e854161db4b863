"""Measures what a stretch of work needed here: wall seconds and peak resident memory of the process.

Linux keeps a high-water mark of resident memory that a process may reset (``/proc/self/clear_refs``); elsewhere the mark
since the process began stands in, and where there is none the figure is 0.
"""

import contextlib
import sys
import time
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class ResourceUsage:
    """``with Meter() as meter: ...`` then ``meter.wall_s`` and ``meter.peak_memory_bytes``.

    Not to be nested, nor used from several threads: a process has one mark.
    """

    wall_s = 0.0
    peak_memory_bytes = 0

    def __enter__(self) -> "ResourceUsage":
        """Start; reset the high-water mark where that is possible."""
        with contextlib.suppress(OSError):  # not Linux, or not permitted: the mark then covers the process's whole life
            _CLEAR.write_text("5")
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.wall_s = time.perf_counter() - self._start
        self.peak_memory_bytes = peak_resident_bytes()


def peak_resident_bytes() -> int:
    """High-water mark of this process's resident memory; 0 where the system does not tell."""
    with contextlib.suppress(OSError):  # no /proc: ask the C library below
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
