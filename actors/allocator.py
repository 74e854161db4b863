"""Keeps freed memory in the process, where the C library is glibc.

By default glibc gives large freed blocks back to the system and takes them again at the next batch; each time every page of
them faults anew. A training step and a packet of some megabytes allocate and free the same sizes over and over: keeping
them saves a fifth to a half of the time of small models (benchmarks/throughput.py). What is kept is at most what was once in use.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEEP_BYTES = 1 << 30
_MMAP_BYTES = 32 << 20  # glibc's largest


def keep_freed_memory() -> bool:
    """Set it for this process; whether it could be set."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library: its own policy stands
        return False
    settings = [(_M_MMAP_THRESHOLD, _MMAP_BYTES), (_M_TRIM_THRESHOLD, _KEEP_BYTES), (_M_TOP_PAD, 64 << 20)]
    return all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings)
